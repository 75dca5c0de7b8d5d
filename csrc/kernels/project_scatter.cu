// Epilogue for count sketch, sparse Johnson-Lindenstrauss, small xor-folds and rows of embeddings: elements go to
// hashed buckets. Every warp has sums of its own in shared memory and takes 32 neighbouring elements at a time; where
// several of them meet in a bucket they add one after the other, by lane, so the bits are the same every time.
//
// Floor: reads 12 bytes an element and sample; one Philox call an element, one shared read-modify-write for each
// bucket that an element goes to (4 for sjlt).
#include "project_epilogue.cuh"

namespace dataflex {
namespace {
constexpr int kWarps = 4;
constexpr int64_t kElementsInGroup = 1 << 15;
constexpr uint32_t kMostBuckets = 8192;

__device__ __forceinline__ uint32_t xorfold_slot(const ProjectCall& call, TileShape shape, uint32_t row,
                                                 uint32_t column) {
  const uint32_t place = ((row & ((1u << shape.row_bits) - 1)) << shape.column_bits) |
                         (column & ((1u << shape.column_bits) - 1));
  const uint32_t key = tile_key(call.key, row >> shape.row_bits, column >> shape.column_bits,
                                static_cast<uint32_t>(call.dim));
  return (place ^ key) | (pick(sign_words(call.key, row, column), column >> 5) >> (column & 31)) << 31;
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
// Eight blocks on a multiprocessor leave 64 registers: by itself the compiler takes 56, and spills two values on sm_90.
__global__ void __launch_bounds__(32 * kWarps, 8) scatter_values(ProjectCall call, uint32_t slice, float* features) {
  DATAFLEX_DYNAMIC_SHARED(float, shared);
  const auto dim = static_cast<uint32_t>(call.dim);
  const uint32_t low = blockIdx.z * slice;
  const uint32_t size = min(dim - low, slice);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t sample = blockIdx.x;
  for (uint32_t b = threadIdx.x; b < kWarps * size; b += blockDim.x) shared[b] = 0.0f;
  __syncthreads();
  float* sums = shared + warp * size;
  const TileShape shape = tile_shape(call.dim);
  const int64_t across = (call.k + 31) / 32, steps = rows_of(call, sample) * across;
  const int64_t begin = steps * blockIdx.y / gridDim.y, end = steps * (blockIdx.y + 1) / gridDim.y;
  for (int64_t step = begin + warp; step < end; step += kWarps) {
    const int64_t column = step % across * 32 + lane;
    const bool here = column < call.k;
    float value = 0.0f;
    uint32_t row = 0;
    const auto global_column = static_cast<uint32_t>(call.col_offset + column);
    if (here) {
      const Element element = element_of(call, sample, step / across, column);
      float first, second;
      load_moments(call, element.at, true, &first, &second);
      value = transformed(call.adam, element.grad, first, second);
      if (call.source == kRows && call.minus_zero) value -= transformed(call.adam, 0.0f, first, second);
      row = static_cast<uint32_t>(call.row_offset + element.row);
    }
    if (call.kind == kSjlt) {
      const Words words = sparse_words(call.key, row, global_column);
      value *= 0.5f;
#pragma unroll
      for (int q = 0; q < kSparsity; q++) {
        const uint32_t bucket = word_bucket(words.w[q], dim / kSparsity) + q * (dim / kSparsity) - low;
        add_in_order(sums, here && bucket < size, bucket, with_sign(value, words.w[q] & 1));
      }
      continue;
    }
    uint32_t slot;
    if (call.kind == kXorfold) {
      slot = xorfold_slot(call, shape, row, global_column);
    } else {
      const uint32_t word = pick(count_words(call.key, row, global_column), global_column);
      slot = word_bucket(word, dim) | word << 31;
    }
    const uint32_t bucket = (slot & 0x7fffffffu) - low;
    add_in_order(sums, here && bucket < size, bucket, with_sign(value, slot >> 31));
  }
  __syncthreads();
  float* to = features + (static_cast<int64_t>(blockIdx.y) * call.samples + sample) * call.dim + low;
  for (uint32_t b = threadIdx.x; b < size; b += blockDim.x) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; w++) sum += shared[w * size + b];
    to[b] = sum;
  }
}
}  // namespace

int64_t scatter_groups(const ProjectCall& call) {
  const int64_t elements = call.source == kRows ? kElementsInGroup * 8 : call.m * call.k;
  return clamp_groups(elements / kElementsInGroup, 64);
}

int launch_scatter(const ProjectCall& call, float* features, int64_t groups, cudaStream_t stream) {
  uint32_t slice = kMostBuckets;
  while (slice * kWarps * sizeof(float) > static_cast<size_t>(largest_shared())) slice /= 2;
  if (call.dim < slice) slice = static_cast<uint32_t>(call.dim);
  const size_t bytes = slice * kWarps * sizeof(float);
  const int code = DATAFLEX_ALLOW_SHARED(scatter_values, bytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(static_cast<unsigned>(call.samples), static_cast<unsigned>(groups),
                  static_cast<unsigned>((call.dim + slice - 1) / slice));
  return DATAFLEX_LAUNCH(scatter_values, grid, dim3(32 * kWarps), bytes, stream, call, slice, features);
}
}  // namespace dataflex
