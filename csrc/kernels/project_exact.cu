// Epilogue for exact scores: squared norms and inner products with directions, in double between blocks.
//
// Floor: reads 4 bytes of gradient an element and sample, and 8 of moments and 4 queries of directions an element,
// once from memory: blocks of the other samples run beside and find them in L2.
#include "project_epilogue.cuh"

namespace dataflex {
namespace {
constexpr int kThreads = 256, kQueries = 4;

// Grid: (samples, groups). exact [groups, samples, 1 + queries]; this launch writes queries [from, from + kQueries)
// and, with from = 0, the norm.
__global__ void __launch_bounds__(kThreads) measure_values(ProjectCall call, double* exact, int64_t from) {
  DATAFLEX_SHARED(float, parts, [kThreads / 32][1 + kQueries]);
  // A whole matrix is taken as one long row.
  const int64_t sample = blockIdx.x, wide = call.source == kRows ? call.k : call.m * call.k;
  const int64_t n = call.source == kRows ? rows_of(call, sample) * wide : wide;
  const int64_t begin = n * blockIdx.y / gridDim.y, end = n * (blockIdx.y + 1) / gridDim.y;
  const auto queries = static_cast<int>(min(static_cast<int64_t>(kQueries), call.queries - from));
  float sum[1 + kQueries] = {};
  int64_t row = (begin + threadIdx.x) / wide, column = (begin + threadIdx.x) % wide;
  const int64_t rows_on = kThreads / wide, columns_on = kThreads % wide;
  for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
    const Element element = element_of(call, sample, row, column);
    row += rows_on, column += columns_on;
    if (column >= wide) column -= wide, row++;
    float first, second;
    load_moments(call, element.at, true, &first, &second);
    float value = transformed(call.adam, element.grad, first, second);
    sum[0] += value * value;
    if (call.source == kRows && call.minus_zero) {
      const float before = transformed(call.adam, 0.0f, first, second);
      sum[0] -= before * before;
      value -= before;
    }
#pragma unroll
    for (int q = 0; q < kQueries; q++)
      if (q < queries) sum[1 + q] += value * __ldg(call.directions + (from + q) * call.m * call.k + element.at);
  }
#pragma unroll
  for (int q = 0; q <= kQueries; q++) {
    sum[q] = warp_sum(sum[q]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][q] = sum[q];
  }
  __syncthreads();
  const auto q = static_cast<int>(threadIdx.x);
  if (q > queries || (q == 0 && from > 0)) return;
  double total = 0.0;
  for (int w = 0; w < kThreads / 32; w++) total += parts[w][q];
  const int64_t place = q == 0 ? 0 : from + q;
  exact[(blockIdx.y * call.samples + sample) * (1 + call.queries) + place] = total;
}
}  // namespace

int64_t exact_groups(const ProjectCall& call) {
  const int64_t elements = call.source == kRows ? kThreads * 64 : call.m * call.k;
  return clamp_groups(elements / (kThreads * 8), 64);
}

int launch_exact(const ProjectCall& call, double* exact, int64_t groups, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(call.samples), static_cast<unsigned>(groups));
  int64_t from = 0;
  do {
    const int code = DATAFLEX_LAUNCH(measure_values, grid, dim3(kThreads), 0, stream, call, exact, from);
    if (code != cudaSuccess) return code;
    from += kQueries;
  } while (from < call.queries);
  return cudaSuccess;
}
}  // namespace dataflex
