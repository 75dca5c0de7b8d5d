// project_outer and project_values on CUDA and, for the tests, under the emulation.
#include "../kernels/project.h"
#include "project.h"

namespace dataflex {
namespace {
using Sizer = DataflexProjectScratch (*)(const ProjectCall*);
using Launcher = int (*)(const ProjectCall*, float*, double*, void*);

// The sizes depend on the device, so they are asked for when it is set.
void run(const ProjectCall& call, const Tensor& like, Sizer size, Launcher launch, const char* op) {
  const OnDevice device(like);
  const DataflexProjectScratch scratch = size(&call);
  Tensor features = torch::stable::new_empty(like, {scratch.features}, ScalarType::Float);
  Tensor exact = torch::stable::new_empty(like, {scratch.exact}, ScalarType::Double);
  check_launch(launch(&call, output<float>(features, "features"), output<double>(exact, "exact"), device.stream()), op);
}

void project_outer(Tensor out, Tensor sqnorm, Tensor dots, Tensor row, Tensor col, Tensor cu_seqlens, Tensor scale,
                   Optional exp_avg, Optional exp_avg_sq, std::vector<double> adam, Optional directions, int64_t kind,
                   int64_t seed, int64_t tensor_id, int64_t row_offset, int64_t col_offset) {
  const ProjectCall call = outer_call(out, sqnorm, dots, row, col, cu_seqlens, scale, exp_avg, exp_avg_sq, adam,
                                      directions, kind, seed, tensor_id, row_offset, col_offset);
  run(call, out, &dataflex_project_outer_scratch, &dataflex_project_outer, "project_outer");
}

void project_values(Tensor out, Tensor sqnorm, Tensor dots, Tensor grad, Optional row_ids, Tensor bounds, Tensor scale,
                    Optional exp_avg, Optional exp_avg_sq, std::vector<double> adam, Optional directions, int64_t kind,
                    int64_t seed, int64_t tensor_id, int64_t row_offset, int64_t col_offset, bool minus_zero) {
  const ProjectCall call = values_call(out, sqnorm, dots, grad, row_ids, bounds, scale, exp_avg, exp_avg_sq, adam,
                                       directions, kind, seed, tensor_id, row_offset, col_offset, minus_zero);
  run(call, out, &dataflex_project_values_scratch, &dataflex_project_values, "project_values");
}

int64_t fused_limit(Tensor like) {
  const OnDevice device(like);
  return dataflex_project_fused_limit();
}
}  // namespace
}  // namespace dataflex

DATAFLEX_OPS(m) {
  m.impl("project_outer", TORCH_BOX(&dataflex::project_outer));
  m.impl("project_values", TORCH_BOX(&dataflex::project_values));
  m.impl("fused_limit", TORCH_BOX(&dataflex::fused_limit));
}
