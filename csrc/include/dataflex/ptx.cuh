// Every inline-PTX instruction, each with its meaning on the host. sm_80 and later.
#pragma once
#include "dataflex/portable.cuh"

namespace dataflex {
#ifdef DATAFLEX_EMU
#define DATAFLEX_PTX inline
#define DATAFLEX_SITE , EMU_SITE
#else
#define DATAFLEX_PTX __device__ __forceinline__
#define DATAFLEX_SITE
#endif

// What it is given, which the compiler then keeps in a register: it may not work it out again where it is used.
DATAFLEX_PTX uint32_t kept(uint32_t value) {
#ifndef DATAFLEX_EMU
  asm volatile("" : "+r"(value));
#endif
  return value;
}
DATAFLEX_PTX uint64_t kept_address(uint64_t value) {
#ifndef DATAFLEX_EMU
  asm volatile("" : "+l"(value));
#endif
  return value;
}

// cp.async: copies BYTES (4, 8 or 16; both addresses so aligned) to shared memory; zeros if not `valid`, and then
// nothing is read. Lands by cp_async_wait of its group, for the thread that issued it: others need a barrier too.
template <int BYTES>
DATAFLEX_PTX void cp_async(void* shared, const void* global, bool valid = true DATAFLEX_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef DATAFLEX_EMU
  const emu::Copy copy{shared, global, BYTES, valid ? unsigned{BYTES} : 0u};
  if (!emu::defer_copy(copy, site)) emu::land(copy);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes)
                 : "memory");
#endif
}

// Ends the thread's group of copies.
DATAFLEX_PTX void cp_async_commit() {
#ifdef DATAFLEX_EMU
  emu::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most GROUPS of the thread's latest groups are open.
template <int GROUPS>
DATAFLEX_PTX void cp_async_wait() {
#ifdef DATAFLEX_EMU
  emu::Copy copy;
  while (emu::take_copy(GROUPS, &copy)) emu::land(copy);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

#ifdef DATAFLEX_EMU
namespace detail {
template <int MATRICES, bool TRANSPOSED>
inline void ldmatrix(uint32_t* out, const void* row, emu::Site site) {
  const emu::Word* rows = emu::warp_exchange(~0u, emu::pack(row), false, "ldmatrix", site);
  const int lane = emu::current->lane;
  for (int i = 0; i < MATRICES; i++) {
    uint16_t pair[2];
    for (int half = 0; half < 2; half++) {
      const int r = TRANSPOSED ? 2 * (lane % 4) + half : lane / 4, c = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + half;
      const auto* start = static_cast<const uint16_t*>(emu::unpack<const void*>(rows[i * 8 + r]));
      if (reinterpret_cast<uintptr_t>(start) % 16) emu::fail("ldmatrix: a row is not aligned to 16 bytes", site);
      pair[half] = start[c];
    }
    out[i] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
  }
  emu::warp_exchange(~0u, {}, true, "ldmatrix", site);
}
}  // namespace detail
#endif

// ldmatrix.m8n8: lane 8 i + r points at row r (16 bytes of shared memory) of matrix i; every lane gives an address.
// Lane l receives of matrix i the pair (row l/4, columns 2 (l%4) and + 1); transposed, (rows 2 (l%4) and + 1, column
// l/4).
DATAFLEX_PTX void ldmatrix_x4(uint32_t (&out)[4], const void* row DATAFLEX_SITE) {
#ifdef DATAFLEX_EMU
  detail::ldmatrix<4, false>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}
DATAFLEX_PTX void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row DATAFLEX_SITE) {
#ifdef DATAFLEX_EMU
  detail::ldmatrix<4, true>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}
DATAFLEX_PTX void ldmatrix_x2(uint32_t (&out)[2], const void* row DATAFLEX_SITE) {
#ifdef DATAFLEX_EMU
  detail::ldmatrix<2, false>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}
DATAFLEX_PTX void ldmatrix_x2_trans(uint32_t (&out)[2], const void* row DATAFLEX_SITE) {
#ifdef DATAFLEX_EMU
  detail::ldmatrix<2, true>(out, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

#ifdef DATAFLEX_EMU
namespace detail {
// d += a b for one m16n8 tile; `a(row, k, words)` and `b(k, column, words)` read one lane's registers.
struct Operands {
  uint32_t a[4], b[2];
};
template <int K, typename A, typename B>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], A a_at, B b_at, emu::Site site) {
  Operands mine;
  for (int i = 0; i < 4; i++) mine.a[i] = a[i];
  for (int i = 0; i < 2; i++) mine.b[i] = b[i];
  const emu::Word* all = emu::warp_exchange(~0u, emu::pack(mine), false, "mma", site);
  const int lane = emu::current->lane;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
    float sum = 0.0f;
    for (int k = 0; k < K; k++) sum += a_at(all, row, k) * b_at(all, k, column);
    d[i] += sum;
  }
}
// The 16-bit element of the fragments of m16n8k16:
//   A register i of lane l: row l/4 + 8 (i&1), columns 2 (l%4) + 8 (i>>1) and + 1
//   B register i of lane l: rows 2 (l%4) + 8 i and + 1, column l/4
inline uint16_t a16(const emu::Word* all, int row, int k) {
  const auto lane = emu::unpack<Operands>(all[row % 8 * 4 + k % 8 / 2]);
  return static_cast<uint16_t>(lane.a[(row >= 8) + 2 * (k >= 8)] >> (k & 1 ? 16 : 0));
}
inline uint16_t b16(const emu::Word* all, int k, int column) {
  const auto lane = emu::unpack<Operands>(all[column * 4 + k % 8 / 2]);
  return static_cast<uint16_t>(lane.b[k >= 8] >> (k & 1 ? 16 : 0));
}
// m16n8k8 of tf32: A register i of lane l: row l/4 + 8 (i&1), column l%4 + 4 (i>>1); B: row l%4 + 4 i, column l/4.
// The hardware looks at the upper 19 bits.
inline float a_tf32(const emu::Word* all, int row, int k) {
  const auto lane = emu::unpack<Operands>(all[row % 8 * 4 + k % 4]);
  return __uint_as_float(lane.a[(row >= 8) + 2 * (k >= 4)] & 0xffffe000u);
}
inline float b_tf32(const emu::Word* all, int k, int column) {
  const auto lane = emu::unpack<Operands>(all[column * 4 + k % 4]);
  return __uint_as_float(lane.b[k >= 4] & 0xffffe000u);
}
}  // namespace detail
#endif

