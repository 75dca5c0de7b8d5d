// Sums of rows, one block a row, with one bug of the harness's choice.
#include "dataflex/portable.cuh"

__global__ void __launch_bounds__(128) block_sum(const float* __restrict__ in, float* __restrict__ out, int columns) {
  DATAFLEX_SHARED(float, parts, [4]);
  const float* row = in + static_cast<size_t>(blockIdx.x) * columns;
  float sum = 0.0f;
#ifdef BUG_OFF_BY_ONE
  for (int i = threadIdx.x; i <= columns; i += blockDim.x) sum += row[i];
#else
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += row[i];
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int by = 16; by; by >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, by);
#ifdef BUG_UNINITIALISED
  if (lane == 0 && warp < 3) parts[warp] = sum;
#elif defined(BUG_SHARED_OVERRUN)
  if (lane == 0) parts[warp + 1] = sum;
#else
  if (lane == 0) parts[warp] = sum;
#endif
#if defined(BUG_DIVERGENT_BARRIER)
  if (warp == 0)
    __syncthreads();
  else
    __syncthreads();
#elif defined(BUG_SKIPPED_BARRIER)
  if (warp != 2) __syncthreads();
  if (warp == 2 && lane < 3) __syncwarp(0x0fu);
#elif !defined(BUG_NO_BARRIER)
  __syncthreads();
#endif
  if (warp != 0) return;
  sum = lane < 4 ? parts[lane] : 0.0f;
#ifdef BUG_INACTIVE_LANES
  if (lane < 4) sum += __shfl_xor_sync(0xffffffffu, sum, 2);
#elif defined(BUG_LANE_OUTSIDE)
  if (lane < 4) sum += __shfl_sync(0x0fu, sum, lane + 4);
#endif
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  if (lane == 0) out[blockIdx.x] = sum;
}
