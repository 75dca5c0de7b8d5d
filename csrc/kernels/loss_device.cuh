// What the loss kernels share: loads, the state of the online softmax, sums over a block, a token's loss.
#pragma once
#include <math.h>
#include <string.h>

#include <type_traits>

#include "dataflex/loss.h"
#include "dataflex/portable.cuh"
#include "dataflex/ptx.cuh"

namespace dataflex {
namespace {
constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half* to) { *to = __float2half_rn(x); }

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T item[kSize];
};
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
  Vector<T> v;
  static_assert(sizeof v == sizeof raw, "16 bytes");
  memcpy(&v, &raw, sizeof raw);
  return v;
}
// The one or two elements of a word, in less than taking them one by one.
template <typename T>
__device__ __forceinline__ void unpack(uint32_t word, float* x) {
  if constexpr (std::is_same_v<T, float>) {
    x[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    const float2 both = __half22float2(pair);
    x[0] = both.x, x[1] = both.y;
  }
}
template <typename T>
__device__ __forceinline__ void unpack(const Vector<T>& vector, float (&x)[Vector<T>::kSize]) {
  uint32_t words[4];
  memcpy(words, &vector, sizeof words);
#pragma unroll
  for (int w = 0; w < 4; w++) unpack<T>(words[w], x + w * (4 / sizeof(T)));
}
// Elements before the first that is 16-byte aligned, at most n.
template <typename T>
__device__ __forceinline__ int64_t misaligned(const T* p, int64_t n) {
  const auto bytes = static_cast<int64_t>((16 - (reinterpret_cast<uintptr_t>(p) & 15)) & 15);
  return min(bytes / static_cast<int64_t>(sizeof(T)), n);
}
// tanh as u (1 + s A(s)) / (1 + s B(s)), s = u^2, with polynomials of degree 3 fitted to [-9, 9] for the least largest
// relative error (2.2e-8; 4.3e-7 with all rounding), and beyond by its value at 9, which is 1 but for the rounding: its
// slope there is 0. 14 instructions.
constexpr float kTanhEnd = 9.0f;
__device__ __forceinline__ float quick_tanh(float x) {
  const float u = clamped(x, kTanhEnd), s = u * u;
  float a = fmaf(1.341979e-8f, s, 2.066124e-5f);
  a = fmaf(a, s, 3.49899475e-3f);
  a = fmaf(a, s, 0.133839786f);
  float b = fmaf(7.80471623e-7f, s, 3.29103612e-4f);
  b = fmaf(b, s, 2.58902013e-2f);
  b = fmaf(b, s, 0.46717301f);
  return fmaf(u * s, a, u) * reciprocal_approximate(fmaf(b, s, 1.0f));
}
// e^x, off by the rounding of x log2 e and 2 units in the last place, like __expf; 0 below 2^-126.
constexpr float kLog2E = 1.44269504f;
__device__ __forceinline__ float quick_exp(float x) { return exp2_approximate(x * kLog2E); }
__device__ __forceinline__ float capped(float x, float cap) {
  return cap == 0.0f ? x : cap * quick_tanh(x * (1.0f / cap));
}
__device__ __forceinline__ float cap_slope(float capped, float cap) {
  const float t = cap == 0.0f ? 0.0f : capped * (1.0f / cap);
  return 1.0f - t * t;
}

// Kernels are compiled for logits as they are; for softcap, where a logit's tanh stands for it until the cap is
// multiplied in; and for smoothed labels with any softcap, where the logits after the cap are needed too.
enum Form { kPlain, kCapped, kSmoothed };
template <typename F>
int with_form(const DataflexLoss& args, const F& f) {
  if (args.label_smoothing != 0.0f) return f(std::integral_constant<Form, kSmoothed>{});
  if (args.softcap != 0.0f) return f(std::integral_constant<Form, kCapped>{});
  return f(std::integral_constant<Form, kPlain>{});
}

// Of a part of a row: the largest logit, sum exp(x - max), sum o_v (x_v - base), sum o_v; o are the class weights.
struct State {
  float max = -INFINITY, sum = 0.0f, weighted = 0.0f, weights = 0.0f;
};
__device__ __forceinline__ float shrink(float from, float to) { return from == to ? 1.0f : quick_exp(from - to); }
__device__ __forceinline__ State merged(State a, State b) {
  State all;
  all.max = fmaxf(a.max, b.max);
  all.sum = a.sum * shrink(a.max, all.max) + b.sum * shrink(b.max, all.max);
  all.weighted = a.weighted + b.weighted;
  all.weights = a.weights + b.weights;
  return all;
}
__device__ __forceinline__ State shuffled(const State& s, int bits) {
  constexpr unsigned all = 0xffffffffu;
  State other;
  other.max = __shfl_xor_sync(all, s.max, bits);
  other.sum = __shfl_xor_sync(all, s.sum, bits);
  other.weighted = __shfl_xor_sync(all, s.weighted, bits);
  other.weights = __shfl_xor_sync(all, s.weights, bits);
  return other;
}
// The block's state, in every thread. Begins and ends with a barrier's ordering for `parts`.
__device__ __forceinline__ State block_merged(State s, float (&parts)[kWarps][4]) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) s = merged(s, shuffled(s, bits));
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    parts[warp][0] = s.max;
    parts[warp][1] = s.sum;
    parts[warp][2] = s.weighted;
    parts[warp][3] = s.weights;
  }
  __syncthreads();
  State all;
  for (int w = 0; w < kWarps; w++) {
    State part;
    part.max = parts[w][0];
    part.sum = parts[w][1];
    part.weighted = parts[w][2];
    part.weights = parts[w][3];
    all = merged(all, part);
  }
  __syncthreads();
  return all;
}
__device__ __forceinline__ float block_sum(float x, float (&parts)[kWarps]) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kWarps; w++) sum += parts[w];
  __syncthreads();
  return sum;
}

