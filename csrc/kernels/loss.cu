// per_sample_loss: each row's online softmax, then each sample's sum.
//
// Floor: one read of the counted rows' logits, rows * vocab * 2 (or 4) bytes; about 5 operations and one exponential
// an element (2048 x 32000 in bf16: 131 MB, 65 M exponentials). Writes 12 bytes a row. Few rows are split over the
// vocabulary, so that every multiprocessor reads; the split depends on the shape alone, and the merge is in order.
#include "loss.h"

#include "loss_device.cuh"

namespace dataflex {
namespace {
constexpr int64_t kBlocks = 1056;       // wanted at least: 8 on each of 132 multiprocessors
constexpr int64_t kPartBytes = 1 << 14;  // a part of a row is at least this long

int64_t parts_of(const DataflexLoss& args) {
  const int64_t most = args.vocab * (args.dtype == DATAFLEX_F32 ? 4 : 2) / kPartBytes;
  const int64_t wanted = args.rows == 0 ? 1 : (kBlocks + args.rows - 1) / args.rows;
  return wanted < most ? wanted : most < 1 ? 1 : most;
}

// One block a part: (row, part) = (block / parts, block mod parts).
template <typename T, Form kForm>
__global__ void __launch_bounds__(kThreads)
    scan_rows(DataflexLoss args, DataflexLossOut out, float4* states, int64_t parts) {
  DATAFLEX_SHARED(float, shared, [kWarps][4]);
  const int64_t row = blockIdx.x / parts, part = blockIdx.x % parts;
  if (!counts(args, row)) {
    if (part == 0 && threadIdx.x == 0) skip_token(row, out);
    return;
  }
  const float at_label = kForm == kSmoothed || threadIdx.x == 0 ? label_logit<T>(args, row) : 0.0f;
  const float base = smoothing_base(at_label), per_cap = 1.0f / args.softcap;
  const float unit = kForm == kCapped ? args.softcap : 1.0f, in_octaves = unit * kLog2E;
  State s;
  for_each_vector(row_of<T>(args, row), args.vocab * part / parts, args.vocab * (part + 1) / parts,
                  [&](auto& values, int64_t column) {
                    constexpr int n = sizeof values / sizeof values[0];
                    float x[n], most = s.max;
#pragma unroll
                    for (int j = 0; j < n; j++) {
                      x[j] = values[j];
                      if (kForm == kCapped) x[j] = quick_tanh(x[j] * per_cap);
                      if (kForm == kSmoothed) x[j] = capped(x[j], args.softcap);
                      most = fmaxf(most, x[j]);
                    }
                    if (most > s.max) s.sum *= exp2_approximate((s.max - most) * in_octaves);
                    s.max = most;
                    const float from = most == -INFINITY ? 0.0f : most;
#pragma unroll
                    for (int j = 0; j < n; j++) s.sum += exp2_approximate((x[j] - from) * in_octaves);
                    if (kForm == kSmoothed) add_smoothing(args, x, column, base, &s);
                  });
  s.max *= unit;
  s = block_merged(s, shared);
  if (threadIdx.x != 0) return;
  float soft;
  if (parts == 1) finish_token(args, row, s, at_label, out, &soft);
  else states[blockIdx.x] = make_float4(s.max, s.sum, s.weighted, s.weights);
}

// One block a sample; merges the parts of its rows first where there are any.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_samples(DataflexLoss args, DataflexLossOut out, const float4* states, int64_t parts) {
  DATAFLEX_SHARED(float, shared, [kWarps]);
  sum_sample(args, out, shared, [&](int64_t row) {
    if (parts > 1) {
      State s;
      for (int64_t p = 0; p < parts; p++) {
        const float4 part = states[row * parts + p];
        State more;
        more.max = part.x;
        more.sum = part.y;
        more.weighted = part.z;
        more.weights = part.w;
        s = merged(s, more);
      }
      float soft;
      finish_token(args, row, s, label_logit<T>(args, row), out, &soft);
    }
    return out.token_loss[row];
  });
}

template <typename T>
int forward(const DataflexLoss& args, const DataflexLossOut& out, float* scratch, cudaStream_t stream) {
  const int64_t parts = parts_of(args);
  const dim3 blocks(static_cast<unsigned>(args.rows * parts)), block(kThreads);
  const dim3 samples(static_cast<unsigned>(max(args.samples, int64_t{1})));
  auto* states = reinterpret_cast<float4*>(scratch);
  int code = cudaSuccess;
  if (args.rows > 0)
    code = with_form(args, [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      return DATAFLEX_LAUNCH((scan_rows<T, kForm>), blocks, block, 0, stream, args, out, states, parts);
    });
  if (code != cudaSuccess) return code;
  return DATAFLEX_LAUNCH((sum_samples<T>), samples, block, 0, stream, args, out, states, parts);
}
}  // namespace
}  // namespace dataflex

int64_t dataflex_loss_scratch(const DataflexLoss* args) {
  const int64_t parts = dataflex::parts_of(*args);
  return parts > 1 ? 4 * parts * args->rows : 0;
}

int dataflex_loss_forward(const DataflexLoss* args, const DataflexLossOut* out, float* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->dtype == DATAFLEX_F32) return dataflex::forward<float>(*args, *out, scratch, on);
  if (args->dtype == DATAFLEX_BF16) return dataflex::forward<__nv_bfloat16>(*args, *out, scratch, on);
  return dataflex::forward<__half>(*args, *out, scratch, on);
}
