// Sums over segments of points, and their adjoints.
//
// Point p of P has the weight w[p], the row q(p) of x and the segment r(p) of sums. Every op here is a derivative of
// T = sum of w[p] <sums[r(p)], x[q(p)]> over the points: segment_reduce that with respect to sums, segment_spread those
// with respect to x and w. Beside sums there are other reductions of the rows of a segment, and maps of its rows that
// need a statistic of all of them.
#include "elementary.h"
#include "voxel_rows.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

namespace custom_ops {

std::tuple<Tensor, Tensor> voxel_sort(const Tensor& rank, int64_t voxels);  // defined in voxel_grid.cpp

namespace {

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

// ---------------------------------------------------------------- reductions

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

  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value, int64_t*) {
    for_columns<A>(columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
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

// value[c] is the product of the rows; an empty one is 1, and one of integers wraps around.
template <class T>
struct Product {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = false;
  static constexpr A kEmpty = 1;

  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value, int64_t*) {
    for_columns<A>(columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
      using B = decltype(block);
      typename B::L::V total[B::vectors];
      for (auto& t : total) t = B::L::all(1);
      for (int64_t i = 0; i < in.n; ++i) {
        if (c0 == 0) in.fetch_ahead(i, columns);
        const T* row = in.row(i, columns) + c0;
        for (int k = 0; k < B::vectors; ++k) total[k] = times(total[k], B::L::load(row + k * B::lanes));
      }
      std::memcpy(value + c0, total, sizeof(total));
    });
  }

  static void merge(const A* values, const int64_t*, int64_t parts, int64_t columns, A* value, int64_t*) {
    using Wide = std::conditional_t<std::is_same_v<T, int64_t>, T, double>;
    for (int64_t c = 0; c < columns; ++c) {
      Wide total = 1;
      for (int64_t k = 0; k < parts; ++k) total = times(total, static_cast<Wide>(values[k * columns + c]));
      value[c] = static_cast<A>(total);
    }
  }

 private:
  template <class V>
  static ALWAYS_INLINE inline V times(const V& a, const V& b) {
    if constexpr (std::is_same_v<V, int64_t>)  // signed numbers may not overflow, outside of vectors
      return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
    else return a * b;
  }
};

// Returns whether v comes before `best` among the largest, or the smallest, where a NaN comes before all numbers.
template <bool kSmallest, class V>
ALWAYS_INLINE inline auto precedes(const V& v, const V& best) {
  if constexpr (kSmallest) return (v < best) | ((v != v) & (best == best));
  else return (v > best) | ((v != v) & (best == best));
}

// value[c] is the largest or the smallest of the rows; at[c] is the first point that has it, or -1.
template <class T, bool kSmallest>
struct Extreme {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = true;
  static constexpr A kEmpty = 0;

  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value,
                                        int64_t* __restrict at) {
    for_columns<A>(columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
      using B = decltype(block);
      using L = typename B::L;
      typename L::V best[B::vectors];
      typename L::Mask first[B::vectors];
      for (auto& f : first) f = L::all_bits(0);
      for (int k = 0; k < B::vectors; ++k) best[k] = L::load(in.row(0, columns) + c0 + k * B::lanes);
      for (int64_t i = 1; i < in.n; ++i) {
        if (c0 == 0) in.fetch_ahead(i, columns);
        const T* row = in.row(i, columns) + c0;
        const auto here = L::all_bits(static_cast<typename L::Bits>(i));
        for (int k = 0; k < B::vectors; ++k) {
          const auto v = L::load(row + k * B::lanes);
          const auto take = precedes<kSmallest>(v, best[k]);
          best[k] = L::choose(take, v, best[k]);
          first[k] = L::choose(take, here, first[k]);
        }
      }
      std::memcpy(value + c0, best, sizeof(best));
      for (int c = 0; c < B::vectors * B::lanes; ++c) at[c0 + c] = in.points[L::get(first[c / B::lanes], c % B::lanes)];
    });
  }

  static void merge(const A* values, const int64_t* points, int64_t parts, int64_t columns, A* value, int64_t* at) {
    for (int64_t c = 0; c < columns; ++c) {
      int64_t best = 0;
      for (int64_t k = 1; k < parts; ++k)
        if (precedes<kSmallest>(values[k * columns + c], values[best * columns + c])) best = k;
      value[c] = values[best * columns + c];
      at[c] = points[best * columns + c];
    }
  }
};

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
template <class T, class F>
ALWAYS_INLINE inline void exponential_sums(const Input<T>& in, int64_t columns, const F& f) {
  using A = Accumulator<T>;
  for_columns<A>(columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
    using B = decltype(block);
    using L = typename B::L;
    for (int k = 0; k < B::vectors; ++k) {
      const int64_t c = c0 + k * B::lanes;
      auto top = L::load(in.row(0, columns) + c);
      for (int64_t i = 1; i < in.n; ++i) {
        if (c == 0) in.fetch_ahead(i, columns);
        const auto v = L::load(in.row(i, columns) + c);
        top = L::choose(precedes<false>(v, top), v, top);
      }
      top = L::choose(top == L::all(-std::numeric_limits<A>::infinity()), L::all(0), top);
      auto total = L::all(0);
      for (int64_t i = 0; i < in.n; ++i) total += exp_lanes<L>(L::load(in.row(i, columns) + c) - top);
      f(L{}, c, top, total);
    }
  });
}

