// The parts of the fused projection kernel (project_fused.cu): pipeline, products, and what becomes of a tile.
#pragma once
#include "dataflex/ptx.cuh"

#include "project_device.cuh"

namespace dataflex {
namespace {
constexpr int kTileRows = 64, kTileColumns = 128, kDepth = 32, kStages = 3, kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostSamples = 4, kMostQueries = 8, kTileSize = kTileRows * kTileColumns;

struct Grid {
  int64_t first_down, first_across, across, tiles;
  int samples_at_once;
  int outputs;  // floats of shared memory for the outputs of a sample
};

template <typename T>
struct alignas(16) Shared {
  T row[kStages][kDepth][kTileRows];   // 16-byte pieces of token t at place piece xor t mod 8
  T col[kStages][kDepth][kTileColumns];
  uint32_t signs[kTileRows][4];
  uint32_t keys[kTileSize / 512];  // of the xor-fold tiles inside
  float exact[kMostSamples][1 + kMostQueries][kWarps];
};  // and floats [samples_at_once][outputs] behind it

// Which 32 tokens of which sample come next. A sample without tokens has one step of nothing.
struct Cursor {
  int64_t sample, token, end;
};
__device__ __forceinline__ Cursor start_of(const ProjectCall& call, int64_t sample, int64_t last) {
  if (sample >= last) return {sample, 0, 0};
  return {sample, bound_of(call, sample), bound_of(call, sample + 1)};
}
__device__ __forceinline__ bool ends_sample(const Cursor& at) { return at.token + kDepth >= at.end; }
__device__ __forceinline__ Cursor next_of(const ProjectCall& call, const Cursor& at, int64_t last) {
  if (ends_sample(at)) return start_of(call, at.sample + 1, last);
  return {at.sample, at.token + kDepth, at.end};
}

// The tile's place: its first row and column in the matrix (may be negative) and in the tensor.
struct Place {
  int64_t i, j;
  uint32_t row, column;
};

template <typename T>
__device__ __forceinline__ void fetch(const ProjectCall& call, const Place& place, const Cursor& at, int64_t last,
                                      Shared<T>& shared, int stage) {
  if (at.sample < last) {
    const T *row = static_cast<const T*>(call.row), *col = static_cast<const T*>(call.col);
    {
      const int t = threadIdx.x / 8, piece = threadIdx.x % 8;
      const int64_t token = at.token + t, i = place.i + piece * 8;
      const bool valid = token < at.end && i >= 0 && i < call.m;
      const T* from = valid ? row + token * call.row_stride + i : row;
      cp_async<16>(&shared.row[stage][t][(piece ^ (t & 7)) * 8], from, valid);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = half * 16 + threadIdx.x / 16, piece = threadIdx.x % 16;
      const int64_t token = at.token + t, j = place.j + piece * 8;
      const bool valid = token < at.end && j >= 0 && j < call.k;
      const T* from = valid ? col + token * call.col_stride + j : col;
      cp_async<16>(&shared.col[stage][t][(piece ^ (t & 7)) * 8], from, valid);
    }
  }
  cp_async_commit();
}

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) mma_m16n8k16_f16(d, a, b);
  else mma_m16n8k16_bf16(d, a, b);
}

// A warp's 32 x 32 part of the tile: sum[i][j] is the fragment at rows 16 i, columns 8 j of it.
using Part = float[2][4][4];

template <typename T>
__device__ __forceinline__ void multiply(const Shared<T>& shared, int stage, int warp_row, int warp_column, Part& sum) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kDepth / 16; step++) {
    uint32_t a[2][4], b[4][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = step * 16 + (lane & 7) + (lane >> 4) * 8, piece = warp_row * 4 + i * 2 + ((lane >> 3) & 1);
      ldmatrix_x4_trans(a[i], &shared.row[stage][t][(piece ^ (t & 7)) * 8]);
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int t = step * 16 + (lane & 15), piece = warp_column * 4 + j * 2 + (lane >> 4);
      uint32_t both[4];
      ldmatrix_x4_trans(both, &shared.col[stage][t][(piece ^ (t & 7)) * 8]);
      b[2 * j][0] = both[0], b[2 * j][1] = both[1], b[2 * j + 1][0] = both[2], b[2 * j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) mma<T>(sum[i][j], a[i], b[j]);
  }
}

// Row and column in the tile of the pair (i, j, half) of this thread.
__device__ __forceinline__ int row_at(int warp_row, int i, int half) {
  return warp_row * 32 + i * 16 + half * 8 + (threadIdx.x % 32) / 4;
}
__device__ __forceinline__ int column_at(int warp_column, int j) {
  return warp_column * 32 + j * 8 + (threadIdx.x % 4) * 2;
}

__device__ __forceinline__ bool inside(const ProjectCall& call, const Place& place, int row, int column) {
  const int64_t i = place.i + row, j = place.j + column;
  return i >= 0 && i < call.m && j >= 0 && j < call.k;
}

