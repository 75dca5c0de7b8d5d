// The arguments of project_outer and project_values as a ProjectCall, for the CPU and for CUDA.
#pragma once
#include "dataflex/project.h"

#include <algorithm>

#include "common.h"

namespace dataflex {
using Optional = std::optional<Tensor>;

inline const float* matrix(const Optional& tensor, const char* name, int64_t numel) {
  STD_TORCH_CHECK(!tensor.has_value() || tensor->numel() == numel, name, ": expected ", numel, " numbers");
  return input<float>(tensor, name);
}

// What both ops share; bounds [S + 1].
inline ProjectCall common_call(const Tensor& out, const Tensor& sqnorm, const Tensor& dots, const Tensor& bounds,
                               const Tensor& scale, int64_t pieces, int64_t m, int64_t k, const Optional& exp_avg,
                               const Optional& exp_avg_sq, const std::vector<double>& adam, const Optional& directions,
                               int64_t kind, int64_t seed, int64_t tensor_id, int64_t row_offset, int64_t col_offset) {
  ProjectCall call{};
  call.samples = out.size(0), call.dim = out.size(1), call.queries = dots.size(1);
  STD_TORCH_CHECK(dots.size(0) == call.samples && bounds.numel() == call.samples + 1, "expected one row per sample");
  STD_TORCH_CHECK(sqnorm.numel() == 0 || sqnorm.numel() == call.samples, "sqnorm: expected one number per sample");
  STD_TORCH_CHECK(adam.empty() || (adam.size() == 6 && exp_avg.has_value() && exp_avg_sq.has_value()),
                  "coefficients: expected none, or six and the moments");
  STD_TORCH_CHECK(call.queries == 0 || directions.has_value(), "directions: expected a tensor");
  STD_TORCH_CHECK(kind >= kXorfold && kind <= kSjlt, "kind: expected 0 to 2, got ", kind);
  STD_TORCH_CHECK(kind != kXorfold || (call.dim & (call.dim - 1)) == 0, "out: expected a power of two of columns");
  STD_TORCH_CHECK(kind != kSjlt || call.dim % kSparsity == 0, "out: expected a multiple of 4 columns");
  call.out = output<float>(out, "out"), call.dots = output<float>(dots, "dots");
  call.sqnorm = sqnorm.numel() ? output<float>(sqnorm, "sqnorm") : nullptr;
  call.bounds = input<int64_t>(bounds, "bounds"), call.pieces = pieces;
  STD_TORCH_CHECK(scale.numel() == call.samples, "scale: expected one number per sample");
  call.scale = input<float>(scale, "scale");
  call.m = m, call.k = k, call.row_offset = row_offset, call.col_offset = col_offset;
  if (!adam.empty()) {
    const auto f = [&](int i) { return static_cast<float>(adam[i]); };
    call.adam = {true, f(0), f(1), f(2), f(3), f(4), f(5)};
    call.exp_avg = matrix(exp_avg, "exp_avg", m * k), call.exp_avg_sq = matrix(exp_avg_sq, "exp_avg_sq", m * k);
  }
  call.directions = matrix(directions, "directions", call.queries * m * k);
  call.kind = static_cast<int>(kind);
  call.key = {static_cast<uint64_t>(seed), static_cast<uint32_t>(tensor_id)};
  return call;
}

inline ProjectCall outer_call(const Tensor& out, const Tensor& sqnorm, const Tensor& dots, const Tensor& row,
                              const Tensor& col, const Tensor& cu_seqlens, const Tensor& scale, const Optional& exp_avg,
                              const Optional& exp_avg_sq, const std::vector<double>& adam, const Optional& directions,
                              int64_t kind, int64_t seed, int64_t tensor_id, int64_t row_offset, int64_t col_offset) {
  STD_TORCH_CHECK(row.dim() == 2 && col.dim() == 2 && row.size(0) == col.size(0), "row, col: expected [N, M], [N, K]");
  STD_TORCH_CHECK(row.numel() == 0 || row.stride(1) == 1 || row.size(1) == 1, "row: expected neighbouring columns side by side");
  STD_TORCH_CHECK(col.numel() == 0 || col.stride(1) == 1 || col.size(1) == 1, "col: expected neighbouring columns side by side");
  ProjectCall call = common_call(out, sqnorm, dots, cu_seqlens, scale, row.size(0), row.size(1), col.size(1), exp_avg,
                                 exp_avg_sq, adam, directions, kind, seed, tensor_id, row_offset, col_offset);
  call.source = kOuterProducts, call.dtype = dtype_code(row, "row");
  STD_TORCH_CHECK(call.dtype == dtype_code(col, "col"), "col: expected the dtype of row");
  call.row = row.const_data_ptr(), call.col = col.const_data_ptr();
  call.row_stride = row.stride(0), call.col_stride = col.stride(0);
  return call;
}

inline ProjectCall values_call(const Tensor& out, const Tensor& sqnorm, const Tensor& dots, const Tensor& grad,
                               const Optional& row_ids, const Tensor& bounds, const Tensor& scale,
                               const Optional& exp_avg, const Optional& exp_avg_sq, const std::vector<double>& adam,
                               const Optional& directions, int64_t kind, int64_t seed, int64_t tensor_id,
                               int64_t row_offset, int64_t col_offset, bool minus_zero) {
  STD_TORCH_CHECK(grad.dim() == 3, "grad: expected [P, m, k]");
  const Optional& shaped = exp_avg.has_value() && !adam.empty() ? exp_avg : directions;
  int64_t m = grad.size(1);
  if (row_ids.has_value()) {
    STD_TORCH_CHECK(m == 1 && row_ids->numel() == grad.size(0), "row_ids: expected one per piece of one row");
    const int64_t k = std::max<int64_t>(grad.size(2), 1);
    m = shaped.has_value() ? shaped->size(shaped->dim() - 2) : int64_t{1} << 31;
    STD_TORCH_CHECK(!shaped.has_value() || shaped->size(shaped->dim() - 1) == k, "expected moments [M, K]");
  } else {
    STD_TORCH_CHECK(grad.size(0) == out.size(0), "grad: expected one piece per sample");
  }
  ProjectCall call = common_call(out, sqnorm, dots, bounds, scale, grad.size(0), m, grad.size(2), exp_avg, exp_avg_sq, adam,
                                 directions, kind, seed, tensor_id, row_offset, col_offset);
  call.grad = input<float>(grad, "grad"), call.row_ids = input<int64_t>(row_ids, "row_ids");
  call.source = row_ids.has_value() ? kRows : kMatrices, call.minus_zero = minus_zero;
  return call;
}
}  // namespace dataflex
