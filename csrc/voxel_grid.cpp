// Which voxel a point lies in, and which points lie in a voxel.
#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

namespace custom_ops {
namespace {

// Chunks that together cover n; the same ones on any number of threads.
struct Chunks {
  int64_t n, size, count;

  Chunks(int64_t n, int64_t size) : n(n), size(size), count((n + size - 1) / size) {}

  template <class F>
  void parallel(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) f(k, k * size, std::min(n, (k + 1) * size));
    });
  }
};

// NaN is in no voxel: it fails both comparisons.
template <class A>
ALWAYS_INLINE inline bool cell(A position, bool truncate, int64_t cells, int64_t& out) {
  const A at = truncate ? std::trunc(position) : std::floor(position);
  if (!(at >= 0 && at < static_cast<A>(cells))) return false;
  out = static_cast<int64_t>(at);
  return true;
}

template <class I>
void counting_sort(const I* rank, int64_t n, int64_t voxels, int64_t* perm, int64_t* indptr) {
  // Every chunk counts for itself, so as many as pays against the n points.
  const int64_t parts = std::clamp<int64_t>(n / (voxels + 1), 1, 8);
  const Chunks chunks(n, std::max<int64_t>((n + parts - 1) / parts, 1 << 14));
  // places[k * (voxels + 1) + v]: points of voxel v in chunk k, then where the next of them goes; the
  // dropped points come after all voxels.
  const int64_t row = voxels + 1;
  std::vector<int64_t> places(chunks.count * row, 0);
  const auto voxel = [&](int64_t i) { return rank[i] < 0 ? voxels : static_cast<int64_t>(rank[i]); };
  chunks.parallel([&](int64_t k, int64_t begin, int64_t end) {
    int64_t* counts = places.data() + k * row;
    for (int64_t i = begin; i < end; ++i) ++counts[voxel(i)];
  });
  int64_t at = 0;
  for (int64_t v = 0; v < row; ++v) {
    indptr[v] = at;
    for (int64_t k = 0; k < chunks.count; ++k) {
      const int64_t count = places[k * row + v];
      places[k * row + v] = at;
      at += count;
    }
  }
  chunks.parallel([&](int64_t k, int64_t begin, int64_t end) {
    int64_t* place = places.data() + k * row;
    for (int64_t i = begin; i < end; ++i) perm[place[voxel(i)]++] = i;
  });
}

// Ranks that some projects keep as floats.
template <class F>
void dispatch_ranks(const Tensor& ranks, const F& f) {
  switch (ranks.scalar_type()) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    default: return dispatch_index(ranks, "ranks", f);
  }
}

// Not of what is so large that numbers beside it are rounded to it.
template <class R>
ALWAYS_INLINE inline bool is_whole(R rank) {
  return (rank < static_cast<R>(int64_t{1} << std::numeric_limits<R>::digits)) & (std::trunc(rank) == rank);
}

// Whether the positions [begin, end) hold what a stable sort puts there, and the boundaries that fall there are right;
// those are copied to `out`. Position n is that of a point outside behind all others, so that each boundary falls on
// one. Points, ordered by voxel and within it strictly, are all different ones, hence a permutation. Where a voxel's
// points begin, its boundary and the first one behind the voxel before must lie, and those between don't decrease.
// Differences whose signs are gathered take the place of branches, because one mispredicted costs more than all the
// rest of a point.
template <class I>
bool follows(const I* rank, const int64_t* perm, const int64_t* at, int64_t* out, int64_t n, int64_t voxels,
             int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 1024;
  int64_t block[kBlock + 1], runs[kBlock + 1], wrong = 0;
  for (int64_t first = begin; first < end && !wrong; first += kBlock) {
    multiversion([=, &wrong, voxel = block + 1, run = static_cast<int64_t*>(runs)]() ALWAYS_INLINE {
      const int64_t count = std::min(kBlock, end - first), points = std::min(count, n - first);
      const int64_t from = first > 0 ? -1 : 0;  // the position before is looked at again
      const int64_t* point = perm + first;
      int64_t found = 0;  // negative where something is wrong
      for (int64_t k = from; k < points; ++k) found |= -static_cast<int64_t>((point[k] < 0) | (point[k] >= n));
      if ((wrong = found < 0)) return;
      for (int64_t k = from; k < points; ++k) {
        const int64_t r = static_cast<int64_t>(rank[point[k]]);
        found |= -static_cast<int64_t>(r >= voxels);
        voxel[k] = r < 0 ? voxels : r;
      }
      for (int64_t k = from + 1; k < points; ++k) {
        const int64_t up = voxel[k] - voxel[k - 1];
        found |= up | (up == 0 ? point[k] - point[k - 1] - 1 : 0);
      }
      if ((wrong = found < 0)) return;
      if (first == 0) voxel[-1] = -1;
      if (points < count) voxel[points] = voxels;
      int64_t starts = 0;
      for (int64_t k = 0; k < count; ++k) {
        run[starts] = k;
        starts += voxel[k] != voxel[k - 1];
      }
      for (int64_t i = 0; i < starts; ++i) {
        const int64_t k = run[i], begins = first + k;
        found |= -static_cast<int64_t>((at[voxel[k - 1] + 1] != begins) | (at[voxel[k]] != begins));
      }
      const int64_t v0 = voxel[-1] + 1, v1 = voxel[count - 1] + 1;
      for (int64_t v = v0; v < v1; ++v) {
        found |= -static_cast<int64_t>(v > 0 && at[v] < at[v - 1]);
        out[v] = at[v];
      }
      wrong = found < 0;
    });
  }
  return !wrong;
}

}  // namespace