__device__ __forceinline__ void read_moments(const ProjectCall& call, const Place& place, int warp_row,
                                             int warp_column, Part& first, Part& second) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = row_at(warp_row, i, half), column = column_at(warp_column, j);
        float2 m = make_float2(0.0f, 0.0f), v = make_float2(1.0f, 1.0f);
        if (call.adam.on && inside(call, place, row, column)) {
          const int64_t at = (place.i + row) * call.k + place.j + column;
          m = __ldg(reinterpret_cast<const float2*>(call.exp_avg + at));
          v = __ldg(reinterpret_cast<const float2*>(call.exp_avg_sq + at));
          m.x *= call.adam.a, m.y *= call.adam.a;
          v.x = call.adam.b * v.x + call.adam.inside, v.y = call.adam.b * v.y + call.adam.inside;
        }
        first[i][j][2 * half] = m.x, first[i][j][2 * half + 1] = m.y;
        second[i][j][2 * half] = v.x, second[i][j][2 * half + 1] = v.y;
      }
}

// Places of a bucket in shared memory: rows of a tile start 8 floats apart, so that the 4 rows that a half-warp adds to
// at a time lie in different banks.
__device__ __forceinline__ uint32_t spread(uint32_t bucket, int column_bits) {
  return bucket ^ ((bucket >> column_bits & 3u) << 3);
}

// Signs and keys of the tile's elements.
template <typename T>
__device__ __forceinline__ void hash_tile(const ProjectCall& call, const Place& place, TileShape shape,
                                          Shared<T>& shared) {
  const int t = threadIdx.x;
  if (t < kTileRows) {
    const Words words = sign_words(call.key, place.row + t, place.column);
#pragma unroll
    for (int w = 0; w < 4; w++) shared.signs[t][w] = words.w[w];
  }
  const int rows = 1 << min(shape.row_bits, 6), columns = 1 << min(shape.column_bits, 7), wide = kTileColumns / columns;
  const int u = t - kTileRows;
  if (u >= 0 && u < kTileRows / rows * wide) {
    const uint32_t row = place.row + u / wide * rows, column = place.column + u % wide * columns;
    shared.keys[u] = tile_key(call.key, row >> shape.row_bits, column >> shape.column_bits,
                              static_cast<uint32_t>(call.dim));
  }
}

// value = transform of scale * value; norm and inner products of the sample into this warp's places.
__device__ __forceinline__ void finish(const ProjectCall& call, const Place& place, int warp_row, int warp_column,
                                       float scale, const Part& first, const Part& second, Part& value,
                                       float (*exact)[kWarps]) {
  float norm = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        value[i][j][e] = transformed(call.adam, value[i][j][e] * scale, first[i][j][e], second[i][j][e]);
        norm += value[i][j][e] * value[i][j][e];
      }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (call.sqnorm) {
    norm = warp_sum(norm);
    if (lane == 0) exact[0][warp] += norm;
  }
  for (int q = 0; q < call.queries; q++) {
    const float* direction = call.directions + q * call.m * call.k;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = row_at(warp_row, i, half), column = column_at(warp_column, j);
          if (!inside(call, place, row, column)) continue;
          const float2 toward = __ldg(reinterpret_cast<const float2*>(
              direction + (place.i + row) * call.k + place.j + column));
          sum += value[i][j][2 * half] * toward.x + value[i][j][2 * half + 1] * toward.y;
        }
    sum = warp_sum(sum);
    if (lane == 0) exact[1 + q][warp] += sum;
  }
}

// Adds the signed values to their buckets.
template <typename T>
__device__ __forceinline__ void fold(const ProjectCall& call, const Place& place, TileShape shape, int warp_row,
                                     int warp_column, const Part& value, const Shared<T>& shared, float* outputs) {
  const uint32_t row_mask = (1u << shape.row_bits) - 1, column_mask = (1u << shape.column_bits) - 1;
  const int inner_rows = min(shape.row_bits, 6), inner_columns = min(shape.column_bits, 7);
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_at(warp_row, i, half);
      const uint32_t signs = shared.signs[row][warp_column];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int column = column_at(warp_column, j);
        const int copy = ((row >> inner_rows) << (7 - inner_columns)) + (column >> inner_columns);
        const uint32_t key = shared.keys[copy];
        const uint32_t element =
            ((place.row + row) & row_mask) << shape.column_bits | ((place.column + column) & column_mask);
        const uint32_t bucket = spread((element ^ key) & ~1u, shape.column_bits);
        const float x = with_sign(value[i][j][2 * half], signs >> (column & 31) & 1);
        const float y = with_sign(value[i][j][2 * half + 1], signs >> (column & 31) >> 1 & 1);
        auto* to = reinterpret_cast<float2*>(outputs + (static_cast<int64_t>(copy) * call.dim + bucket));
        float2 sum = *to;
        sum.x += key & 1 ? y : x, sum.y += key & 1 ? x : y;
        *to = sum;
      }
    }
}
}  // namespace
}  // namespace dataflex
