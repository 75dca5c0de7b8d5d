// Projection of per-sample gradients on the CPU: the parts that every instruction set has.
#pragma once
#include "dataflex/project.h"

namespace dataflex {
constexpr int kTileRows = 64, kTileColumns = 128, kTokensAtOnce = 256;

// Tiles first_tile to last_tile of the matrix, numbered along its rows, for samples [first, last).
// features [last - first, dim] and exact [last - first, 1 + queries] are added to.
#define DATAFLEX_PROJECT_VARIANT(isa)                                                                           \
  namespace isa {                                                                                               \
  void project_tiles(const ProjectCall& call, int64_t first_tile, int64_t last_tile, int64_t first, int64_t last, \
                     float* features, double* exact, void* workspace);                                          \
  void project_rows(const ProjectCall& call, int64_t sample, float* features, double* exact, void* workspace);  \
  int64_t project_workspace(const ProjectCall& call);                                                           \
  }
DATAFLEX_PROJECT_VARIANT(baseline)
DATAFLEX_PROJECT_VARIANT(avx2)
DATAFLEX_PROJECT_VARIANT(avx512)
#undef DATAFLEX_PROJECT_VARIANT

static inline int64_t column_tiles(const ProjectCall& call) {
  return (call.col_offset + call.k - 1) / kTileColumns - call.col_offset / kTileColumns + 1;
}

// The whole call, on torch's threads.
void project(const ProjectCall& call);
}  // namespace dataflex
