// Segments of points: their geometry, and the work of threads on them.
//
// Point p of P has the weight w[p], the row q(p) of x and the segment r(p) of sums. A sum over segments is the
// derivative of T = sum of w[p] <sums[r(p)], x[q(p)]> over the points with respect to sums, and its adjoints are those
// with respect to x and w. Beside sums there are other reductions of the rows of a segment, and maps of its rows that
// need a statistic of all of them.
#pragma once

#include "elementary.h"
#include "voxel_rows.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

namespace custom_ops {

constexpr int64_t kTask = 1024;  // points or segments per task
constexpr int64_t kPart = 256;   // longer segments are summed in parts of so many points
constexpr int64_t kAhead = 16;   // rows that are fetched ahead of their use
constexpr int64_t kGrain = 1 << 15;

// Divides numbers below 2^52 by a constant.
struct Divider {
  int64_t by;
  double inverse;

  explicit Divider(int64_t by) : by(by), inverse(1.0 / static_cast<double>(by)) {}
  int64_t operator()(int64_t n) const {
    const int64_t quotient = static_cast<int64_t>(static_cast<double>(n) * inverse), rest = n - quotient * by;
    return quotient + (rest >= by) - (rest < 0);
  }
};

// The row of each point: `bins` points that are `plane` apart share one, or an index gives it.
struct Rows {
  int64_t bins, plane, points, rows;
  Divider group, lane;
  const int64_t* index = nullptr;
  int64_t indexed = 0;  // points per example in the index, or 0 if all examples share it

  Rows(int64_t bins, int64_t plane, int64_t points)
      : bins(bins),
        plane(plane),
        points(points),
        rows(bins > 0 ? points / bins : 0),
        group(std::max<int64_t>(bins * plane, 1)),
        lane(std::max<int64_t>(plane, 1)) {
    check(bins >= 1 && plane >= 1 && points % (bins * plane) == 0, "bins, plane: expected divisors of ", points,
          " points, got ", bins, " and ", plane);
  }
  int64_t operator()(int64_t e, int64_t p) const {
    if (index) return index[e * indexed + p];
    return bins == 1 ? p : group(p) * plane + p - lane(p) * plane;
  }
  // Stores the offsets of the rows of n points, and of kAhead more that are only fetched.
  __attribute__((noinline)) void find(int64_t e, const int64_t* points, int64_t n, int64_t columns,
                                      int64_t* offsets) const {
    for (int64_t i = 0; i < n; ++i) offsets[i] = (*this)(e, points[i]) * columns;
    std::fill_n(offsets + n, kAhead, n ? offsets[n - 1] : 0);
  }
  int64_t first_point(int64_t row) const { return bins == 1 ? row : lane(row) * (bins - 1) * plane + row; }
};

// The geometry of a batch, checked once so that no kernel can reach foreign memory. The points of segment s are
// perm[at[s]] to perm[at[s + 1]].
struct Segments {
  Tensor indptr;
  std::optional<Tensor> perm;
  int64_t examples, count, points;
  bool shared;  // all examples have one geometry

