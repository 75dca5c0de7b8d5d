// The loss ops on the CPU: rows over threads, or parts of rows where there are few; then tokens to samples.
#include "loss.h"

#include <math.h>
#include <string.h>

#include <vector>

namespace dataflex {
namespace {
constexpr int64_t kPart = 16384;   // columns of a part of a row
constexpr int64_t kFewRows = 32;   // with fewer rows than this, rows are split; a number that no thread count changes
constexpr int64_t kGrain = 65536;  // logits that are worth a thread

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts_of(int64_t rows, int64_t vocab) { return rows >= kFewRows ? 1 : (vocab + kPart - 1) / kPart; }
const char* row_of(const DataflexLoss& args, int64_t row) {
  return static_cast<const char*>(args.logits) + row * args.row_stride * loss_element_size(args);
}
// The label's column here, or -1 where another shard of the vocabulary has it.
int64_t column_of(const DataflexLoss& args, int64_t row) {
  const int64_t column = args.labels[row] - args.vocab_offset;
  return column >= 0 && column < args.vocab ? column : -1;
}
float logit(const DataflexLoss& args, int64_t row, int64_t column) {
  float x;
  if (args.dtype == 0) {
    x = reinterpret_cast<const float*>(row_of(args, row))[column];
  } else {
    const uint16_t half = reinterpret_cast<const uint16_t*>(row_of(args, row))[column];
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    _Float16 fp16;
    memcpy(&fp16, &half, sizeof fp16);
    memcpy(&x, &bits, sizeof x);
    if (args.dtype == 2) x = static_cast<float>(fp16);
  }
  return args.softcap == 0.0f ? x : args.softcap * tanhf(x / args.softcap);
}

// Adds `more` to `into`: the states of the online softmax are a commutative monoid.
void merge(const LossPart& more, const float* more_sketch, LossPart* into, float* sketch, int64_t k1) {
  const float max = more.max > into->max ? more.max : into->max;
  const float keep = into->max == max ? 1.0f : expf(into->max - max);
  const float take = more.max == max ? 1.0f : expf(more.max - max);
  into->sum = into->sum * keep + more.sum * take;
  into->max = max;
  into->weighted += more.weighted;
  into->weights += more.weights;
  for (int64_t j = 0; sketch != nullptr && j < k1; j++) sketch[j] = sketch[j] * keep + more_sketch[j] * take;
}

void finish(const DataflexLoss& args, int64_t row, const LossPart& part, const DataflexSketch* tables,
            const DataflexLossOut& out) {
  const int64_t column = column_of(args, row);
  const double smooth = args.label_smoothing, spread = smooth / static_cast<double>(args.vocab);
  const double log_sum = logf(part.sum), lse = part.max + log_sum;
  const double at_label = column >= 0 ? logit(args, row, column) : args.sharded ? 0.0 : NAN;
  const double token = args.token_weight == nullptr ? 1.0 : args.token_weight[row];
  const double hit = (1.0 - smooth) * (args.class_weight == nullptr || column < 0 ? 1.0 : args.class_weight[column]);
  double loss = hit * (log_sum + (part.max - at_label));
  if (smooth != 0.0) loss += spread * (part.weights * lse - part.weighted);
  if (args.z_loss != 0.0f) loss += args.z_loss * lse * lse;
  out.token_loss[row] = static_cast<float>(token * loss);
  out.lse[row] = static_cast<float>(lse);
  out.lse_low[row] = isfinite(lse) ? static_cast<float>(lse - out.lse[row]) : 0.0f;
  if (tables == nullptr) return;
  float* sketch = tables->out + row * tables->k1;
  const double soft = token * (hit + spread * part.weights + 2.0 * args.z_loss * lse);
  const float factor = static_cast<float>(soft / part.sum), even = static_cast<float>(token * spread);
  for (int64_t j = 0; j < tables->k1; j++) sketch[j] *= factor;
  for (int64_t j = 0; tables->uniform != nullptr && j < tables->k1; j++) sketch[j] -= even * tables->uniform[j];
  if (column < 0) return;
  const double t = args.softcap == 0.0f ? 0.0 : at_label / args.softcap;
  const int64_t to = column % tables->k1 ^ tables->keys[column / tables->k1];
  const bool negative = tables->signs[column / 32] >> (column % 32) & 1;
  sketch[to] -= static_cast<float>(token * hit * (1.0 - t * t) * (negative ? -1.0 : 1.0));
}

void to_samples(const DataflexLoss& args, const DataflexLossOut& out) {
  for (int64_t s = 0; s < args.samples; s++) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t row = args.cu_seqlens[s]; row < args.cu_seqlens[s + 1]; row++) {
      if (args.labels[row] == args.ignore_index) continue;
      sum += out.token_loss[row];
      count++;
    }
    out.count[s] = count;
    out.loss[s] = static_cast<float>(args.mean && count > 0 ? sum / static_cast<double>(count) : sum);
  }
}

