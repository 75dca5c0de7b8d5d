// What csrc/cpu needs and torch-free code can have: threads, and the instruction set chosen at run time.
#pragma once
#include <stdint.h>

#if defined(__x86_64__)
#define DATAFLEX_X86 1
#endif
// The builder compiles *_avx2.cpp and *_avx512.cpp with their own flags and defines DATAFLEX_ISA as avx2 or avx512.
#ifndef DATAFLEX_ISA
#define DATAFLEX_ISA baseline
#endif

namespace dataflex {
enum class Isa { baseline, avx2, avx512 };

// What this machine has, or less if the environment variable DATAFLEX_ISA names less. Read once.
Isa isa();

// Threads that parallel_for may use now (torch.get_num_threads()).
int num_threads();

// Calls body(begin, end, context) over pieces of [0, n), at least `grain` long, on torch's own threads; serial
// inside another parallel region. The pieces depend on the number of threads: results must not.
void parallel_ranges(int64_t n, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// The same for a callable f(begin, end) that does not throw.
template <typename F>
inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  parallel_ranges(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}
}  // namespace dataflex

// Calls avx512::function, avx2::function or baseline::function, whichever fits the machine.
#ifdef DATAFLEX_X86
#define DATAFLEX_DISPATCH(function, ...)                                        \
  (::dataflex::isa() == ::dataflex::Isa::avx512 ? avx512::function(__VA_ARGS__) \
   : ::dataflex::isa() == ::dataflex::Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                                                : baseline::function(__VA_ARGS__))
#else
#define DATAFLEX_DISPATCH(function, ...) baseline::function(__VA_ARGS__)
#endif
