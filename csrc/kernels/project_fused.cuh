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
  int outputs;                    // floats of shared memory for the outputs of a sample
  uint32_t row_bytes, col_bytes;  // between tokens
};

// 32 tokens of a tile's rows and columns; 16-byte pieces of token t at place piece xor t mod 8.
template <typename T>
struct alignas(16) Stage {
  T row[kDepth][kTileRows];
  T col[kDepth][kTileColumns];
};
template <typename T>
struct alignas(16) Shared {
  Stage<T> stage[kStages];
  uint32_t signs[kTileRows][4];
  uint32_t keys[kTileSize / 512];  // of the xor-fold tiles inside
  int bounds[kMostSamples + 1];    // of the block's samples, in tokens
  float exact[kMostSamples][1 + kMostQueries][kWarps];
};  // and floats [samples_at_once][outputs] behind it

// Which 32 tokens of which of the block's samples come next. A sample without tokens has one step of nothing.
struct Cursor {
  int sample, token, end;
};
__device__ __forceinline__ Cursor start_of(const int* bounds, int sample, int samples) {
  if (sample >= samples) return {sample, 0, 0};
  return {sample, bounds[sample], bounds[sample + 1]};
}
__device__ __forceinline__ bool ends_sample(const Cursor& at) { return at.token + kDepth >= at.end; }

// The tile's place: its first row and column in the matrix (may be negative) and in the tensor.
struct Place {
  int64_t i, j;
  uint32_t row, column;
};

// The 16 bytes of the rows and twice of the columns that this thread copies of a step, worked out once for a tile.
struct Copies {
  uint64_t row, col[2];           // addresses for token 0, which may be outside; the second half is 16 tokens on
  uint32_t to_row, to_col;        // in a stage, in bytes
  uint32_t row_token, col_token;  // of the 32; none of them for what lies outside
};
template <typename T>
__device__ __forceinline__ Copies copies_of(const ProjectCall& call, const Place& place) {
  constexpr uint32_t kNone = INT32_MAX - kDepth;
  const int t = threadIdx.x / 8, u = threadIdx.x / 16, piece = threadIdx.x % 8, wide = threadIdx.x % 16;
  const int64_t i = place.i + piece * 8, j = place.j + wide * 8;
  const auto row = reinterpret_cast<uint64_t>(call.row), col = reinterpret_cast<uint64_t>(call.col);
  Copies mine;
  mine.row_token = kept(i >= 0 && i < call.m ? static_cast<uint32_t>(t) : kNone);
  mine.col_token = kept(j >= 0 && j < call.k ? static_cast<uint32_t>(u) : kNone);
  mine.row = kept_address(row + static_cast<uint64_t>((t * call.row_stride + i) * 2));
#pragma unroll
  for (int half = 0; half < 2; half++)
    mine.col[half] = kept_address(col + static_cast<uint64_t>(((u + 16 * half) * call.col_stride + j) * 2));
  mine.to_row = kept((t * kTileRows + (piece ^ (t & 7)) * 8) * 2);
  mine.to_col = kept(offsetof(Stage<T>, col) + (u * kTileColumns + (wide ^ (u & 7)) * 8) * 2);
  return mine;
}

