// Gradient of per_sample_loss by the logits: soft * exp(x - lse) - uniform * o_v, less `hit` at the label, times the
// softcap's derivative; in place where the logits may go.
//
// Floor: one read and one write of the logits, 2 * rows * vocab * 2 (or 4) bytes, one exponential an element; rows
// that do not count are written only. The factors are 16 bytes a row, made by a first kernel.
#include "loss.h"
#include "loss_device.cuh"

namespace dataflex {
namespace {
constexpr int kPerThread = 4;  // vectors

// One block a sample: {lse, soft, uniform, hit} of each of its rows, zeros for rows without a gradient. A row of no
// sample has its token's gradient only.
__global__ void __launch_bounds__(kThreads) find_factors(DataflexLoss args, DataflexLossGrad grad, float4* factors) {
  DATAFLEX_SHARED(float, shared, [kWarps]);
  float weights = args.class_weight == nullptr ? static_cast<float>(args.vocab) : 0.0f;
  if (args.class_weight != nullptr && args.label_smoothing != 0.0f) {
    for (int64_t v = threadIdx.x; v < args.vocab; v += kThreads) weights += args.class_weight[v];
    weights = block_sum(weights, shared);
  }
  const float spread = args.label_smoothing / static_cast<float>(args.vocab);
  auto find = [&](int64_t row, float of_sample) {
    float from = of_sample + (grad.token == nullptr ? 0.0f : grad.token[row]);
    if (args.token_weight != nullptr) from *= args.token_weight[row];
    const int64_t column = column_of(args, row);
    const float lse = grad.lse[row], weight = label_weight(args, column);
    float soft = from * (weight + spread * weights);
    if (args.z_loss != 0.0f) soft += from * 2.0f * args.z_loss * lse;
    if (grad.lse_grad != nullptr) soft += grad.lse_grad[row];
    soft *= expf(-grad.lse_low[row]);  // exp(x - lse - low) is exp(x - lse) exp(-low)
    float hit = from * weight;
    if (column < 0) hit = args.sharded ? 0.0f : NAN;
    const bool none = soft == 0.0f && hit == 0.0f && from == 0.0f;
    const bool kept = counts(args, row) && !none;
    factors[row] = kept ? make_float4(lse, soft, from * spread, hit) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  for_each_row_outside(args, [&](int64_t row) { find(row, 0.0f); });
  const int64_t sample = blockIdx.x;
  if (sample >= args.samples) return;
  float of_sample = grad.loss == nullptr ? 0.0f : grad.loss[sample];
  if (args.mean && grad.count[sample] > 0) of_sample /= static_cast<float>(grad.count[sample]);
  const int64_t begin = max(args.cu_seqlens[sample], static_cast<int64_t>(0));
  const int64_t end = min(args.cu_seqlens[sample + 1], args.rows);
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) find(row, of_sample);
}

template <Form kForm>
struct RowGrad {
  float4 by;
  const float* class_weight;
  float cap, per_cap;
  int64_t label;
  __device__ __forceinline__ float operator()(float x, int64_t column) const {
    const bool caps = kForm == kCapped || (kForm == kSmoothed && cap != 0.0f);
    float slope = 1.0f;
    if (caps) {
      const float u = x * per_cap, t = quick_tanh(u);
      x = cap * t, slope = fabsf(u) < kTanhEnd ? fmaf(-t, t, 1.0f) : 0.0f;
    }
    float g = by.y * quick_exp(x - by.x);
    if (kForm == kSmoothed) g -= by.z * (class_weight == nullptr ? 1.0f : class_weight[column]);
    if (column == label) g -= by.w;
    return g * slope;
  }
};

// Zeros for a row that has no gradient, NaN for one that is spoilt; the row is not read.
template <typename T>
__device__ __forceinline__ void fill(T* out, int64_t begin, int64_t end, float value) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t body = begin + misaligned(out + begin, end - begin);
  const int64_t vectors = (end - body) / kSize, tail = body + vectors * kSize;
  Vector<T> all;
#pragma unroll
  for (int j = 0; j < kSize; j++) from_float(value, &all.item[j]);
  uint4 bits;
  memcpy(&bits, &all, sizeof bits);
  for (int64_t v = begin + threadIdx.x; v < body; v += kThreads) out[v] = all.item[0];
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) __stcs(reinterpret_cast<uint4*>(out + body) + i, bits);
  for (int64_t v = tail + threadIdx.x; v < end; v += kThreads) out[v] = all.item[0];
}

