// The kernels of the epilogue, as project.cu puts them together. Each divides the matrix into groups.
#pragma once
#include "project_device.cuh"

namespace dataflex {
// project_fold.cu: xor-fold of whole matrices, dim >= 64.
int64_t fold_groups(const ProjectCall& call);
int launch_fold(const ProjectCall& call, float* features, int64_t groups, cudaStream_t stream);

// project_scatter.cu: every other projection, and rows.
int64_t scatter_groups(const ProjectCall& call);
int launch_scatter(const ProjectCall& call, float* features, int64_t groups, cudaStream_t stream);

// project_exact.cu: norms and inner products.
int64_t exact_groups(const ProjectCall& call);
int launch_exact(const ProjectCall& call, double* exact, int64_t groups, cudaStream_t stream);

// Element e of a sample: its place in the gradients and in the matrix. With rows, a sample has
// bounds[s + 1] - bounds[s] of them, else it has the m of the matrix.
struct Element {
  float grad;
  int64_t row, column, at;
};
__device__ __forceinline__ int64_t rows_of(const ProjectCall& call, int64_t sample) {
  if (call.source == kMatrices) return call.m;
  const int64_t rows = bound_of(call, sample + 1) - bound_of(call, sample);
  return rows < 0 ? 0 : rows;
}
__device__ __forceinline__ Element element_of(const ProjectCall& call, int64_t sample, int64_t r, int64_t column) {
  const int64_t piece = call.source == kRows ? bound_of(call, sample) + r : sample * call.m + r;
  const int64_t row = call.source == kRows ? call.row_ids[piece] : r;
  if (row < 0 || row >= call.m) return {NAN, 0, column, column};  // no such row: spoils its sample, reads nothing
  return {call.grad[piece * call.k + column] * call.scale[sample], row, column, row * call.k + column};
}
}  // namespace dataflex
