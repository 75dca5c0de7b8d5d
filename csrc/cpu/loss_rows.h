// One row of logits: the online softmax (with label smoothing's sums and the sketch), and its gradient.
//
// Floor: forward 1 read of the logits; gradient 1 read and 1 write. A block of logits that fits the first-level
// cache is looked at twice: for its maximum, and for its exponentials (about 17 vector operations).
#pragma once
#include <math.h>

#include "loss.h"
#include "loss_simd.h"

namespace dataflex {
namespace DATAFLEX_ISA {
namespace {
constexpr int64_t kBlock = 512;   // columns in a block
constexpr int64_t kUnroll = 4 * W;  // the last block is padded with -inf to a multiple of this

inline Floats capped(Floats x, float cap, float inverse) { return cap * tanh(x * inverse); }
inline Floats cap_slope(Floats capped, float inverse) {
  const Floats t = greater(splat(-1.0f), capped * inverse);  // padding is -inf
  return 1.0f - t * t;
}
inline int64_t padded(int64_t n) { return (n + kUnroll - 1) / kUnroll * kUnroll; }

// A block of logits as floats after softcap, padded with -inf, and their maximum.
struct Block {
  const float* x;
  float max;
};

inline float largest(const Floats (&most)[4]) {
  return largest(greater(greater(most[0], most[1]), greater(most[2], most[3])));
}

// Through `buffer`: other dtypes, softcap, and the end of a row.
template <typename T>
inline Block converted(const T* x, int64_t n, float softcap, float* buffer) {
  const float inverse = softcap == 0.0f ? 0.0f : 1.0f / softcap;
  Floats most[4];
  for (Floats& m : most) m = splat(-HUGE_VALF);
  int64_t i = 0;
  for (; softcap == 0.0f && i + kUnroll <= n; i += kUnroll)
    for (int k = 0; k < 4; k++) {
      const Floats v = load(x + i + k * W);
      most[k] = greater(v, most[k]);
      store(v, buffer + i + k * W, false);
    }
  for (; i + W <= n; i += W) {
    const Floats v = softcap == 0.0f ? load(x + i) : capped(load(x + i), softcap, inverse);
    most[0] = greater(v, most[0]);
    store(v, buffer + i, false);
  }
  float last = -HUGE_VALF;
  for (; i < n; i++) {
    buffer[i] = widen(x[i]);
    if (softcap != 0.0f) buffer[i] = capped(splat(buffer[i]), softcap, inverse)[0];
    last = buffer[i] > last ? buffer[i] : last;
  }
  for (; i < padded(n); i++) buffer[i] = -HUGE_VALF;
  const float whole = largest(most);
  return {buffer, whole > last ? whole : last};
}
template <typename T>
inline Block fetch(const T* x, int64_t n, float softcap, float* buffer) {
  return converted(x, n, softcap, buffer);
}
inline Block fetch(const float* x, int64_t n, float softcap, float* buffer) {
  if (softcap != 0.0f || n % kUnroll != 0) return converted(x, n, softcap, buffer);
  Floats most[4];
  for (int k = 0; k < 4; k++) most[k] = load(x + k * W);
  for (int64_t i = kUnroll; i < n; i += kUnroll)
    for (int k = 0; k < 4; k++) most[k] = greater(load(x + i + k * W), most[k]);
  return {x, largest(most)};
}

inline void add_exp(const float* x, int64_t end, float max, Floats (&sum)[4]) {
  for (int64_t i = 0; i < end; i += kUnroll)
    for (int k = 0; k < 4; k++) sum[k] += exp(load(x + i + k * W) - max);
}

// Adds to the sums of label smoothing, relative to `base` so that large logits keep their digits.
inline void add_weighted(const float* x, const float* weight, int64_t n, float base, LossPart* part) {
  Floats sums{}, weights{};
  float sum = 0.0f, ones = 0.0f;
  const int64_t whole = n / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    const Floats w = weight == nullptr ? splat(1.0f) : load(weight + i);
    sums = fma(w, load(x + i) - base, sums);
    weights += w;
  }
  for (int64_t i = whole; i < n; i++) {
    const float w = weight == nullptr ? 1.0f : weight[i];
    sum += w * (x[i] - base);
    ones += w;
  }
  const double all = static_cast<double>(total(weights)) + ones;
  part->weighted += static_cast<double>(total(sums)) + sum + base * all;
  part->weights += all;
}

// Raises the maximum to `most`: what was summed so far shrinks.
inline void raise(float most, LossPart* part, Floats (&sum)[4], float* sketch, int64_t k1) {
  if (!(most > part->max)) return;
  const float factor = expf(part->max - most);
  for (Floats& s : sum) s *= factor;
  for (int64_t j = 0; j < k1; j += W) store(load(sketch + j) * factor, sketch + j, false);
  part->max = most;
}
inline float base_of(const LossPart& part) { return part.max == -HUGE_VALF ? 0.0f : part.max; }

template <typename T>
LossPart scan(const DataflexLoss& args, const T* row, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock];
  LossPart part;
  Floats sum[4] = {};
  for (int64_t v = begin; v < end; v += kBlock) {
    const int64_t n = end - v < kBlock ? end - v : kBlock;
    const Block block = fetch(row + v, n, args.softcap, buffer);
    raise(block.max, &part, sum, nullptr, 0);
    add_exp(block.x, padded(n), base_of(part), sum);
    if (args.label_smoothing != 0.0f)
      add_weighted(block.x, args.class_weight == nullptr ? nullptr : args.class_weight + v, n, base_of(part), &part);
  }
  part.sum = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return part;
}
}  // namespace
}  // namespace DATAFLEX_ISA
}  // namespace dataflex

