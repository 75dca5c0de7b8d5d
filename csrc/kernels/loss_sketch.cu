// loss_and_head_sketch: the forward of loss.cu, whose exponentials are also added, signed, to k1 buckets.
//
// Floor: as loss.cu, and 4 k1 bytes written a row; a sign and an addition more an element. A thread owns the same 8
// buckets (or 16, 32) throughout and reads the columns that fall into them: column j xor key of each stretch of k1
// columns, which permutes the 8 inside a 16-byte load and the loads inside the stretch. So the buckets are registers,
// with a maximum of their own; no atomics. One block a row. A thread has the loads of the next stretches in flight
// while it folds one.
#include "loss.h"
#include "loss_device.cuh"

namespace dataflex {
namespace {
constexpr int kGroup = 8;                       // buckets that lie together
constexpr int64_t kHeld = kThreads * kGroup;    // buckets that one group a thread holds
constexpr int kFlight = 2;                      // stretches whose loads are in flight

// 8 logits that lie together, packed as in memory, and the signs of their columns.
template <typename T>
struct Group {
  static constexpr int kWords = kGroup * sizeof(T) / 4;
  uint32_t word[kWords];
  uint32_t signs, first;  // the signs' 32 columns; the group's first column
  int left;               // how many of the 8 are of the row; none: not to be added

  // Nothing that is loaded is used here, so that no load waits for another.
  __device__ __forceinline__ void load(const T* row, const uint32_t* all_signs, uint32_t column, uint32_t vocab,
                                       bool aligned) {
    first = column;
    left = first < vocab ? static_cast<int>(min(vocab - first, static_cast<uint32_t>(kGroup))) : 0;
    if (left == 0) return;
    signs = all_signs[first / 32];
    if (aligned && left == kGroup) {
#pragma unroll
      for (int k = 0; k < kWords / 4; k++) {
        const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(row + first) + k);
        memcpy(word + 4 * k, &raw, sizeof raw);
      }
      return;
    }
    T item[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; j++) item[j] = row[first + min(j, left - 1)];
    memcpy(word, item, sizeof item);
  }
  // Element i becomes element i xor key, key < 8, and so do their signs.
  __device__ __forceinline__ void permute(uint32_t key) {
    constexpr bool kPairs = sizeof(T) == 2;  // two elements a word
    if (kPairs) {
      const uint32_t halves = key & 1 ? 0x1032u : 0x3210u;
#pragma unroll
      for (int w = 0; w < kWords; w++) word[w] = __byte_perm(word[w], 0, halves);
    }
#pragma unroll
    for (int bit = 1; bit < kWords; bit *= 2) {
      const bool moves = key & static_cast<uint32_t>(kPairs ? 2 * bit : bit);
#pragma unroll
      for (int w = 0; w < kWords; w++) {
        if (w & bit) continue;
        const uint32_t low = word[w], high = word[w | bit];
        word[w] = moves ? high : low, word[w | bit] = moves ? low : high;
      }
    }
    signs >>= first % 32;
    if (key & 1) signs = (signs >> 1 & 0x55u) | (signs << 1 & 0xaau);
    if (key & 2) signs = (signs >> 2 & 0x33u) | (signs << 2 & 0xccu);
    if (key & 4) signs = (signs >> 4 & 0x0fu) | (signs << 4 & 0xf0u);
  }
};

// kCaps: `max` is of the tanh of logits, whose unit is the cap.
template <int kGroups, bool kCaps>
struct Sketching {
  State s;
  float bucket[kGroups][kGroup] = {};
  float per_cap, in_octaves;  // 1 / cap; cap, or 1, times log2 e

