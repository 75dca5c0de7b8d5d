#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sanitizers.h"

namespace emu {
Fiber* running = nullptr;

namespace {
constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

#ifdef EMU_UCONTEXT
ucontext_t scheduler;
#else
void* scheduler = nullptr;
#endif
[[maybe_unused]] void* scheduler_asan = nullptr;
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;
[[maybe_unused]] void* scheduler_tsan = nullptr;
// A destroyed fiber takes its history with it, and with that every race against it: keep a few thousand.
[[maybe_unused]] std::vector<void*> graveyard;

char* new_stack() {
  void* p = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, kPage, PROT_NONE) != 0) {
    std::perror("emulation: no memory for a stack");
    std::abort();
  }
  return static_cast<char*>(p) + kPage;
}
}  // namespace

#ifndef EMU_UCONTEXT
extern "C" void dataflex_emu_switch(void** save, void* to);
asm(R"(
.text
.globl dataflex_emu_switch
.hidden dataflex_emu_switch
.type dataflex_emu_switch,@function
dataflex_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size dataflex_emu_switch,.-dataflex_emu_switch
)");
#endif

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_ - kPage, kStack + kPage);
}

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  allow(stack_, kStack);
#ifdef DATAFLEX_EMU_TSAN
  // New pages have no history of accesses.
  mmap(stack_, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (tsan_fiber_ != nullptr) graveyard.push_back(tsan_fiber_);
  if (graveyard.size() > 4096) forget_fibers();
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
  asan_stack_ = nullptr;
  quiet = 0;
#ifdef EMU_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  void** top = reinterpret_cast<void**>(stack_ + kStack);
  *--top = nullptr;  // the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the saved registers
  stack_pointer_ = top;
#endif
}

void Fiber::run() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_asan, stack_, kStack);
#endif
#ifdef DATAFLEX_EMU_TSAN
  scheduler_tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, 1);
  for (int i = 0; i < quiet; i++) quiet_begin();
#endif
  running = this;
#ifdef EMU_UCONTEXT
  swapcontext(&scheduler, &context_);
#else
  dataflex_emu_switch(&scheduler, stack_pointer_);
#endif
  running = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_asan, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool dying) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(dying ? nullptr : &asan_stack_, scheduler_bottom, scheduler_size);
#endif
#ifdef DATAFLEX_EMU_TSAN
  for (int i = 0; i < quiet; i++) quiet_end();
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
#ifdef EMU_UCONTEXT
  swapcontext(&context_, &scheduler);
#else
  dataflex_emu_switch(&stack_pointer_, scheduler);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(asan_stack_, &scheduler_bottom, &scheduler_size);
#endif
}

void Fiber::entered() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
}

Quiet::Quiet() {
  quiet_begin();
  if (running != nullptr) running->quiet++;
}

Quiet::~Quiet() {
  quiet_end();
  if (running != nullptr) running->quiet--;
}

void forget_fibers() {
#ifdef DATAFLEX_EMU_TSAN
  for (void* fiber : graveyard) __tsan_destroy_fiber(fiber);
  graveyard.clear();
#endif
}
}  // namespace emu