std::tuple<Tensor, Tensor> voxel_bounds(const Tensor& ranks_in, bool check_sorted) {
  const Tensor ranks = dense(ranks_in);
  const int64_t n = ranks.numel();
  const Chunks chunks(n, 1 << 15);
  std::vector<int64_t> first(chunks.count + 1, 0);  // runs that begin before each chunk
  std::atomic<int64_t> inside{0}, blocks{0};        // points of a voxel, and how often they begin anew
  std::atomic<bool> whole{true}, sorted{true};
  Tensor bounds, last;
  dispatch_ranks(ranks, [&](auto type) {
    using R = typename decltype(type)::type;
    using Count = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;  // as wide, so that the loop vectorises
    const R* r = data<R>(ranks);
    chunks.parallel([&](int64_t k, int64_t begin, int64_t end) {
      multiversion([&, r]() ALWAYS_INLINE {
        Count begins = 0, enters = 0, points = 0, drops = 0, broken = 0;
        for (int64_t i = begin; i < end; ++i) {
          points += r[i] >= 0;
          if constexpr (std::is_floating_point_v<R>) broken |= !is_whole(r[i]);
        }
        for (int64_t i = std::max<int64_t>(1, begin); i < end; ++i) {
          begins += (r[i] >= 0) & (r[i] != r[i - 1]);
          enters += (r[i] >= 0) & (r[i - 1] < 0);
          drops |= r[i] < r[i - 1];
        }
        const Count starts = k == 0 && r[0] >= 0;
        first[k + 1] = begins + starts;
        inside += points, blocks += enters + starts;
        if (drops) sorted = false;
        if (broken) whole = false;
      });
    });
    check(whole, "ranks: expected whole numbers below 2^24 in float32 and 2^53 in float64, got others");
    check(!check_sorted || sorted,
          "ranks: expected non-decreasing values, got an unsorted tensor; sort x, geometry and "
          "ranks by ranks first, or pass check_sorted=False to sum each run of equal ranks");
    check(blocks <= 1,
          "ranks: expected the points outside, of negative ranks, before and behind all others, got some "
          "between them; sort x, geometry and ranks by ranks first");
    for (int64_t k = 0; k < chunks.count; ++k) first[k + 1] += first[k];
    const int64_t voxels = first[chunks.count];
    bounds = fresh(ranks, {voxels + 1}, ScalarType::Long);
    int64_t* out = mutable_data<int64_t>(bounds);
    chunks.parallel([&](int64_t k, int64_t begin, int64_t end) {
      int64_t at = first[k];
      for (int64_t i = begin; i < end && at < first[k + 1]; ++i) {
        out[at] = i;
        at += r[i] >= 0 && (i == 0 || r[i] != r[i - 1]);
      }
    });
    out[voxels] = voxels ? out[0] + inside : 0;
    last = fresh(ranks, {voxels}, ScalarType::Long);
    int64_t* lp = mutable_data<int64_t>(last);
    for (int64_t v = 0; v < voxels; ++v) lp[v] = out[v + 1] - 1;
  });
  return {bounds, last};
}