// value[c] is the logarithm of the sum of e^x.
template <class T>
struct LogSumExp {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = false;
  static constexpr A kEmpty = -std::numeric_limits<A>::infinity();

  // The largest term of the total is 1, unless all are 0 or infinite.
  static ALWAYS_INLINE inline A logarithm(A top, A total) {
    const A log = top + static_cast<A>(log_normal(static_cast<double>(total)));
    return total == 0 ? kEmpty : top == -kEmpty ? top : log;
  }

  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value, int64_t*) {
    exponential_sums(in, columns, [&](auto l, int64_t c, const auto& top, const auto& total) ALWAYS_INLINE {
      using L = decltype(l);
      for (int k = 0; k < static_cast<int>(sizeof(top) / sizeof(A)); ++k)
        value[c + k] = logarithm(L::get(top, k), L::get(total, k));
    });
  }

  static void merge(const A* values, const int64_t*, int64_t parts, int64_t columns, A* value, int64_t*) {
    for (int64_t c = 0; c < columns; ++c) {
      A top = values[c], total = 0;
      for (int64_t k = 1; k < parts; ++k)
        if (precedes<false>(values[k * columns + c], top)) top = values[k * columns + c];
      if (top == kEmpty) top = 0;
      for (int64_t k = 0; k < parts; ++k) total += exp_nonpositive(values[k * columns + c] - top);
      value[c] = logarithm(top, total);
    }
  }
};

template <class T>
struct Reduced {
  const T* x;
  const T* weight;  // may be null
  T* out;
  int64_t* argmax;  // may be null
  int64_t columns;
  bool mean;
  RowWriter writer;
};

template <class Reduction, class T>
void reduce(const Segments& segments, const Rows& rows, const Reduced<T>& io) {
  using A = Accumulator<T>;
  const Plan plan(segments);
  const int64_t columns = io.columns, count = segments.count;
  std::unique_ptr<A[]> values(new A[std::max<int64_t>(plan.parts * columns, 1)]);
  std::unique_ptr<int64_t[]> at(new int64_t[Reduction::kIndexed ? std::max<int64_t>(plan.parts * columns, 1) : 1]);
  const auto finish = [&](int64_t e, int64_t s, const A* value, T* row) ALWAYS_INLINE {
    const int64_t* bounds = segments.at(e);
    const A divisor = static_cast<A>(bounds[s + 1] - bounds[s]);
    if (io.mean)
      for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(value[c] / divisor);
    else
      for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(value[c]);
    io.writer.copy(io.out + (e * count + s) * columns, row);
  };
  const auto argmax = [&](int64_t e, int64_t s) ALWAYS_INLINE {
    return Reduction::kIndexed ? io.argmax + (e * count + s) * columns : nullptr;
  };
  // A reduction can write its sums directly into a row of the output.
  const bool as_summed = !io.mean && !io.writer.streams();
  const int64_t grain = std::max<int64_t>(1, kGrain / kTask * 8 / std::max<int64_t>(columns, 1));
  for_each_task(plan.tasks, grain, [&](const Task& task) {
    int64_t offsets[kTask + kAhead], points[kTask];
    A weights[kTask];
    std::vector<A> value(columns);
    std::vector<T> row(columns);
    const int64_t e = task.example, n = task.stop - task.begin;
    const int64_t *order = segments.order(e), *bounds = segments.at(e);
    const T* x = io.x + e * rows.rows * columns;
    for (int64_t i = 0; i < n; ++i) points[i] = order ? order[task.begin + i] : task.begin + i;
    const bool in_order = !order && rows.bins == 1;
    if (!in_order) {
      for (int64_t i = 0; i < n; ++i) offsets[i] = rows(e, points[i]) * columns;
      for (int64_t i = n; i < n + kAhead; ++i) offsets[i] = n ? offsets[n - 1] : 0;
    }
    if (io.weight)
      for (int64_t i = 0; i < n; ++i) weights[i] = static_cast<A>(io.weight[e * segments.points + points[i]]);
    const auto input = [&](int64_t first, int64_t length) ALWAYS_INLINE {
      return Input<T>{in_order ? x + (task.begin + first) * columns : x, in_order ? nullptr : offsets + first,
                      weights + first, points + first, length};
    };
    const bool part = task.part >= 0;
    multiversion([&]() ALWAYS_INLINE {
      for (int64_t s = task.segment, next; s < task.end; s = next) {
        for (next = s; next < task.end && bounds[next + 1] == bounds[s];) ++next;
        if (next > s) {
          if (Reduction::kEmpty == 0) io.writer.zero(io.out + (e * count + s) * columns, next - s);
          else std::fill_n(io.out + (e * count + s) * columns, (next - s) * columns, static_cast<T>(Reduction::kEmpty));
          if (Reduction::kIndexed) std::fill_n(argmax(e, s), (next - s) * columns, -1);
          continue;
        }
        next = s + 1;
        A* to = value.data();
        int64_t* to_at = argmax(e, s);
        if (part)
          to = values.get() + task.part * columns, to_at = at.get() + (Reduction::kIndexed ? task.part * columns : 0);
        if constexpr (std::is_same_v<T, A>)
          if (!part && as_summed) to = io.out + (e * count + s) * columns;
        const int64_t begin = std::max(bounds[s], task.begin), end = std::min(bounds[next], task.stop);
        Reduction::rows(input(begin - task.begin, end - begin), columns, to, to_at);
        if (to == value.data()) finish(e, s, to, row.data());
      }
    });
    io.writer.flush();
  });
  for_each_task(plan.longs, grain, [&](const Long& l) {
    std::vector<A> value(columns);
    std::vector<T> row(columns);
    const int64_t from = l.part * columns;
    Reduction::merge(values.get() + from, at.get() + (Reduction::kIndexed ? from : 0), l.parts, columns, value.data(),
                     argmax(l.example, l.segment));
    finish(l.example, l.segment, value.data(), row.data());
    io.writer.flush();
  });
}

