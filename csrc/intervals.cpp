// The geometry of BEVDet's pooling, which lists points by voxel.
#include "common.h"

#include <algorithm>
#include <atomic>

namespace custom_ops {

Tensor interval_ranks(const Tensor& ranks_depth, const Tensor& ranks_feat, const Tensor& ranks_bev,
                      const Tensor& interval_starts, const Tensor& interval_lengths, int64_t points, int64_t pixels,
                      int64_t voxels) {
  const Tensor arrays[] = {dense(ranks_depth), dense(ranks_feat), dense(ranks_bev), dense(interval_starts),
                           dense(interval_lengths)};
  for (const Tensor& t : arrays)
    check(t.dim() == 1 && t.scalar_type() == ScalarType::Long, "ranks, intervals: expected int64 tensors [P] or [I]");
  const int64_t listed = arrays[0].numel(), intervals = arrays[3].numel();
  check(arrays[1].numel() == listed && arrays[2].numel() == listed, "ranks: expected [P] alike");
  check(arrays[4].numel() == intervals, "intervals: expected [I] alike");
  const int64_t *depth = data<int64_t>(arrays[0]), *feat = data<int64_t>(arrays[1]), *bev = data<int64_t>(arrays[2]),
                *starts = data<int64_t>(arrays[3]), *lengths = data<int64_t>(arrays[4]);

  int64_t total = 0;
  for (int64_t i = 0; i < intervals; ++i) {
    check(starts[i] >= 0 && starts[i] <= listed, "interval_starts: expected values within [0, ", listed, "], got ",
          starts[i]);
    check(lengths[i] >= 0 && lengths[i] <= listed - starts[i], "interval_lengths: expected 0 to the ",
          listed - starts[i], " points that are left for interval ", i, ", got ", lengths[i]);
    // Any total above `listed` is too large, so the sum may stop there.
    total = std::min(total + lengths[i], listed + 1);
  }

  Tensor out = fresh(ranks_bev, {listed});
  int64_t* rank = mutable_data<int64_t>(out);
  std::fill_n(rank, listed, -1);
  std::atomic<int64_t> wrong{listed};  // the first point in the list with an error
  torch::stable::parallel_for(0, total > listed ? 0 : intervals, 256, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = starts[i]; j < starts[i] + lengths[i]; ++j) {
        const int64_t voxel = bev[starts[i]], p = depth[j], q = feat[j];
        if (bev[j] == voxel && voxel >= 0 && voxel < voxels && p >= 0 && p < points && q >= 0 && q < pixels) {
          rank[j] = voxel;
          continue;
        }
        for (int64_t seen = wrong; j < seen && !wrong.compare_exchange_weak(seen, j);) {
        }
      }
    }
  });
  if (const int64_t j = wrong; j < listed) {
    check(depth[j] >= 0 && depth[j] < points, "ranks_depth: expected values within [0, ", points, "), got ", depth[j]);
    check(feat[j] >= 0 && feat[j] < pixels, "ranks_feat: expected values within [0, ", pixels, "), got ", feat[j]);
    check(bev[j] >= 0 && bev[j] < voxels, "ranks_bev: expected values within [0, ", voxels, "), got ", bev[j]);
    check(false, "ranks_bev: expected one voxel in each interval, got ", bev[j], " in one that begins with another");
  }
  check(listed - std::count(rank, rank + listed, -1) == total,
        "interval_starts, interval_lengths: expected intervals that don't overlap, got a point in two of them");
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(interval_ranks)