  __device__ __forceinline__ void raise(float most) {
    if (!(most > s.max)) return;
    const float by = exp2_approximate((s.max - most) * in_octaves);
    s.sum *= by;
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int j = 0; j < kGroup; j++) bucket[g][j] *= by;
    s.max = most;
  }
  template <typename T>
  __device__ __forceinline__ void add(Group<T>& group, int g, uint32_t key) {
    float x[kGroup], most = -INFINITY;
    group.permute(key);
#pragma unroll
    for (int w = 0; w < Group<T>::kWords; w++) unpack<T>(group.word[w], x + w * (4 / sizeof(T)));
#pragma unroll
    for (int j = 0; j < kGroup; j++) {
      if (kCaps) x[j] = quick_tanh(x[j] * per_cap);
    }
    if (group.left < kGroup) {
#pragma unroll
      for (int j = 0; j < kGroup; j++)
        if (static_cast<int>(j ^ key) >= group.left) x[j] = kCaps ? -1e18f : -INFINITY;  // the slope stays finite
    }
#pragma unroll
    for (int j = 0; j < kGroup; j++) most = fmaxf(most, x[j]);
    raise(most);
    const float from = s.max == -INFINITY ? 0.0f : s.max;
#pragma unroll
    for (int j = 0; j < kGroup; j++) {
      const float e = exp2_approximate((x[j] - from) * in_octaves), share = kCaps ? e * fmaf(-x[j], x[j], 1.0f) : e;
      s.sum += e;
      bucket[g][j] += __uint_as_float(__float_as_uint(share) ^ (group.signs << (31 - j) & 0x80000000u));
    }
  }
};

template <typename T, int kGroups, bool kCaps>
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
  Sketching<kGroups, kCaps> own;
  const float unit = kCaps ? args.softcap : 1.0f;
  own.per_cap = 1.0f / args.softcap, own.in_octaves = unit * kLog2E;
  Group<T> flight[kFlight][kGroups];
  uint32_t lows[kFlight];  // of the stretches' keys: what permutes the 8
  const auto vocab = static_cast<uint32_t>(args.vocab), wide = static_cast<uint32_t>(k1);  // below 2^31 in all
  const uint32_t last = (vocab - 1) / wide;
  auto next_key = static_cast<uint32_t>(sketch.keys[min(static_cast<uint32_t>(team), last)]);  // no load waits for it
  auto load = [&](uint32_t q, Group<T> (&groups)[kGroups], uint32_t& low) {
    if (q * wide >= vocab) return;
    low = next_key % kGroup;
    const uint32_t high = next_key - low;
    next_key = static_cast<uint32_t>(sketch.keys[min(q + all_teams, last)]);
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      const auto of_stretch = static_cast<uint32_t>(kGroup * (place + g * kThreads)) ^ high;
      groups[g].load(x, sketch.signs, q * wide + of_stretch, vocab, aligned);
    }
  };
#pragma unroll
  for (int f = 0; f < kFlight; f++) load(team + f * all_teams, flight[f], lows[f]);
  for (uint32_t first = team; first * wide < vocab; first += kFlight * all_teams) {
#pragma unroll
    for (int f = 0; f < kFlight; f++) {
      const uint32_t q = first + f * all_teams;
      if (q * wide >= vocab) break;
#pragma unroll
      for (int g = 0; g < kGroups; g++)
        if (flight[f][g].left > 0) own.add(flight[f][g], g, lows[f]);
      load(q + kFlight * all_teams, flight[f], lows[f]);
    }
  }
  if (args.label_smoothing != 0.0f) {  // a pass of its own, from the caches
    const float base = smoothing_base(at_label);
    for_each_vector(x, 0, args.vocab, [&](auto& v, int64_t column) { add_smoothing(args, v, column, base, &own.s); });
  }
  own.s.max *= unit;
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

template <typename T, bool kCaps>
int fold_rows(const DataflexLoss& args, const DataflexSketch& sketch, const DataflexLossOut& out, cudaStream_t stream) {
  const dim3 rows(static_cast<unsigned>(args.rows)), block(kThreads);
  if (sketch.k1 <= kHeld)
    return DATAFLEX_LAUNCH((sketch_rows<T, 1, kCaps>), rows, block, 0, stream, args, sketch, out);
  if (sketch.k1 == 2 * kHeld)
    return DATAFLEX_LAUNCH((sketch_rows<T, 2, kCaps>), rows, block, 0, stream, args, sketch, out);
  return DATAFLEX_LAUNCH((sketch_rows<T, 4, kCaps>), rows, block, 0, stream, args, sketch, out);
}

template <typename T>
int run(const DataflexLoss& args, const DataflexSketch& sketch, const DataflexLossOut& out, cudaStream_t stream) {
  const dim3 samples(static_cast<unsigned>(args.samples)), block(kThreads);
  int code = cudaSuccess;
  if (args.rows > 0)
    code = args.softcap == 0.0f ? fold_rows<T, false>(args, sketch, out, stream)
                                : fold_rows<T, true>(args, sketch, out, stream);
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
