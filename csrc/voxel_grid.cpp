// The voxel of each point, and the points of each voxel.
#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace custom_ops {
namespace {

// Chunks that together cover n elements; they don't depend on the number of threads.
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

// NaN fails both comparisons, so it is in no voxel.
template <class A>
ALWAYS_INLINE inline bool cell(A position, bool truncate, int64_t cells, int64_t& out) {
  const A at = truncate ? std::trunc(position) : std::floor(position);
  if (!(at >= 0 && at < static_cast<A>(cells))) return false;
  out = static_cast<int64_t>(at);
  return true;
}

template <class I>
void counting_sort(const I* rank, int64_t n, int64_t voxels, int64_t* perm, int64_t* indptr) {
  // Every chunk has counters of its own, which pays only if n is large against the number of voxels.
  const int64_t parts = std::clamp<int64_t>(n / (voxels + 1), 1, 8);
  const Chunks chunks(n, std::max<int64_t>((n + parts - 1) / parts, 1 << 14));
  // places[k * (voxels + 1) + v] is first the number of points of voxel v in chunk k, then the place of the next of
  // them; the dropped points come after all voxels.
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

// A point and its rank. Sorting takes half the time if both have 32 bits.
template <class U>
struct Ranked {
  U rank, point;
};

// Sorts by rank, and points of equal ranks in their order, a digit of the rank after another from the lowest.
template <class U>
void radix_sort(std::vector<Ranked<U>>& items, U largest) {
  constexpr int kBits = 11;
  constexpr size_t kDigits = size_t{1} << kBits;
  std::vector<Ranked<U>> other(items.size());
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(U)) && (largest >> shift) > 0; shift += kBits) {
    const auto digit = [shift](const Ranked<U>& item) { return (item.rank >> shift) & (kDigits - 1); };
    size_t places[kDigits] = {}, at = 0;
    for (const Ranked<U>& item : items) ++places[digit(item)];
    for (size_t& place : places) {
      const size_t count = place;
      place = at, at += count;
    }
    for (const Ranked<U>& item : items) other[places[digit(item)]++] = item;
    std::swap(items, other);
  }
}

// The voxels that have points, in the order of their ranks, and the points sorted by voxel.
struct Distinct {
  std::vector<int64_t> ranks, starts, points;

  template <class I>
  Distinct(const I* rank, int64_t n) {
    int64_t largest = 0, inside = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max<int64_t>(largest, rank[i]), inside += rank[i] >= 0;
    if (std::max(largest, n) <= std::numeric_limits<uint32_t>::max())
      fill<uint32_t>(rank, n, inside, static_cast<uint32_t>(largest));
    else fill<uint64_t>(rank, n, inside, static_cast<uint64_t>(largest));
  }

 private:
  template <class U, class I>
  void fill(const I* rank, int64_t n, int64_t inside, U largest) {
    std::vector<Ranked<U>> items;
    items.reserve(inside);
    for (int64_t i = 0; i < n; ++i)
      if (rank[i] >= 0) items.push_back({static_cast<U>(rank[i]), static_cast<U>(i)});
    radix_sort(items, largest);
    points.resize(inside);
    for (int64_t i = 0; i < inside; ++i) {
      points[i] = static_cast<int64_t>(items[i].point);
      if (i > 0 && items[i].rank == items[i - 1].rank) continue;
      ranks.push_back(static_cast<int64_t>(items[i].rank)), starts.push_back(i);
    }
  }
};

// The voxels in the order of their first points, and the place of each point in its voxel.
struct Slots {
  std::vector<int64_t> ranks, counts;

  // Stores voxel * max_points + place for each point, or -1 if its voxel or its place is past the limits.
  template <class I>
  Slots(const I* rank, int64_t n, int64_t max_points, int64_t max_voxels, int64_t* slot) {
    int64_t cells = 0;
    multiversion([&]() ALWAYS_INLINE {
      I largest = -1;
      for (int64_t i = 0; i < n; ++i) largest = std::max(largest, rank[i]);
      cells = static_cast<int64_t>(largest);
    });
    const bool narrow = n < std::numeric_limits<int32_t>::max();
    const auto run = [&](auto voxel) {
      using V = decltype(voxel);
      // A grid of a few cells per point takes no more memory than a table of hashes, and less time.
      if (cells < kCells * n) number<V>(rank, n, max_points, max_voxels, slot, Grid<V>(cells + 1));
      else number<V>(rank, n, max_points, max_voxels, slot, Table<V>(n, ranks));
    };
    if (narrow) run(int32_t{});
    else run(int64_t{});
  }

