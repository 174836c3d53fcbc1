// The geometry of BEVDet's pooling, which lists points by voxel.
#include "common.h"

#include <algorithm>
#include <atomic>

namespace custom_ops {

Tensor interval_ranks(const Tensor& ranks_depth, const Tensor& ranks_feat, const Tensor& ranks_bev,
                      const Tensor& interval_starts, const Tensor& interval_lengths, int64_t points, int64_t bins,
                      int64_t plane, int64_t voxels) {
  const Tensor arrays[] = {dense(ranks_depth), dense(ranks_feat), dense(ranks_bev), dense(interval_starts),
                           dense(interval_lengths)};
  for (const Tensor& t : arrays)
    check(t.dim() == 1 && t.scalar_type() == ScalarType::Long, "ranks, intervals: expected int64 tensors [P] or [I]");
  const int64_t listed = arrays[0].numel(), intervals = arrays[3].numel();
  check(arrays[1].numel() == listed && arrays[2].numel() == listed, "ranks: expected [P] alike");
  check(arrays[4].numel() == intervals, "intervals: expected [I] alike");
  const int64_t *depth = data<int64_t>(arrays[0]), *feat = data<int64_t>(arrays[1]), *bev = data<int64_t>(arrays[2]),
                *starts = data<int64_t>(arrays[3]), *lengths = data<int64_t>(arrays[4]);

  int64_t end = 0;
  for (int64_t i = 0; i < intervals; ++i) {
    check(starts[i] == end, "interval_starts: expected ", end, " for interval ", i, ", where the one before ends, got ",
          starts[i]);
    check(lengths[i] >= 1 && lengths[i] <= listed - end, "interval_lengths: expected 1 to the ", listed - end,
          " points that are left for interval ", i, ", got ", lengths[i]);
    end += lengths[i];
  }
  check(end == listed, "interval_lengths: expected a sum of ", listed, " as there are ranks, got ", end);

  Tensor out = fresh(ranks_depth, {points});
  int64_t* rank = mutable_data<int64_t>(out);
  std::fill_n(rank, points, -1);
  const int64_t camera = std::max<int64_t>(bins * plane, 1), row = std::max<int64_t>(plane, 1);
  const auto pixel = [&](int64_t point) { return point / camera * plane + point % row; };
  std::atomic<int64_t> wrong{listed};  // the first point in the list with something wrong
  torch::stable::parallel_for(0, intervals, 256, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t voxel = bev[starts[i]];
      for (int64_t j = starts[i]; j < starts[i] + lengths[i]; ++j) {
        const int64_t p = depth[j];
        if (bev[j] == voxel && voxel >= 0 && voxel < voxels && p >= 0 && p < points && feat[j] == pixel(p)) {
          rank[p] = voxel;
          continue;
        }
        for (int64_t seen = wrong; j < seen && !wrong.compare_exchange_weak(seen, j);) {
        }
      }
    }
  });
  if (const int64_t j = wrong; j < listed) {
    check(depth[j] >= 0 && depth[j] < points, "ranks_depth: expected values within [0, ", points, "), got ", depth[j]);
    check(feat[j] == pixel(depth[j]), "ranks_feat: expected ", pixel(depth[j]), ", the pixel of ranks_depth ", depth[j],
          ", got ", feat[j]);
    check(bev[j] >= 0 && bev[j] < voxels, "ranks_bev: expected values within [0, ", voxels, "), got ", bev[j]);
    check(false, "ranks_bev: expected one voxel in each interval, got ", bev[j], " in one that begins with another");
  }
  check(points - std::count(rank, rank + points, -1) == listed,
        "ranks_depth: expected each point at most once, got some of them twice");
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(interval_ranks)