#include "loss_fold.h"

namespace dataflex {
namespace DATAFLEX_ISA {
namespace {
// One block of gradient, plain without softcap and label smoothing; `around` as in store().
template <bool kPlain, typename T>
inline void grad_block(const float* x, const float* weight, T* out, int64_t n, float inverse_cap, bool around,
                       const LossRowGrad& grad) {
  const int64_t whole = n / W * W;
  for (int64_t i = 0; i < n; i += W) {
    const Floats logit = load(x + i), below = logit - grad.lse;
    Floats g = below < kLeast ? Floats{} : exp(below) * grad.soft;
    if (!kPlain && grad.uniform != 0.0f) {
      Floats w = splat(1.0f);
      if (weight != nullptr && i < whole) w = load(weight + i);
      if (weight != nullptr && i >= whole)
        for (int64_t k = whole; k < n; k++) w[k - whole] = weight[k];
      g -= grad.uniform * w;
    }
    if (!kPlain && inverse_cap != 0.0f) g *= cap_slope(logit, inverse_cap);
    if (i < whole)
      store(g, out + i, around);
    else
      for (int64_t k = whole; k < n; k++) narrow(g[k - whole], out + k);
  }
}

template <typename T>
float label_grad(const DataflexLoss& args, const T* row, const LossRowGrad& grad) {
  const float raw = widen(row[grad.label]), t = args.softcap == 0.0f ? 0.0f : tanhf(raw / args.softcap);
  const float x = args.softcap == 0.0f ? raw : args.softcap * t;
  const float weight = args.class_weight == nullptr ? 1.0f : args.class_weight[grad.label];
  return (grad.soft * expf(x - grad.lse) - grad.uniform * weight - grad.hit) * (1.0f - t * t);
}

template <typename T>
void gradient(const DataflexLoss& args, const T* row, T* out, int64_t begin, int64_t end, const LossRowGrad& grad) {
  alignas(64) float buffer[kBlock];
  const float inverse_cap = args.softcap == 0.0f ? 0.0f : 1.0f / args.softcap;
  const bool has_label = grad.label >= begin && grad.label < end;
  const float at_label = has_label ? label_grad(args, row, grad) : 0.0f;
  // Writing around the caches saves reading what is overwritten; out of place only, and on aligned vectors.
  const uint64_t misaligned = reinterpret_cast<uint64_t>(out + begin) % (W * sizeof(T));
  const bool around = row != out && misaligned % sizeof(T) == 0;
  int64_t n = around && misaligned != 0 ? static_cast<int64_t>((W * sizeof(T) - misaligned) / sizeof(T)) : kBlock;
  for (int64_t v = begin; v < end; v += n, n = kBlock) {
    if (n > end - v) n = end - v;
    const float* x = fetch(row + v, n, args.softcap, buffer).x;
    const auto write = grad.uniform == 0.0f && inverse_cap == 0.0f ? grad_block<true, T> : grad_block<false, T>;
    write(x, args.class_weight == nullptr ? nullptr : args.class_weight + v, out + v, n, inverse_cap, around, grad);
  }
  if (around) after_streaming();
  if (has_label) narrow(at_label, out + grad.label);
}
}  // namespace

template <typename T>
LossPart scan_any(const DataflexLoss& args, const void* row, int64_t begin, int64_t end, const DataflexSketch* tables,
                  float* sketch) {
  const T* x = static_cast<const T*>(row);
  return tables == nullptr ? scan(args, x, begin, end) : scan_fold(args, x, begin, end, *tables, sketch);
}

LossPart scan_row(const DataflexLoss& args, const void* row, int64_t begin, int64_t end, const DataflexSketch* tables,
                  float* sketch) {
  if (args.dtype == 0) return scan_any<float>(args, row, begin, end, tables, sketch);
  if (args.dtype == 1) return scan_any<Bf16>(args, row, begin, end, tables, sketch);
  return scan_any<Fp16>(args, row, begin, end, tables, sketch);
}

template <typename T>
void grad_any(const DataflexLoss& args, const void* row, void* out, int64_t begin, int64_t end,
              const LossRowGrad& grad) {
  gradient(args, static_cast<const T*>(row), static_cast<T*>(out), begin, end, grad);
}

void grad_row(const DataflexLoss& args, const void* row, void* out, int64_t begin, int64_t end,
              const LossRowGrad& grad) {
  if (args.dtype == 0) return grad_any<float>(args, row, out, begin, end, grad);
  if (args.dtype == 1) return grad_any<Bf16>(args, row, out, begin, end, grad);
  grad_any<Fp16>(args, row, out, begin, end, grad);
}
}  // namespace DATAFLEX_ISA
}  // namespace dataflex
