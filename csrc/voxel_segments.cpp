// Sums over segments of points, and their adjoints.
//
// Point p of P has the weight w[p], the row q(p) of x and the segment r(p) of sums. Everything here is
// a form of T = sum of w[p] <sums[r(p)], x[q(p)]> over the points: segment_reduce is its derivative in
// sums, segment_spread those in x and w.
#include "bits.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace custom_ops {
namespace {

constexpr int64_t kTask = 1024;  // points, or segments, that one task takes at most
constexpr int64_t kPart = 256;   // longer segments are summed in parts of as many points
constexpr int64_t kAhead = 8;    // rows that are fetched before they are needed
constexpr int64_t kGrain = 1 << 15;

// Division by a constant, of numbers below 2^52.
struct Divider {
  int64_t by;
  double inverse;

  explicit Divider(int64_t by) : by(by), inverse(1.0 / static_cast<double>(by)) {}
  int64_t operator()(int64_t n) const {
    const int64_t quotient = static_cast<int64_t>(static_cast<double>(n) * inverse), rest = n - quotient * by;
    return quotient + (rest >= by) - (rest < 0);
  }
};

// The row of each point: `bins` points share one, and lie `plane` apart.
struct Rows {
  int64_t bins, plane, points, rows;
  Divider group, lane;

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
  int64_t operator()(int64_t p) const { return bins == 1 ? p : group(p) * plane + p - lane(p) * plane; }
  int64_t first_point(int64_t row) const { return bins == 1 ? row : lane(row) * (bins - 1) * plane + row; }
};

// The geometry of a batch, checked once, so that no kernel below can reach memory it doesn't own: the
// points of each segment are perm[at[s]] to perm[at[s + 1]].
struct Segments {
  Tensor indptr;
  std::optional<Tensor> perm;
  int64_t examples, count, points;
  bool shared;  // one geometry for all examples

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
        bool ok = at[0] >= 0 && at[count] <= points;
        multiversion([&]() ALWAYS_INLINE {
          for (int64_t s = 0; s < count; ++s) ok &= at[s] <= at[s + 1];
        });
        if (!ok) ordered = false;
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
      bool ok = true;
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t i = begin; i < end; ++i) ok &= (pp[i] >= 0) & (pp[i] < points);
      });
      if (!ok) inside = false;
    });
    check(inside, "perm: expected points within [0, ", points, ")");
  }

  int64_t geometries() const { return shared ? 1 : examples; }
  const int64_t* at(int64_t example) const { return data<int64_t>(indptr) + (shared ? 0 : example * (count + 1)); }
  const int64_t* order(int64_t example) const {
    return perm ? data<int64_t>(*perm) + (shared ? 0 : example * points) : nullptr;
  }

  // The segment of each point, -1 for none.
  std::unique_ptr<int64_t[]> ranks() const {
    std::unique_ptr<int64_t[]> rank(new int64_t[std::max<int64_t>(geometries() * points, 1)]);
    if (perm) std::fill_n(rank.get(), geometries() * points, -2);
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
    // As many entries as points: if one is missing, another is there twice.
    if (perm)
      check(std::find(rank.get(), rank.get() + geometries() * points, -2) == rank.get() + geometries() * points,
            "perm: expected a permutation of the points, got some of them twice");
    return rank;
  }
};

// Work for one thread: whole segments, or a part of a long one. Tasks are alike on any number of threads.
struct Task {
  int64_t example, segment, end, begin, stop;  // segments [segment, end), positions [begin, stop)
  int64_t part;                                // the partial result it makes, -1 for whole segments
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

  void add(const int64_t* at, int64_t count, int64_t e) {
    int64_t s = 0;
    while (s < count) {
      const int64_t length = at[s + 1] - at[s];
      if (length > kPart) {
        longs.push_back({e, s, parts, 0});
        for (int64_t i = at[s]; i < at[s + 1]; i += kPart) {
          tasks.push_back({e, s, s + 1, i, std::min(i + kPart, at[s + 1]), parts++});
          ++longs.back().parts;
        }
        ++s;
        continue;
      }
      int64_t end = s + 1;
      while (end < count && end - s < kTask && at[end + 1] - at[s] <= kTask && at[end + 1] - at[end] <= kPart) ++end;
      tasks.push_back({e, s, end, at[s], at[end], -1});
      s = end;
    }
  }
};

inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b);
}

// ---------------------------------------------------------------- reductions