std::vector<int64_t> counted_rows(const DataflexLoss& args, const DataflexSketch* tables, const DataflexLossOut& out) {
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(args.rows));
  for (int64_t row = 0; row < args.rows; row++) {
    if (args.labels[row] != args.ignore_index) {
      rows.push_back(row);
      continue;
    }
    out.token_loss[row] = out.lse[row] = out.lse_low[row] = 0.0f;
    if (tables != nullptr) memset(tables->out + row * tables->k1, 0, sizeof(float) * static_cast<size_t>(tables->k1));
  }
  return rows;
}

// The factors of a row's gradient, from the gradients of the outputs. all_weights: sum of the class weights.
LossRowGrad factors(const DataflexLoss& args, const DataflexLossGrad& grad, int64_t row, int64_t sample,
                    double all_weights) {
  const int64_t column = column_of(args, row), count = grad.count[sample];
  double from = grad.token == nullptr ? 0.0 : grad.token[row];
  if (grad.loss != nullptr) from += grad.loss[sample] / (args.mean && count > 0 ? static_cast<double>(count) : 1.0);
  if (args.token_weight != nullptr) from *= args.token_weight[row];
  const double smooth = args.label_smoothing, spread = smooth / static_cast<double>(args.vocab), lse = grad.lse[row];
  const double hit = (1.0 - smooth) * (args.class_weight == nullptr || column < 0 ? 1.0 : args.class_weight[column]);
  double soft = from * (hit + spread * all_weights);
  if (args.z_loss != 0.0f) soft += from * 2.0 * args.z_loss * lse;
  if (grad.lse_grad != nullptr) soft += grad.lse_grad[row];
  // exp(x - lse - low) is exp(x - lse) exp(-low).
  soft *= exp(-static_cast<double>(grad.lse_low[row]));
  return {grad.lse[row], static_cast<float>(soft), static_cast<float>(from * spread),
          column < 0 ? 0.0f : static_cast<float>(from * hit), column};
}

std::vector<int64_t> samples_of_rows(const DataflexLoss& args) {
  std::vector<int64_t> sample(static_cast<size_t>(args.rows), 0);
  for (int64_t s = 0; s < args.samples; s++)
    for (int64_t row = args.cu_seqlens[s]; row < args.cu_seqlens[s + 1]; row++) sample[static_cast<size_t>(row)] = s;
  return sample;
}

// A row that is not finite has a gradient that is not a number; a row that nothing asks of has none.
void fill_row(const DataflexLoss& args, void* out, int64_t begin, int64_t end, bool nan) {
  if (args.dtype == 0) {
    for (int64_t v = begin; v < end; v++) static_cast<float*>(out)[v] = nan ? NAN : 0.0f;
  } else {
    const uint16_t value = !nan ? 0 : args.dtype == 1 ? 0x7fc0 : 0x7e00;
    for (int64_t v = begin; v < end; v++) static_cast<uint16_t*>(out)[v] = value;
  }
}
}  // namespace