 private:
  static constexpr int64_t kCells = 8;

  // The number of each cell's voxel, or -1 if it has none yet.
  template <class V>
  struct Grid {
    std::vector<V> voxels;

    explicit Grid(int64_t cells) : voxels(cells, -1) {}
    ALWAYS_INLINE V& at(int64_t rank) { return voxels[rank]; }
  };

  // The same at or after the hash of the rank.
  template <class V>
  struct Table {
    std::vector<V> voxels;
    const std::vector<int64_t>& ranks;

    Table(int64_t n, const std::vector<int64_t>& ranks) : ranks(ranks) {
      size_t size = 16;
      while (size < 2 * static_cast<size_t>(n)) size *= 2;
      voxels.assign(size, -1);
    }
    ALWAYS_INLINE V& at(int64_t rank) {
      const uint64_t hash = static_cast<uint64_t>(rank) * 0x9E3779B97F4A7C15u, mask = voxels.size() - 1;
      uint64_t place = (hash ^ hash >> 32) & mask;
      while (voxels[place] >= 0 && ranks[voxels[place]] != rank) place = (place + 1) & mask;
      return voxels[place];
    }
  };

  template <class V, class I, class Cells>
  void number(const I* rank, int64_t n, int64_t max_points, int64_t max_voxels, int64_t* slot, Cells known) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = static_cast<int64_t>(rank[i]);
      slot[i] = -1;
      if (r < 0) continue;
      V& voxel = known.at(r);
      if (voxel < 0) {
        if (static_cast<int64_t>(ranks.size()) == max_voxels) continue;
        voxel = static_cast<V>(ranks.size());
        ranks.push_back(r), counts.push_back(0);
      }
      const int64_t place = counts[voxel], kept = place < max_points;
      slot[i] = (voxel * max_points + place) | (kept - 1);  // without a branch, which would often be mispredicted
      counts[voxel] = place + kept;
    }
  }
};

// Ranks may also be floats, as some projects keep them.
template <class F>
void dispatch_ranks(const Tensor& ranks, const F& f) {
  switch (ranks.scalar_type()) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    default: return dispatch_index(ranks, "ranks", f);
  }
}

// Returns false for numbers so large that neighbouring integers are rounded to them.
template <class R>
ALWAYS_INLINE inline bool is_whole(R rank) {
  return (rank < static_cast<R>(int64_t{1} << std::numeric_limits<R>::digits)) & (std::trunc(rank) == rank);
}

// Copies the boundaries [begin, end) and returns whether they don't decrease, from 0 to at most n.
bool copy_boundaries(const int64_t* at, int64_t* out, int64_t n, int64_t voxels, int64_t begin, int64_t end) {
  const int64_t last = std::min(end, voxels);
  int64_t drops = 0;
  multiversion([=, &drops]() ALWAYS_INLINE {
    int64_t found = 0;
    for (int64_t v = begin; v < last; ++v) {
      found |= at[v + 1] < at[v];
      out[v] = at[v];
    }
    drops = found;
  });
  if (end > voxels) out[voxels] = at[voxels];
  return !drops && at[0] == 0 && at[voxels] <= n;
}

// A hash of a point in a voxel. Sums of the hashes of two sets of such pairs are equal if the sets are, and otherwise
// with a chance of 2^-64. To look up each point's rank instead would take longer than to sum its row.
ALWAYS_INLINE inline uint64_t hash_in(int64_t point, int64_t voxel) {
  const uint64_t at = static_cast<uint64_t>(voxel);
  uint64_t hash = static_cast<uint64_t>(point) + at + (at << 32);
  hash = (hash ^ hash >> 33) * 0xFF51AFD7ED558CCDu;
  hash = (hash ^ hash >> 33) * 0xC4CEB9FE1A85EC53u;
  return hash ^ hash >> 33;
}

