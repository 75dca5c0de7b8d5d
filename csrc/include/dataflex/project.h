// The arguments of a projection of per-sample gradients, for host and device.
#pragma once
#include "dataflex/philox.h"

namespace dataflex {
// (a m + c g) / (sqrt(b v + d g^2 + inside) + outside), or g itself without moments.
struct Adam {
  bool on;
  float a, c, b, d, inside, outside;
};

// Where the gradients come from. Pointers of empty tensors may be null in each.
enum Source { kOuterProducts, kMatrices, kRows };

struct ProjectCall {
  // What is added to; `dim` and `queries` are 0 and sqnorm null where not wanted.
  float* out;     // [samples, dim]
  float* sqnorm;  // [samples]
  float* dots;    // [samples, queries]
  int64_t samples, dim, queries;
  Source source;
  const void* row;         // kOuterProducts: [tokens, m], dtype, row_stride between tokens
  const void* col;         // [tokens, k]
  const float* grad;       // kMatrices: [samples, m, k]; kRows: [pieces, k]
  const int64_t* row_ids;  // kRows: [pieces]
  const int64_t* bounds;   // [samples + 1], in tokens or pieces
  int64_t pieces;          // how many tokens or pieces there are
  const float* scale;      // [samples]
  int64_t row_stride, col_stride;
  int dtype;  // 0 float32, 1 bfloat16, 2 float16
  bool minus_zero;
  // The matrix [m, k], whose element (0, 0) is (row_offset, col_offset) of the tensor.
  int64_t m, k, row_offset, col_offset;
  const float* exp_avg;     // [m, k]
  const float* exp_avg_sq;  // [m, k]
  const float* directions;  // [queries, m, k]
  Adam adam;
  int kind;
  HashKey key;
};
}  // namespace dataflex