Tensor voxel_index(const Tensor& points_in, const Tensor& frame_in, int64_t x_cells, int64_t y_cells, int64_t z_cells,
                   bool truncate) {
  const Tensor points = dense(points_in), frame = dense(frame_in);
  const int64_t dims = points.dim() - 1, frames = frame.numel() / 6;
  check(dims >= 0 && points.size(dims) == 3, "points: expected [..., 3]");
  check(frame.numel() == 6 * frames && (frames == 1 || (dims > 0 && frames == points.size(0))),
        "frame: expected 6 numbers, for all points or for each example");
  const Shape shape = sizes(points, 0, dims);
  Tensor out = fresh(points, shape, ScalarType::Long);
  const int64_t n = out.numel(), per_frame = std::max<int64_t>(frames ? n / frames : 0, 1);
  int64_t* op = mutable_data<int64_t>(out);
  dispatch_floating(points, "points", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    check(frame.scalar_type() == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float),
          "frame: expected the points' accumulation dtype");
    const T* p = data<T>(points);
    const A* f = data<A>(frame);
    torch::stable::parallel_for(0, n, 1 << 14, [&](int64_t begin, int64_t end) {
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t i = begin; i < end; ++i) {
          const A* origin = f + i / per_frame * 6;
          const A* size = origin + 3;
          int64_t x = 0, y = 0, z = 0;
          const bool inside = cell((static_cast<A>(p[3 * i]) - origin[0]) / size[0], truncate, x_cells, x) &
                              cell((static_cast<A>(p[3 * i + 1]) - origin[1]) / size[1], truncate, y_cells, y) &
                              cell((static_cast<A>(p[3 * i + 2]) - origin[2]) / size[2], truncate, z_cells, z);
          op[i] = inside ? (x * y_cells + y) * z_cells + z : -1;
        }
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> voxel_sort(const Tensor& rank_in, int64_t voxels) {
  const Tensor rank = dense(rank_in);
  const int64_t dims = rank.dim() - 1;
  check(dims >= 0, "rank: expected [..., N]");
  check(voxels >= 0, "num_voxels: expected at least 0, got ", voxels);
  const Shape batch = sizes(rank, 0, dims);
  const int64_t n = rank.size(dims);
  Tensor perm = fresh(rank, sizes(rank), ScalarType::Long);
  Tensor indptr = fresh(rank, append(batch, {voxels + 1}), ScalarType::Long);
  int64_t* pp = mutable_data<int64_t>(perm);
  int64_t* ip = mutable_data<int64_t>(indptr);
  dispatch_index(rank, "rank", [&](auto type) {
    using I = typename decltype(type)::type;
    const I* rp = data<I>(rank);
    std::atomic<bool> inside{true};
    Chunks(rank.numel(), 1 << 15).parallel([&](int64_t, int64_t begin, int64_t end) {
      bool below = true;
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t i = begin; i < end; ++i) below &= rp[i] < voxels;
      });
      if (!below) inside = false;
    });
    if (!inside)
      check(false, "rank: expected values below num_voxels=", voxels, ", got ",
            *std::max_element(rp, rp + rank.numel()));
    // Several examples go to one thread each; one alone is split.
    const int64_t examples = product(batch);
    torch::stable::parallel_for(0, examples, examples > 1 ? 1 : 2, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) counting_sort(rp + e * n, n, voxels, pp + e * n, ip + e * (voxels + 1));
    });
  });
  return {perm, indptr};
}

Tensor voxel_match(const Tensor& rank_in, const Tensor& perm_in, const Tensor& indptr_in) {
  const Tensor rank = dense(rank_in), perm = dense(perm_in), indptr = dense(indptr_in);
  const int64_t dims = rank.dim() - 1;
  check(dims >= 0 && sizes(perm) == sizes(rank) && indptr.dim() == dims + 1 && indptr.size(dims) >= 1 &&
            sizes(indptr, 0, dims) == sizes(rank, 0, dims) && perm.scalar_type() == ScalarType::Long &&
            indptr.scalar_type() == ScalarType::Long,
        "csr: expected (perm, indptr), int64, of the shapes that voxel_csr gives for rank");
  const int64_t n = rank.size(dims), row = indptr.size(dims), examples = product(sizes(rank, 0, dims));
  Tensor out = fresh(indptr, sizes(indptr));
  const int64_t *pp = data<int64_t>(perm), *ip = data<int64_t>(indptr);
  int64_t* op = mutable_data<int64_t>(out);
  std::atomic<bool> matches{true};
  dispatch_index(rank, "rank", [&](auto type) {
    using I = typename decltype(type)::type;
    const I* rp = data<I>(rank);
    const int64_t positions = n + 1;
    Chunks(examples * positions, 1 << 14).parallel([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t at = begin, stop; at < end; at = stop) {
        const int64_t e = at / positions, first = e * positions;
        stop = std::min(end, first + positions);
        if (!follows(rp + e * n, pp + e * n, ip + e * row, op + e * row, n, row - 1, at - first, stop - first))
          matches = false;
      }
    });
  });
  check(matches, "csr: expected voxel_csr(rank, num_voxels), got one of other ranks");
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(voxel_bounds)
CUSTOM_OPS_CPU_KERNEL(voxel_index)
CUSTOM_OPS_CPU_KERNEL(voxel_sort)
CUSTOM_OPS_CPU_KERNEL(voxel_match)
