// Launchers of the loss kernels. Scratch memory is the caller's, of the sizes given here.
#pragma once
#include "api.h"
#include "dataflex/loss.h"

// Floats of scratch that the forward needs (0 where rows are not split over the vocabulary), and the backward.
DATAFLEX_API int64_t dataflex_loss_scratch(const DataflexLoss* args);
DATAFLEX_API int64_t dataflex_loss_backward_scratch(const DataflexLoss* args);

DATAFLEX_API int dataflex_loss_forward(const DataflexLoss* args, const DataflexLossOut* out, float* scratch,
                                       void* stream);
// No scratch: one block a row. k1 a power of two, 64 to 8192.
DATAFLEX_API int dataflex_loss_sketch(const DataflexLoss* args, const DataflexSketch* sketch,
                                      const DataflexLossOut* out, void* stream);
DATAFLEX_API int dataflex_loss_backward(const DataflexLoss* args, const DataflexLossGrad* grad, float* scratch,
                                        void* stream);
