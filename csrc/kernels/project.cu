// The epilogue of the chunked form: which kernels run, and their scratch memory.
#include "project.h"

#include "project_epilogue.cuh"

namespace dataflex {
namespace {
bool empty(const ProjectCall& call) { return call.samples == 0 || call.m == 0 || call.k == 0; }
bool folds(const ProjectCall& call) { return call.kind == kXorfold && call.dim >= 64 && call.source == kMatrices; }
int64_t feature_groups(const ProjectCall& call) {
  return call.dim == 0 ? 0 : folds(call) ? fold_groups(call) : scatter_groups(call);
}
int64_t measure_groups(const ProjectCall& call) { return call.sqnorm || call.queries ? exact_groups(call) : 0; }
}  // namespace
}  // namespace dataflex

DataflexProjectScratch dataflex_project_values_scratch(const dataflex::ProjectCall* call) {
  using namespace dataflex;
  if (empty(*call)) return {0, 0};
  return {feature_groups(*call) * call->samples * call->dim,
          measure_groups(*call) * call->samples * (1 + call->queries)};
}

int dataflex_project_values(const dataflex::ProjectCall* call, float* features, double* exact, void* stream) {
  using namespace dataflex;
  if (empty(*call)) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t groups = feature_groups(*call), measures = measure_groups(*call);
  int code = cudaSuccess;
  if (groups) code = (folds(*call) ? launch_fold : launch_scatter)(*call, features, groups, on);
  if (code == cudaSuccess && measures) code = launch_exact(*call, exact, measures, on);
  if (code != cudaSuccess) return code;
  return launch_reduce(*call, features, groups, exact, measures, on);
}
