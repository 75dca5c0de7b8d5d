// Vectors of the widest registers of DATAFLEX_ISA, and the products of a tile. Included by each variant.
#pragma once
#include <string.h>
#ifdef DATAFLEX_X86
#include <immintrin.h>
#endif

namespace dataflex {
namespace DATAFLEX_ISA {
namespace {
#if defined(__AVX512F__)
constexpr int kWidth = 16, kStripRows = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kStripRows = 4;
#else
constexpr int kWidth = 4, kStripRows = 4;
#endif
constexpr int kStripColumns = 2 * kWidth;
typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));

inline Floats load(const float* from) {
  Floats x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }
inline Floats all(float x) { return x - Floats{}; }

inline Bits bits_of(Floats x) {
  Bits bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline Floats floats_of(Bits bits) {
  Floats x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline Floats root(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);  // plain sqrt leaves a lane source that GCC calls uninitialised
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < kWidth; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

inline float wide(float x) { return x; }
inline float wide(_Float16 x) { return static_cast<float>(x); }
struct BFloat16 {
  uint16_t bits;
};
inline float wide(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// from [tokens, columns] with `stride`, to strips [strip][tokens][Width] in float32; zeros outside [low, high).
template <int Width, typename T>
void pack(float* to, const T* from, int64_t stride, int tokens, int low, int high) {
  for (int start = 0; start < high; start += Width, to += static_cast<int64_t>(tokens) * Width) {
    const bool full = start >= low && start + Width <= high;
    for (int t = 0; t < tokens; t++) {
      const T* source = from + t * stride + (start - low);
      float* target = to + static_cast<int64_t>(t) * Width;
      if (full) {
        for (int i = 0; i < Width; i++) target[i] = wide(source[i]);
      } else {
        for (int i = 0; i < Width; i++) target[i] = start + i >= low && start + i < high ? wide(source[i]) : 0.0f;
      }
    }
  }
}

// grad [kStripRows, kStripColumns] (`stride` between rows) = or += sum over t of left[t] right[t]^T.
inline void multiply_strip(float* grad, int stride, const float* left, const float* right, int tokens, bool first) {
  Floats sum[kStripRows][2];
  for (int r = 0; r < kStripRows; r++) {
    sum[r][0] = first ? Floats{} : load(grad + r * stride);
    sum[r][1] = first ? Floats{} : load(grad + r * stride + kWidth);
  }
  for (int t = 0; t < tokens; t++, left += kStripRows, right += kStripColumns) {
    const Floats low = load(right), high = load(right + kWidth);
    for (int r = 0; r < kStripRows; r++) {
      const Floats factor = all(left[r]);
      sum[r][0] += factor * low;
      sum[r][1] += factor * high;
    }
  }
  for (int r = 0; r < kStripRows; r++) {
    store(grad + r * stride, sum[r][0]);
    store(grad + r * stride + kWidth, sum[r][1]);
  }
}

// Sum over i < n of a[i] b[i], in lanes.
inline float inner(const float* a, const float* b, int n) {
  Floats lanes = {};
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) lanes += load(a + i) * load(b + i);
  float sum = 0.0f;
  for (int j = 0; j < kWidth; j++) sum += lanes[j];
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}
}  // namespace
}  // namespace DATAFLEX_ISA
}  // namespace dataflex
