#include <cstdlib>
#include <cstring>

#include "dataflex/cpu.h"

namespace dataflex {
namespace {
Isa best() {
#ifdef DATAFLEX_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen() {
  const Isa most = best();
  const char* asked = std::getenv("DATAFLEX_ISA");
  if (asked == nullptr) return most;
  const Isa limit = !std::strcmp(asked, "baseline") ? Isa::baseline : !std::strcmp(asked, "avx2") ? Isa::avx2 : most;
  return limit < most ? limit : most;
}
}  // namespace

Isa isa() {
  static const Isa isa = chosen();
  return isa;
}
}  // namespace dataflex