// ---------------------------------------------------------------- adjoints

// Computes row q of the gradient of x, and the gradients of the weights of its points.
template <class T>
struct Spread {
  using A = Accumulator<T>;
  const T* sums;
  const T* x;       // null if the weights need no gradient
  const T* weight;  // null if all weights are 1
  T* of_x;          // may be null
  T* of_weight;
  int64_t columns;

  // Computes one row from its n points: `offsets` of their segments' sums, their `factors`, and `dots` to fill.
  template <bool kRows, bool kDots>
  ALWAYS_INLINE inline void row(const T* base, const int64_t* offsets, const A* factors, int64_t n, const T* x_row,
                                T* to, A* dots) const {
    if constexpr (kDots) std::fill_n(dots, n, A(0));
    for_columns<A>(columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
      using B = decltype(block);
      using L = typename B::L;
      typename L::V total[B::vectors];
      for (auto& t : total) t = L::all(0);
      for (int64_t i = 0; i < n; ++i) {
        const T* from = base + offsets[i] + c0;
        auto products = L::all(0);
        for (int k = 0; k < B::vectors; ++k) {
          const auto v = L::load(from + k * B::lanes);
          if constexpr (kRows) total[k] += factors[i] * v;
          if constexpr (kDots) products += v * L::load(x_row + c0 + k * B::lanes);
        }
        if constexpr (kDots) dots[i] += L::sum(products);
      }
      if constexpr (kRows)
        for (int c = 0; c < B::vectors * B::lanes; ++c)
          to[c0 + c] = static_cast<T>(L::get(total[c / B::lanes], c % B::lanes));
    });
  }
};

// Computes the gradient if each point has a row of its own and all weights are equal: every point gets a copy of its
// segment's sum or mean.
template <class T>
void spread_copies(const Segments& segments, const T* sums, T* of_x, int64_t columns, bool mean,
                   const RowWriter& writer) {
  using A = Accumulator<T>;
  segments.check_permutation();
  Plan plan(segments);
  plan.add_outside(segments);
  const int64_t grain = std::max<int64_t>(1, kGrain / kTask / std::max<int64_t>(columns, 1));
  for_each_task(plan.tasks, grain, [&](const Task& task) {
    std::vector<T> scaled(columns);
    const int64_t e = task.example, *order = segments.order(e), *bounds = segments.at(e);
    T* to = of_x + e * segments.points * columns;
    const auto row = [&](int64_t i) { return to + (order ? order[i] : i) * columns; };
    if (task.segment < 0)
      for (int64_t i = task.begin; i < task.stop; ++i) writer.zero(row(i), 1);
    for (int64_t s = std::max<int64_t>(task.segment, 0); s < task.end; ++s) {
      const int64_t later = std::min(s + kAhead, task.end - 1);
      const T* sum = sums + e * segments.count * columns;
      if (bounds[later] < bounds[later + 1]) prefetch(sum + later * columns, columns * static_cast<int64_t>(sizeof(T)));
      const int64_t begin = std::max(bounds[s], task.begin), end = std::min(bounds[s + 1], task.stop);
      sum += s * columns;
      if (mean && begin < end) {
        const A factor = A(1) / static_cast<A>(bounds[s + 1] - bounds[s]);
        for (int64_t c = 0; c < columns; ++c) scaled[c] = static_cast<T>(factor * static_cast<A>(sum[c]));
        sum = scaled.data();
      }
      for (int64_t i = begin; i < end; ++i) writer.copy(row(i), sum);
    }
    writer.flush();
  });
}

template <class T>
void spread_rows(const Segments& segments, const Rows& rows, const int64_t* rank, const Spread<T>& io, bool mean) {
  using A = Accumulator<T>;
  const int64_t columns = io.columns, bytes = columns * static_cast<int64_t>(sizeof(T));
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(columns * rows.bins, 1));
  torch::stable::parallel_for(0, segments.examples * rows.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> offsets(rows.bins + kAhead), points(rows.bins);
    std::vector<A> factors(rows.bins), scales(rows.bins), dots(rows.bins);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = i / rows.rows, q = i - e * rows.rows;
      const int64_t* ranks = rank + (segments.shared ? 0 : e * segments.points);
      const T* base = io.sums + e * segments.count * columns;
      T* to = io.of_x ? io.of_x + i * columns : nullptr;
      const int64_t* bounds = segments.at(e);
      const int64_t first = rows.first_point(q), shift = e * segments.points;
      int64_t n = 0;
      for (int64_t d = 0; d < rows.bins; ++d) {
        const int64_t p = first + d * rows.plane, r = ranks[p];
        if (r < 0) {
          if (io.x) io.of_weight[shift + p] = T(0);
          continue;
        }
        points[n] = p, offsets[n] = r * columns;
        scales[n] = mean ? A(1) / static_cast<A>(bounds[r + 1] - bounds[r]) : A(1);
        factors[n] = io.weight ? scales[n] * static_cast<A>(io.weight[shift + p]) : scales[n];
        prefetch(base + offsets[n++], bytes);
      }
      const T* x_row = io.x ? io.x + i * columns : nullptr;
      multiversion([&]() ALWAYS_INLINE {
        const auto run = [&](auto wants_rows, auto wants_dots) ALWAYS_INLINE {
          io.template row<decltype(wants_rows)::value, decltype(wants_dots)::value>(
              base, offsets.data(), factors.data(), n, x_row, to, dots.data());
        };
        if (to && x_row) run(std::true_type{}, std::true_type{});
        else if (to) run(std::true_type{}, std::false_type{});
        else run(std::false_type{}, std::true_type{});
      });
      if (x_row)
        for (int64_t k = 0; k < n; ++k) io.of_weight[shift + points[k]] = static_cast<T>(scales[k] * dots[k]);
    }
  });
}

