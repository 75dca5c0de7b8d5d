// C [m,n] = A [m,k] B [n,k]^T by cp.async, ldmatrix and mma.sync, for whole 16 x 8 x 16 tiles, one warp a block;
// two stages, with one bug of the harness's choice.
#include "dataflex/ptx.cuh"

constexpr int kStride = 24;  // 16 columns and 8 of padding: rows 48 bytes apart

template <bool BF16>
__global__ void __launch_bounds__(32)
    matmul(const uint16_t* __restrict__ a, const uint16_t* __restrict__ b, float* __restrict__ c, int n, int k) {
  using namespace dataflex;
  DATAFLEX_SHARED(uint16_t, tiles, [2][24 * kStride]);  // a stage: 16 rows of A, 8 rows of B
  const int lane = threadIdx.x, row0 = blockIdx.y * 16, column0 = blockIdx.x * 8;
  float d[4] = {};
  const auto stage = [&](int step) {
    for (int i = lane; i < 24 * 2; i += 32) {
      const int row = i / 2, half = i % 2 * 8;
      const uint16_t* from = row < 16 ? a + static_cast<size_t>(row0 + row) * k : b + static_cast<size_t>(column0 + row - 16) * k;
      cp_async<16>(&tiles[step % 2][row * kStride + half], from + step * 16 + half);
    }
    cp_async_commit();
  };
  stage(0);
  for (int step = 0; step < k / 16; step++) {
    if (step + 1 < k / 16) {
      stage(step + 1);
#ifndef BUG_NO_WAIT
      cp_async_wait<1>();
#endif
    } else {
      cp_async_wait<0>();
    }
#ifndef BUG_NO_WARP_BARRIER
    __syncwarp();
#endif
    const uint16_t* tile = tiles[step % 2];
    uint32_t fa[4], fb[2];
    ldmatrix_x4(fa, tile + lane % 16 * kStride + lane / 16 * 8);
    ldmatrix_x2(fb, tile + (16 + lane % 8) * kStride + lane / 8 % 2 * 8);
    if (BF16)
      mma_m16n8k16_bf16(d, fa, fb);
    else
      mma_m16n8k16_f16(d, fa, fb);
    __syncwarp();
  }
  for (int i = 0; i < 4; i++) {
    const int row = row0 + lane / 4 + 8 * (i >> 1), column = column0 + 2 * (lane % 4) + (i & 1);
    c[static_cast<size_t>(row) * n + column] = d[i];
  }
}

// The same product of float32 by m16n8k8 in tf32, and the fragments of a transposed load, straight from memory.
__global__ void __launch_bounds__(32)
    matmul_tf32(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c, int n, int k) {
  using namespace dataflex;
  const int lane = threadIdx.x, row0 = blockIdx.y * 16, column0 = blockIdx.x * 8;
  float d[4] = {};
  for (int at = 0; at < k; at += 8) {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; i++)
      fa[i] = to_tf32(a[static_cast<size_t>(row0 + lane / 4 + 8 * (i & 1)) * k + at + lane % 4 + 4 * (i >> 1)]);
    for (int i = 0; i < 2; i++) fb[i] = to_tf32(b[static_cast<size_t>(column0 + lane / 4) * k + at + lane % 4 + 4 * i]);
    mma_m16n8k8_tf32(d, fa, fb);
  }
  for (int i = 0; i < 4; i++)
    c[static_cast<size_t>(row0 + lane / 4 + 8 * (i >> 1)) * n + column0 + 2 * (lane % 4) + (i & 1)] = d[i];
}

// out [8,8] = in [8,8] transposed, by ldmatrix.trans.
__global__ void __launch_bounds__(32) transpose(const uint16_t* __restrict__ in, uint16_t* __restrict__ out) {
  DATAFLEX_SHARED(uint16_t, tile, [4 * 64]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 64; i += 32) tile[i] = in[i % 64];
  __syncwarp();
  uint32_t four[4], two[2];
  dataflex::ldmatrix_x4_trans(four, tile + lane * 8);
  dataflex::ldmatrix_x2_trans(two, tile + lane % 16 * 8);
  const bool same = four[0] == four[3] && four[0] == two[0] && four[0] == two[1];
  out[lane / 4 * 8 + 2 * (lane % 4)] = static_cast<uint16_t>(same ? four[0] & 0xffff : 0xffff);
  out[lane / 4 * 8 + 2 * (lane % 4) + 1] = static_cast<uint16_t>(same ? four[0] >> 16 : 0xffff);
}