template <typename T>
__device__ __forceinline__ const T* row_of(const DataflexLoss& args, int64_t row) {
  return static_cast<const T*>(args.logits) + row * args.row_stride;
}
__device__ __forceinline__ bool counts(const DataflexLoss& args, int64_t row) {
  return args.labels[row] != args.ignore_index;
}
// The label's column here, or -1: on another shard, or out of range.
__device__ __forceinline__ int64_t column_of(const DataflexLoss& args, int64_t row) {
  const int64_t column = args.labels[row] - args.vocab_offset;
  return column >= 0 && column < args.vocab ? column : -1;
}
// The label's logit after softcap; NaN for a label out of range, which spoils its own sample.
template <typename T>
__device__ __forceinline__ float label_logit(const DataflexLoss& args, int64_t row) {
  const int64_t column = column_of(args, row);
  if (column >= 0) return capped(to_float(row_of<T>(args, row)[column]), args.softcap);
  return args.sharded ? 0.0f : NAN;
}
__device__ __forceinline__ float label_weight(const DataflexLoss& args, int64_t column) {
  const float weight = args.class_weight == nullptr || column < 0 ? 1.0f : args.class_weight[column];
  return (1.0f - args.label_smoothing) * weight;
}
// What State::weighted is relative to, so that large logits keep their digits.
__device__ __forceinline__ float smoothing_base(float at_label) { return is_finite(at_label) ? at_label : 0.0f; }

template <int n>
__device__ __forceinline__ void add_smoothing(const DataflexLoss& args, const float (&x)[n], int64_t column, float base,
                                              State* s) {
#pragma unroll
  for (int j = 0; j < n; j++) {
    const float weight = args.class_weight == nullptr ? 1.0f : args.class_weight[column + j];
    s->weighted += weight * (x[j] - base);
    s->weights += weight;
  }
}