// ---------------------------------------------------------------- maps

// A map computes a row for each point from the point's own row and a statistic of its segment.
template <class T>
struct Mapped {
  const T* x;
  const T* y;  // null for maps of one tensor
  T* out;
  int64_t columns;
};

// Calls f(L, c) for all vectors of columns.
template <class A, class F>
ALWAYS_INLINE inline void for_vectors(int64_t columns, const F& f) {
  for_columns<A>(columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
    using B = decltype(block);
    for (int k = 0; k < B::vectors; ++k) f(typename B::L{}, c0 + k * B::lanes);
  });
}

template <class V, class A>
ALWAYS_INLINE inline V load_as(const A* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class L, class T, class V>
ALWAYS_INLINE inline void store(const V& v, T* to) {
  if constexpr (std::is_same_v<T, std::decay_t<decltype(L::get(v, 0))>>) std::memcpy(to, &v, sizeof(v));
  else
    for (int k = 0; k < static_cast<int>(sizeof(V) / sizeof(L::get(v, 0))); ++k) to[k] = static_cast<T>(L::get(v, k));
}

// The row of a point is e^x divided by the sum over its segment; all are 0 where all x are -inf. The statistics are the
// largest x and the sum of e^(x - largest), of which the second is inverted at the end.
template <class T>
struct Softmax {
  using A = Accumulator<T>;
  static constexpr int64_t kStatistics = 2;

  static ALWAYS_INLINE inline void gather(const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics) {
    const Input<T> in{io.x, offsets, nullptr, nullptr, n};
    exponential_sums(in, io.columns, [&](auto, int64_t c, const auto& top, const auto& total) ALWAYS_INLINE {
      std::memcpy(statistics + c, &top, sizeof(top));
      std::memcpy(statistics + io.columns + c, &total, sizeof(total));
    });
  }

  static void merge(const A* parts, int64_t n, int64_t columns, A* statistics) {
    for (int64_t c = 0; c < columns; ++c) {
      const A* tops = parts + c;
      const A* totals = tops + columns;
      // A part that is all -inf has the top 0 and the total 0.
      A top = -std::numeric_limits<A>::infinity(), total = 0;
      for (int64_t k = 0; k < n; ++k)
        if (totals[2 * k * columns] != 0 && precedes<false>(tops[2 * k * columns], top)) top = tops[2 * k * columns];
      for (int64_t k = 0; k < n; ++k)
        if (totals[2 * k * columns] != 0)
          total += totals[2 * k * columns] * exp_nonpositive(tops[2 * k * columns] - top);
      statistics[c] = total == 0 ? A(0) : top, statistics[columns + c] = total;
    }
  }

  static ALWAYS_INLINE inline void finish(int64_t, int64_t columns, A* statistics) {
    A* total = statistics + columns;
    for (int64_t c = 0; c < columns; ++c) total[c] = total[c] == 0 ? A(0) : 1 / total[c];
  }

  static ALWAYS_INLINE inline void write(const Mapped<T>& io, int64_t offset, const A* statistics) {
    for_vectors<A>(io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      using V = typename L::V;
      const V top = load_as<V>(statistics + c), inverse = load_as<V>(statistics + io.columns + c);
      store<L>(V(inverse * exp_lanes<L>(V(L::load(io.x + offset + c) - top))), io.out + offset + c);
    });
  }
};

// The adjoint of Softmax: y (x - <x, y>) for the gradient x and the result y. The statistic is the dot product.
template <class T>
struct SoftmaxAdjoint {
  using A = Accumulator<T>;
  static constexpr int64_t kStatistics = 1;

  static ALWAYS_INLINE inline void gather(const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics) {
    for_vectors<A>(io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      auto total = L::all(0);
      for (int64_t i = 0; i < n; ++i) total += L::load(io.x + offsets[i] + c) * L::load(io.y + offsets[i] + c);
      std::memcpy(statistics + c, &total, sizeof(total));
    });
  }

  static void merge(const A* parts, int64_t n, int64_t columns, A* statistics) {
    Sum<T, false>::merge(parts, nullptr, n, columns, statistics, nullptr);
  }

  static ALWAYS_INLINE inline void finish(int64_t, int64_t, A*) {}

  static ALWAYS_INLINE inline void write(const Mapped<T>& io, int64_t offset, const A* statistics) {
    for_vectors<A>(io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      using V = typename L::V;
      const V difference = L::load(io.x + offset + c) - load_as<V>(statistics + c);
      store<L>(V(L::load(io.y + offset + c) * difference), io.out + offset + c);
    });
  }
};