// Columns in registers: one block of a vector's worth each, then what is left. f(block, first, width).
template <class A, class F>
ALWAYS_INLINE inline void for_columns(int64_t columns, const F& f) {
  constexpr int kWide = 256 / sizeof(A), kNarrow = 16;
  int64_t c = 0;
  for (; c + kWide <= columns; c += kWide) f(std::integral_constant<int, kWide>{}, c, kWide);
  for (; c + kNarrow <= columns; c += kNarrow) f(std::integral_constant<int, kNarrow>{}, c, kNarrow);
  if (c < columns) f(std::integral_constant<int, 0>{}, c, static_cast<int>(columns - c));
}

// What a reduction reads: n > 0 rows of x at offsets, their weights if any, and their points.
template <class T>
struct Input {
  const T* x;
  const int64_t* offsets;
  const Accumulator<T>* weights;
  const int64_t* points;
  int64_t n;
};

// value[c] = sum of the rows; the parts of a long segment are added in double.
template <class T, bool kWeighted>
struct Sum {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = false;

  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value, int64_t*) {
    for_columns<A>(columns, [&](auto block, int64_t c0, int columns_left) ALWAYS_INLINE {
      constexpr int kBlock = decltype(block)::value;
      const int width = kBlock ? kBlock : columns_left;
      A total[kBlock ? kBlock : 16];
      for (int c = 0; c < width; ++c) total[c] = 0;
      for (int64_t i = 0; i < in.n; ++i) {
        const T* row = in.x + in.offsets[i] + c0;
        if constexpr (kWeighted) {
          const A w = in.weights[i];
          for (int c = 0; c < width; ++c) total[c] += w * static_cast<A>(row[c]);
        } else {
          for (int c = 0; c < width; ++c) total[c] += static_cast<A>(row[c]);
        }
      }
      for (int c = 0; c < width; ++c) value[c0 + c] = total[c];
    });
  }

  static void merge(const A* values, const int64_t*, int64_t parts, int64_t columns, A* value, int64_t*) {
    for (int64_t c = 0; c < columns; ++c) {
      double total = 0;
      for (int64_t k = 0; k < parts; ++k) total += static_cast<double>(values[k * columns + c]);
      value[c] = static_cast<A>(total);
    }
  }
};

// value[c] = the largest of the rows, a NaN above all; at[c] = the first point that has it, -1 for none.
template <class T>
struct Max {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = true;

  static ALWAYS_INLINE inline bool above(A v, A best) { return v > best || (v != v && best == best); }

  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value,
                                        int64_t* __restrict at) {
    for_columns<A>(columns, [&](auto block, int64_t c0, int columns_left) ALWAYS_INLINE {
      constexpr int kBlock = decltype(block)::value;
      const int width = kBlock ? kBlock : columns_left;
      A best[kBlock ? kBlock : 16];
      int32_t first[kBlock ? kBlock : 16];
      for (int c = 0; c < width; ++c) best[c] = static_cast<A>(in.x[in.offsets[0] + c0 + c]), first[c] = 0;
      for (int64_t i = 1; i < in.n; ++i) {
        const T* row = in.x + in.offsets[i] + c0;
        for (int c = 0; c < width; ++c) {
          const A v = static_cast<A>(row[c]);
          const bool take = above(v, best[c]);
          best[c] = take ? v : best[c];
          first[c] = take ? static_cast<int32_t>(i) : first[c];
        }
      }
      for (int c = 0; c < width; ++c) value[c0 + c] = best[c], at[c0 + c] = in.points[first[c]];
    });
  }

  static void merge(const A* values, const int64_t* points, int64_t parts, int64_t columns, A* value, int64_t* at) {
    for (int64_t c = 0; c < columns; ++c) {
      int64_t best = 0;
      for (int64_t k = 1; k < parts; ++k)
        if (above(values[k * columns + c], values[best * columns + c])) best = k;
      value[c] = values[best * columns + c];
      at[c] = points[best * columns + c];
    }
  }
};

template <class T>
struct Reduced {
  const T* x;
  const T* weight;  // or null
  T* out;
  int64_t* argmax;  // or null
  int64_t columns;
  bool mean;
};

