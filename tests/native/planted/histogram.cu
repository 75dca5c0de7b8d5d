// Counts and sums of values in bins, in shared memory first, with one bug of the harness's choice.
#include "dataflex/portable.cuh"

__global__ void __launch_bounds__(128)
    histogram(const float* __restrict__ in, int n, int bins, unsigned* __restrict__ counts, float* __restrict__ sums) {
  DATAFLEX_DYNAMIC_SHARED(unsigned, count);
  float* sum = reinterpret_cast<float*>(count + bins);
  for (int i = threadIdx.x; i < bins; i += blockDim.x) {
    count[i] = 0;
    sum[i] = 0.0f;
  }
#ifndef BUG_NO_FIRST_BARRIER
  __syncthreads();
#endif
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
#ifdef BUG_BIN_OFF_BY_ONE
    const int bin = min(static_cast<int>(in[i] * bins), bins);
#else
    const int bin = min(static_cast<int>(in[i] * bins), bins - 1);
#endif
#ifdef BUG_PLAIN_ADD
    count[bin] += 1;
#else
    atomicAdd(&count[bin], 1u);
#endif
    atomicAdd(&sum[bin], in[i]);
  }
#ifndef BUG_NO_LAST_BARRIER
  __syncthreads();
#endif
  for (int i = threadIdx.x; i < bins; i += blockDim.x) {
#ifdef BUG_PLAIN_GLOBAL_ADD
    counts[i] += count[i];
#else
    atomicAdd(&counts[i], count[i]);
#endif
    atomicAdd(&sums[i], sum[i]);
  }
}
