// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for host and device, and
// the counters of the projections: the same bits as dataflex/ops/hashing.py.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define DATAFLEX_BOTH __host__ __device__ __forceinline__
#else
// Never a shared symbol: the CPU code is compiled for several instruction sets.
#define DATAFLEX_BOTH static inline __attribute__((always_inline))
#endif

namespace dataflex {
struct Words {
  uint32_t w[4];
};

DATAFLEX_BOTH Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = static_cast<uint32_t>(p1), c2 = n2, c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Word i mod 4, by selection: an index that is not constant would put the words into memory.
DATAFLEX_BOTH uint32_t pick(const Words& words, uint32_t i) {
  const uint32_t low = i & 1 ? words.w[1] : words.w[0], high = i & 1 ? words.w[3] : words.w[2];
  return i & 2 ? high : low;
}

// Order of dataflex.ops.project_kinds.PROJECTIONS; the later kinds have no native code.
enum Projection { kXorfold = 0, kCountSketch = 1, kSjlt = 2 };
constexpr int kSparsity = 4;

// What names a random bit besides its row and column.
struct HashKey {
  uint64_t seed;
  uint32_t tensor_id;
};

// What the last counter of each kind of bits is.
constexpr uint32_t kOfSigns = 0x51515151u, kOfTiles = 0x4B4B4B4Bu, kOfCounts = 0x43434343u, kOfSparse = 0x53535353u;
// Xor-fold: sign of (row, column) is bit column mod 128 of these; 1 is minus.
DATAFLEX_BOTH Words sign_words(HashKey key, uint32_t row, uint32_t column) {
  return philox(column >> 7, row, key.tensor_id, kOfSigns, key.seed);
}
// Xor-fold: what the places inside tile (down, across) are xor-ed with.
DATAFLEX_BOTH uint32_t tile_key(HashKey key, uint32_t down, uint32_t across, uint32_t dim) {
  return philox(across, down, key.tensor_id, kOfTiles, key.seed).w[0] & (dim - 1);
}
// Count sketch: the word of (row, column) is word column mod 4.
DATAFLEX_BOTH Words count_words(HashKey key, uint32_t row, uint32_t column) {
  return philox(column >> 2, row, key.tensor_id, kOfCounts, key.seed);
}
// Sparse Johnson-Lindenstrauss: word q is for quarter q of the buckets.
DATAFLEX_BOTH Words sparse_words(HashKey key, uint32_t row, uint32_t column) {
  return philox(column, row, key.tensor_id, kOfSparse, key.seed);
}
// Bucket below `size` from the upper 31 bits of a word; its lowest bit is the sign, 1 for minus.
DATAFLEX_BOTH uint32_t word_bucket(uint32_t word, uint32_t size) {
  return static_cast<uint32_t>((static_cast<uint64_t>(word >> 1) * size) >> 31);
}

// log2 of the rows and columns of the xor-fold tile: rows * columns = dim, a power of two >= 2.
struct TileShape {
  int row_bits, column_bits;
};
DATAFLEX_BOTH TileShape tile_shape(int64_t dim) {
  int bits = 0;
  while ((static_cast<int64_t>(1) << (bits + 1)) <= dim) bits++;
  return {(bits - 1) / 2, bits - (bits - 1) / 2};
}
}  // namespace dataflex
