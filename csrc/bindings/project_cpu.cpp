// project_outer and project_values on the CPU.
#include "../cpu/project.h"
#include "project.h"

namespace dataflex {
namespace {
void check_bounds(const ProjectCall& call) {
  for (int64_t s = 0; s < call.samples; s++)
    STD_TORCH_CHECK(call.bounds[s] >= 0 && call.bounds[s] <= call.bounds[s + 1] && call.bounds[s + 1] <= call.pieces,
                    "bounds: expected to rise to ", call.pieces);
}

void project_outer(Tensor out, Tensor sqnorm, Tensor dots, Tensor row, Tensor col, Tensor cu_seqlens, Tensor scale,
                   Optional exp_avg, Optional exp_avg_sq, std::vector<double> adam, Optional directions, int64_t kind,
                   int64_t seed, int64_t tensor_id, int64_t row_offset, int64_t col_offset) {
  const ProjectCall call = outer_call(out, sqnorm, dots, row, col, cu_seqlens, scale, exp_avg, exp_avg_sq, adam,
                                      directions, kind, seed, tensor_id, row_offset, col_offset);
  check_bounds(call);
  project(call);
}

void project_values(Tensor out, Tensor sqnorm, Tensor dots, Tensor grad, Optional row_ids, Tensor bounds, Tensor scale,
                    Optional exp_avg, Optional exp_avg_sq, std::vector<double> adam, Optional directions, int64_t kind,
                    int64_t seed, int64_t tensor_id, int64_t row_offset, int64_t col_offset, bool minus_zero) {
  const ProjectCall call = values_call(out, sqnorm, dots, grad, row_ids, bounds, scale, exp_avg, exp_avg_sq, adam,
                                       directions, kind, seed, tensor_id, row_offset, col_offset, minus_zero);
  if (call.source == kRows) {
    check_bounds(call);
    for (int64_t p = 0; p < call.pieces; p++)
      STD_TORCH_CHECK(call.row_ids[p] >= 0 && call.row_ids[p] < call.m, "row_ids: expected 0 to ", call.m - 1);
  }
  project(call);
}
}  // namespace
}  // namespace dataflex

DATAFLEX_OPS(m) {
  m.impl("project_outer", TORCH_BOX(&dataflex::project_outer));
  m.impl("project_values", TORCH_BOX(&dataflex::project_values));
}
