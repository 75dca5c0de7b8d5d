// The state of the block that runs, shared by the scheduler and by what threads meet in.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "emu_runtime.h"
#include "fiber.h"

namespace emu {
enum class State { ready, at_barrier, in_warp, done };

struct CudaThread {
  Fiber fiber;
  Thread thread;
  State state = State::done;
  const char* waits_in = "";
  Site site{};
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
};

// A meeting of the threads of a block, or of lanes with one mask. Results are kept for two rounds: a thread can
// be a round behind when the others meet again, not two.
struct Meeting {
  int arrived = 0, round = 0, votes = 0;
  unsigned lanes = 0;
  Site site{};
  Votes result[2];
  Word words[2][32];
  char tag[2];
};

struct Team {
  std::deque<CudaThread> threads;  // fibers stay where they are; the first `count` are this block's
  size_t count = 0;
  int live = 0;
  std::deque<CudaThread*> ready;
  Meeting barrier;
  std::vector<std::map<unsigned, Meeting>> warps;  // by mask
};
extern Team team;
extern Settings settings;

CudaThread& self();
std::string place(Site site);
uint64_t draw();
void make_ready(CudaThread& thread);
// Let another thread run; returns when this one's turn comes again.
void wait(State state, const char* what, Site site);
void yield();
// All live threads have arrived.
void open_barrier();
}  // namespace emu
