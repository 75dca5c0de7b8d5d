// The fused form: per-sample gradients g_s = sum_t row[t] col[t]^T by tensor cores, 64 x 128 at a time, and transform,
// norms, inner products, signs and xor-fold while the tile is in registers. The gradient is never written.
//
// A block takes up to four samples (three on an A100) and a range of tiles. For each tile it reads the moments and
// makes the hashes once, keeps them in registers and shared memory, and goes through the samples' tokens, 32 at a
// time, in a pipeline of three stages that runs on across samples. The outputs of its samples lie in shared memory
// for the whole range: the elements of one xor-fold tile go to distinct buckets, and where a 64 x 128 tile holds
// several xor-fold tiles each has a copy of the outputs, so nothing is added by two threads at once: no atomics, same
// input same bits.
//
// Floor for S samples of T tokens: 2 S T m k flops on the tensor cores; bytes 2 S T (m k / 128 + k m / 64) through L2
// (2 S T (m + k) from memory where L2 holds them), 8 m k of moments once (blocks of the other samples run at the same
// time), and 8 groups S dim of partial sums. The epilogue is about 40 instructions for two elements of a sample.
#include "project_fused.cuh"

#include "project.h"

namespace dataflex {
namespace {
// Grid: (samples / samples_at_once, groups). features [groups, samples, dim]; exact [groups, samples, 1 + queries].
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    project_fused(ProjectCall call, Grid grid, float* features, double* exact) {
  DATAFLEX_DYNAMIC_SHARED(unsigned char, memory);
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory);
  auto* outputs = reinterpret_cast<float*>(memory + sizeof(Shared<T>));
  const int warp = threadIdx.x / 32, warp_row = warp & 1, warp_column = warp >> 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * grid.samples_at_once;
  const auto samples = static_cast<int>(min(static_cast<int64_t>(grid.samples_at_once), call.samples - first));
  const TileShape shape = tile_shape(call.dim ? call.dim : kTileSize);
  for (int64_t b = threadIdx.x; b < samples * grid.outputs; b += kThreads) outputs[b] = 0.0f;
  for (int b = threadIdx.x; b < kMostSamples * (1 + kMostQueries) * kWarps; b += kThreads)
    (&shared.exact[0][0][0])[b] = 0.0f;
  if (static_cast<int>(threadIdx.x) <= samples)
    shared.bounds[threadIdx.x] = static_cast<int>(bound_of(call, first + threadIdx.x));
  const Fragments fragments = fragments_of<T>(warp_row, warp_column);
  const int64_t begin = grid.tiles * blockIdx.y / gridDim.y, end = grid.tiles * (blockIdx.y + 1) / gridDim.y;
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t row = (grid.first_down + tile / grid.across) * kTileRows;
    const int64_t column = (grid.first_across + tile % grid.across) * kTileColumns;
    const Place place = {row - call.row_offset, column - call.col_offset, static_cast<uint32_t>(row),
                         static_cast<uint32_t>(column)};
    const Mine mine = mine_of(call, place, warp_row, warp_column);
    const bool active = mine.rows_inside != 0 && mine.columns_inside != 0;
    const Copies copies = copies_of<T>(call, place);
    __syncthreads();  // the tile before is folded, its hashes are no longer needed
    if (call.dim) hash_tile(call, place, shape, shared);
    Part moment = {}, square = {}, sum = {};
    read_moments(call, mine, moment, square);
    Cursor at = start_of(shared.bounds, 0, samples), ahead = at;
    constexpr uint32_t kStageBytes = sizeof(Stage<T>), kAllStages = kStages * kStageBytes;
    for (uint32_t stage = 0; stage < kAllStages - kStageBytes; stage += kStageBytes)
      fetch(grid, copies, ahead, samples, shared, stage);
    for (uint32_t stage = 0, free = kAllStages - kStageBytes; at.sample < samples;) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage has landed for all; the one before is free
      fetch(grid, copies, ahead, samples, shared, free);
      if (active) multiply(shared, stage, fragments, sum);
      if (ends_sample(at)) {
        if (active) {
          const float scale = __ldg(call.scale + first + at.sample);
          finish(call, mine, scale, moment, square, sum, shared.exact[at.sample]);
          if (call.dim) fold(call, place, shape, mine, warp_column, sum, shared, outputs + at.sample * grid.outputs);
#pragma unroll
          for (int e = 0; e < 32; e++) (&sum[0][0][0])[e] = 0.0f;
        }
        at = start_of(shared.bounds, at.sample + 1, samples);
      } else {
        at.token += kDepth;
      }
      free = stage, stage = stage + kStageBytes == kAllStages ? 0 : stage + kStageBytes;
    }
    cp_async_wait<0>();
  }
  __syncthreads();
  for (int s = 0; s < samples; s++) {
    const float* mine = outputs + s * grid.outputs;
    const int64_t place = blockIdx.y * call.samples + first + s;
    for (auto b = static_cast<uint32_t>(threadIdx.x); b < call.dim; b += kThreads) {
      float sum = 0.0f;
      for (int64_t copy = 0; copy < grid.outputs; copy += call.dim) sum += mine[copy + spread(b, shape.column_bits)];
      features[place * call.dim + b] = sum;
    }
    if (static_cast<int>(threadIdx.x) <= call.queries) {
      double sum = 0.0;
      for (int w = 0; w < kWarps; w++) sum += shared.exact[s][threadIdx.x][w];
      exact[place * (1 + call.queries) + threadIdx.x] = sum;
    }
  }
}