  Segments(const Tensor& indptr_in, const std::optional<Tensor>& perm_in, const Shape& batch, int64_t points)
      : indptr(dense(indptr_in)),
        examples(product(batch)),
        points(points) {
    const int64_t dims = indptr.dim() - 1;
    check(dims >= 0 && indptr.size(dims) >= 1 && indptr.scalar_type() == ScalarType::Long,
          "indptr: expected an int64 tensor [..., V + 1]");
    shared = dims == 0;
    check(shared || sizes(indptr, 0, dims) == batch, "indptr: expected the leading dimensions of x, or none");
    count = indptr.size(dims) - 1;
    std::atomic<bool> ordered{true}, inside{true};
    const int64_t* ip = data<int64_t>(indptr);
    const int64_t length = count + 1, n = geometries();
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / length), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        const int64_t* at = ip + e * length;
        int64_t drops = 0;  // as wide as the compared numbers, so that the loop vectorises
        multiversion([&]() ALWAYS_INLINE {
          int64_t found = 0;
          for (int64_t s = 0; s < count; ++s) found |= at[s] > at[s + 1];
          drops = found;
        });
        if (drops || at[0] < 0 || at[count] > points) ordered = false;
      }
    });
    check(ordered, "indptr: expected non-decreasing boundaries within [0, ", points, "]");
    if (!perm_in) return;
    perm = dense(*perm_in);
    check(perm->dim() == dims + 1 && sizes(*perm) == append(sizes(indptr, 0, dims), {points}) &&
              perm->scalar_type() == ScalarType::Long,
          "perm: expected an int64 tensor of ", points, " points, with the leading dimensions of indptr");
    const int64_t* pp = data<int64_t>(*perm);
    torch::stable::parallel_for(0, n * points, kGrain, [&](int64_t begin, int64_t end) {
      int64_t strays = 0;
      multiversion([&]() ALWAYS_INLINE {
        int64_t found = 0;
        for (int64_t i = begin; i < end; ++i) found |= (pp[i] < 0) | (pp[i] >= points);
        strays = found;
      });
      if (strays) inside = false;
    });
    check(inside, "perm: expected points within [0, ", points, ")");
  }

  int64_t geometries() const { return shared ? 1 : examples; }
  const int64_t* at(int64_t example) const { return data<int64_t>(indptr) + (shared ? 0 : example * (count + 1)); }
  const int64_t* order(int64_t example) const {
    return perm ? data<int64_t>(*perm) + (shared ? 0 : example * points) : nullptr;
  }

  // All entries are known to be points, as many as there are. If no point is missing, none is there twice.
  void check_permutation() const {
    if (!perm) return;
    const int64_t n = geometries() * points;
    std::unique_ptr<std::atomic<bool>[]> found(new std::atomic<bool>[std::max<int64_t>(n, 1)]());
    const int64_t* pp = data<int64_t>(*perm);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, base = begin / points * points; i < end; ++i) {
        if (i == base + points) base = i;
        found[base + pp[i]].store(true, std::memory_order_relaxed);
      }
    });
    bool all = true;
    for (int64_t i = 0; i < n; ++i) all &= found[i].load(std::memory_order_relaxed);
    check(all, "perm: expected a permutation of the points, got some of them twice");
  }

  // Returns the segment of each point, or -1 for none.
  std::unique_ptr<int64_t[]> ranks() const {
    std::unique_ptr<int64_t[]> rank(new int64_t[std::max<int64_t>(geometries() * points, 1)]);
    check_permutation();
    torch::stable::parallel_for(0, geometries() * points, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t e = begin / points, first = begin - e * points, last = std::min(end - e * points, points);
        const int64_t *bounds = at(e), *sorted = order(e);
        int64_t* to = rank.get() + e * points;
        int64_t s = std::upper_bound(bounds, bounds + count + 1, first) - bounds - 1;
        for (int64_t i = first; i < last; ++i) {
          while (s < count && bounds[s + 1] <= i) ++s;
          to[sorted ? sorted[i] : i] = s < count ? s : -1;
        }
        begin = e * points + last;
      }
    });
    return rank;
  }
};

// The work of one thread: whole segments, or a part of a long one. Tasks don't depend on the number of threads.
struct Task {
  int64_t example, segment, end, begin, stop;  // segments [segment, end), positions [begin, stop)
  int64_t part;                                // the partial result that it computes, or -1 for whole segments
};

struct Long {
  int64_t example, segment, part, parts;
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Long> longs;
  int64_t parts = 0;

  explicit Plan(const Segments& segments) {
    const int64_t n = segments.geometries();
    for (int64_t e = 0; e < n; ++e) add(segments.at(e), segments.count, e);
    if (!segments.shared) return;
    const Plan one = *this;
    tasks.reserve(tasks.size() * segments.examples);
    if (segments.examples == 0) tasks.clear(), longs.clear();
    for (int64_t e = 1; e < segments.examples; ++e) {
      for (Task task : one.tasks) {
        task.example = e;
        if (task.part >= 0) task.part += e * one.parts;
        tasks.push_back(task);
      }
      for (const Long& l : one.longs) longs.push_back({e, l.segment, l.part + e * one.parts, l.parts});
    }
    parts *= segments.examples;
  }

  // Adds tasks with segment -1 for the points in no segment.
  void add_outside(const Segments& segments) {
    const auto add_range = [this](int64_t e, int64_t begin, int64_t end) {
      for (; begin < end; begin += kTask) tasks.push_back({e, -1, -1, begin, std::min(begin + kTask, end), -1});
    };
    for (int64_t e = 0; e < segments.examples; ++e) {
      add_range(e, 0, segments.at(e)[0]);
      add_range(e, segments.at(e)[segments.count], segments.points);
    }
  }

