// CUDA on the host: kernels of csrc/kernels run unchanged, one fiber for each CUDA thread, one block at a time.
// Included by dataflex/portable.cuh in place of the CUDA headers; needs no toolkit.
//
// What it shows: wrong results, divergent or missing barriers (in one of the orders of threads, or under TSan),
// lanes that miss a warp collective, shuffles from lanes outside the mask, uninitialised shared memory (poisoned),
// writes past a shared variable, copies that nobody waited for; under ASan every access out of bounds, by line.
// What it cannot show: speed, memory fences, the rounding of the hardware's approximate instructions.
// Not there: clusters, cooperative groups, tensor maps, wgmma, dynamic parallelism.
#pragma once
#include "emu_types.h"

#include "emu_runtime.h"

#include "emu_device.h"
