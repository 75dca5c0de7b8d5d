// Launchers of the kernels: raw device pointers, a stream, no torch. Each returns a cudaError_t, 0 for success.
// One family of ops has its own header beside this one; all include it.
#pragma once
#include <stddef.h>
#include <stdint.h>
#define DATAFLEX_API extern "C" __attribute__((visibility("default")))

enum DataflexDtype { DATAFLEX_F32 = 0, DATAFLEX_BF16 = 1, DATAFLEX_F16 = 2 };

// out [n] = in [n] + 1: shows that a library built for this device's architecture is loaded.
DATAFLEX_API int dataflex_probe(const float* in, float* out, int64_t n, void* stream);
