// Launchers of the projection kernels. All pointers of the call are device pointers.
#pragma once
#include "api.h"
#include "dataflex/project.h"

// Scratch memory that a call needs: floats of partial features, doubles of partial norms and inner products.
typedef struct {
  int64_t features, exact;
} DataflexProjectScratch;

// The largest dim of the fused kernel on the current device: 16384, less where a block has less than 103 KiB of shared
// memory (sm_86, sm_89, sm_120), 0 where it can only have none.
DATAFLEX_API int64_t dataflex_project_fused_limit();
// Source kOuterProducts: the fused kernel. 16-bit inputs with rows at multiples of 16 bytes; dim 0 or a power of two
// from 512 to that limit; queries at most 8; m, k and the offsets multiples of 8.
DATAFLEX_API DataflexProjectScratch dataflex_project_outer_scratch(const dataflex::ProjectCall* call);
DATAFLEX_API int dataflex_project_outer(const dataflex::ProjectCall* call, float* features, double* exact,
                                        void* stream);
// Sources kMatrices and kRows: the epilogue kernels.
DATAFLEX_API DataflexProjectScratch dataflex_project_values_scratch(const dataflex::ProjectCall* call);
DATAFLEX_API int dataflex_project_values(const dataflex::ProjectCall* call, float* features, double* exact,
                                         void* stream);
