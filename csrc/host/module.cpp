// The torch-free host helper: what this processor has, and how it was built.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {
// Instruction sets that matter here, as far as processor and operating system both support them.
py::list cpu_features() {
  py::list found;
#if defined(__x86_64__)
#define DATAFLEX_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.append(name)
  DATAFLEX_FEATURE("avx2");
  DATAFLEX_FEATURE("fma");
  DATAFLEX_FEATURE("f16c");
  DATAFLEX_FEATURE("avx512f");
  DATAFLEX_FEATURE("avx512bw");
  DATAFLEX_FEATURE("avx512dq");
  DATAFLEX_FEATURE("avx512vl");
  DATAFLEX_FEATURE("avx512bf16");
#undef DATAFLEX_FEATURE
#endif
  return found;
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["flags"] = DATAFLEX_FLAGS;
  return facts;
}
}  // namespace

PYBIND11_MODULE(_dataflex_host, module) {
  module.def("cpu_features", &cpu_features);
  module.def("build_facts", &build_facts);
}
