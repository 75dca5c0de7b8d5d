// per_sample_loss on the CPU: the driver (loss.cpp) and what one row costs, once per instruction set (loss_rows.h).
#pragma once
#include "dataflex/cpu.h"
#include "dataflex/loss.h"

namespace dataflex {
// What a part of a row's vocabulary says; two parts merge by `merge` in loss.cpp.
struct LossPart {
  float max = -__builtin_huge_valf();  // largest logit (after softcap)
  float sum = 0.0f;                    // of exp(logit - max)
  double weighted = 0.0;               // sum of class weight * logit, only with label smoothing
  double weights = 0.0;                // sum of class weights, likewise
};

// Gradient of the logits of one row: soft * exp(x - lse) - uniform * class weight, less `hit` at the label,
// times the softcap's derivative.
struct LossRowGrad {
  float lse, soft, uniform, hit;
  int64_t label;  // in the row, or -1
};

#define DATAFLEX_LOSS_ROWS                                                                                      \
  /* Reads columns [begin, end) of a row once. sketch: [k1] sums of exp(x - part.max) * sign * softcap's      */ \
  /* derivative, zeros before; or null.                                                                       */ \
  LossPart scan_row(const DataflexLoss& args, const void* row, int64_t begin, int64_t end,                       \
                    const DataflexSketch* tables, float* sketch);                                               \
  /* Reads columns [begin, end) of a row and writes their gradient, where the logits lay if that is asked.    */ \
  void grad_row(const DataflexLoss& args, const void* row, void* out, int64_t begin, int64_t end,                \
                const LossRowGrad& grad);

namespace baseline {
DATAFLEX_LOSS_ROWS
}
#ifdef DATAFLEX_X86
namespace avx2 {
DATAFLEX_LOSS_ROWS
}
namespace avx512 {
DATAFLEX_LOSS_ROWS
}
#endif

void loss_forward(const DataflexLoss& args, const DataflexSketch* sketch, const DataflexLossOut& out);
void loss_backward(const DataflexLoss& args, const DataflexLossGrad& grad);

inline int64_t loss_element_size(const DataflexLoss& args) { return args.dtype == 0 ? 4 : 2; }
}  // namespace dataflex
