// Maps over segments: a row for each point from the point's own row and a statistic of its segment, and recurrences.
#include "segments.h"

namespace custom_ops {

namespace {

// A map computes a row for each point from the point's own row and a statistic of its segment.
template <class T>
struct Mapped {
  const T* x;
  const T* y;  // null for maps of one tensor
  T* out;
  int64_t columns;
};

template <class V, class A>
ALWAYS_INLINE inline V load_as(const A* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// The row of a point is e^x divided by the sum over its segment; all are 0 where all x are -inf. The statistics are the
// largest x and the sum of e^(x - largest), of which the second is inverted at the end.
template <class T>
struct Softmax {
  using A = Accumulator<T>;
  static constexpr int64_t kStatistics = 2;

  template <class R>
  static ALWAYS_INLINE inline void gather(const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics) {
    const Input<T> in{io.x, offsets, nullptr, nullptr, n};
    exponential_sums<R>(in, io.columns, [&](auto, int64_t c, const auto& top, const auto& total) ALWAYS_INLINE {
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

  static void finish(int64_t, int64_t columns, A* statistics) {
    A* total = statistics + columns;
    for (int64_t c = 0; c < columns; ++c) total[c] = total[c] == 0 ? A(0) : 1 / total[c];
  }

  template <class R>
  static ALWAYS_INLINE inline void write(const Mapped<T>& io, int64_t offset, const A* statistics) {
    for_vectors<A>(R{}, io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      using V = typename L::V;
      const V top = load_as<V>(statistics + c), inverse = load_as<V>(statistics + io.columns + c);
      store<T, A>(V(inverse * exp_lanes<L>(V(L::load(io.x + offset + c) - top))), io.out + offset + c);
    });
  }
};

// The adjoint of Softmax: y (x - <x, y>) for the gradient x and the result y. The statistic is the dot product.
template <class T>
struct SoftmaxAdjoint {
  using A = Accumulator<T>;
  static constexpr int64_t kStatistics = 1;

  template <class R>
  static ALWAYS_INLINE inline void gather(const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics) {
    for_vectors<A>(R{}, io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      auto total = L::all(0);
      for (int64_t i = 0; i < n; ++i) total += L::load(io.x + offsets[i] + c) * L::load(io.y + offsets[i] + c);
      std::memcpy(statistics + c, &total, sizeof(total));
    });
  }

  static void merge(const A* parts, int64_t n, int64_t columns, A* statistics) {
    Sum<T, false>::merge(parts, nullptr, n, columns, statistics, nullptr);
  }

  static void finish(int64_t, int64_t, A*) {}

  template <class R>
  static ALWAYS_INLINE inline void write(const Mapped<T>& io, int64_t offset, const A* statistics) {
    for_vectors<A>(R{}, io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      using V = typename L::V;
      const V difference = L::load(io.x + offset + c) - load_as<V>(statistics + c);
      store<T, A>(V(L::load(io.y + offset + c) * difference), io.out + offset + c);
    });
  }
};

// The row of a point is its difference from the mean of its segment.
template <class T>
struct Center {
  using A = Accumulator<T>;
  static constexpr int64_t kStatistics = 1;

  template <class R>
  static ALWAYS_INLINE inline void gather(const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics) {
    Sum<T, false>::template rows<R>(Input<T>{io.x, offsets, nullptr, nullptr, n}, io.columns, statistics, nullptr);
  }

  static void merge(const A* parts, int64_t n, int64_t columns, A* statistics) {
    Sum<T, false>::merge(parts, nullptr, n, columns, statistics, nullptr);
  }

  static void finish(int64_t points, int64_t columns, A* statistics) {
    for (int64_t c = 0; c < columns; ++c) statistics[c] /= static_cast<A>(points);
  }

  template <class R>
  static ALWAYS_INLINE inline void write(const Mapped<T>& io, int64_t offset, const A* statistics) {
    for_vectors<A>(R{}, io.columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      using V = typename L::V;
      store<T, A>(V(L::load(io.x + offset + c) - load_as<V>(statistics + c)), io.out + offset + c);
    });
  }
};

// The functions of a map. They are called by pointer, so that what is around them is compiled once for all.
template <class T>
struct Functions {
  using A = Accumulator<T>;
  int64_t statistics;  // numbers per column
  void (*gather)(const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics);
  void (*merge)(const A* parts, int64_t n, int64_t columns, A* statistics);
  void (*finish)(int64_t points, int64_t columns, A* statistics);
  void (*write)(const Mapped<T>& io, const int64_t* offsets, int64_t n, const A* statistics);
};

template <class Map, class T>
Functions<T> functions_of() {
  using A = Accumulator<T>;
  const auto gather = [](const Mapped<T>& io, const int64_t* offsets, int64_t n, A* statistics) {
    multiversion([=](auto registers) ALWAYS_INLINE {
      using R = decltype(registers);
      Map::template gather<R>(io, offsets, n, statistics);
    });
  };
  const auto write = [](const Mapped<T>& io, const int64_t* offsets, int64_t n, const A* statistics) {
    multiversion([=](auto registers) ALWAYS_INLINE {
      using R = decltype(registers);
      for (int64_t i = 0; i < n; ++i) Map::template write<R>(io, offsets[i], statistics);
    });
  };
  return {Map::kStatistics, gather, Map::merge, Map::finish, write};
}

// Maps whole segments at once. The parts of a long one come first, then its statistics, and its points at last. Points
// in no segment get 0.
template <class T>
void map_segments(const Functions<T>& map, const Segments& segments, const Mapped<T>& io) {
  using A = Accumulator<T>;
  segments.check_permutation();
  Plan plan(segments);
  plan.add_outside(segments);
  const int64_t columns = io.columns, width = map.statistics * columns;
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
    if (task.segment < 0)
      for (int64_t i = 0; i < task.stop - task.begin; ++i) std::fill_n(at.out + offsets[i], columns, T(0));
    else
      for (int64_t s = task.segment; s < task.end; ++s) {
        const bool part = task.part >= 0;
        const int64_t first = part ? 0 : bounds[s] - task.begin;
        const int64_t last = part ? task.stop - task.begin : bounds[s + 1] - task.begin;
        if (first == last) continue;
        map.gather(at, offsets + first, last - first, part ? parts.get() + task.part * width : statistics.data());
        if (part) continue;
        map.finish(last - first, columns, statistics.data());
        map.write(at, offsets + first, last - first, statistics.data());
      }
  });
  // The statistics of a long segment take the place of its first part's.
  std::vector<int64_t> first_part(plan.parts);
  for (const Long& l : plan.longs) std::fill_n(first_part.begin() + l.part, l.parts, l.part);
  for_each_task(plan.longs, grain, [&](const Long& l) {
    std::vector<A> statistics(width);
    map.merge(parts.get() + l.part * width, l.parts, columns, statistics.data());
    const int64_t* bounds = segments.at(l.example) + l.segment;
    map.finish(bounds[1] - bounds[0], columns, statistics.data());
    std::copy(statistics.begin(), statistics.end(), parts.get() + l.part * width);
  });
  for_each_task(pieces, grain, [&](const Task& task) {
    int64_t offsets[kTask + kAhead];
    offsets_of(task, offsets);
    const Mapped<T> at = example(task.example);
    const A* statistics = parts.get() + first_part[task.part] * width;
    map.write(at, offsets, task.stop - task.begin, statistics);
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
  template <class R, bool kWrites>
  ALWAYS_INLINE inline void steps(const int64_t* offsets, int64_t n, A* state, A* products) const {
    for_vectors<A>(R{}, columns, [&](auto l, int64_t c) ALWAYS_INLINE {
      using L = decltype(l);
      using V = typename L::V;
      V row = load_as<V>(state + c), product = L::all(1);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = offsets[backwards ? n - 1 - i : i] + c;
        if constexpr (kWrites) store<T, A>(row, out + at);
        const V factor = L::load(factors + at);
        row = row * factor;
        if (terms) row += L::load(terms + at);
        if constexpr (!kWrites) product = product * factor;
      }
      std::memcpy(state + c, &row, sizeof(row));
      if constexpr (!kWrites) std::memcpy(products + c, &product, sizeof(product));
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
    multiversion([&](auto registers) ALWAYS_INLINE {
      using R = decltype(registers);
      if (task.segment < 0)
        for (int64_t i = 0; i < n; ++i) std::fill_n(io.out + offsets[i], columns, T(0));
      else if (task.part >= 0) {
        A* row = parts.get() + task.part * 2 * columns;
        std::fill_n(row, columns, A(0));
        io.template steps<R, false>(offsets, n, row, row + columns);
      } else
        for (int64_t s = task.segment; s < task.end; ++s) {
          std::fill_n(state.data(), columns, first);
          io.template steps<R, true>(offsets + bounds[s] - task.begin, bounds[s + 1] - bounds[s], state.data(),
                                     nullptr);
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
    multiversion([&](auto registers) ALWAYS_INLINE {
      using R = decltype(registers);
      io.template steps<R, true>(offsets, task.stop - task.begin, parts.get() + task.part * 2 * columns, nullptr);
    });
  });
}

}  // namespace

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
    map_segments(functions_of<Map<T>, T>(), segments,
                 Mapped<T>{data<T>(x), data_or_null<T>(y), mutable_data<T>(out), shapes.columns});
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

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(segment_scan)
CUSTOM_OPS_CPU_KERNEL(segment_softmax)
CUSTOM_OPS_CPU_KERNEL(segment_softmax_adjoint)
CUSTOM_OPS_CPU_KERNEL(segment_center)
