// Partial results of groups, added to the outputs in the order of the groups: no atomics, same input same bits.
// Reads groups * samples * dim floats, which the kernel before has just written (L2).
#include "project_device.cuh"

namespace dataflex {
// out [n] += sum over groups of features [groups, n]
__global__ void __launch_bounds__(256)
    add_groups(float* __restrict__ out, const float* __restrict__ features, int64_t groups, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float sum = 0.0f;
  for (int64_t g = 0; g < groups; g++) sum += features[g * n + i];
  out[i] += sum;
}

// sqnorm [samples], dots [samples, queries] += sum over groups of exact [groups, samples, 1 + queries]
__global__ void __launch_bounds__(256)
    add_exact(ProjectCall call, const double* __restrict__ exact, int64_t groups) {
  const int64_t wide = 1 + call.queries, n = call.samples * wide;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double sum = 0.0;
  for (int64_t g = 0; g < groups; g++) sum += exact[g * n + i];
  const int64_t s = i / wide, q = i % wide - 1;
  if (q >= 0) call.dots[s * call.queries + q] += static_cast<float>(sum);
  else if (call.sqnorm) call.sqnorm[s] += static_cast<float>(sum);
}

int launch_reduce(const ProjectCall& call, const float* features, int64_t feature_groups, const double* exact,
                         int64_t exact_groups, cudaStream_t stream) {
  const int64_t n = call.samples * call.dim, m = call.samples * (1 + call.queries);
  int code = cudaSuccess;
  if (feature_groups && n)
    code = DATAFLEX_LAUNCH(add_groups, dim3(static_cast<unsigned>((n + 255) / 256)), dim3(256), 0, stream, call.out,
                           features, feature_groups, n);
  if (code == cudaSuccess && exact_groups)
    code = DATAFLEX_LAUNCH(add_exact, dim3(static_cast<unsigned>((m + 255) / 256)), dim3(256), 0, stream, call, exact,
                           exact_groups);
  return code;
}
}  // namespace dataflex
