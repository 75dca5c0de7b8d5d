// loss_and_head_sketch: the forward of loss.cu, whose exponentials are also added, signed, to k1 buckets.
//
// Floor: as loss.cu, and 4 k1 bytes written a row; a sign and an addition more an element. A thread owns the same 8
// buckets (or 16, 32) throughout and reads the columns that fall into them: column j xor key of each stretch of k1
// columns, which permutes the 8 inside a 16-byte load and the loads inside the stretch. So the buckets are registers,
// with a maximum of their own; no atomics. One block a row.
#include "loss.h"
#include "loss_device.cuh"

namespace dataflex {
namespace {
constexpr int kGroup = 8;                       // buckets that lie together
constexpr int64_t kHeld = kThreads * kGroup;    // buckets that one group a thread holds

template <typename T>
__device__ __forceinline__ void load_group(const T* row, int64_t v, int64_t vocab, bool aligned, float (&x)[kGroup]) {
  constexpr int kSize = Vector<T>::kSize;
  if (aligned && v + kGroup <= vocab) {
#pragma unroll
    for (int k = 0; k < kGroup / kSize; k++) {
      const Vector<T> raw = load_vector(row + v + k * kSize);
#pragma unroll
      for (int j = 0; j < kSize; j++) x[k * kSize + j] = to_float(raw.item[j]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; j++) x[j] = v + j < vocab ? to_float(row[v + j]) : -INFINITY;
}

// x[i] becomes x[i xor key].
__device__ __forceinline__ void permute(float (&x)[kGroup], uint32_t key) {
#pragma unroll
  for (int bit = 1; bit < kGroup; bit *= 2) {
    if (!(key & bit)) continue;
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      if (i & bit) continue;
      const float low = x[i];
      x[i] = x[i | bit];
      x[i | bit] = low;
    }
  }
}

template <int kGroups>
struct Sketching {
  State s;
  float bucket[kGroups][kGroup] = {};

  __device__ __forceinline__ void raise(float most) {
    if (!(most > s.max)) return;
    const float by = __expf(s.max - most);
    s.sum *= by;
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int j = 0; j < kGroup; j++) bucket[g][j] *= by;
    s.max = most;
  }
  // left: how many of x are of the row; the rest is -inf and stays so, where a logit of -inf becomes -cap.
  __device__ __forceinline__ void add(float (&x)[kGroup], int g, int64_t left, uint32_t signs, uint32_t key, float cap) {
    float most = -INFINITY;
#pragma unroll
    for (int j = 0; j < kGroup; j++) {
      if (cap != 0.0f && j < left) x[j] = capped(x[j], cap);
      most = fmaxf(most, x[j]);
    }
    raise(most);
    const float from = s.max == -INFINITY ? 0.0f : s.max;
#pragma unroll
    for (int j = 0; j < kGroup; j++) {
      const float e = __expf(x[j] - from);
      s.sum += e;
      if (cap != 0.0f) x[j] = e == 0.0f ? 0.0f : e * cap_slope(x[j], cap);
      else x[j] = e;
      if (signs >> j & 1) x[j] = -x[j];
    }
    permute(x, key);
#pragma unroll
    for (int j = 0; j < kGroup; j++) bucket[g][j] += x[j];
  }
};

template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads)
    sketch_rows(DataflexLoss args, DataflexSketch sketch, DataflexLossOut out) {
  DATAFLEX_SHARED(float, states, [kWarps][4]);
  DATAFLEX_SHARED(float, teams, [kHeld]);
  DATAFLEX_SHARED(float, soft_of_row, [1]);
  const int64_t row = blockIdx.x, k1 = sketch.k1;
  float* to = sketch.out + row * k1;
  if (!counts(args, row)) {
    if (threadIdx.x == 0) skip_token(row, out);
    for (int64_t j = threadIdx.x; j < k1; j += kThreads) to[j] = 0.0f;
    return;
  }
  // Fewer buckets than kHeld: teams of threads take turns at the stretches.
  const int in_team = static_cast<int>(min(k1 / kGroup, static_cast<int64_t>(kThreads)));
  const int team = threadIdx.x / in_team, place = threadIdx.x % in_team, all_teams = kThreads / in_team;
  const T* x = row_of<T>(args, row);
  const bool aligned = (reinterpret_cast<uintptr_t>(x) & 15) == 0;
  const float at_label = label_logit<T>(args, row);
  Sketching<kGroups> own;
  for (int64_t q = team; q * k1 < args.vocab; q += all_teams) {
    const auto key = static_cast<uint32_t>(sketch.keys[q]);
    float values[kGroups][kGroup];
    int64_t first[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      first[g] = q * k1 + kGroup * ((place + g * kThreads) ^ static_cast<int64_t>(key / kGroup));
      load_group(x, first[g], args.vocab, aligned, values[g]);
    }
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      if (first[g] >= args.vocab) continue;
      const uint32_t signs = sketch.signs[first[g] / 32] >> (first[g] % 32);
      own.add(values[g], g, args.vocab - first[g], signs, key % kGroup, args.softcap);
    }
  }
  if (args.label_smoothing != 0.0f) {  // a pass of its own, from the caches
    const float base = smoothing_base(at_label);
    for_each_vector(x, 0, args.vocab, [&](auto& v, int64_t column) { add_smoothing(args, v, column, base, &own.s); });
  }
  const float max = own.s.max;
  const State s = block_merged(own.s, states);
  if (threadIdx.x == 0) finish_token(args, row, s, at_label, out, soft_of_row);
  const float by = shrink(max, s.max);
  if (all_teams > 1) {
#pragma unroll
    for (int j = 0; j < kGroup; j++) teams[threadIdx.x * kGroup + j] = own.bucket[0][j] * by;
  }
  __syncthreads();
  const float factor = soft_of_row[0] / s.sum, token = args.token_weight == nullptr ? 1.0f : args.token_weight[row];
  const float even = token * args.label_smoothing / static_cast<float>(args.vocab);
  const int64_t column = column_of(args, row);
  const int64_t hit = column < 0 ? -1 : column % k1 ^ sketch.keys[column / k1];
  float at_hit = column < 0 ? 0.0f : token * label_weight(args, column) * cap_slope(at_label, args.softcap);
  if (column >= 0 && (sketch.signs[column / 32] >> (column % 32) & 1)) at_hit = -at_hit;
  auto write = [&](int64_t j, float sum) {
    float value = sum * factor - (sketch.uniform == nullptr ? 0.0f : even * sketch.uniform[j]);
    to[j] = j == hit ? value - at_hit : value;
  };
  if (all_teams > 1) {
    for (int64_t j = threadIdx.x; j < k1; j += kThreads) {
      float sum = 0.0f;
      for (int t = 0; t < all_teams; t++) sum += teams[t * k1 + j];
      write(j, sum);
    }
    return;
  }
#pragma unroll
  for (int g = 0; g < kGroups; g++)
#pragma unroll
    for (int j = 0; j < kGroup; j++) write((place + g * kThreads) * kGroup + j, own.bucket[g][j] * by);
}