// mma.sync, d [16,8] += a [16,k] b [k,8] in float32, fragments as the PTX ISA lays them out (above, and
// C/D register i of lane l: row l/4 + 8 (i>>1), column 2 (l%4) + (i&1)).
DATAFLEX_PTX void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] DATAFLEX_SITE) {
#ifdef DATAFLEX_EMU
  detail::mma<16>(
      d, a, b, [](auto... at) { return static_cast<float>(__ushort_as_bfloat16(detail::a16(at...))); },
      [](auto... at) { return static_cast<float>(__ushort_as_bfloat16(detail::b16(at...))); }, site);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
DATAFLEX_PTX void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] DATAFLEX_SITE) {
#ifdef DATAFLEX_EMU
  detail::mma<16>(
      d, a, b, [](auto... at) { return static_cast<float>(__ushort_as_half(detail::a16(at...))); },
      [](auto... at) { return static_cast<float>(__ushort_as_half(detail::b16(at...))); }, site);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// a and b hold float32 bits; `to_tf32` rounds them, else they are cut off.
DATAFLEX_PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] DATAFLEX_SITE) {
#ifdef DATAFLEX_EMU
  detail::mma<8>(d, a, b, detail::a_tf32, detail::b_tf32, site);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// Within 2^-23 of the root, relative; 0 of 0.
DATAFLEX_PTX float sqrt_approximate(float value) {
#ifdef DATAFLEX_EMU
  return emu::off_by(std::sqrt(value), 1.0f);
#else
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#endif
}
// The approximate instructions below take numbers under 2^-126 for 0 and give 0 for such a result: without that each is
// three to five instructions. Largest errors as the PTX ISA documents them.
// 2^x, within 2 units in the last place.
DATAFLEX_PTX float exp2_approximate(float x) {
#ifdef DATAFLEX_EMU
  return emu::flushed(emu::off_by(std::exp2(emu::flushed(x)), 2.0f));
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}
// 1 / x, within 1 unit in the last place.
DATAFLEX_PTX float reciprocal_approximate(float x) {
#ifdef DATAFLEX_EMU
  return emu::flushed(emu::off_by(1.0f / emu::flushed(x), 1.0f));
#else
  float part;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(x));
  return part;
#endif
}
// x brought into [-most, most]; NaN stays NaN, which fminf would not let it.
DATAFLEX_PTX float clamped(float x, float most) {
#ifdef DATAFLEX_EMU
  return x > most ? most : x < -most ? -most : x;
#else
  float inside;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(inside) : "f"(x), "f"(most));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(inside) : "f"(inside), "f"(-most));
  return inside;
#endif
}
// Round to nearest, ties away from zero, to 10 bits of mantissa.
DATAFLEX_PTX uint32_t to_tf32(float value) {
#ifdef DATAFLEX_EMU
  return (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}
}  // namespace dataflex