template <class Reduction, class T>
void reduce(const Segments& segments, const Rows& rows, const Reduced<T>& io) {
  using A = Accumulator<T>;
  const Plan plan(segments);
  const int64_t columns = io.columns, count = segments.count;
  std::unique_ptr<A[]> values(new A[std::max<int64_t>(plan.parts * columns, 1)]);
  std::unique_ptr<int64_t[]> at(new int64_t[Reduction::kIndexed ? std::max<int64_t>(plan.parts * columns, 1) : 1]);
  const auto finish = [&](int64_t e, int64_t s, const A* value) ALWAYS_INLINE {
    const int64_t* bounds = segments.at(e);
    const A divisor = static_cast<A>(bounds[s + 1] - bounds[s]);
    T* to = io.out + (e * count + s) * columns;
    if (io.mean)
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<T>(value[c] / divisor);
    else
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<T>(value[c]);
  };
  const auto argmax = [&](int64_t e, int64_t s) ALWAYS_INLINE {
    return Reduction::kIndexed ? io.argmax + (e * count + s) * columns : nullptr;
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / kTask * 8 / std::max<int64_t>(columns, 1));
  torch::stable::parallel_for(0, static_cast<int64_t>(plan.tasks.size()), grain, [&](int64_t begin, int64_t end) {
    int64_t offsets[kTask + kAhead], points[kTask];
    A weights[kTask];
    std::vector<A> value(columns);
    for (int64_t t = begin; t < end; ++t) {
      const Task& task = plan.tasks[t];
      const int64_t e = task.example, n = task.stop - task.begin;
      const int64_t *order = segments.order(e), *bounds = segments.at(e);
      const T* x = io.x + e * rows.rows * columns;
      for (int64_t i = 0; i < n; ++i) points[i] = order ? order[task.begin + i] : task.begin + i;
      for (int64_t i = 0; i < n; ++i) offsets[i] = rows(points[i]) * columns;
      for (int64_t i = n; i < n + kAhead; ++i) offsets[i] = n ? offsets[n - 1] : 0;
      if (io.weight)
        for (int64_t i = 0; i < n; ++i) weights[i] = static_cast<A>(io.weight[e * segments.points + points[i]]);
      const auto input = [&](int64_t first, int64_t length) ALWAYS_INLINE {
        if (order)
          for (int64_t i = first; i < first + length; ++i)
            prefetch(x + offsets[i + kAhead], columns * static_cast<int64_t>(sizeof(T)));
        return Input<T>{x, offsets + first, weights + first, points + first, length};
      };
      if (task.part >= 0) {
        const Input<T> in = input(0, n);
        const int64_t to = task.part * columns;
        multiversion([&]() ALWAYS_INLINE {
          Reduction::rows(in, columns, values.get() + to, at.get() + (Reduction::kIndexed ? to : 0));
        });
        continue;
      }
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t s = task.segment, next; s < task.end; s = next) {
          for (next = s; next < task.end && bounds[next + 1] == bounds[s];) ++next;
          if (next > s) {
            std::memset(static_cast<void*>(io.out + (e * count + s) * columns), 0, (next - s) * columns * sizeof(T));
            if (Reduction::kIndexed) std::fill_n(argmax(e, s), (next - s) * columns, -1);
            continue;
          }
          next = s + 1;
          const Input<T> in = input(bounds[s] - task.begin, bounds[next] - bounds[s]);
          Reduction::rows(in, columns, value.data(), argmax(e, s));
          finish(e, s, value.data());
        }
      });
    }
  });
  torch::stable::parallel_for(0, static_cast<int64_t>(plan.longs.size()), grain, [&](int64_t begin, int64_t end) {
    std::vector<A> value(columns);
    for (int64_t k = begin; k < end; ++k) {
      const Long& l = plan.longs[k];
      const int64_t from = l.part * columns;
      Reduction::merge(values.get() + from, at.get() + (Reduction::kIndexed ? from : 0), l.parts, columns, value.data(),
                       argmax(l.example, l.segment));
      finish(l.example, l.segment, value.data());
    }
  });
}

// ---------------------------------------------------------------- adjoints

// Row q of the gradient of x, and the gradients of the weights of its points.
template <class T>
struct Spread {
  using A = Accumulator<T>;
  const T* sums;
  const T* x;       // or null: no gradient of the weights
  const T* weight;  // or null: ones
  T* of_x;          // or null
  T* of_weight;
  int64_t columns;

