// The shared memory of the block that runs: poisoned, with a guard around each variable.
#pragma once
#include <cstddef>
#include <string>

namespace emu {
// Fresh memory for a block. Any earlier block's is gone.
void shared_begin(size_t dynamic_bytes, unsigned char poison);
// What was written past a variable, or "" ; then nothing may touch the memory any more.
std::string shared_end(unsigned char poison);
}  // namespace emu
