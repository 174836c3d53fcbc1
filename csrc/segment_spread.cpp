// Adjoints of sums over segments: the gradients of the rows and of the weights.
#include "segments.h"

namespace custom_ops {

namespace {

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
  template <class R, bool kRows, bool kDots>
  ALWAYS_INLINE inline void row(const T* base, const int64_t* offsets, const A* factors, int64_t n, const T* x_row,
                                T* to, A* dots) const {
    if constexpr (kDots) std::fill_n(dots, n, A(0));
    // A dot product is summed in an order that depends on the number of lanes, so it is the same in all copies.
    for_columns<T>(std::conditional_t<kDots, Registers<32>, R>{}, columns, [&](auto block, int64_t c0) ALWAYS_INLINE {
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
      if constexpr (kRows) store<T, A>(total, to + c0);
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
      multiversion([&](auto registers) ALWAYS_INLINE {
        using R = decltype(registers);
        const auto run = [&](auto wants_rows, auto wants_dots) ALWAYS_INLINE {
          io.template row<R, decltype(wants_rows)::value, decltype(wants_dots)::value>(
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

}  // namespace

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
                io.template row<Registers<32>, false, true>(io.sums + e * of_sums.rows * columns, &offset, nullptr, 1,
                                                            io.x + (e * shapes.rows + ip[at]) * columns, nullptr, &dot);
              io.of_weight[i] = static_cast<T>(dot);
            }
          });
        });
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(segment_spread)
CUSTOM_OPS_CPU_KERNEL(pair_dots)