// Writes a token's loss and lse. soft: the factor of softmax in its gradient.
__device__ __forceinline__ void finish_token(const DataflexLoss& args, int64_t row, const State& s, float at_label,
                                             const DataflexLossOut& out, float* soft) {
  const float log_sum = logf(s.sum), lse = s.max + log_sum;
  const float token = args.token_weight == nullptr ? 1.0f : args.token_weight[row];
  const float hit = label_weight(args, column_of(args, row));
  const float spread = args.label_smoothing / static_cast<float>(args.vocab);
  float loss = hit * (log_sum + (s.max - at_label));
  if (args.label_smoothing != 0.0f) loss += spread * (s.weights * (lse - smoothing_base(at_label)) - s.weighted);
  if (args.z_loss != 0.0f) loss += args.z_loss * lse * lse;
  out.token_loss[row] = token * loss;
  out.lse[row] = lse;
  const float back = lse - s.max;  // the error of the sum, exactly
  out.lse_low[row] = is_finite(lse) ? (s.max - (lse - back)) + (log_sum - back) : 0.0f;
  *soft = token * (hit + spread * s.weights + 2.0f * args.z_loss * lse);
}
__device__ __forceinline__ void skip_token(int64_t row, const DataflexLossOut& out) {
  out.token_loss[row] = 0.0f;
  out.lse[row] = 0.0f;
  out.lse_low[row] = 0.0f;
}

// Calls f(x, column) for columns [begin, end) of a row, each by one thread of the block: 16-byte loads, four in
// flight. f gets whole vectors: f(const float (&x)[n], first column).
template <typename T, typename F>
__device__ __forceinline__ void for_each_vector(const T* row, int64_t begin, int64_t end, const F& f) {
  constexpr int kSize = Vector<T>::kSize, kFlight = 4;
  const int64_t head = misaligned(row + begin, end - begin), body = begin + head;
  const int64_t vectors = (end - body) / kSize, tail = body + vectors * kSize;
  auto one = [&](int64_t column) {
    const float x[1] = {to_float(row[column])};
    f(x, column);
  };
  for (int64_t v = begin + threadIdx.x; v < body; v += kThreads) one(v);
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads * kFlight) {
    Vector<T> raw[kFlight];
#pragma unroll
    for (int k = 0; k < kFlight; k++)
      if (i + k * kThreads < vectors) raw[k] = load_vector(row + body + (i + k * kThreads) * kSize);
#pragma unroll
    for (int k = 0; k < kFlight; k++) {
      if (i + k * kThreads >= vectors) break;
      float x[kSize];
      unpack(raw[k], x);
      f(x, body + (i + k * kThreads) * kSize);
    }
  }
  for (int64_t v = tail + threadIdx.x; v < end; v += kThreads) one(v);
}

// Calls f(row) for the rows of no sample: before the first and behind the last, by the blocks of those two. A row
// between cu_seqlens[0] and cu_seqlens[samples] is in some sample whatever lies between, so every row is seen to.
template <typename F>
__device__ __forceinline__ void for_each_row_outside(const DataflexLoss& args, const F& f) {
  if (blockIdx.x == 0) {
    const int64_t end = min(args.cu_seqlens[0], args.rows);
    for (int64_t row = threadIdx.x; row < end; row += kThreads) f(row);
  }
  if (blockIdx.x + 1 < args.samples) return;
  const int64_t begin = max(args.cu_seqlens[args.samples], static_cast<int64_t>(0));
  for (int64_t row = begin + threadIdx.x; row < args.rows; row += kThreads) f(row);
}

// A loss is the sum of its tokens' in a fixed order. Rows outside [0, rows) are not touched, whatever cu_seqlens says.
template <typename Token>
__device__ __forceinline__ void sum_sample(const DataflexLoss& args, const DataflexLossOut& out, float (&parts)[kWarps],
                                           const Token& token) {
  const int64_t sample = blockIdx.x;
  for_each_row_outside(args, [&](int64_t row) {
    if (counts(args, row)) token(row);
  });
  if (sample >= args.samples) return;
  const int64_t begin = max(args.cu_seqlens[sample], static_cast<int64_t>(0));
  const int64_t end = min(args.cu_seqlens[sample + 1], args.rows);
  float sum = 0.0f, count = 0.0f;  // a thread's count is below 2^24
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) {
    if (!counts(args, row)) continue;
    sum += token(row);
    count += 1.0f;
  }
  sum = block_sum(sum, parts);
  count = block_sum(count, parts);
  if (threadIdx.x != 0) return;
  out.loss[sample] = args.mean && count > 0.0f ? sum / count : sum;
  out.count[sample] = static_cast<int64_t>(count);
}
}  // namespace
}  // namespace dataflex
