// One tile (64 x 128) of every sample's gradient at a time: products, transform, norms and inner products, signs and
// buckets. The gradient exists only as that tile, in the first cache; moments and hashes are prepared once a tile and
// used by all samples. Included by each variant.
//
// Floor: 2 tokens m k flops for the products; moments and directions read once a call.
#pragma once
#include "project.h"
#include "project_vector.h"

namespace dataflex {
namespace DATAFLEX_ISA {
namespace {
constexpr int kSegment = 16, kSegments = kTileColumns / kSegment;  // columns with one xor-fold key
constexpr int kSmallestVectorDim = 64;                              // its tile has 16 columns
constexpr int kFewColumns = 16;  // fewer than these: the products are formed with rows and columns exchanged

struct Workspace {
  alignas(64) float grad[kTileRows * kTileColumns];
  alignas(64) float first[kTileRows * kTileColumns];   // a m
  alignas(64) float second[kTileRows * kTileColumns];  // b v + inside
  alignas(64) float turned[kFewColumns * kTileRows];
  alignas(64) float left[kTokensAtOnce * kTileColumns];
  alignas(64) float right[kTokensAtOnce * kTileColumns];
  uint32_t signs[kTileRows][4];
  uint32_t place[kTileRows][kSegments];
  uint32_t slot[];  // [kSparsity or 1][kTileRows * kTileColumns]: bucket, and the sign in the top bit
};

// Rows [row, row + rows) of the matrix; columns [low, high) of the 128 that start at global column `column`.
struct Window {
  int64_t row, column;
  int rows, low, high;
};

bool scattered(const ProjectCall& call) {
  return call.dim && (call.kind != kXorfold || call.dim < kSmallestVectorDim);
}
int scattered_copies(const ProjectCall& call) { return call.kind == kSjlt ? kSparsity : 1; }

// Address of the window's column 0 in row r of a [m, k] matrix; columns outside [low, high) are not there.
template <typename T>
T* at(T* matrix, const ProjectCall& call, const Window& window, int r) {
  return matrix + (window.row + r) * call.k + (window.column - call.col_offset);
}

void prepare_moments(const ProjectCall& call, const Window& window, Workspace& work) {
  if (!call.adam.on) return;
  for (int r = 0; r < window.rows; r++) {
    float *first = work.first + r * kTileColumns, *second = work.second + r * kTileColumns;
    const float *m = at(call.exp_avg, call, window, r), *v = at(call.exp_avg_sq, call, window, r);
    for (int j = 0; j < kTileColumns; j++) first[j] = 0.0f, second[j] = 1.0f;  // padding: 0 / (sqrt(1) + ..) = 0
    for (int j = window.low; j < window.high; j++) {
      first[j] = call.adam.a * m[j];
      second[j] = call.adam.b * v[j] + call.adam.inside;
    }
  }
}

void prepare_xorfold(const ProjectCall& call, const Window& window, Workspace& work) {
  const TileShape shape = tile_shape(call.dim);
  const auto dim = static_cast<uint32_t>(call.dim);
  const uint32_t columns = 1u << shape.column_bits, mask = columns - 1;
  const auto column = static_cast<uint32_t>(window.column);
  uint32_t keys[kSegments] = {}, known = ~0u;
  for (int r = 0; r < window.rows; r++) {
    const auto row = static_cast<uint32_t>(call.row_offset + window.row + r);
    const Words words = sign_words(call.key, row, column);
    memcpy(work.signs[r], words.w, sizeof words.w);
    for (int g = 0; g < kSegments; g++) {
      const uint32_t start = column + g * kSegment;
      if (row >> shape.row_bits != known) {
        const bool same = g > 0 && start >> shape.column_bits == (start - kSegment) >> shape.column_bits;
        keys[g] = same ? keys[g - 1]
                       : tile_key(call.key, row >> shape.row_bits, start >> shape.column_bits, dim);
      }
      work.place[r][g] = (((row & ((1u << shape.row_bits) - 1)) << shape.column_bits) | (start & mask)) ^ keys[g];
    }
    known = row >> shape.row_bits;
  }
}

void prepare_slots(const ProjectCall& call, const Window& window, Workspace& work) {
  const auto dim = static_cast<uint32_t>(call.dim);
  const TileShape shape = tile_shape(call.dim);
  for (int r = 0; r < window.rows; r++) {
    for (int j = window.low; j < window.high; j++) {
      const auto row = static_cast<uint32_t>(call.row_offset + window.row + r);
      const auto column = static_cast<uint32_t>(window.column + j);
      uint32_t* slot = work.slot + r * kTileColumns + j;
      if (call.kind == kXorfold) {
        const uint32_t down = row >> shape.row_bits, across = column >> shape.column_bits;
        const uint32_t place = ((row & ((1u << shape.row_bits) - 1)) << shape.column_bits) |
                               (column & ((1u << shape.column_bits) - 1));
        const uint32_t sign = sign_words(call.key, row, column).w[(column >> 5) & 3] >> (column & 31);
        *slot = (place ^ tile_key(call.key, down, across, dim)) | sign << 31;
      } else if (call.kind == kCountSketch) {
        const uint32_t word = count_words(call.key, row, column).w[column & 3];
        *slot = word_bucket(word, dim) | word << 31;
      } else {
        const Words words = sparse_words(call.key, row, column);
        for (int q = 0; q < kSparsity; q++) {
          const uint32_t bucket = word_bucket(words.w[q], dim / kSparsity) + q * (dim / kSparsity);
          slot[q * kTileRows * kTileColumns] = bucket | words.w[q] << 31;
        }
      }
    }
  }
}

void prepare(const ProjectCall& call, const Window& window, Workspace& work) {
  prepare_moments(call, window, work);
  if (scattered(call)) prepare_slots(call, window, work);
  else if (call.dim) prepare_xorfold(call, window, work);
}

void multiply(float* grad, int stride, const float* left, const float* right, int rows,
              int columns, int tokens, bool first) {
  for (int j = 0; j < columns; j += kStripColumns)
    for (int i = 0; i < rows; i += kStripRows)
      multiply_strip(grad + i * stride + j, stride, left + static_cast<int64_t>(i) * tokens,
                     right + static_cast<int64_t>(j) * tokens, tokens, first);
}

// work.grad = sum over the sample's tokens of row[t] col[t]^T.
template <typename T>
void form(const ProjectCall& call, const Window& window, int64_t sample, Workspace& work) {
  const T* row = static_cast<const T*>(call.row) + window.row;
  const T* col = static_cast<const T*>(call.col) + (window.column - call.col_offset + window.low);
  const bool turn = window.high <= kFewColumns && window.rows > kFewColumns;
  const int64_t begin = call.bounds[sample], end = call.bounds[sample + 1];
  for (int64_t t = begin; t == begin || t < end; t += kTokensAtOnce) {
    const int tokens = static_cast<int>(end - t < kTokensAtOnce ? end - t : kTokensAtOnce);
    const T *rows = row + t * call.row_stride, *cols = col + t * call.col_stride;
    if (turn) {
      pack<kStripRows>(work.left, cols, call.col_stride, tokens, window.low, window.high);
      pack<kStripColumns>(work.right, rows, call.row_stride, tokens, 0, window.rows);
      multiply(work.turned, kTileRows, work.left, work.right, window.high, window.rows, tokens, t == begin);
    } else {
      pack<kStripRows>(work.left, rows, call.row_stride, tokens, 0, window.rows);
      pack<kStripColumns>(work.right, cols, call.col_stride, tokens, window.low, window.high);
      multiply(work.grad, kTileColumns, work.left, work.right, window.rows, window.high, tokens, t == begin);
    }
  }
  if (!turn) return;
  for (int r = 0; r < window.rows; r++)
    for (int j = 0; j < kFewColumns; j++)
      work.grad[r * kTileColumns + j] = j < window.high ? work.turned[j * kTileRows + r] : 0.0f;
}

// work.grad = rows of grad [.., k] that start at `from`.
void copy(const ProjectCall& call, const Window& window, const float* from, Workspace& work) {
  for (int r = 0; r < window.rows; r++) {
    float* to = work.grad + r * kTileColumns;
    const float* source = from + r * call.k + (window.column - call.col_offset);
    for (int j = 0; j < kTileColumns; j++) to[j] = 0.0f;
    for (int j = window.low; j < window.high; j++) to[j] = source[j];
  }
}

Floats transformed(const Adam& adam, Floats grad, Floats first, Floats second) {
  const Floats above = first + all(adam.c) * grad, below = second + all(adam.d) * grad * grad;
  return above / (root(below) + all(adam.outside));
}

// work.grad = transform of scale * work.grad, less that of zero where asked.
void transform(const ProjectCall& call, const Window& window, float scale, Workspace& work) {
  const int columns = (window.high + kSegment - 1) / kSegment * kSegment;
  for (int r = 0; r < window.rows; r++) {
    for (int j = 0; j < columns; j += kWidth) {
      float* grad = work.grad + r * kTileColumns + j;
      Floats value = load(grad) * all(scale);
      if (call.adam.on) {
        const Floats first = load(work.first + r * kTileColumns + j), second = load(work.second + r * kTileColumns + j);
        value = transformed(call.adam, value, first, second);
      }
      store(grad, value);
    }
  }
}

// exact[0] += squared norm, exact[1 + q] += inner product with direction q.
void measure(const ProjectCall& call, const Window& window, const Workspace& work, double* exact) {
  const int n = window.high - window.low;
  for (int r = 0; r < window.rows; r++) {
    const float* value = work.grad + r * kTileColumns + window.low;
    if (call.sqnorm) exact[0] += inner(value, value, n);
    for (int64_t q = 0; q < call.queries; q++)
      exact[1 + q] += inner(value, at(call.directions + q * call.m * call.k, call, window, r) + window.low, n);
  }
}

void fold(const Window& window, const Workspace& work, float* features) {
  Bits lane;
  for (int i = 0; i < kWidth; i++) lane[i] = static_cast<uint32_t>(i);
  const Bits up = 31 - lane;
  for (int r = 0; r < window.rows; r++) {
    for (int j = window.low / kSegment * kSegment; j < window.high; j += kWidth) {
      const uint32_t place = work.place[r][j / kSegment] ^ static_cast<uint32_t>(j % kSegment);
      const uint32_t word = work.signs[r][j / 32] >> (j % 32);
      Bits value = bits_of(load(work.grad + r * kTileColumns + j));
      value ^= ((word - Bits{}) << up) & 0x80000000u;
      value = __builtin_shuffle(value, lane ^ (place & (kWidth - 1)));
      float* to = features + (place & ~static_cast<uint32_t>(kWidth - 1));
      store(to, load(to) + floats_of(value));
    }
  }
}

void scatter(const ProjectCall& call, const Window& window, const Workspace& work, float* features) {
  const float factor = call.kind == kSjlt ? 0.5f : 1.0f;
  for (int q = 0; q < scattered_copies(call); q++) {
    const uint32_t* slots = work.slot + q * kTileRows * kTileColumns;
    for (int r = 0; r < window.rows; r++) {
      for (int j = window.low; j < window.high; j++) {
        const uint32_t slot = slots[r * kTileColumns + j];
        const float value = work.grad[r * kTileColumns + j] * factor;
        features[slot & 0x7fffffffu] += slot >> 31 ? -value : value;
      }
    }
  }
}

void add_features(const ProjectCall& call, const Window& window, const Workspace& work, float* features) {
  if (scattered(call)) scatter(call, window, work, features);
  else if (call.dim) fold(window, work, features);
}

Window window_of(const ProjectCall& call, int64_t row, int rows, int64_t tile) {
  const int64_t start = (call.col_offset / kTileColumns + tile) * kTileColumns, end = call.col_offset + call.k;
  const int low = static_cast<int>(start < call.col_offset ? call.col_offset - start : 0);
  return {row, start, rows, low, static_cast<int>(end - start < kTileColumns ? end - start : kTileColumns)};
}
}  // namespace

int64_t project_workspace(const ProjectCall& call) {
  const int64_t slots = scattered(call) ? static_cast<int64_t>(scattered_copies(call)) * kTileRows * kTileColumns : 0;
  return static_cast<int64_t>(sizeof(Workspace)) + slots * 4;
}

void project_tiles(const ProjectCall& call, int64_t first_tile, int64_t last_tile, int64_t first, int64_t last,
                   float* features, double* exact, void* workspace) {
  Workspace& work = *static_cast<Workspace*>(workspace);
  const int64_t across = column_tiles(call);
  for (int64_t tile = first_tile; tile < last_tile; tile++) {
    const int64_t row = tile / across * kTileRows;
    const int rows = static_cast<int>(call.m - row < kTileRows ? call.m - row : kTileRows);
    const Window window = window_of(call, row, rows, tile % across);
    prepare(call, window, work);
    for (int64_t s = first; s < last; s++) {
      if (call.source == kMatrices) copy(call, window, call.grad + (s * call.m + row) * call.k, work);
      else if (call.dtype == 0) form<float>(call, window, s, work);
      else if (call.dtype == 1) form<BFloat16>(call, window, s, work);
      else form<_Float16>(call, window, s, work);
      transform(call, window, call.scale[s], work);
      measure(call, window, work, exact + (s - first) * (1 + call.queries));
      add_features(call, window, work, features + (s - first) * call.dim);
    }
  }
}

void project_rows(const ProjectCall& call, int64_t sample, float* features, double* exact, void* workspace) {
  Workspace& work = *static_cast<Workspace*>(workspace);
  for (int64_t p = call.bounds[sample]; p < call.bounds[sample + 1]; p++) {
    for (int64_t tile = 0; tile < column_tiles(call); tile++) {
      const Window window = window_of(call, call.row_ids[p], 1, tile);
      prepare(call, window, work);
      copy(call, window, call.grad + p * call.k, work);
      transform(call, window, call.scale[sample], work);
      if (!call.minus_zero || !call.adam.on) {
        measure(call, window, work, exact);
        add_features(call, window, work, features);
        continue;
      }
      float* untouched = work.grad + kTileColumns;
      for (int j = 0; j < kTileColumns; j += kWidth)
        store(untouched + j, transformed(call.adam, Floats{}, load(work.first + j), load(work.second + j)));
      const int n = window.high - window.low;
      const float *value = work.grad + window.low, *before = untouched + window.low;
      const double norm = inner(value, value, n) - inner(before, before, n);
      for (int j = 0; j < kTileColumns; j += kWidth) store(work.grad + j, load(work.grad + j) - load(untouched + j));
      const double measured = exact[0];
      measure(call, window, work, exact);
      exact[0] = measured + norm;
      add_features(call, window, work, features);
    }
  }
}
}  // namespace DATAFLEX_ISA
}  // namespace dataflex