// Floats of shared memory for the outputs of a sample.
int64_t outputs_of(int64_t dim) { return dim == 0 ? 0 : dim < kTileSize ? kTileSize : dim; }

Grid grid_of(const ProjectCall& call) {
  const int64_t down = call.row_offset / kTileRows, across = call.col_offset / kTileColumns;
  const int64_t last_down = (call.row_offset + call.m - 1) / kTileRows;
  const int64_t last_across = (call.col_offset + call.k - 1) / kTileColumns;
  const int64_t wide = last_across - across + 1;
  const auto outputs = static_cast<int>(outputs_of(call.dim));
  const int64_t room = (largest_shared() - static_cast<int64_t>(sizeof(Shared<__half>))) / (4 * max(outputs, 1));
  const auto at_once = static_cast<int>(room < 1 ? 1 : room < kMostSamples ? room : kMostSamples);
  const auto bytes = [](int64_t stride) { return static_cast<uint32_t>(2 * stride); };
  return {down,    across,  wide, (last_down - down + 1) * wide,
          at_once, outputs, bytes(call.row_stride), bytes(call.col_stride)};
}

int64_t groups_of(const ProjectCall& call, const Grid& grid) {
  const int64_t others = (call.samples + grid.samples_at_once - 1) / grid.samples_at_once;
  return clamp_groups((kBlocks + others - 1) / others, grid.tiles);
}

template <typename T>
int launch(const ProjectCall& call, const Grid& grid, int64_t groups, float* features, double* exact,
           cudaStream_t stream) {
  const size_t bytes = sizeof(Shared<T>) + sizeof(float) * grid.outputs * grid.samples_at_once;
  const int code = DATAFLEX_ALLOW_SHARED(project_fused<T>, bytes);
  if (code != cudaSuccess) return code;
  const dim3 blocks(static_cast<unsigned>((call.samples + grid.samples_at_once - 1) / grid.samples_at_once),
                    static_cast<unsigned>(groups));
  return DATAFLEX_LAUNCH(project_fused<T>, blocks, dim3(kThreads), bytes, stream, call, grid, features, exact);
}
bool nothing(const ProjectCall& call) { return call.samples == 0 || call.m == 0 || call.k == 0; }
}  // namespace
}  // namespace dataflex

int64_t dataflex_project_fused_limit() {
  using namespace dataflex;
  const int64_t room = largest_shared() - static_cast<int64_t>(sizeof(Shared<__half>));
  int64_t dim = 16384;
  while (dim >= 512 && outputs_of(dim) * 4 > room) dim /= 2;
  return dim < 512 ? 0 : dim;
}

DataflexProjectScratch dataflex_project_outer_scratch(const dataflex::ProjectCall* call) {
  using namespace dataflex;
  if (nothing(*call)) return {0, 0};
  const int64_t groups = groups_of(*call, grid_of(*call));
  return {groups * call->samples * call->dim, groups * call->samples * (1 + call->queries)};
}

int dataflex_project_outer(const dataflex::ProjectCall* call, float* features, double* exact, void* stream) {
  using namespace dataflex;
  const bool too_large = call->dim > dataflex_project_fused_limit();
  const bool wrong_dim = call->dim && (call->dim < 512 || too_large || call->kind != kXorfold);
  // The kernel counts tokens in 32 bits, and bytes between them.
  const int64_t largest = INT32_MAX - kDepth;
  const bool too_far = call->pieces > largest || call->row_stride > largest || call->col_stride > largest;
  const int64_t sizes = call->m | call->k | call->row_offset | call->col_offset | call->row_stride | call->col_stride;
  if (wrong_dim || too_far || sizes % 8 || call->queries > kMostQueries || call->dtype == 0)
    return cudaErrorInvalidValue;
  if (nothing(*call)) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  const Grid grid = grid_of(*call);
  const int64_t groups = groups_of(*call, grid);
  const int code = call->dtype == DATAFLEX_F16 ? launch<__half>(*call, grid, groups, features, exact, on)
                                               : launch<__nv_bfloat16>(*call, grid, groups, features, exact, on);
  return code == cudaSuccess ? launch_reduce(*call, features, groups, exact, groups, on) : code;
}