// Compares the pairs of points and voxels at the positions [begin, end) of perm, given boundaries that don't decrease,
// with those of the points [begin, end): returns the difference of the sums of their hashes. The points of no voxel are
// in one more, and a rank of no voxel is another. `ordered` becomes false if the points of a voxel aren't in order.
// Differences are collected instead of branching, because one misprediction takes longer than the rest of a point.
template <class I>
uint64_t difference(const I* rank, const int64_t* perm, const int64_t* at, int64_t voxels, int64_t begin, int64_t end,
                    std::atomic<bool>& ordered) {
  constexpr int64_t kBlock = 1024;
  const auto number = [voxels](int64_t r) ALWAYS_INLINE { return r < 0 ? voxels : r < voxels ? r : voxels + 1; };
  int64_t block[1 + kBlock], voxel = std::upper_bound(at, at + voxels + 1, begin) - at - 1, backward = 0;
  uint64_t sum = 0;
  block[0] = begin > 0 && at[voxel] < begin ? voxel : -1;
  for (int64_t first = begin; first < end; first += kBlock) {
    multiversion([=, &sum, &backward, &voxel, in = block + 1]() ALWAYS_INLINE {
      const int64_t count = std::min(kBlock, end - first), *point = perm + first;
      int64_t v = voxel + 1, here = voxel, back = 0;
      uint64_t total = 0;
      for (int64_t k = 0; k < count; ++k) in[k] = 0;
      for (; v <= voxels && at[v] < first + count; ++v) in[at[v] - first] = v;
      for (int64_t k = 0; k < count; ++k) in[k] = here = std::max(here, in[k]);
      for (int64_t k = 0; k < count; ++k) total += hash_in(point[k], in[k]);
      for (int64_t k = 0; k < count; ++k) total -= hash_in(first + k, number(rank[first + k]));
      for (int64_t k = first > 0 ? 0 : 1; k < count; ++k) back |= (in[k] == in[k - 1]) & (point[k] <= point[k - 1]);
      sum += total, backward |= back, voxel = here;
    });
    block[0] = voxel;
  }
  if (backward) ordered = false;
  return sum;
}

// Calls f(example, begin, end) for ranges that together cover n elements of each example.
template <class F>
void for_ranges(int64_t examples, int64_t n, const F& f) {
  Chunks(examples * n, 1 << 13).parallel([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t at = begin, stop; at < end; at = stop) {
      const int64_t e = at / n, first = e * n;
      stop = std::min(end, first + n);
      f(e, at - first, stop - first);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> voxel_bounds(const Tensor& ranks_in, bool check_sorted) {
  const Tensor ranks = dense(ranks_in);
  const int64_t n = ranks.numel();
  const Chunks chunks(n, 1 << 15);
  std::vector<int64_t> first(chunks.count + 1, 0);  // runs that begin before each chunk
  std::atomic<int64_t> inside{0}, blocks{0};        // points in voxels, and how often such points follow others
  std::atomic<bool> whole{true}, sorted{true};
  Tensor bounds, last;
  dispatch_ranks(ranks, [&](auto type) {
    using R = typename decltype(type)::type;
    // Counters are as wide as the ranks, so that the loop vectorises.
    using Count = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
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
    // Several examples go to one thread each; a single one is divided.
    const int64_t examples = product(batch);
    torch::stable::parallel_for(0, examples, examples > 1 ? 1 : 2, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) counting_sort(rp + e * n, n, voxels, pp + e * n, ip + e * (voxels + 1));
    });
  });
  return {perm, indptr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> voxel_unique(const Tensor& rank_in, int64_t size) {
  const Tensor rank = dense(rank_in);
  const int64_t dims = rank.dim() - 1;
  check(dims == 0 || (dims > 0 && size >= 0), "rank: expected [N], or [..., N] with a number of voxels");
  const Shape batch = sizes(rank, 0, dims);
  const int64_t n = rank.size(dims), examples = product(batch);
  Tensor inverse = fresh(rank, sizes(rank), ScalarType::Long), perm = fresh(rank, sizes(rank), ScalarType::Long);
  Tensor ranks, indptr;
  dispatch_index(rank, "rank", [&](auto type) {
    using I = typename decltype(type)::type;
    const I* rp = data<I>(rank);
    const auto find = [&](int64_t e) { return Distinct(rp + e * n, n); };
    const auto write = [&](int64_t e, const Distinct& found, int64_t row) {
      int64_t* to = mutable_data<int64_t>(ranks) + e * row;
      int64_t* bounds = mutable_data<int64_t>(indptr) + e * (row + 1);
      int64_t* order = mutable_data<int64_t>(perm) + e * n;
      int64_t* voxel = mutable_data<int64_t>(inverse) + e * n;
      const int64_t all = static_cast<int64_t>(found.ranks.size()), kept = std::min(all, row);
      const int64_t end = kept < all ? found.starts[kept] : static_cast<int64_t>(found.points.size());
      std::copy_n(found.ranks.begin(), kept, to);
      std::fill(to + kept, to + row, -1);
      std::copy_n(found.starts.begin(), kept, bounds);
      std::fill(bounds + kept, bounds + row + 1, end);
      std::copy_n(found.points.begin(), end, order);
      std::fill_n(voxel, n, -1);
      for (int64_t v = 0; v < kept; ++v)
        for (int64_t i = bounds[v]; i < bounds[v + 1]; ++i) voxel[order[i]] = v;
      for (int64_t i = 0, at = end; i < n; ++i)
        if (voxel[i] < 0) order[at++] = i;
    };
    const auto allocate = [&](int64_t row) {
      ranks = fresh(rank, append(batch, {row}), ScalarType::Long);
      indptr = fresh(rank, append(batch, {row + 1}), ScalarType::Long);
    };
    if (size < 0) {
      const Distinct found = find(0);
      allocate(static_cast<int64_t>(found.ranks.size()));
      write(0, found, ranks.numel());
    } else {
      allocate(size);
      torch::stable::parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) write(e, find(e), size);
      });
    }
  });
  return {ranks, inverse, perm, indptr};
}

