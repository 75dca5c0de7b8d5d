// The emulation's runtime: fibers, barriers, warp exchange, shared memory, the few runtime calls that launchers make.
#pragma once
#include <functional>

#include "emu_types.h"

using cudaError_t = int;
using cudaStream_t = struct EmuStream*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9,
                      cudaErrorInvalidDevice = 101,
                      cudaErrorLaunchFailure = 719;

namespace emu {
// A place in a kernel's source.
struct Site {
  const char* file;
  int line;
};
// What the running CUDA thread sees.
struct Thread {
  uint3 index, block;
  dim3 block_dim, grid_dim;
  int linear, lane, warp;
};
extern Thread* current;

// Threads and blocks that can run run in index order, in reverse, or in an order drawn from a seed. Environment:
// DATAFLEX_EMU_ORDER=forward|reverse|random, DATAFLEX_EMU_SEED=n; at the first launch, or when configure() is called.
enum class Order { forward, reverse, random };
struct Settings {
  Order order = Order::forward;
  uint64_t seed = 1;
  int preempt_percent = 20;     // chance, in random order, that an atomic or a fence lets another thread run
  unsigned char poison = 0xFF;  // fills shared memory: NaN as a float, -1 as an integer
};
void configure(const Settings& settings);

constexpr size_t kMaxShared = 232448;  // bytes a block can have on sm_90 and sm_100, static and dynamic
extern size_t shared_limit;           // what a block can have on the device that is emulated, at most kMaxShared
extern int devices_set;               // how many callers have made a device theirs (OnDevice of the bindings)
constexpr size_t kDefaultShared = 48 * 1024;
constexpr int kMultiprocessors = 4;

cudaError_t launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body);
cudaError_t allow_shared(const void* function, size_t bytes);
const char* last_error();  // of the last launch in this process; empty after a good one

[[noreturn]] void fail(const char* what, Site site);
void maybe_preempt();
void fence();

// One instance for each block, found by the address of a static in the kernel.
void* shared_variable(const void* key, const char* name, size_t bytes, size_t align);
void* dynamic_shared();

struct Votes {
  int yes, all;
};
Votes block_barrier(bool vote, Site site);

// Every lane of `mask` deposits a value; all get all of them. `orders` makes it a memory barrier too.
struct Word {
  uint64_t part[4];
};
const Word* warp_exchange(unsigned mask, const Word& value, bool orders, const char* what, Site site);

template <typename T>
__attribute__((no_sanitize("thread"))) inline Word pack(const T& value) {
  static_assert(sizeof(T) <= sizeof(Word), "too wide for a warp exchange");
  Word word{};
  __builtin_memcpy(&word, &value, sizeof value);
  return word;
}
template <typename T>
__attribute__((no_sanitize("thread"))) inline T unpack(const Word& word) {
  T value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// cp.async: a copy lands at its wait (forward order), at once (reverse) or either (random), never without a wait.
struct Copy {
  void* to;
  const void* from;
  unsigned bytes, source_bytes;  // the rest is filled with zeros
};
bool defer_copy(const Copy& copy, Site site);
void commit_copies();
bool take_copy(int groups_left, Copy* copy);  // the next copy that waiting for all but `groups_left` groups completes
// Inline in the kernel, so that sanitizers see the accesses.
inline void land(const Copy& copy) {
  auto* to = static_cast<unsigned char*>(copy.to);
  const auto* from = static_cast<const unsigned char*>(copy.from);
  for (unsigned i = 0; i < copy.bytes; i++) to[i] = i < copy.source_bytes ? from[i] : 0;
}
}  // namespace emu

// A default argument: the caller's place.
#define EMU_SITE ::emu::Site site = {__builtin_FILE(), __builtin_LINE()}

#define DATAFLEX_SHARED(T, name, dims)                                                            \
  typedef T name##_shared_t dims;                                                                 \
  static const char name##_key = 0;                                                               \
  name##_shared_t& name = *static_cast<name##_shared_t*>(                                         \
      ::emu::shared_variable(&name##_key, #name, sizeof(name##_shared_t), alignof(T)))
#define DATAFLEX_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::emu::dynamic_shared())
#define DATAFLEX_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  (static_cast<void>(stream),                                                                     \
   ::emu::launch(#kernel, (const void*)(kernel), grid, block, shared_bytes, [&] { (kernel)(__VA_ARGS__); }))
#define DATAFLEX_ALLOW_SHARED(kernel, bytes) ::emu::allow_shared((const void*)(kernel), bytes)

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrL2CacheSize,
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// Before a device is set the answer would be another device's.
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return emu::devices_set > 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? emu::kMultiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(emu::shared_limit)
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
                                                                  : 50 << 20;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
