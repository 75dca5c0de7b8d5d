// What the projection kernels share: the transform, elements with their moments, sums in a fixed order.
#pragma once
#include "dataflex/portable.cuh"
#include "dataflex/project.h"
#include "dataflex/ptx.cuh"

namespace dataflex {
// Groups that tiles are divided into, about one block for each processor of an H100. By the shape alone: the bits
// of a result do not depend on the device.
constexpr int64_t kBlocks = 132;

// Bytes of shared memory that a block can have on the current device: 99 KiB on sm_86, 163 on an A100, 227 on an H100.
inline int64_t largest_shared() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 48 << 10;
  return bytes;
}

__host__ __device__ __forceinline__ int64_t clamp_groups(int64_t groups, int64_t tiles) {
  return groups < 1 ? 1 : groups > tiles ? (tiles < 1 ? 1 : tiles) : groups;
}

// first = a m, second = b v + inside; see struct Adam. Root and quotient are approximate, together within 4 ulp: the
// sums over thousands of such values that follow are rounded more than that.
__device__ __forceinline__ float by_adam(const Adam& adam, float grad, float first, float second) {
  const float below = sqrt_approximate(second + adam.d * grad * grad) + adam.outside;
  return (first + adam.c * grad) * reciprocal_approximate(below);
}
__device__ __forceinline__ float transformed(const Adam& adam, float grad, float first, float second) {
  return adam.on ? by_adam(adam, grad, first, second) : grad;
}

// Moments of element `at` of the matrix, prepared; the transform of 0 is 0 where there is no element.
__device__ __forceinline__ void load_moments(const ProjectCall& call, int64_t at, bool valid, float* first,
                                             float* second) {
  *first = 0.0f, *second = 1.0f;
  if (!valid || !call.adam.on) return;
  *first = call.adam.a * __ldg(call.exp_avg + at);
  *second = call.adam.b * __ldg(call.exp_avg_sq + at) + call.adam.inside;
}

// bounds[s], kept inside of what there is: device memory is not checked on the host.
__device__ __forceinline__ int64_t bound_of(const ProjectCall& call, int64_t s) {
  const int64_t bound = __ldg(call.bounds + s);
  return bound < 0 ? 0 : bound > call.pieces ? call.pieces : bound;
}

__device__ __forceinline__ float with_sign(float value, uint32_t minus) {
  return __uint_as_float(__float_as_uint(value) ^ (minus << 31));
}

// Sum over the warp, the same bits in every lane and every time.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// project_reduce.cu: adds the partial results of groups to the outputs; 0 groups where there are none.
int launch_reduce(const ProjectCall& call, const float* features, int64_t feature_groups, const double* exact,
                  int64_t exact_groups, cudaStream_t stream);
}  // namespace dataflex
