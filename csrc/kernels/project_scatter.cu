// Epilogue for count sketch, sparse Johnson-Lindenstrauss, small xor-folds and rows of embeddings: elements go to
// hashed buckets, which lie once in a block's shared memory. A warp takes 32 neighbouring columns of some rows at a
// time: as many rows as share their Philox calls. Loads and hashes of the warps run side by side; to add, they take
// turns, or at sparse JL each has another quarter of the buckets. Where several lanes meet in a bucket they add one
// after the other, by lane. So there are no atomics and the bits are the same every time.
//
// Floor: reads 12 bytes an element and sample; a Philox call for each element in sparse JL, for 4 in a count sketch, two
// for 32 in an xor-fold; one shared read-modify-write for each bucket that an element goes to (4 for sjlt).
#include "project_epilogue.cuh"

namespace dataflex {
namespace {
constexpr int kWarps = 4;
constexpr int64_t kElementsInGroup = 1 << 15;
constexpr uint32_t kMostBuckets = 8192;
static_assert(kWarps == kSparsity, "a warp has a quarter of sparse JL's buckets to itself");

// Rows that a warp takes at once.
template <int kKind>
constexpr int kRowsOf = kKind == kSjlt ? 1 : 4;

// Of the lane's column in each of a warp's rows: bucket, and the sign in the highest bit; four of one row for sparse JL.
// `row`: of the tensor, of row lane mod their number; `first`: the warp's first column, a multiple of 32.
template <int kKind, int kSlots>
__device__ __forceinline__ void hash(const ProjectCall& call, TileShape shape, uint32_t row, uint32_t first,
                                     uint32_t (&slot)[kSlots]) {
  constexpr unsigned kAll = 0xffffffffu;
  const uint32_t lane = threadIdx.x % 32, column = first + lane, dim = static_cast<uint32_t>(call.dim);
  if constexpr (kKind == kSjlt) {
    const Words words = sparse_words(call.key, row, column);
    const uint32_t quarter = dim / kSparsity;
#pragma unroll
    for (uint32_t q = 0; q < kSparsity; q++)
      slot[q] = (word_bucket(words.w[q], quarter) + q * quarter) | words.w[q] << 31;
  } else if constexpr (kKind == kCountSketch) {
    // Each of four lanes has the words of another row; they exchange them, lane and lane xor d.
    const Words mine = count_words(call.key, row, column);
    Words from;
#pragma unroll
    for (uint32_t d = 0; d < 4; d++) from.w[d] = __shfl_xor_sync(kAll, pick(mine, lane ^ d), static_cast<int>(d));
#pragma unroll
    for (uint32_t r = 0; r < 4; r++) {
      const uint32_t word = pick(from, lane ^ r);
      slot[r] = word_bucket(word, dim) | word << 31;
    }
  } else {
    // Lanes 0 to 3 make the signs of a row's 32 columns, the others its tile's key, where the columns are in one tile.
    const bool makes_key = lane >= kSlots;
    const uint32_t in_tile = (1u << shape.column_bits) - 1, rows_in_tile = (1u << shape.row_bits) - 1;
    const uint32_t down = makes_key ? row >> shape.row_bits : row;
    const uint32_t across = first >> (makes_key ? shape.column_bits : 7);
    const Words words = philox(across, down, call.key.tensor_id, makes_key ? kOfTiles : kOfSigns, call.key.seed);
    const uint32_t word = makes_key ? words.w[0] & (dim - 1) : pick(words, first >> 5);
#pragma unroll
    for (int r = 0; r < kSlots; r++) {
      const uint32_t signs = __shfl_sync(kAll, word, r), its_row = __shfl_sync(kAll, row, r);
      uint32_t key = __shfl_sync(kAll, word, kSlots + r);
      if (shape.column_bits < 5) key = tile_key(call.key, its_row >> shape.row_bits, column >> shape.column_bits, dim);
      slot[r] = (((its_row & rows_in_tile) << shape.column_bits | (column & in_tile)) ^ key) | (signs >> lane) << 31;
    }
  }
}

// Adds `value` to sums[bucket] for the lanes with `here`; lanes of one bucket in the order of their numbers.
__device__ __forceinline__ void add_in_order(float* sums, bool here, uint32_t bucket, float value) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned same = __match_any_sync(0xffffffffu, here ? bucket : 0x80000000u | lane);
  const unsigned turn = static_cast<unsigned>(__popc(same & ((1u << lane) - 1)));
  const unsigned last = __reduce_max_sync(0xffffffffu, turn);
  for (unsigned t = 0; t <= last; t++) {
    if (here && turn == t) sums[bucket] += value;
    __syncwarp();
  }
}

// Grid: (samples, groups, slices of `slice` buckets). features [groups, samples, dim].
template <int kKind>
__global__ void __launch_bounds__(32 * kWarps, 8) scatter_values(ProjectCall call, uint32_t slice, float* features) {
  constexpr int kRowsAtOnce = kRowsOf<kKind>, kSlots = kKind == kSjlt ? kSparsity : kRowsAtOnce;
  DATAFLEX_DYNAMIC_SHARED(float, sums);
  const auto dim = static_cast<uint32_t>(call.dim);
  const uint32_t low = blockIdx.z * slice, size = min(dim - low, slice);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t sample = blockIdx.x;
  for (uint32_t b = threadIdx.x; b < size; b += blockDim.x) sums[b] = 0.0f;
  __syncthreads();
  const TileShape shape = tile_shape(call.dim);
  // Steps of 32 columns, whose first has a number in the tensor that is a multiple of 32.
  const int64_t lead = call.col_offset % 32, across = (call.k + lead + 31) / 32, rows = rows_of(call, sample);
  const int64_t steps = (rows + kRowsAtOnce - 1) / kRowsAtOnce * across;
  const int64_t begin = steps * blockIdx.y / gridDim.y, end = steps * (blockIdx.y + 1) / gridDim.y;
  int64_t down = (begin + warp) / across, along = (begin + warp) % across;
  for (int64_t step = begin; step < end; step += kWarps) {
    const int64_t top = down * kRowsAtOnce, column = along * 32 + lane - lead;
    const bool inside = step + warp < end && column >= 0 && column < call.k;
    // Lanes outside read what is nearest: so all loads are on their way before one is waited for.
    const int64_t nearest = min(max(column, static_cast<int64_t>(0)), call.k - 1);
    Element element[kRowsAtOnce];
    float first[kRowsAtOnce], second[kRowsAtOnce], value[kRowsAtOnce];
    int64_t row = 0;  // of the matrix, of row lane mod kRowsAtOnce
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; r++) {
      element[r] = element_of(call, sample, min(top + r, rows - 1), nearest);
      load_moments(call, element[r].at, true, &first[r], &second[r]);
      if (lane % kRowsAtOnce == r) row = element[r].row;
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; r++) {
      value[r] = transformed(call.adam, element[r].grad, first[r], second[r]);
      if (call.source == kRows && call.minus_zero) value[r] -= transformed(call.adam, 0.0f, first[r], second[r]);
      if (!inside || top + r >= rows) value[r] = 0.0f;
    }
    uint32_t slot[kSlots];
    hash<kKind>(call, shape, static_cast<uint32_t>(call.row_offset + row),
                static_cast<uint32_t>(call.col_offset + along * 32 - lead), slot);
    auto add = [&](float what, uint32_t to) {
      const uint32_t bucket = (to & 0x7fffffffu) - low;
      add_in_order(sums, inside && bucket < size, bucket, with_sign(what, to >> 31));
    };
    for (int turn = 0; turn < kWarps; turn++) {
      if constexpr (kKind == kSjlt) {
        add(0.5f * value[0], pick(Words{{slot[0], slot[1], slot[2], slot[3]}}, static_cast<uint32_t>(warp + turn)));
      } else if (turn == warp) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; r++) add(value[r], slot[r]);
      }
      __syncthreads();
    }
    along += kWarps;
    while (along >= across) along -= across, down++;
  }
  float* to = features + (static_cast<int64_t>(blockIdx.y) * call.samples + sample) * call.dim + low;
  for (uint32_t b = threadIdx.x; b < size; b += blockDim.x) to[b] = sums[b];
}

template <int kKind>
int launch_kind(const ProjectCall& call, float* features, int64_t groups, cudaStream_t stream) {
  const uint32_t slice = min(static_cast<uint32_t>(call.dim), kMostBuckets);
  const dim3 grid(static_cast<unsigned>(call.samples), static_cast<unsigned>(groups),
                  static_cast<unsigned>((call.dim + slice - 1) / slice));
  const size_t bytes = slice * sizeof(float);
  return DATAFLEX_LAUNCH(scatter_values<kKind>, grid, dim3(32 * kWarps), bytes, stream, call, slice, features);
}
}  // namespace

int64_t scatter_groups(const ProjectCall& call) {
  const int64_t elements = call.source == kRows ? kElementsInGroup * 8 : call.m * call.k;
  return clamp_groups(elements / kElementsInGroup, 64);
}

int launch_scatter(const ProjectCall& call, float* features, int64_t groups, cudaStream_t stream) {
  if (call.kind == kXorfold) return launch_kind<kXorfold>(call, features, groups, stream);
  if (call.kind == kCountSketch) return launch_kind<kCountSketch>(call, features, groups, stream);
  return launch_kind<kSjlt>(call, features, groups, stream);
}
}  // namespace dataflex
