// What device code calls: coordinates, barriers, warp collectives, atomics, loads, arithmetic.
#pragma once
#include <type_traits>

#include "emu_runtime.h"

#define threadIdx (::emu::current->index)
#define blockIdx (::emu::current->block)
#define blockDim (::emu::current->block_dim)
#define gridDim (::emu::current->grid_dim)
constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------ barriers
inline void __syncthreads(EMU_SITE) { emu::block_barrier(false, site); }
inline int __syncthreads_count(int vote, EMU_SITE) { return emu::block_barrier(vote != 0, site).yes; }
inline int __syncthreads_or(int vote, EMU_SITE) { return emu::block_barrier(vote != 0, site).yes > 0; }
inline int __syncthreads_and(int vote, EMU_SITE) {
  const emu::Votes votes = emu::block_barrier(vote != 0, site);
  return votes.yes == votes.all;
}
inline void __syncwarp(unsigned mask = ~0u, EMU_SITE) { emu::warp_exchange(mask, {}, true, "__syncwarp", site); }
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }

// ------------------------------------------------------------------------------------------------ warp collectives
namespace emu {
template <typename T>
inline T shuffle(unsigned mask, T value, int lane, const char* what, Site site) {
  const Word* all = warp_exchange(mask, pack(value), false, what, site);
  if (!(mask >> lane & 1)) fail("a shuffle reads a lane outside its mask", site);
  return unpack<T>(all[lane]);
}
template <typename T, typename F>
inline T reduce(unsigned mask, T value, F combine, const char* what, Site site) {
  const Word* all = warp_exchange(mask, pack(value), false, what, site);
  int lane = __builtin_ctz(mask);
  T total = unpack<T>(all[lane]);
  while (++lane < 32)
    if (mask >> lane & 1) total = combine(total, unpack<T>(all[lane]));
  return total;
}
inline int first_of(int lane, int width) { return lane & ~(width - 1); }
}  // namespace emu

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMU_SITE) {
  const int lane = emu::first_of(emu::current->lane, width) | (from & (width - 1));
  return emu::shuffle(mask, value, lane, "__shfl_sync", site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMU_SITE) {
  const int me = emu::current->lane, lane = me ^ bits;
  return emu::shuffle(mask, value, lane < emu::first_of(me, width) + width ? lane : me, "__shfl_xor_sync", site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMU_SITE) {
  const int me = emu::current->lane, lane = me + static_cast<int>(by);
  return emu::shuffle(mask, value, lane < emu::first_of(me, width) + width ? lane : me, "__shfl_down_sync", site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMU_SITE) {
  const int me = emu::current->lane, lane = me - static_cast<int>(by);
  return emu::shuffle(mask, value, lane >= emu::first_of(me, width) ? lane : me, "__shfl_up_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, int vote, EMU_SITE) {
  const unsigned mine = vote != 0 ? 1u << emu::current->lane : 0u;
  return emu::reduce(mask, mine, [](unsigned a, unsigned b) { return a | b; }, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int vote, EMU_SITE) { return __ballot_sync(mask, vote, site) != 0; }
inline int __all_sync(unsigned mask, int vote, EMU_SITE) { return __ballot_sync(mask, vote, site) == mask; }
inline unsigned __match_any_sync(unsigned mask, unsigned value, EMU_SITE) {
  const emu::Word* all = emu::warp_exchange(mask, emu::pack(value), false, "__match_any_sync", site);
  unsigned same = 0;
  for (int lane = 0; lane < 32; lane++)
    if ((mask >> lane & 1) && emu::unpack<unsigned>(all[lane]) == value) same |= 1u << lane;
  return same;
}
template <typename T>
inline T __reduce_add_sync(unsigned mask, T value, EMU_SITE) {
  return emu::reduce(mask, value, [](T a, T b) { return a + b; }, "__reduce_add_sync", site);
}
template <typename T>
inline T __reduce_max_sync(unsigned mask, T value, EMU_SITE) {
  return emu::reduce(mask, value, [](T a, T b) { return a > b ? a : b; }, "__reduce_max_sync", site);
}

// ------------------------------------------------------------------------------------------------ loads and stores
template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcg(const T* p) {
  return *p;
}
template <typename T>
inline void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
inline void __stcg(T* p, T value) {
  *p = value;
}

// ------------------------------------------------------------------------------------------------ atomics
namespace emu {
template <typename T>
struct Same {  // no deduction from the value, as in CUDA's overloads
  using type = T;
};
template <typename T, typename F>
inline T atomic_update(T* p, F f) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  maybe_preempt();
  auto* place = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(place, &before, bits<Bits>(static_cast<T>(f(bits<T>(before)))), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return bits<T>(before);
}
}  // namespace emu
#define EMU_ATOMIC(name, expression)                                          \
  template <typename T>                                                       \
  inline T name(T* p, typename emu::Same<T>::type value) {                    \
    return emu::atomic_update(p, [value](T old) { return expression; });      \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMax, old > value ? old : value)
EMU_ATOMIC(atomicMin, old < value ? old : value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicAnd, old& value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicExch, (static_cast<void>(old), value))
EMU_ATOMIC(atomicInc, old >= value ? T{0} : old + 1)
#undef EMU_ATOMIC
template <typename T>
inline T atomicCAS(T* p, typename emu::Same<T>::type expected, typename emu::Same<T>::type value) {
  return emu::atomic_update(p, [=](T old) { return old == expected ? value : old; });
}

// ------------------------------------------------------------------------------------------------ arithmetic
namespace emu {
// `value` off by so many units in the last place, up or down by the value's own bits: what an approximate instruction
// may be off by at most, so that a budget that holds here holds on a device.
inline float off_by(float value, float ulps) {
  if (value == 0.0f || !std::isfinite(value)) return value;
  const uint32_t mixed = bits<uint32_t>(value) * 2654435761u;
  return value + (mixed >> 31 ? ulps : -ulps) * 0x1p-23f * value;
}
// What .ftz instructions take and give for a number that has no normal exponent.
inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }
}  // namespace emu
// The largest errors are those of the CUDA C++ Programming Guide, "Intrinsic Functions".
inline float __expf(float x) { return emu::off_by(std::exp(x), 2.0f + std::floor(std::fabs(1.173f * x))); }
inline float __fdividef(float a, float b) { return emu::off_by(a / b, 2.0f); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float rsqrtf(float x) { return emu::off_by(1.0f / std::sqrt(x), 2.0f); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  unsigned picked = 0;
  for (int i = 0; i < 4; i++)
    picked |= static_cast<unsigned>((uint64_t{high} << 32 | low) >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return picked;
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
  return static_cast<unsigned>((uint64_t{hi} << 32 | lo) >> (by & 31));
}
using std::fmaxf;
using std::fminf;
template <typename T>
inline std::enable_if_t<std::is_arithmetic<T>::value, T> min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline std::enable_if_t<std::is_arithmetic<T>::value, T> max(T a, T b) {
  return a < b ? b : a;
}