std::tuple<Tensor, Tensor, Tensor> voxel_slots(const Tensor& rank_in, int64_t max_points, int64_t size, bool padded) {
  const Tensor rank = dense(rank_in);
  const int64_t dims = rank.dim() - 1;
  check(dims == 0 || (dims > 0 && padded), "rank: expected [N], or [..., N] with a number of voxels");
  check(size >= 0 || !padded, "size: expected a number of voxels");
  check(max_points >= 1, "max_points: expected at least 1, got ", max_points);
  const Shape batch = sizes(rank, 0, dims);
  const int64_t n = rank.size(dims), examples = product(batch);
  Tensor slot = fresh(rank, sizes(rank), ScalarType::Long), ranks, counts;
  dispatch_index(rank, "rank", [&](auto type) {
    using I = typename decltype(type)::type;
    const I* rp = data<I>(rank);
    const auto find = [&](int64_t e) {
      return Slots(rp + e * n, n, max_points, size, mutable_data<int64_t>(slot) + e * n);
    };
    const auto write = [&](int64_t e, const Slots& found, int64_t row) {
      const int64_t kept = static_cast<int64_t>(found.ranks.size());
      for (const auto& [to, from, rest] :
           {std::tuple(&ranks, &found.ranks, int64_t{-1}), std::tuple(&counts, &found.counts, int64_t{0})}) {
        int64_t* at = mutable_data<int64_t>(*to) + e * row;
        std::copy(from->begin(), from->end(), at);
        std::fill(at + kept, at + row, rest);
      }
    };
    const auto allocate = [&](int64_t row) {
      ranks = fresh(rank, append(batch, {row}), ScalarType::Long);
      counts = fresh(rank, append(batch, {row}), ScalarType::Long);
    };
    if (!padded) {
      const Slots found = find(0);
      allocate(static_cast<int64_t>(found.ranks.size()));
      write(0, found, ranks.numel());
    } else {
      allocate(size);
      torch::stable::parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) write(e, find(e), size);
      });
    }
  });
  return {slot, ranks, counts};
}

namespace {

// Calls f(row, at) for all points with a place, where `at` is the row of its place, and f(row, -1) for the others.
template <class F>
void for_places(const Tensor& place, int64_t rows, const F& f) {
  const int64_t dims = place.dim() - 1, n = place.size(dims);
  const int64_t* pp = data<int64_t>(place);
  std::atomic<bool> inside{true};
  for_ranges(product(sizes(place, 0, dims)), n, [&](int64_t e, int64_t begin, int64_t end) {
    const int64_t first = e * rows;
    bool below = true;
    for (int64_t i = e * n + begin; i < e * n + end; ++i) {
      if (pp[i] < rows) f(i, pp[i] < 0 ? -1 : first + pp[i]);
      else below = false;
    }
    if (!below) inside = false;
  });
  check(inside, "place: expected values below ", rows);
}

// Checks the places of rows [..., N, C] and returns the bytes of a row.
int64_t check_places(const Tensor& x, const Tensor& place, bool of_rows) {
  const int64_t dims = x.dim() - 1;
  check(dims >= 1 && place.dim() == dims && place.scalar_type() == ScalarType::Long &&
            sizes(place, 0, of_rows ? dims : dims - 1) == sizes(x, 0, of_rows ? dims : dims - 1),
        "place: expected an int64 tensor [..., N] with the leading dimensions of x");
  return x.size(dims) * static_cast<int64_t>(x.element_size());
}

constexpr int64_t kShort = 128;  // a longer row is copied by the C library

// Copies a row of at most kShort bytes, in words that may overlap.
ALWAYS_INLINE inline void copy_short(char* to, const char* from, int64_t bytes) {
  const auto in = [=](auto word) ALWAYS_INLINE {
    constexpr int64_t kBytes = sizeof(word);
    for (int64_t b = 0; b + kBytes < bytes; b += kBytes) {
      std::memcpy(&word, from + b, sizeof(word));
      std::memcpy(to + b, &word, sizeof(word));
    }
    std::memcpy(&word, from + bytes - kBytes, sizeof(word));
    std::memcpy(to + bytes - kBytes, &word, sizeof(word));
  };
  typedef uint64_t Pair __attribute__((vector_size(16)));
  if (bytes >= 16) in(Pair{});
  else if (bytes >= 8) in(uint64_t{});
  else if (bytes >= 4) in(uint32_t{});
  else if (bytes >= 2) in(uint16_t{});
}

}  // namespace