// The row of a point is its difference from the mean of its segment.
template <class T>
struct Center {
  using A = Accumulator<T>;
  static constexpr int64_t kStatistics = 1;

  static ALWAYS_INLINE inline void gather(const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics) {
    Sum<T, false>::rows(Input<T>{io.x, offsets, nullptr, nullptr, n}, io.columns, statistics, nullptr);
  }

  static void merge(const A* parts, int64_t n, int64_t columns, A* statistics) {
    Sum<T, false>::merge(parts, nullptr, n, columns, statistics, nullptr);
  }

  static ALWAYS_INLINE inline void finish(int64_t points, int64_t columns, A* statistics) {
    for (int64_t c = 0; c < columns; ++c) statistics[c] /= static_cast<A>(points);
  }

  static ALWAYS_INLINE inline void write(const Mapped<T>& io, int64_t offset, const A* statistics) {
    for_vectors<A>(io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      using V = typename L::V;
      store<L>(V(L::load(io.x + offset + c) - load_as<V>(statistics + c)), io.out + offset + c);
    });
  }
};

// Maps whole segments at once. The parts of a long one come first, then its statistics, and its points at last. Points
// in no segment get 0.
template <class Map, class T>
void map_segments(const Segments& segments, const Mapped<T>& io) {
  using A = Accumulator<T>;
  segments.check_permutation();
  Plan plan(segments);
  plan.add_outside(segments);
  const int64_t columns = io.columns, width = Map::kStatistics * columns;
  std::unique_ptr<A[]> parts(new A[std::max<int64_t>(plan.parts * width, 1)]);
  const int64_t grain = std::max<int64_t>(1, kGrain / kTask / std::max<int64_t>(columns, 1));
  std::vector<Task> pieces;
  for (const Task& task : plan.tasks)
    if (task.part >= 0) pieces.push_back(task);
  const auto example = [&](int64_t e) {
    Mapped<T> at = io;
    const int64_t first = e * segments.points * columns;
    at.x += first, at.out += first;
    if (at.y) at.y += first;
    return at;
  };
  const auto offsets_of = [&](const Task& task, int64_t* offsets) {
    const int64_t *order = segments.order(task.example), n = task.stop - task.begin;
    for (int64_t i = 0; i < n; ++i) offsets[i] = (order ? order[task.begin + i] : task.begin + i) * columns;
    for (int64_t i = n; i < n + kAhead; ++i) offsets[i] = n ? offsets[n - 1] : 0;
  };
  for_each_task(plan.tasks, grain, [&](const Task& task) {
    int64_t offsets[kTask + kAhead];
    std::vector<A> statistics(width);
    const Mapped<T> at = example(task.example);
    offsets_of(task, offsets);
    const int64_t* bounds = segments.at(task.example);
    multiversion([&]() ALWAYS_INLINE {
      if (task.segment < 0)
        for (int64_t i = 0; i < task.stop - task.begin; ++i) std::fill_n(at.out + offsets[i], columns, T(0));
      else if (task.part >= 0) Map::gather(at, offsets, task.stop - task.begin, parts.get() + task.part * width);
      else
        for (int64_t s = task.segment; s < task.end; ++s) {
          const int64_t first = bounds[s] - task.begin, last = bounds[s + 1] - task.begin;
          if (first == last) continue;
          Map::gather(at, offsets + first, last - first, statistics.data());
          Map::finish(last - first, columns, statistics.data());
          for (int64_t i = first; i < last; ++i) Map::write(at, offsets[i], statistics.data());
        }
    });
  });
  // The statistics of a long segment take the place of its first part's.
  std::vector<int64_t> first_part(plan.parts);
  for (const Long& l : plan.longs) std::fill_n(first_part.begin() + l.part, l.parts, l.part);
  for_each_task(plan.longs, grain, [&](const Long& l) {
    std::vector<A> statistics(width);
    Map::merge(parts.get() + l.part * width, l.parts, columns, statistics.data());
    const int64_t* bounds = segments.at(l.example) + l.segment;
    Map::finish(bounds[1] - bounds[0], columns, statistics.data());
    std::copy(statistics.begin(), statistics.end(), parts.get() + l.part * width);
  });
  for_each_task(pieces, grain, [&](const Task& task) {
    int64_t offsets[kTask + kAhead];
    offsets_of(task, offsets);
    const Mapped<T> at = example(task.example);
    const A* statistics = parts.get() + first_part[task.part] * width;
    multiversion([&]() ALWAYS_INLINE {
      for (int64_t i = 0; i < task.stop - task.begin; ++i) Map::write(at, offsets[i], statistics);
    });
  });
}

// ---------------------------------------------------------------- recurrences

// A recurrence over the points of a segment, in their order or backwards: the row of the first point is 0, or 1 if
// there are no terms, and that of the next is factor * row + term.
template <class T>
struct Recurrence {
  using A = Accumulator<T>;
  const T* factors;
  const T* terms;  // may be null
  T* out;
  int64_t columns;
  bool backwards;

