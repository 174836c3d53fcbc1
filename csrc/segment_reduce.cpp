// Reductions over segments: sums, means, products, extremes and logarithms of sums of exponentials.
#include "segments.h"

namespace custom_ops {

std::tuple<Tensor, Tensor> voxel_sort(const Tensor& rank, int64_t voxels);  // defined in voxel_grid.cpp

namespace {

// value[c] is the product of the rows; an empty one is 1, and one of integers wraps around.
template <class T>
struct Product {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = false;
  static constexpr A kEmpty = 1;

  template <class R>
  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value, int64_t*) {
    for_columns<T>(R{}, columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
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

// value[c] is the largest or the smallest of the rows; at[c] is the first point that has it, or -1.
template <class T, bool kSmallest>
struct Extreme {
  using A = Accumulator<T>;
  static constexpr bool kIndexed = true;
  static constexpr A kEmpty = 0;

  template <class R>
  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value,
                                        int64_t* __restrict at) {
    for_columns<T>(R{}, columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
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
      typename L::Bits rows[B::vectors * B::lanes];
      std::memcpy(rows, first, sizeof(rows));
#pragma GCC unroll 1
      for (int c = 0; c < B::vectors * B::lanes; ++c) at[c0 + c] = in.points[rows[c]];
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

  template <class R>
  static ALWAYS_INLINE inline void rows(const Input<T>& in, int64_t columns, A* __restrict value, int64_t*) {
    exponential_sums<R>(in, columns, [&](auto l, int64_t c, const auto& top, const auto& total) ALWAYS_INLINE {
      using L = decltype(l);
#pragma GCC unroll 1
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

  // Writes the result of segment s of example e; `row` is room for it. It isn't inlined, as there are many reductions.
  __attribute__((noinline)) void write(const Segments& segments, int64_t e, int64_t s, const Accumulator<T>* value,
                                       T* row) const {
    const int64_t* bounds = segments.at(e);
    const Accumulator<T> points = static_cast<Accumulator<T>>(bounds[s + 1] - bounds[s]);
    multiversion([=]() ALWAYS_INLINE {
      if (mean)
        for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(value[c] / points);
      else
        for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(value[c]);
    });
    writer.copy(out + (e * segments.count + s) * columns, row);
  }
};

template <class Reduction, class T>
void reduce(const Segments& segments, const Rows& rows, const Reduced<T>& io) {
  using A = Accumulator<T>;
  const Plan plan(segments);
  const int64_t columns = io.columns, count = segments.count;
  std::unique_ptr<A[]> values(new A[std::max<int64_t>(plan.parts * columns, 1)]);
  std::unique_ptr<int64_t[]> at(new int64_t[Reduction::kIndexed ? std::max<int64_t>(plan.parts * columns, 1) : 1]);
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
    if (!in_order) rows.find(e, points, n, columns, offsets);
    if (io.weight)
      for (int64_t i = 0; i < n; ++i) weights[i] = static_cast<A>(io.weight[e * segments.points + points[i]]);
    const auto input = [&](int64_t first, int64_t length) ALWAYS_INLINE {
      return Input<T>{in_order ? x + (task.begin + first) * columns : x, in_order ? nullptr : offsets + first,
                      weights + first, points + first, length};
    };
    const bool part = task.part >= 0;
    multiversion([&](auto registers) ALWAYS_INLINE {
      using R = decltype(registers);
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
        Reduction::template rows<R>(input(begin - task.begin, end - begin), columns, to, to_at);
        if (to == value.data()) io.write(segments, e, s, to, row.data());
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
    io.write(segments, l.example, l.segment, value.data(), row.data());
    io.writer.flush();
  });
}

// Sums and extremes are also those of integers.
template <class F>
void dispatch_numbers(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Long) f(Type<int64_t>{});
  else dispatch_floating(t, "x", f);
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

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(segment_reduce)
CUSTOM_OPS_CPU_KERNEL(segment_extreme)
CUSTOM_OPS_CPU_KERNEL(segment_prod)
CUSTOM_OPS_CPU_KERNEL(segment_logsumexp)
CUSTOM_OPS_CPU_KERNEL(pair_reduce)
