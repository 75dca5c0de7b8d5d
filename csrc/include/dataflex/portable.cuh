// The only CUDA header that kernels include: the real thing under nvcc, the host emulation (csrc/emu) under
// DATAFLEX_EMU. Kernels are plain CUDA; only these four things are spelt by macro, for the emulation to see them.
//   DATAFLEX_SHARED(float, tile, [32][33]);      float tile[32][33] in static shared memory
//   DATAFLEX_DYNAMIC_SHARED(unsigned char, raw);  unsigned char* raw, 1024-byte aligned; one name a kernel
//   DATAFLEX_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)   -> cudaError_t; templates in parentheses
//   DATAFLEX_ALLOW_SHARED(kernel, bytes)          more than 48 KiB of dynamic shared memory -> cudaError_t
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef DATAFLEX_EMU
#include "cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DATAFLEX_SHARED(T, name, dims) __shared__ T name dims
#define DATAFLEX_DYNAMIC_SHARED(T, name)                                       \
  extern __shared__ __align__(1024) unsigned char dataflex_dynamic_shared[];   \
  T* name = reinterpret_cast<T*>(dataflex_dynamic_shared)
#define DATAFLEX_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)        \
  ((kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())
#define DATAFLEX_ALLOW_SHARED(kernel, bytes)                                   \
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, \
                       static_cast<int>(bytes))
#endif