void loss_forward(const DataflexLoss& args, const DataflexSketch* tables, const DataflexLossOut& out) {
  const std::vector<int64_t> rows = counted_rows(args, tables, out);
  const auto n = static_cast<int64_t>(rows.size());
  const int64_t parts = parts_of(n, args.vocab), k1 = tables == nullptr ? 0 : tables->k1;
  // Parts of rows begin at whole folds of the sketch.
  const int64_t width = tables == nullptr ? kPart : (kPart + k1 - 1) / k1 * k1;
  std::vector<LossPart> states(static_cast<size_t>(n * parts));
  std::vector<float> sketches(static_cast<size_t>(parts > 1 ? n * parts * k1 : 0), 0.0f);
  const auto sketch_of = [&](int64_t i) {
    if (tables == nullptr) return static_cast<float*>(nullptr);
    return parts > 1 ? sketches.data() + i * k1 : tables->out + rows[static_cast<size_t>(i)] * k1;
  };
  parallel_for(n * parts, 1 + kGrain / args.vocab, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t row = rows[static_cast<size_t>(i / parts)], begin = min_of(i % parts * width, args.vocab);
      const int64_t end = parts == 1 ? args.vocab : min_of(begin + width, args.vocab);
      float* sketch = sketch_of(i);
      if (sketch != nullptr && parts == 1) memset(sketch, 0, sizeof(float) * static_cast<size_t>(k1));
      LossPart part = DATAFLEX_DISPATCH(scan_row, args, row_of(args, row), begin, end, tables, sketch);
      if (parts == 1) finish(args, row, part, tables, out);
      else states[static_cast<size_t>(i)] = part;
    }
  });
  for (int64_t i = 0; parts > 1 && i < n; i++) {
    LossPart& whole = states[static_cast<size_t>(i * parts)];
    float* sketch = sketch_of(i * parts);
    for (int64_t p = 1; p < parts; p++)
      merge(states[static_cast<size_t>(i * parts + p)], sketch_of(i * parts + p), &whole, sketch, k1);
    const int64_t row = rows[static_cast<size_t>(i)];
    if (tables != nullptr) memcpy(tables->out + row * k1, sketch, sizeof(float) * static_cast<size_t>(k1));
    finish(args, row, whole, tables, out);
  }
  to_samples(args, out);
}

void loss_backward(const DataflexLoss& args, const DataflexLossGrad& grad) {
  const std::vector<int64_t> sample = samples_of_rows(args);
  double all_weights = static_cast<double>(args.vocab);
  if (args.class_weight != nullptr && args.label_smoothing != 0.0f) {
    all_weights = 0.0;
    for (int64_t v = 0; v < args.vocab; v++) all_weights += args.class_weight[v];
  }
  const int64_t parts = parts_of(args.rows, args.vocab);
  parallel_for(args.rows * parts, 1 + kGrain / args.vocab, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t row = i / parts, begin = parts == 1 ? 0 : i % parts * kPart;
      const int64_t end = parts == 1 ? args.vocab : min_of(begin + kPart, args.vocab);
      char* out = static_cast<char*>(grad.logits) + row * grad.out_stride * loss_element_size(args);
      const LossRowGrad by = factors(args, grad, row, sample[static_cast<size_t>(row)], all_weights);
      const bool none = by.soft == 0.0f && by.uniform == 0.0f && by.hit == 0.0f;
      if (none || args.labels[row] == args.ignore_index) fill_row(args, out, begin, end, false);
      else if (!isfinite(by.lse) || !isfinite(by.soft)) fill_row(args, out, begin, end, true);
      else DATAFLEX_DISPATCH(grad_row, args, row_of(args, row), out, begin, end, by);
    }
  });
}
}  // namespace dataflex
