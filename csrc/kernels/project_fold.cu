// Epilogue of the chunked form for xor-fold: gradients [samples, m, k] that a library product has just left in the L2
// cache -> transform -> sign -> fold. A thread owns four neighbouring buckets of eight samples and keeps their sums
// in registers over all tiles of its group: bucket b takes element b xor key of every tile, so there are no atomics.
//
// Floor: reads 4 samples + 8 bytes an element (gradients from L2, moments from memory once: the blocks of the other
// samples run at the same time and find them in L2) and writes and reads 4 groups samples dim bytes of partial sums;
// about 12 operations an element and sample, and a Philox call (10 rounds) for each 4 elements of 8 samples.
#include "project_epilogue.cuh"

namespace dataflex {
namespace {
constexpr int kSamples = 8, kLargestBlock = 256;

struct Four {
  float x[4];
};

// Elements at .. at + 3 of a row; those whose bit in `valid` is 0 are not read.
template <bool ALIGNED>
__device__ __forceinline__ Four load_four(const float* from, unsigned valid) {
  Four out;
  if (ALIGNED) {
    const float4 all = valid ? __ldg(reinterpret_cast<const float4*>(from)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    out.x[0] = all.x, out.x[1] = all.y, out.x[2] = all.z, out.x[3] = all.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) out.x[i] = (valid >> i & 1) ? __ldg(from + i) : 0.0f;
  }
  return out;
}

// Element i to place i xor low.
__device__ __forceinline__ void exchange(Four& value, uint32_t low) {
  const Four was = value;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float near = low & 1 ? was.x[i ^ 1] : was.x[i], far = low & 1 ? was.x[i ^ 3] : was.x[i ^ 2];
    value.x[i] = low & 2 ? far : near;
  }
}

struct Tiles {
  TileShape shape;
  int64_t first_down, first_across, across, count;
};

// Grid: (samples / kSamples, dim / (4 threads), groups). features [groups, samples, dim].
template <bool ALIGNED>
__global__ void __launch_bounds__(kLargestBlock) fold_values(ProjectCall call, Tiles tiles, float* features) {
  const auto dim = static_cast<uint32_t>(call.dim), columns = 1u << tiles.shape.column_bits;
  const uint32_t bucket = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSamples;
  const int count = static_cast<int>(min(static_cast<int64_t>(kSamples), call.samples - first));
  float scale[kSamples], sum[kSamples][4] = {};
#pragma unroll
  for (int s = 0; s < kSamples; s++) scale[s] = s < count ? __ldg(call.scale + first + s) : 0.0f;
  const int64_t begin = tiles.count * blockIdx.z / gridDim.z, end = tiles.count * (blockIdx.z + 1) / gridDim.z;
  for (int64_t tile = begin; tile < end; tile++) {
    const auto down = static_cast<uint32_t>(tiles.first_down + tile / tiles.across);
    const auto across = static_cast<uint32_t>(tiles.first_across + tile % tiles.across);
    const uint32_t key = tile_key(call.key, down, across, dim), element = (bucket ^ key) & ~3u;
    const uint32_t row = (down << tiles.shape.row_bits) + (element >> tiles.shape.column_bits);
    const uint32_t column = (across << tiles.shape.column_bits) + (element & (columns - 1));
    const int64_t i = row - call.row_offset, j = column - call.col_offset;
    if (i < 0 || i >= call.m || j + 3 < 0 || j >= call.k) continue;
    unsigned valid = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) valid |= (j + e >= 0 && j + e < call.k ? 1u : 0u) << e;
    const int64_t at = i * call.k + j;
    Four m = {}, v = {{1.0f, 1.0f, 1.0f, 1.0f}};
    if (call.adam.on) {
      m = load_four<ALIGNED>(call.exp_avg + at, valid), v = load_four<ALIGNED>(call.exp_avg_sq + at, valid);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const bool here = valid >> e & 1;
        m.x[e] *= call.adam.a, v.x[e] = here ? call.adam.b * v.x[e] + call.adam.inside : 1.0f;
      }
    }
    const uint32_t signs = pick(sign_words(call.key, row, column), column >> 5) >> (column & 31);
#pragma unroll
    for (int s = 0; s < kSamples; s++) {
      if (s >= count) break;
      Four value = load_four<ALIGNED>(call.grad + (first + s) * call.m * call.k + at, valid);
#pragma unroll
      for (int e = 0; e < 4; e++)
        value.x[e] = with_sign(transformed(call.adam, value.x[e] * scale[s], m.x[e], v.x[e]), signs >> e & 1);
      exchange(value, key & 3);
#pragma unroll
      for (int e = 0; e < 4; e++) sum[s][e] += value.x[e];
    }
  }
#pragma unroll
  for (int s = 0; s < kSamples; s++)
    if (s < count)
      *reinterpret_cast<float4*>(features + (blockIdx.z * call.samples + first + s) * call.dim + bucket) =
          make_float4(sum[s][0], sum[s][1], sum[s][2], sum[s][3]);
}

unsigned threads_of(const ProjectCall& call) {
  return static_cast<unsigned>(call.dim / 4 < kLargestBlock ? call.dim / 4 : kLargestBlock);
}

Tiles tiles_of(const ProjectCall& call) {
  const TileShape shape = tile_shape(call.dim);
  const int64_t down = call.row_offset >> shape.row_bits, across = call.col_offset >> shape.column_bits;
  const int64_t last_down = (call.row_offset + call.m - 1) >> shape.row_bits;
  const int64_t last_across = (call.col_offset + call.k - 1) >> shape.column_bits;
  return {shape, down, across, last_across - across + 1, (last_down - down + 1) * (last_across - across + 1)};
}
}  // namespace

int64_t fold_groups(const ProjectCall& call) {
  const int64_t others = (call.samples + kSamples - 1) / kSamples * (call.dim / 4 / threads_of(call));
  return clamp_groups((kBlocks + others - 1) / others, tiles_of(call).count);
}

int launch_fold(const ProjectCall& call, float* features, int64_t groups, cudaStream_t stream) {
  const unsigned threads = threads_of(call);
  const dim3 grid(static_cast<unsigned>((call.samples + kSamples - 1) / kSamples),
                  static_cast<unsigned>(call.dim / 4 / threads), static_cast<unsigned>(groups));
  const auto aligned = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = call.k % 4 == 0 && call.col_offset % 4 == 0 && aligned(call.grad) && aligned(call.exp_avg) &&
                    aligned(call.exp_avg_sq);
  const Tiles tiles = tiles_of(call);
  if (wide) return DATAFLEX_LAUNCH(fold_values<true>, grid, dim3(threads), 0, stream, call, tiles, features);
  return DATAFLEX_LAUNCH(fold_values<false>, grid, dim3(threads), 0, stream, call, tiles, features);
}
}  // namespace dataflex