  void add(const int64_t* at, int64_t count, int64_t e) {
    const auto is_long = [at](int64_t s) { return at[s + 1] - at[s] > kPart; };
    for (int64_t s = 0; s < count;) {
      // A task takes as many segments as fit, up to the first long one.
      int64_t end = std::upper_bound(at + s + 1, at + std::min(s + kTask, count) + 1, at[s] + kTask) - at - 1;
      int64_t longs_inside = 0;
      multiversion([&]() ALWAYS_INLINE {
        int64_t found = 0;
        for (int64_t i = s; i < end; ++i) found |= at[i + 1] - at[i] > kPart;
        longs_inside = found;
      });
      if (longs_inside)
        for (end = s; !is_long(end);) ++end;
      if (end > s) tasks.push_back({e, s, end, at[s], at[end], -1});
      s = end;
      if (s == count || !is_long(s)) continue;
      longs.push_back({e, s, parts, 0});
      for (int64_t i = at[s]; i < at[s + 1]; i += kPart) {
        tasks.push_back({e, s, s + 1, i, std::min(i + kPart, at[s + 1]), parts++});
        ++longs.back().parts;
      }
      ++s;
    }
  }
};

// Calls f(task) for all tasks; a thread that has finished one takes the next.
template <class T, class F>
void for_each_task(const std::vector<T>& tasks, int64_t grain, const F& f) {
  const int64_t n = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, n, grain, [&](int64_t, int64_t) {
    for (int64_t t; (t = next++) < n;) f(tasks[t]);
  });
}

// ---------------------------------------------------------------- arguments

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return custom_ops::dense(*t);
}

struct Shapes {
  Shape batch;
  int64_t rows, columns;

  Shapes(const Tensor& t, const char* name) {
    check(t.dim() >= 2, name, ": expected at least 2 dimensions, got ", t.dim());
    batch = sizes(t, 0, t.dim() - 2);
    rows = t.size(t.dim() - 2), columns = t.size(t.dim() - 1);
  }
};

inline void check_like(const char* name, const Tensor& t, const Tensor& like, const Shape& shape) {
  check(sizes(t) == shape && t.scalar_type() == like.scalar_type(), name,
        ": expected a tensor that fits the others in shape and dtype");
}

// Returns the number of pairs of a row of x and a rank; a pair is unused if one of them is negative.
inline int64_t check_pairs(const Tensor& index, const Tensor& ranks, const Shapes& x, int64_t count) {
  const int64_t dims = index.dim() - 1;
  check(dims >= 0 && sizes(index) == sizes(ranks) && index.scalar_type() == ScalarType::Long &&
            ranks.scalar_type() == ScalarType::Long && (dims == 0 || sizes(index, 0, dims) == x.batch),
        "rows, ranks: expected int64 tensors [..., P] alike, with the leading dimensions of x, or none");
  const int64_t *ip = data<int64_t>(index), *rp = data<int64_t>(ranks), rows = x.rows;
  std::atomic<bool> inside{true};
  torch::stable::parallel_for(0, index.numel(), kGrain, [&](int64_t begin, int64_t end) {
    bool below = true;
    for (int64_t i = begin; i < end; ++i) below &= (ip[i] < rows) & (rp[i] < count);
    if (!below) inside = false;
  });
  check(inside, "rows, ranks: expected values below ", rows, " and ", count);
  return index.size(dims);
}

// ---------------------------------------------------------------- rows of a segment

// Stores vectors of any number as numbers of type T. The conversion to 16 bits is long code, so the loop isn't
// unrolled.
template <class T, class A, class V>
ALWAYS_INLINE inline void store(const V& v, T* to) {
  if constexpr (std::is_same_v<T, A>) std::memcpy(to, &v, sizeof(v));
  else {
    constexpr size_t kBytes = sizeof(V);  // V may be an array of vectors
    constexpr size_t n = kBytes / sizeof(A);
    A numbers[n];
    std::memcpy(numbers, &v, sizeof(v));
#pragma GCC unroll 1
    for (size_t k = 0; k < n; ++k) to[k] = static_cast<T>(numbers[k]);
  }
}

