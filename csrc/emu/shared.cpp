#include "shared.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "emu_runtime.h"
#include "fiber.h"
#include "sanitizers.h"

namespace emu {
namespace {
constexpr size_t kGuard = 64, kAlign = 16, kDynamicAlign = 1024;
constexpr size_t kArena = kMaxShared + (64 << 10);  // room for guards and alignment

struct Variable {
  const void* key;
  const char* name;
  size_t offset, bytes;
};
char* arena = nullptr;
size_t used = 0, static_bytes = 0, dynamic = 0, dirty = kArena;
std::vector<Variable> variables;

// SIZE_MAX where there is no room.
size_t carve(const void* key, const char* name, size_t bytes, size_t align) {
  const size_t offset = (used + kGuard + align - 1) / align * align;
  if (offset + bytes + kGuard > kArena) return SIZE_MAX;
  used = offset + bytes;
  variables.push_back({key, name, offset, bytes});
  allow(arena + offset, bytes);
  return offset;
}
}  // namespace

void shared_begin(size_t dynamic_bytes, unsigned char poison) {
  const Quiet quiet;
#ifdef DATAFLEX_EMU_TSAN
  std::free(arena);  // different blocks' shared memory is unrelated: new pages have no history of accesses
  arena = nullptr;
#endif
  if (arena == nullptr) {
    arena = static_cast<char*>(std::aligned_alloc(kDynamicAlign, kArena));
    dirty = kArena;
  }
  allow(arena, kArena);
  std::memset(arena, poison, kArena < dirty ? kArena : dirty);
  forbid(arena, kArena);
  used = static_bytes = 0;
  variables.clear();
  dynamic = dynamic_bytes;
  if (dynamic_bytes) carve(nullptr, "the dynamic shared memory", dynamic_bytes, kDynamicAlign);
}

std::string shared_end(unsigned char poison) {
  allow(arena, kArena);
  dirty = used + 2 * kGuard;
  size_t from = 0;
  const char* before = "the start of shared memory";
  for (size_t i = 0; i <= variables.size(); i++) {
    const size_t to = i < variables.size() ? variables[i].offset : used + kGuard;
    for (size_t at = from; at < to; at++)
      if (static_cast<unsigned char>(arena[at]) != poison) {
        dirty = kArena;
        return "shared memory written " + std::to_string(at - from) + " bytes past the end of " + before;
      }
    if (i == variables.size()) break;
    from = variables[i].offset + variables[i].bytes;
    before = variables[i].name;
  }
  return "";
}

void* shared_variable(const void* key, const char* name, size_t bytes, size_t align) {
  for (const Variable& variable : variables)
    if (variable.key == key) return arena + variable.offset;
  const Quiet quiet;
  static_bytes += bytes;
  const size_t offset = carve(key, name, bytes, align < kAlign ? kAlign : align);
  if (static_bytes > kDefaultShared) fail("more than 48 KiB of static shared memory", {name, 0});
  if (static_bytes + dynamic > shared_limit || offset == SIZE_MAX) fail("more shared memory than a block has", {name, 0});
  return arena + offset;
}

void* dynamic_shared() {
  if (!dynamic) fail("dynamic shared memory is used, but the launch asks for none", {"the launch", 0});
  return arena + variables.front().offset;
}
}  // namespace emu