// Copies what comes next into a stage, which is given in bytes from the first, and goes on by it.
template <typename T>
__device__ __forceinline__ void fetch(const Grid& grid, const Copies& mine, Cursor& at, int samples, Shared<T>& shared,
                                      uint32_t stage) {
  if (at.sample < samples) {
    auto* to = reinterpret_cast<char*>(shared.stage) + stage;
    const auto token = static_cast<uint64_t>(static_cast<uint32_t>(at.token));
    const int left = at.end - at.token;
    cp_async<16>(to + mine.to_row, reinterpret_cast<const char*>(mine.row + token * grid.row_bytes),
                 static_cast<int>(mine.row_token) < left);
#pragma unroll
    for (int half = 0; half < 2; half++)
      cp_async<16>(to + mine.to_col + half * 16 * kTileColumns * 2,
                   reinterpret_cast<const char*>(mine.col[half] + token * grid.col_bytes),
                   static_cast<int>(mine.col_token) + 16 * half < left);
    if (ends_sample(at)) at = start_of(shared.bounds, at.sample + 1, samples);
    else at.token += kDepth;
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

// Where this lane reads the fragments of its warp's part in a stage, in bytes; 16 tokens on for the second half.
struct Fragments {
  uint32_t a[2], b[2];
};
template <typename T>
__device__ __forceinline__ Fragments fragments_of(int warp_row, int warp_column) {
  const int lane = threadIdx.x % 32;
  Fragments mine;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int t = (lane & 7) + (lane >> 4) * 8, piece = warp_row * 4 + i * 2 + ((lane >> 3) & 1);
    mine.a[i] = kept((t * kTileRows + (piece ^ (t & 7)) * 8) * 2);
    const int u = lane & 15, wide = warp_column * 4 + i * 2 + (lane >> 4);
    mine.b[i] = kept(offsetof(Stage<T>, col) + (u * kTileColumns + (wide ^ (u & 7)) * 8) * 2);
  }
  return mine;
}

template <typename T>
__device__ __forceinline__ void multiply(const Shared<T>& shared, uint32_t stage, const Fragments& mine, Part& sum) {
  const auto* from = reinterpret_cast<const char*>(shared.stage) + stage;
#pragma unroll
  for (int step = 0; step < kDepth / 16; step++) {
    uint32_t a[2][4], b[4][2];
#pragma unroll
    for (int i = 0; i < 2; i++) ldmatrix_x4_trans(a[i], from + mine.a[i] + step * 16 * kTileRows * 2);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      uint32_t both[4];
      ldmatrix_x4_trans(both, from + mine.b[j] + step * 16 * kTileColumns * 2);
      b[2 * j][0] = both[0], b[2 * j][1] = both[1], b[2 * j + 1][0] = both[2], b[2 * j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) mma<T>(sum[i][j], a[i], b[j]);
  }
}

// This thread's part of a tile: the pair (i, half, j) is at row 16 i + 8 half and column 8 j of it. Sizes and offsets
// are multiples of 8, so a warp's rows of one (i, half) and its columns of one j are inside together.
struct Mine {
  int row, column;  // in the tile, of the first pair
  int64_t at;       // in the matrix
  uint32_t rows_inside, columns_inside;  // bit 2 i + half, bit j
};
__device__ __forceinline__ Mine mine_of(const ProjectCall& call, const Place& place, int warp_row, int warp_column) {
  const int lane = threadIdx.x % 32;
  Mine mine = {warp_row * 32 + lane / 4, warp_column * 32 + lane % 4 * 2, 0, 0, 0};
  const int64_t i = place.i + mine.row, j = place.j + mine.column;
  mine.at = i * call.k + j;
#pragma unroll
  for (int b = 0; b < 4; b++) {
    mine.rows_inside |= (i + 8 * b >= 0 && i + 8 * b < call.m ? 1u : 0u) << b;
    mine.columns_inside |= (j + 8 * b >= 0 && j + 8 * b < call.k ? 1u : 0u) << b;
  }
  mine.rows_inside = kept(mine.rows_inside), mine.columns_inside = kept(mine.columns_inside);
  return mine;
}
__device__ __forceinline__ bool inside(const Mine& mine, int i, int half, int j) {
  return (mine.rows_inside >> (2 * i + half) & 1) && (mine.columns_inside >> j & 1);
}

// Without Adam there are no moments, and nothing of ``first`` and ``second`` is read.
__device__ __forceinline__ void read_moments(const ProjectCall& call, const Mine& mine, Part& first, Part& second) {
  if (!call.adam.on) return;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t at = mine.at + (16 * i + 8 * half) * call.k;
      const auto* moments = reinterpret_cast<const float2*>(call.exp_avg + at);
      const auto* squares = reinterpret_cast<const float2*>(call.exp_avg_sq + at);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float2 m = make_float2(0.0f, 0.0f), v = make_float2(1.0f, 1.0f);
        if (inside(mine, i, half, j)) {
          m = __ldg(moments + 4 * j), v = __ldg(squares + 4 * j);
          m.x *= call.adam.a, m.y *= call.adam.a;
          v.x = call.adam.b * v.x + call.adam.inside, v.y = call.adam.b * v.y + call.adam.inside;
        }
        first[i][j][2 * half] = m.x, first[i][j][2 * half + 1] = m.y;
        second[i][j][2 * half] = v.x, second[i][j][2 * half + 1] = v.y;
      }
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
__device__ __forceinline__ void finish(const ProjectCall& call, const Mine& mine, float scale, const Part& first,
                                       const Part& second, Part& value, float (*exact)[kWarps]) {
  float *all = &value[0][0][0], norm = 0.0f;
  const float *firsts = &first[0][0][0], *seconds = &second[0][0][0];
  if (call.adam.on) {
#pragma unroll
    for (int e = 0; e < 32; e++) all[e] = by_adam(call.adam, all[e] * scale, firsts[e], seconds[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 32; e++) all[e] *= scale;
  }
#pragma unroll
  for (int e = 0; e < 32; e++) norm += all[e] * all[e];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (call.sqnorm) {
    norm = warp_sum(norm);
    if (lane == 0) exact[0][warp] += norm;
  }
  for (int q = 0; q < call.queries; q++) {
    const float* direction = call.directions + q * call.m * call.k + mine.at;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto* from = reinterpret_cast<const float2*>(direction + (16 * i + 8 * half) * call.k);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (!inside(mine, i, half, j)) continue;
          const float2 toward = __ldg(from + 4 * j);
          sum += value[i][j][2 * half] * toward.x + value[i][j][2 * half + 1] * toward.y;
        }
      }
    sum = warp_sum(sum);
    if (lane == 0) exact[1 + q][warp] += sum;
  }
}