// The input of a reduction: n > 0 rows of x, their weights if there are any, and their points.
template <class T>
struct Input {
  const T* x;
  const int64_t* offsets;  // offsets of the rows in x, or null if they are consecutive
  const Accumulator<T>* weights;
  const int64_t* points;
  int64_t n;

  ALWAYS_INLINE inline const T* row(int64_t i, int64_t columns) const {
    return x + (offsets ? offsets[i] : i * columns);
  }
  // Prefetches the row that is used kAhead rows later; the processor itself prefetches consecutive rows.
  ALWAYS_INLINE inline void fetch_ahead(int64_t i, int64_t columns) const {
    if (offsets) prefetch(x + offsets[i + kAhead], columns * static_cast<int64_t>(sizeof(T)));
  }
};

// value[c] is the sum of the rows; the parts of a long segment are added in double.
template <class T, bool kWeighted>
struct Sum {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = false;
  static constexpr A kEmpty = 0;

  template <class R>
  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value, int64_t*) {
    for_columns<T>(R{}, columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
      using B = decltype(block);
      typename B::L::V total[B::vectors];
      for (auto& t : total) t = B::L::all(0);
      for (int64_t i = 0; i < in.n; ++i) {
        if (c0 == 0) in.fetch_ahead(i, columns);
        const T* row = in.row(i, columns) + c0;
        for (int k = 0; k < B::vectors; ++k) {
          const auto v = B::L::load(row + k * B::lanes);
          if constexpr (kWeighted) total[k] += in.weights[i] * v;
          else total[k] += v;
        }
      }
      std::memcpy(value + c0, total, sizeof(total));
    });
  }

  static void merge(const A* values, const int64_t*, int64_t parts, int64_t columns, A* value, int64_t*) {
    using Wide = std::conditional_t<std::is_same_v<T, int64_t>, T, double>;
    for (int64_t c = 0; c < columns; ++c) {
      Wide total = 0;
      for (int64_t k = 0; k < parts; ++k) total += static_cast<Wide>(values[k * columns + c]);
      value[c] = static_cast<A>(total);
    }
  }
};

// Returns whether v comes before `best` among the largest, or the smallest, where a NaN comes before all numbers.
template <bool kSmallest, class V>
ALWAYS_INLINE inline auto precedes(const V& v, const V& best) {
  if constexpr (kSmallest) return (v < best) | ((v != v) & (best == best));
  else return (v > best) | ((v != v) & (best == best));
}

// Returns e^v of each lane, for v <= 0.
template <class L>
ALWAYS_INLINE inline typename L::V exp_lanes(const typename L::V& v) {
  using V = typename L::V;
  using A = std::decay_t<decltype(L::get(v, 0))>;
  constexpr int kLanes = sizeof(V) / sizeof(A);
  if constexpr (kLanes == 1) {
    return exp_nonpositive(v);
  } else if constexpr (std::is_same_v<A, float>) {
    typedef uint32_t Bits __attribute__((vector_size(sizeof(V))));
    return exp_nonpositive_float<V, Bits>(v);
  } else {
    typedef uint64_t Bits __attribute__((vector_size(sizeof(V))));
    return exp_nonpositive_double<V, Bits>(v);
  }
}

// Calls f(L, c, top, total) for the columns from c on: `top` is the largest of the rows, or 0 if all are -inf, and
// `total` the sum of e^(x - top).
template <class R, class T, class F>
ALWAYS_INLINE inline void exponential_sums(const Input<T>& in, int64_t columns, const F& f) {
  using A = Accumulator<T>;
  for_vectors<A>(R{}, columns, [&](auto l, int64_t c) ALWAYS_INLINE {
    using L = decltype(l);
    auto top = L::load(in.row(0, columns) + c);
    for (int64_t i = 1; i < in.n; ++i) {
      if (c == 0) in.fetch_ahead(i, columns);
      const auto v = L::load(in.row(i, columns) + c);
      top = L::choose(precedes<false>(v, top), v, top);
    }
    top = L::choose(top == L::all(-std::numeric_limits<A>::infinity()), L::all(0), top);
    auto total = L::all(0);
    for (int64_t i = 0; i < in.n; ++i) total += exp_lanes<L>(L::load(in.row(i, columns) + c) - top);
    f(l, c, top, total);
  });
}

}  // namespace custom_ops
