// Blocks one after the other, their threads as fibers that run until they wait for each other.
#include <cstdlib>
#include <mutex>
#include <utility>

#include "emu_runtime.h"
#include "sanitizers.h"
#include "scheduler.h"
#include "shared.h"

namespace emu {
Thread* current = nullptr;
Team team;
Settings settings;

namespace {
struct Launch {
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::string error;
};
Launch running_launch;
std::string last;
bool configured = false;
uint64_t random_state = 1;
std::map<const void*, size_t> allowed_shared;
char start_tag, end_tag;

std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

// What every fiber runs.
void entry() {
  CudaThread& me = self();
  me.fiber.entered();
  acquire(&start_tag);
  (*running_launch.body)();
  {
    const Quiet quiet;
    me.open_copies.clear();  // copies that nobody waited for never land
    me.copy_groups.clear();
    release(&end_tag);
    me.state = State::done;
    team.live--;
    if (team.live > 0 && team.barrier.arrived == team.live) open_barrier();
  }
  me.fiber.leave(true);
  std::abort();
}

// The next thread to run: forward, the one that became ready first; reverse, the one that did last.
CudaThread* next() {
  if (settings.order == Order::random) std::swap(team.ready[draw() % team.ready.size()], team.ready.back());
  const bool first = settings.order == Order::forward;
  CudaThread* chosen = first ? team.ready.front() : team.ready.back();
  if (first)
    team.ready.pop_front();
  else
    team.ready.pop_back();
  return chosen;
}

std::string stuck() {
  std::map<std::string, int> waiting;
  for (size_t i = 0; i < team.count; i++) {
    const CudaThread& t = team.threads[i];
    if (t.state != State::done) waiting[std::string(t.waits_in) + " at " + place(t.site)]++;
  }
  std::string text = "stuck: ";
  for (const auto& [where, n] : waiting) text += std::to_string(n) + " threads wait in " + where + ", ";
  return text + std::to_string(static_cast<int>(team.count) - team.live) + " have ended";
}

void start_threads(uint3 at, dim3 block, dim3 grid) {
  team.count = size_t{block.x} * block.y * block.z;
  team.live = static_cast<int>(team.count);
  while (team.threads.size() < team.count) team.threads.emplace_back();
  team.warps.assign((team.count + 31) / 32, {});
  team.barrier = Meeting{};
  team.ready.clear();
  for (size_t i = 0; i < team.count; i++) {
    CudaThread& t = team.threads[i];
    const auto n = static_cast<unsigned>(i);
    const uint3 index{n % block.x, n / block.x % block.y, n / block.x / block.y};
    const int linear = static_cast<int>(n);
    t.thread = {index, at, block, grid, linear, linear % 32, linear / 32};
    t.fiber.prepare(entry);
    make_ready(t);
  }
}

void run_block(uint3 at, dim3 block, dim3 grid, size_t shared_bytes) {
  std::string& error = running_launch.error;
  shared_begin(shared_bytes, settings.poison);
  start_threads(at, block, grid);
  release(&start_tag);
  while (!team.ready.empty() && error.empty()) {
    CudaThread* t = next();
    current = &t->thread;
    t->fiber.run();
    current = nullptr;
  }
  const std::string overrun = shared_end(settings.poison);
  const std::string head = std::string(running_launch.kernel) + ": block " + triple(at) + ": ";
  if (error.empty() && team.live > 0) error = head + stuck();
  if (error.empty() && !overrun.empty()) error = head + overrun;
}

std::vector<uint64_t> block_order(uint64_t n) {
  std::vector<uint64_t> order(n);
  for (uint64_t i = 0; i < n; i++) order[i] = settings.order == Order::reverse ? n - 1 - i : i;
  if (settings.order == Order::random)
    for (uint64_t i = n; i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
  return order;
}

void configure_from_environment() {
  Settings found;
  const char* order = std::getenv("DATAFLEX_EMU_ORDER");
  const char* seed = std::getenv("DATAFLEX_EMU_SEED");
  const std::string name = order != nullptr ? order : "forward";
  found.order = name == "reverse" ? Order::reverse : name == "random" ? Order::random : Order::forward;
  if (seed != nullptr) found.seed = std::strtoull(seed, nullptr, 10);
  configure(found);
}

// Why a launch is refused, or null.
const char* refusal(const void* function, dim3 grid, dim3 block, size_t shared_bytes) {
  const size_t n = size_t{block.x} * block.y * block.z;
  if (n == 0 || n > 1024 || block.z > 64) return "a block has 1 to 1024 threads";
  const bool grid_fits = grid.x && grid.x <= 0x7fffffffu && grid.y && grid.y <= 65535 && grid.z && grid.z <= 65535;
  if (!grid_fits) return "the grid is empty or too large";
  const auto allowed = allowed_shared.find(function);
  if (shared_bytes > (allowed == allowed_shared.end() ? kDefaultShared : allowed->second))
    return "more dynamic shared memory than DATAFLEX_ALLOW_SHARED asked for";
  return nullptr;
}
}  // namespace

uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

CudaThread& self() { return team.threads[current->linear]; }

std::string place(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void make_ready(CudaThread& thread) {
  thread.state = State::ready;
  team.ready.push_back(&thread);
}

void wait(State state, const char* what, Site site) {
  CudaThread& me = self();
  me.state = state;
  me.waits_in = what;
  me.site = site;
  me.fiber.leave(false);
}

void yield() {
  CudaThread& me = self();
  make_ready(me);
  me.fiber.leave(false);
}

void configure(const Settings& wanted) {
  settings = wanted;
  random_state = (wanted.seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  configured = true;
}

const char* last_error() { return last.c_str(); }

size_t shared_limit = kMaxShared;
int devices_set = 0;

cudaError_t allow_shared(const void* function, size_t bytes) {
  if (bytes > shared_limit) return cudaErrorInvalidValue;
  allowed_shared[function] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  if (!configured) configure_from_environment();
  last.clear();
  if (const char* reason = refusal(function, grid, block, shared_bytes)) {
    last = std::string(kernel) + ": " + reason;
    return cudaErrorInvalidConfiguration;
  }
  running_launch = {kernel, &body, ""};
  for (const uint64_t i : block_order(uint64_t{grid.x} * grid.y * grid.z)) {
    const uint3 at{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(at, block, grid, shared_bytes);
    if (!running_launch.error.empty()) break;
  }
  acquire(&end_tag);
  forget_fibers();
  last = running_launch.error;
  return last.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void fail(const char* what, Site site) {
  std::string& error = running_launch.error;
  if (error.empty())
    error = std::string(running_launch.kernel) + ": block " + triple(current->block) + " thread " +
            triple(current->index) + " at " + place(site) + ": " + what;
  self().fiber.leave(false);
  std::abort();
}
}  // namespace emu

// order: 0 forward, 1 reverse, 2 random. poison: the byte that shared memory is filled with.
extern "C" __attribute__((visibility("default"))) void dataflex_emu_configure(int order, uint64_t seed, int poison) {
  emu::Settings settings;
  settings.order = static_cast<emu::Order>(order);
  settings.seed = seed;
  settings.poison = static_cast<unsigned char>(poison);
  emu::configure(settings);
}

// bytes: what a block can have from now on.
extern "C" __attribute__((visibility("default"))) void dataflex_emu_limit_shared(size_t bytes) {
  emu::shared_limit = bytes < emu::kMaxShared ? bytes : emu::kMaxShared;
}

extern "C" __attribute__((visibility("default"))) const char* dataflex_emu_last_error() { return emu::last_error(); }