// Adds the signed values to their buckets. An xor-fold tile has at least 16 x 32 elements (dim 512), so a warp's values
// of one i are in one of them, and an offset inside of it changes a bucket's bits by xor.
template <typename T>
__device__ __forceinline__ void fold(const ProjectCall& call, const Place& place, TileShape shape, const Mine& mine,
                                     int warp_column, const Part& value, const Shared<T>& shared, float* outputs) {
  const uint32_t row_mask = (1u << shape.row_bits) - 1, column_mask = (1u << shape.column_bits) - 1;
  const int inner_rows = min(shape.row_bits, 6), inner_columns = min(shape.column_bits, 7), wide = shape.column_bits;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = mine.row + 16 * i;
    const int copy = ((row >> inner_rows) << (7 - inner_columns)) + (mine.column >> inner_columns);
    const uint32_t key = shared.keys[copy];
    const uint32_t element = ((place.row + row) & row_mask) << wide | ((place.column + mine.column) & column_mask);
    const uint32_t first = copy * static_cast<uint32_t>(call.dim) + spread((element ^ key) & ~1u, wide);
    const bool swapped = key & 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t signs = shared.signs[row + 8 * half][warp_column] >> (mine.column & 31);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float x = with_sign(value[i][j][2 * half], signs >> (8 * j) & 1);
        const float y = with_sign(value[i][j][2 * half + 1], signs >> (8 * j + 1) & 1);
        auto* to = reinterpret_cast<float2*>(outputs + (first ^ (8u * half << wide) ^ 8u * j));
        float2 sum = *to;
        sum.x += swapped ? y : x, sum.y += swapped ? x : y;
        *to = sum;
      }
    }
  }
}
}  // namespace
}  // namespace dataflex