  // Applies n steps to the rows in `state`, and to the products of all factors if these are wanted, or writes the row
  // of each point.
  template <bool kWrites>
  ALWAYS_INLINE inline void steps(const int64_t* offsets, int64_t n, A* state, A* products) const {
    for_columns<A>(columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
      using B = decltype(block);
      using L = typename B::L;
      using V = typename L::V;
      for (int k = 0; k < B::vectors; ++k) {
        const int64_t c = c0 + k * B::lanes;
        V row = load_as<V>(state + c), product = L::all(1);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = offsets[backwards ? n - 1 - i : i] + c;
          if constexpr (kWrites) store<L>(row, out + at);
          const V factor = L::load(factors + at);
          row = row * factor;
          if (terms) row += L::load(terms + at);
          if constexpr (!kWrites) product = product * factor;
        }
        std::memcpy(state + c, &row, sizeof(row));
        if constexpr (!kWrites) std::memcpy(products + c, &product, sizeof(product));
      }
    });
  }
};

// The parts of a long segment are first reduced to the product of their factors and the row that follows from 0, which
// give the row that each part begins with.
template <class T>
void scan_segments(const Segments& segments, const Recurrence<T>& io) {
  using A = Accumulator<T>;
  segments.check_permutation();
  Plan plan(segments);
  plan.add_outside(segments);
  const int64_t columns = io.columns, grain = std::max<int64_t>(1, kGrain / kTask / std::max<int64_t>(columns, 1));
  const A first = io.terms ? A(0) : A(1);
  std::unique_ptr<A[]> parts(new A[std::max<int64_t>(plan.parts * 2 * columns, 1)]);
  std::vector<Task> pieces;
  for (const Task& task : plan.tasks)
    if (task.part >= 0) pieces.push_back(task);
  const auto offsets_of = [&](const Task& task, int64_t* offsets) {
    const int64_t* order = segments.order(task.example);
    for (int64_t i = task.begin; i < task.stop; ++i)
      offsets[i - task.begin] = (task.example * segments.points + (order ? order[i] : i)) * columns;
  };
  for_each_task(plan.tasks, grain, [&](const Task& task) {
    int64_t offsets[kTask];
    std::vector<A> state(columns);
    offsets_of(task, offsets);
    const int64_t *bounds = segments.at(task.example), n = task.stop - task.begin;
    multiversion([&]() ALWAYS_INLINE {
      if (task.segment < 0)
        for (int64_t i = 0; i < n; ++i) std::fill_n(io.out + offsets[i], columns, T(0));
      else if (task.part >= 0) {
        A* row = parts.get() + task.part * 2 * columns;
        std::fill_n(row, columns, A(0));
        io.template steps<false>(offsets, n, row, row + columns);
      } else
        for (int64_t s = task.segment; s < task.end; ++s) {
          std::fill_n(state.data(), columns, first);
          io.template steps<true>(offsets + bounds[s] - task.begin, bounds[s + 1] - bounds[s], state.data(), nullptr);
        }
    });
  });
  for (const Long& l : plan.longs)
    for (int64_t c = 0; c < columns; ++c) {
      A state = first;
      for (int64_t k = 0; k < l.parts; ++k) {
        A* row = parts.get() + (l.part + (io.backwards ? l.parts - 1 - k : k)) * 2 * columns + c;
        const A next = row[columns] * state + row[0];
        row[0] = state, state = next;
      }
    }
  for_each_task(pieces, grain, [&](const Task& task) {
    int64_t offsets[kTask];
    offsets_of(task, offsets);
    multiversion([&]() ALWAYS_INLINE {
      io.template steps<true>(offsets, task.stop - task.begin, parts.get() + task.part * 2 * columns, nullptr);
    });
  });
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return custom_ops::dense(*t);
}

// Sums and extremes are also those of integers.
template <class F>
void dispatch_numbers(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Long) f(Type<int64_t>{});
  else dispatch_floating(t, "x", f);
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

void check_like(const char* name, const Tensor& t, const Tensor& like, const Shape& shape) {
  check(sizes(t) == shape && t.scalar_type() == like.scalar_type(), name,
        ": expected a tensor that fits the others in shape and dtype");
}

// Returns the number of pairs of a row of x and a rank; a pair is unused if one of them is negative.
int64_t check_pairs(const Tensor& index, const Tensor& ranks, const Shapes& x, int64_t count) {
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

}  // namespace

Tensor segment_reduce(const Tensor& x_in, const std::optional<Tensor>& weight_in, const Tensor& indptr,
                      const std::optional<Tensor>& perm, bool mean, int64_t bins, int64_t plane) {
  const Tensor x = dense(x_in);
  const std::optional<Tensor> weight = dense(weight_in);
  const Shapes shapes(x, "x");
  const Rows rows(bins, plane, shapes.rows * bins);
  if (weight) check_like("weight", *weight, x, append(shapes.batch, {rows.points}));
  const Segments segments(indptr, perm, shapes.batch, rows.points);
  Tensor out = fresh(x, append(shapes.batch, {segments.count, shapes.columns}));
  check(x.scalar_type() != ScalarType::Long || !(mean || weight),
        "x: expected floating numbers with a mean or weights");
  dispatch_numbers(x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Reduced<T> io{data<T>(x), data_or_null<T>(weight),       mutable_data<T>(out), nullptr, shapes.columns,
                        mean,       RowWriter(out, shapes.columns)};
    if (weight) reduce<Sum<T, true>>(segments, rows, io);
    else reduce<Sum<T, false>>(segments, rows, io);
  });
  return out;
}