Tensor voxel_place(const Tensor& x_in, const Tensor& place_in, int64_t rows) {
  const Tensor x = dense(x_in), place = dense(place_in);
  const int64_t bytes = check_places(x, place, true);
  check(rows >= 0, "rows: expected at least 0, got ", rows);
  Tensor out = fresh(x, append(sizes(x, 0, x.dim() - 2), {rows, x.size(x.dim() - 1)}));
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  Chunks(out.numel() * static_cast<int64_t>(out.element_size()), 1 << 18).parallel([&](int64_t, int64_t b, int64_t e) {
    std::memset(to + b, 0, static_cast<size_t>(e - b));
  });
  // A dropped row is copied to nowhere, as a misprediction takes longer.
  if (bytes <= kShort)
    for_places(place, rows, [=](int64_t row, int64_t at) ALWAYS_INLINE {
      char nowhere[kShort];
      copy_short(at >= 0 ? to + at * bytes : nowhere, from + row * bytes, bytes);
    });
  else
    for_places(place, rows, [=](int64_t row, int64_t at) {
      if (at >= 0) std::memcpy(to + at * bytes, from + row * bytes, static_cast<size_t>(bytes));
    });
  return out;
}

Tensor voxel_take(const Tensor& x_in, const Tensor& place_in) {
  const Tensor x = dense(x_in), place = dense(place_in);
  const int64_t bytes = check_places(x, place, false);
  Tensor out = fresh(x, append(sizes(place), {x.size(x.dim() - 1)}));
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const char zeros[kShort] = {};
  if (bytes <= kShort)
    for_places(place, x.size(x.dim() - 2), [&](int64_t row, int64_t at) ALWAYS_INLINE {
      copy_short(to + row * bytes, at >= 0 ? from + at * bytes : zeros, bytes);
    });
  else
    for_places(place, x.size(x.dim() - 2), [&](int64_t row, int64_t at) {
      if (at >= 0) std::memcpy(to + row * bytes, from + at * bytes, static_cast<size_t>(bytes));
      else std::memset(to + row * bytes, 0, static_cast<size_t>(bytes));
    });
  return out;
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
  std::atomic<uint64_t> differences{0};
  for_ranges(examples, row, [&](int64_t e, int64_t begin, int64_t end) {
    if (!copy_boundaries(ip + e * row, op + e * row, n, row - 1, begin, end)) matches = false;
  });
  if (matches)
    dispatch_index(rank, "rank", [&](auto type) {
      const auto* rp = data<typename decltype(type)::type>(rank);
      for_ranges(examples, n, [&](int64_t e, int64_t begin, int64_t end) {
        // The factor keeps equal and opposite differences of two examples apart.
        differences += hash_in(e, 1) * difference(rp + e * n, pp + e * n, ip + e * row, row - 1, begin, end, matches);
      });
    });
  matches = matches && differences == 0;
  check(matches, "csr: expected voxel_csr(rank, num_voxels), got one of other ranks");
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(voxel_bounds)
CUSTOM_OPS_CPU_KERNEL(voxel_index)
CUSTOM_OPS_CPU_KERNEL(voxel_sort)
CUSTOM_OPS_CPU_KERNEL(voxel_unique)
CUSTOM_OPS_CPU_KERNEL(voxel_slots)
CUSTOM_OPS_CPU_KERNEL(voxel_place)
CUSTOM_OPS_CPU_KERNEL(voxel_take)
CUSTOM_OPS_CPU_KERNEL(voxel_match)
