// Vectors of one register's floats, in GCC's vector extension; W follows the flags of the file that includes this.
// Everything is in the namespace of its instruction set: nothing here may be shared between files of different flags.
#pragma once
#include <stdint.h>
#include <string.h>

#include "dataflex/cpu.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dataflex {
namespace DATAFLEX_ISA {
namespace {
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline Floats splat(float x) { return x - Floats{}; }
inline Words splat(uint32_t x) { return x - Words{}; }
inline Words lanes() {
  Words lane{};
  for (int i = 0; i < W; i++) lane[i] = static_cast<uint32_t>(i);
  return lane;
}
// a where it is greater, else b: b where either is NaN.
inline Floats greater(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
// The lanes whose bits are set, negated.
inline Floats negated(Floats v, uint32_t bits) {
#if defined(__AVX512F__)
  const __m512i sign = _mm512_set1_epi32(INT32_MIN), v_bits = bits_of<__m512i>(v);
  return bits_of<Floats>(_mm512_mask_xor_epi32(v_bits, static_cast<__mmask16>(bits), v_bits, sign));
#else
  return bits_of<Floats>(bits_of<Words>(v) ^ ((splat(bits) >> lanes()) << 31));
#endif
}
inline float largest(Floats v) {
  for (uint32_t step = W / 2; step > 0; step /= 2) v = greater(__builtin_shuffle(v, bits_of<Ints>(lanes() ^ step)), v);
  return v[0];
}
inline float total(Floats v) {
  float sum = 0.0f;
  for (int i = 0; i < W; i++) sum += v[i];
  return sum;
}

inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent and makes subnormals normal; infinities and NaNs keep all exponent bits.
  const float value = bits_of<float>(rest) * 0x1p112f;
  const uint32_t finite = bits_of<uint32_t>(value);
  return bits_of<float>(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
}

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Floats load(const Bf16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return bits_of<Floats>(__builtin_convertvector(h, Words) << 16);
}
inline Floats load(const Fp16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats v;
  for (int i = 0; i < W; i++) v[i] = widen(p[i]);
  return v;
#endif
}

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, Bf16* p) {
  const uint32_t u = bits_of<uint32_t>(x);
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void narrow(float x, Fp16* p) {
  const uint32_t u = bits_of<uint32_t>(x), magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the addition rounds at the last bit that a half keeps
    half = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>((u >> 16 & 0x8000) | half);
}

// Stores W values that are no NaN; `around` goes past the caches and needs p aligned to the vector.
inline void store(Floats v, float* p, [[maybe_unused]] bool around) {
#if defined(__AVX512F__)
  if (around) return _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  if (around) return _mm256_stream_ps(p, v);
#endif
  memcpy(p, &v, sizeof v);
}
inline void store(Halves h, void* p, [[maybe_unused]] bool around) {
#if defined(__AVX512F__)
  if (around) return _mm256_stream_si256(static_cast<__m256i*>(p), bits_of<__m256i>(h));
#elif defined(__AVX2__)
  if (around) return _mm_stream_si128(static_cast<__m128i*>(p), bits_of<__m128i>(h));
#endif
  memcpy(p, &h, sizeof h);
}
inline void store(Floats v, Bf16* p, bool around) {
  const Words u = bits_of<Words>(v);
  store(__builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, Halves), static_cast<void*>(p), around);
}
inline void store(Floats v, Fp16* p, bool around) {
#if defined(__AVX512F__)
  store(bits_of<Halves>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT)), static_cast<void*>(p), around);
#elif defined(__F16C__)
  store(bits_of<Halves>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)), static_cast<void*>(p), around);
#else
  (void)around;
  for (int i = 0; i < W; i++) narrow(v[i], p + i);
#endif
}
inline void after_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// e^x for x <= 80, relative error below 2e-7 + |x| 2e-8; below kLeast it stays at e^kLeast = 1.2e-38. NaN stays NaN.
constexpr float kLeast = -87.3f;
inline Floats exp(Floats x) {
  x = greater(splat(kLeast), x);
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Floats shifted = fma(x, splat(1.44269504f), magic), n = shifted - magic;
#if defined(__FMA__)
  const Floats f = fma(x, splat(1.44269504f), -n);
#else
  const Floats f = ((x - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504f;
#endif
  Floats p = fma(splat(1.32647273e-3f), f, splat(9.67151299e-3f));  // minimax for 2^f with 2^0 = 1
  p = fma(p, f, splat(5.55073358e-2f));
  p = fma(p, f, splat(2.40222424e-1f));
  p = fma(p, f, splat(6.93147004e-1f));
  p = fma(p, f, splat(1.0f));
  return bits_of<Floats>(bits_of<Words>(p) + (bits_of<Words>(shifted) << 23));
}

// tanh, absolute error below 2e-7 and relative below 4e-7; NaN stays NaN.
inline Floats tanh(Floats x) {
  const Words sign = bits_of<Words>(x) & 0x80000000u;
  const Floats size = bits_of<Floats>(bits_of<Words>(x) ^ sign);
  const Floats shrunk = exp(size * -2.0f);
  const Floats large = (1.0f - shrunk) / (1.0f + shrunk);
  const Floats square = size * size;  // the polynomial of Cephes' tanhf
  Floats p = fma(splat(-5.70498872745e-3f), square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const Floats small = fma(p * square, size, size);
  return bits_of<Floats>(bits_of<Words>(size < 0.625f ? small : large) | sign);
}
}  // namespace
}  // namespace DATAFLEX_ISA
}  // namespace dataflex
