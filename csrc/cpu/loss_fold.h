// One row of logits with the sketch: the online softmax of loss_rows.h, whose exponentials are also added, signed,
// to k1 buckets. Part of loss_rows.h.
//
// Column j of a stretch of k1 columns goes to bucket j xor key: the columns are read in their order, as the hardware
// foresees, and the buckets, which stay in the first-level cache, are what is permuted.
#pragma once

namespace dataflex {
namespace DATAFLEX_ISA {
namespace {
// Columns [first, first + n) of one stretch; n and first are multiples of kUnroll.
template <bool kCapped>
inline void add_exp_fold(const float* x, int64_t n, float max, float inverse_cap, uint32_t key, int64_t first,
                         const uint32_t* signs, float* sketch, Floats (&sum)[4]) {
  const Ints order = bits_of<Ints>(lanes() ^ (key & (W - 1)));
  const uint32_t group = key & ~static_cast<uint32_t>(kUnroll - 1);
  Floats sums[4] = {sum[0], sum[1], sum[2], sum[3]};  // in registers: the stores below could change `sum` for all we know
  uint32_t place[4];
  for (int k = 0; k < 4; k++) place[k] = static_cast<uint32_t>(k * W) ^ (key & static_cast<uint32_t>(kUnroll - W));
  for (int64_t i = 0; i < n; i += kUnroll) {
    float* to = sketch + (static_cast<uint32_t>(first + i) ^ group);
    uint64_t bits = 0;  // kUnroll of them
    memcpy(&bits, reinterpret_cast<const char*>(signs) + i / 8, kUnroll / 8);
    for (int k = 0; k < 4; k++) {
      const Floats logit = load(x + i + k * W), e = exp(logit - max);
      sums[k] += e;
      Floats part = negated(e, static_cast<uint32_t>(bits >> (k * W)));
      if (kCapped) part *= cap_slope(logit, inverse_cap);
      store(load(to + place[k]) + __builtin_shuffle(part, order), to + place[k], false);
    }
  }
  for (int k = 0; k < 4; k++) sum[k] = sums[k];
}

// begin is a multiple of k1.
template <typename T>
LossPart scan_fold(const DataflexLoss& args, const T* row, int64_t begin, int64_t end, const DataflexSketch& tables,
                   float* sketch) {
  alignas(64) float buffer[kBlock];
  const float inverse_cap = args.softcap == 0.0f ? 0.0f : 1.0f / args.softcap;
  const auto add = inverse_cap == 0.0f ? add_exp_fold<false> : add_exp_fold<true>;
  const int64_t k1 = tables.k1, step = k1 < kBlock ? k1 : kBlock;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(k1));
  LossPart part;
  Floats sum[4] = {};
  for (int64_t v = begin; v < end; v += step) {
    const int64_t n = end - v < step ? end - v : step;
    const Block block = fetch(row + v, n, args.softcap, buffer);
    raise(block.max, &part, sum, sketch, k1);
    const auto key = static_cast<uint32_t>(tables.keys[v >> shift]);
    add(block.x, padded(n), base_of(part), inverse_cap, key, v & (k1 - 1), tables.signs + v / 32, sketch, sum);
    if (args.label_smoothing != 0.0f)
      add_weighted(block.x, args.class_weight == nullptr ? nullptr : args.class_weight + v, n, base_of(part), &part);
  }
  part.sum = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return part;
}
}  // namespace
}  // namespace DATAFLEX_ISA
}  // namespace dataflex
