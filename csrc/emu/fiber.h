// A stack that can be switched to and from: what one CUDA thread runs on.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#define EMU_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emu {
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // The next run() starts `entry` on this fiber's stack. `entry` must end in leave(true).
  void prepare(void (*entry)());
  // Called by the scheduler: returns when the fiber leaves.
  void run();
  // Called on the fiber: back to the scheduler. `dying`: it will not be run again.
  void leave(bool dying);
  // First thing in `entry`.
  void entered();

  // Nested scopes in which TSan overlooks this fiber (Quiet); lifted while it is away.
  int quiet = 0;

 private:
  char* stack_ = nullptr;
#ifdef EMU_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  void* asan_stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
};

extern Fiber* running;  // null on the scheduler

// TSan intercepts memcpy, new and free even in code that is not instrumented: this keeps the runtime's own out.
class Quiet {
 public:
  Quiet();
  ~Quiet();
};

// At the end of a launch: TSan's records of fibers that have ended.
void forget_fibers();
}  // namespace emu
