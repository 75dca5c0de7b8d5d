// Where threads meet: barriers, warp collectives, fences, and copies that land later.
#include <string>
#include <utility>

#include "sanitizers.h"
#include "scheduler.h"

namespace emu {
namespace {
char fence_tag;
}

void open_barrier() {
  team.barrier.result[team.barrier.round & 1] = {team.barrier.votes, team.barrier.arrived};
  team.barrier.arrived = team.barrier.votes = 0;
  team.barrier.round++;
  for (size_t i = 0; i < team.count; i++)
    if (team.threads[i].state == State::at_barrier) make_ready(team.threads[i]);
}

void maybe_preempt() {
  if (settings.order != Order::random || static_cast<int>(draw() % 100) >= settings.preempt_percent) return;
  const Quiet quiet;
  yield();
}

void fence() {
  acquire(&fence_tag);
  release(&fence_tag);
  maybe_preempt();
}

Votes block_barrier(bool vote, Site site) {
  const Quiet quiet;
  if (team.barrier.arrived && team.barrier.site.line != site.line)
    fail(("__syncthreads here, but other threads of the block wait at " + place(team.barrier.site)).c_str(), site);
  team.barrier.site = site;
  team.barrier.votes += vote;
  const int round = team.barrier.round & 1;
  release(&team.barrier.tag[round]);
  if (++team.barrier.arrived == team.live) {
    open_barrier();
    if (settings.order != Order::forward) yield();
  } else {
    wait(State::at_barrier, "__syncthreads", site);
  }
  acquire(&team.barrier.tag[round]);
  return team.barrier.result[round];
}

const Word* warp_exchange(unsigned mask, const Word& value, bool orders, const char* what, Site site) {
  const Quiet quiet;
  const int lane = current->lane, first = current->warp * 32;
  const int lanes = static_cast<int>(team.count) - first;
  if (!(mask >> lane & 1)) fail((std::string(what) + ": the calling lane is not in its mask").c_str(), site);
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1) && (i >= lanes || team.threads[first + i].state == State::done))
      fail((std::string(what) + ": lane " + std::to_string(i) + " of the mask has ended or does not exist").c_str(), site);
  Meeting& meeting = team.warps[current->warp][mask];
  if (meeting.lanes && meeting.site.line != site.line)
    fail((std::string(what) + " here, but other lanes of the mask wait at " + place(meeting.site)).c_str(), site);
  meeting.site = site;
  const int round = meeting.round & 1;
  meeting.words[round][lane] = value;
  meeting.lanes |= 1u << lane;
  if (orders) release(&meeting.tag[round]);
  if (meeting.lanes == mask) {
    meeting.lanes = 0;
    meeting.round++;
    for (int i = 0; i < 32; i++)
      if ((mask >> i & 1) && i != lane) make_ready(team.threads[first + i]);
    if (settings.order != Order::forward) yield();
  } else {
    wait(State::in_warp, what, site);
  }
  if (orders) acquire(&meeting.tag[round]);
  return meeting.words[round];
}

bool defer_copy(const Copy& copy, Site site) {
  const Quiet quiet;
  if ((reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from)) % copy.bytes)
    fail("cp.async: an address is not aligned to the size of the copy", site);
  const bool at_once = settings.order == Order::reverse || (settings.order == Order::random && (draw() & 1));
  if (!at_once) self().open_copies.push_back(copy);
  return !at_once;
}

void commit_copies() {
  const Quiet quiet;
  self().copy_groups.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}

bool take_copy(int groups_left, Copy* copy) {
  const Quiet quiet;
  auto& groups = self().copy_groups;
  while (groups.size() > static_cast<size_t>(groups_left) && groups.front().empty()) groups.pop_front();
  if (groups.size() <= static_cast<size_t>(groups_left)) return false;
  *copy = groups.front().back();
  groups.front().pop_back();
  return true;
}
}  // namespace emu
