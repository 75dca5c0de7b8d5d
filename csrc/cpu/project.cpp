// How a projection is divided among threads. Tiles are divided into groups by the shape of the matrix alone, every
// group has sums of its own for every sample, and the sums are added in the order of the groups: the bits of a
// sample's features depend neither on the number of threads nor on the other samples of the batch.
#include "project.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "dataflex/cpu.h"

namespace dataflex {
namespace {
constexpr int64_t kMostGroups = 16, kTilesInGroup = 2, kPartialFloats = 16 << 20;

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
std::unique_ptr<void, Free> workspace(const ProjectCall& call) {
  const int64_t bytes = DATAFLEX_DISPATCH(project_workspace, call);
  return std::unique_ptr<void, Free>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
}

void add_exact(const ProjectCall& call, int64_t sample, const double* exact) {
  if (call.sqnorm) call.sqnorm[sample] += static_cast<float>(exact[0]);
  for (int64_t q = 0; q < call.queries; q++)
    call.dots[sample * call.queries + q] += static_cast<float>(exact[1 + q]);
}

void project_pieces(const ProjectCall& call) {
  parallel_for(call.samples, 1, [&](int64_t begin, int64_t end) {
    const auto memory = workspace(call);
    for (int64_t s = begin; s < end; s++) {
      std::vector<double> exact(1 + call.queries);
      DATAFLEX_DISPATCH(project_rows, call, s, call.out + s * call.dim, exact.data(), memory.get());
      add_exact(call, s, exact.data());
    }
  });
}

// Samples [from, to) over all tiles.
void project_samples(const ProjectCall& call, int64_t tiles, int64_t groups, int64_t from, int64_t to) {
  const int64_t count = to - from, wide = 1 + call.queries;
  std::vector<float> features(groups * count * call.dim);
  std::vector<double> exact(groups * count * wide);
  const int64_t blocks = std::clamp<int64_t>((num_threads() + groups - 1) / groups, 1, count);
  parallel_for(groups * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto memory = workspace(call);
    for (int64_t task = begin; task < end; task++) {
      const int64_t group = task / blocks, block = task % blocks;
      const int64_t first = block * count / blocks, last = (block + 1) * count / blocks;
      const int64_t place = group * count + first;
      DATAFLEX_DISPATCH(project_tiles, call, group * tiles / groups, (group + 1) * tiles / groups, from + first,
                        from + last, features.data() + place * call.dim, exact.data() + place * wide, memory.get());
    }
  });
  float* out = call.out + from * call.dim;
  parallel_for(count * call.dim, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < groups; g++) {
      const float* part = features.data() + g * count * call.dim;
      for (int64_t i = begin; i < end; i++) out[i] += part[i];
    }
  });
  for (int64_t s = 0; s < count; s++) {
    for (int64_t g = 1; g < groups; g++)
      for (int64_t i = 0; i < wide; i++) exact[s * wide + i] += exact[(g * count + s) * wide + i];
    add_exact(call, from + s, exact.data() + s * wide);
  }
}
}  // namespace

void project(const ProjectCall& call) {
  if (call.samples == 0 || call.m == 0 || call.k == 0) return;
  if (call.source == kRows) return project_pieces(call);
  const int64_t tiles = (call.m + kTileRows - 1) / kTileRows * column_tiles(call);
  const int64_t groups = std::clamp<int64_t>(tiles / kTilesInGroup, 1, kMostGroups);
  const int64_t at_once = std::max<int64_t>(1, kPartialFloats / (groups * std::max<int64_t>(call.dim, 1)));
  for (int64_t s = 0; s < call.samples; s += at_once)
    project_samples(call, tiles, groups, s, std::min(call.samples, s + at_once));
}
}  // namespace dataflex