__global__ void __launch_bounds__(kThreads) sum_sketched(DataflexLoss args, DataflexLossOut out) {
  DATAFLEX_SHARED(float, shared, [kWarps]);
  sum_sample(args, out, shared, [&](int64_t row) { return out.token_loss[row]; });
}

template <typename T>
int run(const DataflexLoss& args, const DataflexSketch& sketch, const DataflexLossOut& out, cudaStream_t stream) {
  const dim3 rows(static_cast<unsigned>(args.rows)), samples(static_cast<unsigned>(args.samples)), block(kThreads);
  int code = cudaSuccess;
  if (args.rows > 0) {
    if (sketch.k1 <= kHeld)
      code = DATAFLEX_LAUNCH((sketch_rows<T, 1>), rows, block, 0, stream, args, sketch, out);
    else if (sketch.k1 == 2 * kHeld)
      code = DATAFLEX_LAUNCH((sketch_rows<T, 2>), rows, block, 0, stream, args, sketch, out);
    else
      code = DATAFLEX_LAUNCH((sketch_rows<T, 4>), rows, block, 0, stream, args, sketch, out);
  }
  if (code != cudaSuccess || args.samples == 0) return code;
  return DATAFLEX_LAUNCH(sum_sketched, samples, block, 0, stream, args, out);
}
}  // namespace
}  // namespace dataflex

int dataflex_loss_sketch(const DataflexLoss* args, const DataflexSketch* sketch, const DataflexLossOut* out,
                         void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->dtype == DATAFLEX_F32) return dataflex::run<float>(*args, *sketch, *out, on);
  if (args->dtype == DATAFLEX_BF16) return dataflex::run<__nv_bfloat16>(*args, *sketch, *out, on);
  return dataflex::run<__half>(*args, *sketch, *out, on);
}