std::tuple<Tensor, Tensor> segment_extreme(const Tensor& x_in, const Tensor& indptr, const std::optional<Tensor>& perm,
                                           bool largest) {
  const Tensor x = dense(x_in);
  const Shapes shapes(x, "x");
  const Rows rows(1, 1, shapes.rows);
  const Segments segments(indptr, perm, shapes.batch, shapes.rows);
  const Shape shape = append(shapes.batch, {segments.count, shapes.columns});
  Tensor out = fresh(x, shape), index = fresh(x, shape, ScalarType::Long);
  dispatch_numbers(x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Reduced<T> io{data<T>(x),     nullptr, mutable_data<T>(out),          mutable_data<int64_t>(index),
                        shapes.columns, false,   RowWriter(out, shapes.columns)};
    if (largest) reduce<Extreme<T, false>>(segments, rows, io);
    else reduce<Extreme<T, true>>(segments, rows, io);
  });
  return {out, index};
}

Tensor segment_prod(const Tensor& x_in, const Tensor& indptr, const std::optional<Tensor>& perm) {
  const Tensor x = dense(x_in);
  const Shapes shapes(x, "x");
  const Rows rows(1, 1, shapes.rows);
  const Segments segments(indptr, perm, shapes.batch, shapes.rows);
  Tensor out = fresh(x, append(shapes.batch, {segments.count, shapes.columns}));
  dispatch_numbers(x, [&](auto type) {
    using T = typename decltype(type)::type;
    reduce<Product<T>>(segments, rows,
                       Reduced<T>{data<T>(x), nullptr, mutable_data<T>(out), nullptr, shapes.columns, false,
                                  RowWriter(out, shapes.columns)});
  });
  return out;
}

Tensor segment_scan(const Tensor& factors_in, const std::optional<Tensor>& terms_in, const Tensor& indptr,
                    const std::optional<Tensor>& perm, bool backwards) {
  const Tensor factors = dense(factors_in);
  const std::optional<Tensor> terms = dense(terms_in);
  const Shapes shapes(factors, "factors");
  if (terms) check_like("terms", *terms, factors, sizes(factors));
  const Segments segments(indptr, perm, shapes.batch, shapes.rows);
  Tensor out = fresh(factors, sizes(factors));
  dispatch_floating(factors, "factors", [&](auto type) {
    using T = typename decltype(type)::type;
    scan_segments(segments, Recurrence<T>{data<T>(factors), data_or_null<T>(terms), mutable_data<T>(out),
                                          shapes.columns, backwards});
  });
  return out;
}

Tensor segment_logsumexp(const Tensor& x_in, const Tensor& indptr, const std::optional<Tensor>& perm) {
  const Tensor x = dense(x_in);
  const Shapes shapes(x, "x");
  const Rows rows(1, 1, shapes.rows);
  const Segments segments(indptr, perm, shapes.batch, shapes.rows);
  Tensor out = fresh(x, append(shapes.batch, {segments.count, shapes.columns}));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    reduce<LogSumExp<T>>(segments, rows,
                         Reduced<T>{data<T>(x), nullptr, mutable_data<T>(out), nullptr, shapes.columns, false,
                                    RowWriter(out, shapes.columns)});
  });
  return out;
}

namespace {

template <template <class> class Map>
Tensor mapped(const Tensor& x_in, const std::optional<Tensor>& y_in, const Tensor& indptr,
              const std::optional<Tensor>& perm) {
  const Tensor x = custom_ops::dense(x_in);
  const std::optional<Tensor> y = dense(y_in);
  const Shapes shapes(x, "x");
  if (y) check_like("y", *y, x, sizes(x));
  const Segments segments(indptr, perm, shapes.batch, shapes.rows);
  Tensor out = fresh(x, sizes(x));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    map_segments<Map<T>>(segments, Mapped<T>{data<T>(x), data_or_null<T>(y), mutable_data<T>(out), shapes.columns});
  });
  return out;
}

}  // namespace

Tensor segment_softmax(const Tensor& x, const Tensor& indptr, const std::optional<Tensor>& perm) {
  return mapped<Softmax>(x, std::nullopt, indptr, perm);
}

Tensor segment_softmax_adjoint(const Tensor& grad, const Tensor& y, const Tensor& indptr,
                               const std::optional<Tensor>& perm) {
  return mapped<SoftmaxAdjoint>(grad, y, indptr, perm);
}

Tensor segment_center(const Tensor& x, const Tensor& indptr, const std::optional<Tensor>& perm) {
  return mapped<Center>(x, std::nullopt, indptr, perm);
}