  // For the n points of one row: the offsets of their segments' sums, their factors, and dots to fill.
  template <bool kRows, bool kDots>
  ALWAYS_INLINE inline void row(const T* base, const int64_t* offsets, const A* factors, int64_t n, const T* x_row,
                                T* to, A* dots) const {
    if constexpr (kDots) std::fill_n(dots, n, A(0));
    for_columns<A>(columns, [&](auto block, int64_t c0, int columns_left) ALWAYS_INLINE {
      constexpr int kBlock = decltype(block)::value;
      const int width = kBlock ? kBlock : columns_left;
      A total[kBlock ? kBlock : 16];
      for (int c = 0; c < width; ++c) total[c] = 0;
      for (int64_t i = 0; i < n; ++i) {
        const T* from = base + offsets[i] + c0;
        if constexpr (kRows)
          for (int c = 0; c < width; ++c) total[c] += factors[i] * static_cast<A>(from[c]);
        if constexpr (kDots) {
          const T* x_at = x_row + c0;
          if constexpr (kBlock > 0) {
            A lanes[8] = {};
            for (int c = 0; c < kBlock; c += 8)
              for (int k = 0; k < 8; ++k) lanes[k] += static_cast<A>(from[c + k]) * static_cast<A>(x_at[c + k]);
            dots[i] +=
                ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
          } else {
            for (int c = 0; c < width; ++c) dots[i] += static_cast<A>(from[c]) * static_cast<A>(x_at[c]);
          }
        }
      }
      if constexpr (kRows)
        for (int c = 0; c < width; ++c) to[c0 + c] = static_cast<T>(total[c]);
    });
  }
};

template <class T>
void spread_rows(const Segments& segments, const Rows& rows, const int64_t* rank, const Spread<T>& io, bool mean) {
  using A = Accumulator<T>;
  const int64_t columns = io.columns, bytes = columns * static_cast<int64_t>(sizeof(T));
  const bool copies = rows.bins == 1 && !io.weight && !io.x && !mean;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(columns * rows.bins, 1));
  torch::stable::parallel_for(0, segments.examples * rows.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> offsets(rows.bins + kAhead), points(rows.bins);
    std::vector<A> factors(rows.bins), scales(rows.bins), dots(rows.bins);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = i / rows.rows, q = i - e * rows.rows;
      const int64_t* ranks = rank + (segments.shared ? 0 : e * segments.points);
      const T* base = io.sums + e * segments.count * columns;
      T* to = io.of_x ? io.of_x + i * columns : nullptr;
      if (copies) {
        if (ranks[q] < 0) std::memset(static_cast<void*>(to), 0, bytes);
        else std::memcpy(static_cast<void*>(to), base + ranks[q] * columns, bytes);
        continue;
      }
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

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
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

void check_like(const char* name, const Tensor& t, const Tensor& like, const Shape& shape) {
  check(sizes(t) == shape && t.scalar_type() == like.scalar_type(), name,
        ": expected a tensor that fits the others in shape and dtype");
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
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    const Reduced<T> io{data<T>(x), data_or_null<T>(weight), mutable_data<T>(out), nullptr, shapes.columns, mean};
    if (weight) reduce<Sum<T, true>>(segments, rows, io);
    else reduce<Sum<T, false>>(segments, rows, io);
  });
  return out;
}

std::tuple<Tensor, Tensor> segment_max(const Tensor& x_in, const Tensor& indptr, const std::optional<Tensor>& perm) {
  const Tensor x = dense(x_in);
  const Shapes shapes(x, "x");
  const Rows rows(1, 1, shapes.rows);
  const Segments segments(indptr, perm, shapes.batch, shapes.rows);
  const Shape shape = append(shapes.batch, {segments.count, shapes.columns});
  Tensor out = fresh(x, shape), argmax = fresh(x, shape, ScalarType::Long);
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    reduce<Max<T>>(
        segments, rows,
        Reduced<T>{data<T>(x), nullptr, mutable_data<T>(out), mutable_data<int64_t>(argmax), shapes.columns, false});
  });
  return {out, argmax};
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
  const auto rank = segments.ranks();
  dispatch_floating(sums, "sums", [&](auto type) {
    using T = typename decltype(type)::type;
    const Spread<T> io{data<T>(sums),
                       data_or_null<T>(x),
                       data_or_null<T>(weight),
                       of_x ? mutable_data<T>(grad_x) : nullptr,
                       mutable_data<T>(grad_weight),
                       shapes.columns};
    spread_rows(segments, rows, rank.get(), io, mean);
  });
  return {grad_x, grad_weight};
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(segment_reduce)
CUSTOM_OPS_CPU_KERNEL(segment_max)
CUSTOM_OPS_CPU_KERNEL(segment_spread)