// One block a part: (row, part) = (block / parts, block mod parts); a part is kPerThread vectors for each thread.
template <typename T, Form kForm>
__global__ void __launch_bounds__(kThreads, 4)
    write_gradient(DataflexLoss args, DataflexLossGrad grad, const float4* factors, int64_t parts) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int64_t kPart = static_cast<int64_t>(kThreads) * kPerThread * kSize;
  const int64_t row = blockIdx.x / parts, first = blockIdx.x % parts * kPart, last = min(first + kPart, args.vocab);
  const T* in = row_of<T>(args, row);
  T* out = static_cast<T*>(grad.logits) + row * grad.out_stride;
  const float4 by = factors[row];
  if (by.y == 0.0f && by.z == 0.0f && by.w == 0.0f) return fill(out, first, last, 0.0f);
  if (!is_finite(by.x) || !is_finite(by.y) || !is_finite(by.w)) return fill(out, first, last, NAN);
  const RowGrad<kForm> f{by, args.class_weight, args.softcap, 1.0f / args.softcap, column_of(args, row)};
  auto one = [&](int64_t v) { from_float(f(to_float(in[v]), v), out + v); };
  // Vectors where input and output are aligned alike, which they are but for odd row lengths of strided logits.
  if (((reinterpret_cast<uintptr_t>(in) ^ reinterpret_cast<uintptr_t>(out)) & 15) != 0) {
    for (int64_t v = first + threadIdx.x; v < last; v += kThreads) one(v);
    return;
  }
  const int64_t body = first + misaligned(out + first, last - first);
  const int64_t vectors = (last - body) / kSize, tail = body + vectors * kSize;
  for (int64_t v = first + threadIdx.x; v < body; v += kThreads) one(v);
  for (int64_t v = tail + threadIdx.x; v < last; v += kThreads) one(v);
  Vector<T> raw[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; k++) {
    const int i = k * kThreads + static_cast<int>(threadIdx.x);
    if (i < vectors) raw[k] = load_vector(in + body + i * kSize);
  }
#pragma unroll
  for (int k = 0; k < kPerThread; k++) {
    const int i = k * kThreads + static_cast<int>(threadIdx.x);
    if (i >= vectors) break;
    Vector<T> made;
    float x[kSize];
    unpack(raw[k], x);
#pragma unroll
    for (int j = 0; j < kSize; j++) from_float(f(x[j], body + i * kSize + j), &made.item[j]);
    uint4 bits;
    memcpy(&bits, &made, sizeof bits);
    __stcs(reinterpret_cast<uint4*>(out + body + i * kSize), bits);
  }
}

template <typename T>
int backward(const DataflexLoss& args, const DataflexLossGrad& grad, float* scratch, cudaStream_t stream) {
  constexpr int64_t kPart = static_cast<int64_t>(kThreads) * kPerThread * Vector<T>::kSize;
  auto* factors = reinterpret_cast<float4*>(scratch);
  if (args.rows == 0) return cudaSuccess;
  const auto samples = static_cast<unsigned>(max(args.samples, int64_t{1}));
  const int code = DATAFLEX_LAUNCH(find_factors, dim3(samples), dim3(kThreads), 0, stream, args, grad, factors);
  if (code != cudaSuccess) return code;
  const int64_t parts = (args.vocab + kPart - 1) / kPart;
  const dim3 blocks(static_cast<unsigned>(args.rows * parts)), block(kThreads);
  return with_form(args, [&](auto form) {
    constexpr Form kForm = decltype(form)::value;
    return DATAFLEX_LAUNCH((write_gradient<T, kForm>), blocks, block, 0, stream, args, grad, factors, parts);
  });
}
}  // namespace
}  // namespace dataflex

int64_t dataflex_loss_backward_scratch(const DataflexLoss* args) { return 4 * args->rows; }

int dataflex_loss_backward(const DataflexLoss* args, const DataflexLossGrad* grad, float* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->dtype == DATAFLEX_F32) return dataflex::backward<float>(*args, *grad, scratch, on);
  if (args->dtype == DATAFLEX_BF16) return dataflex::backward<__nv_bfloat16>(*args, *grad, scratch, on);
  return dataflex::backward<__half>(*args, *grad, scratch, on);
}