std::tuple<Tensor, Tensor> segment_spread(const Tensor& sums_in, const std::optional<Tensor>& x_in,
                                          const std::optional<Tensor>& weight_in, const Tensor& indptr,
                                          const std::optional<Tensor>& perm, int64_t points, bool mean, int64_t bins,
                                          int64_t plane, bool of_x) {
  const Tensor sums = dense(sums_in);
  const std::optional<Tensor> x = dense(x_in), weight = dense(weight_in);
  const Shapes shapes(sums, "sums");
  const Rows rows(bins, plane, points);
  const Shape x_shape = append(shapes.batch, {rows.rows, shapes.columns});
  if (x) check_like("x", *x, sums, x_shape);
  if (weight) check_like("weight", *weight, sums, append(shapes.batch, {points}));
  const Segments segments(indptr, perm, shapes.batch, points);
  check(shapes.rows == segments.count, "sums: expected ", segments.count, " segments, got ", shapes.rows);
  Tensor grad_x = fresh(sums, of_x ? x_shape : Shape{0});
  Tensor grad_weight = fresh(sums, x ? append(shapes.batch, {points}) : Shape{0});
  if (shapes.columns == 0 && x)
    std::memset(grad_weight.mutable_data_ptr(), 0, static_cast<size_t>(grad_weight.numel()) * x->element_size());
  if (shapes.columns == 0 || (!of_x && !x)) return {grad_x, grad_weight};
  dispatch_floating(sums, "sums", [&](auto type) {
    using T = typename decltype(type)::type;
    if (bins == 1 && !weight && !x)
      return spread_copies(segments, data<T>(sums), mutable_data<T>(grad_x), shapes.columns, mean,
                           RowWriter(grad_x, shapes.columns));
    const Spread<T> io{data<T>(sums),
                       data_or_null<T>(x),
                       data_or_null<T>(weight),
                       of_x ? mutable_data<T>(grad_x) : nullptr,
                       mutable_data<T>(grad_weight),
                       shapes.columns};
    spread_rows(segments, rows, segments.ranks().get(), io, mean);
  });
  return {grad_x, grad_weight};
}

Tensor pair_reduce(const Tensor& x_in, const Tensor& weight_in, const Tensor& rows_in, const Tensor& ranks_in,
                   int64_t count) {
  const Tensor x = dense(x_in), weight = dense(weight_in), index = dense(rows_in), ranks = dense(ranks_in);
  const Shapes shapes(x, "x");
  const int64_t points = check_pairs(index, ranks, shapes, count);
  check_like("weight", weight, x, append(shapes.batch, {points}));
  Tensor inside = fresh(ranks, sizes(ranks));
  const int64_t *ip = data<int64_t>(index), *rp = data<int64_t>(ranks);
  each_element(mutable_data<int64_t>(inside), inside.numel(),
               [ip, rp](int64_t i) ALWAYS_INLINE { return ip[i] < 0 ? int64_t{-1} : rp[i]; });
  const auto [perm, indptr] = voxel_sort(inside, count);
  const Segments segments(indptr, perm, shapes.batch, points);
  Rows rows(1, 1, shapes.rows);
  rows.index = ip, rows.indexed = index.dim() > 1 ? points : 0;
  Tensor out = fresh(x, append(shapes.batch, {count, shapes.columns}));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    reduce<Sum<T, true>>(segments, rows,
                         Reduced<T>{data<T>(x), data<T>(weight), mutable_data<T>(out), nullptr, shapes.columns, false,
                                    RowWriter(out, shapes.columns)});
  });
  return out;
}

Tensor pair_dots(const Tensor& sums_in, const Tensor& x_in, const Tensor& ranks_in, const Tensor& rows_in) {
  const Tensor sums = dense(sums_in), x = dense(x_in), ranks = dense(ranks_in), index = dense(rows_in);
  const Shapes of_sums(sums, "sums"), shapes(x, "x");
  const int64_t points = check_pairs(index, ranks, shapes, of_sums.rows), columns = shapes.columns;
  check_like("sums", sums, x, append(shapes.batch, {of_sums.rows, columns}));
  const int64_t *ip = data<int64_t>(index), *rp = data<int64_t>(ranks), own = index.dim() > 1;
  Tensor out = fresh(x, append(shapes.batch, {points}));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    const Spread<T> io{data<T>(sums), data<T>(x), nullptr, nullptr, mutable_data<T>(out), columns};
    torch::stable::parallel_for(
        0, out.numel(), kGrain / std::max<int64_t>(columns, 1) + 1, [&](int64_t begin, int64_t end) {
          multiversion([&]() ALWAYS_INLINE {
            for (int64_t i = begin; i < end; ++i) {
              const int64_t e = i / points, at = own ? i : i - e * points, offset = rp[at] * columns;
              Accumulator<T> dot(0);
              if (rp[at] >= 0 && ip[at] >= 0)
                io.template row<false, true>(io.sums + e * of_sums.rows * columns, &offset, nullptr, 1,
                                             io.x + (e * shapes.rows + ip[at]) * columns, nullptr, &dot);
              io.of_weight[i] = static_cast<T>(dot);
            }
          });
        });
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(segment_reduce)
CUSTOM_OPS_CPU_KERNEL(segment_extreme)
CUSTOM_OPS_CPU_KERNEL(segment_prod)
CUSTOM_OPS_CPU_KERNEL(segment_scan)
CUSTOM_OPS_CPU_KERNEL(segment_logsumexp)
CUSTOM_OPS_CPU_KERNEL(segment_softmax)
CUSTOM_OPS_CPU_KERNEL(segment_softmax_adjoint)
CUSTOM_OPS_CPU_KERNEL(segment_center)
CUSTOM_OPS_CPU_KERNEL(segment_spread)
CUSTOM_OPS_CPU_KERNEL(pair_reduce)
CUSTOM_OPS_CPU_KERNEL(pair_dots)
