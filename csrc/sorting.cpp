// Soft ranks and soft sorting: projections onto the permutahedron, which are isotonic regressions of the sorted values.
// They are computed by pooling adjacent violators in double.
//
// The result is constant or linear within groups of adjacent items in the order. `groups` has, for each place in the
// order of a list, the item of the row that it holds: i, or ~i where a group begins, or n, the row's length, for none.
#include "lists.h"

#include <cmath>

namespace custom_ops {

CUSTOM_OPS_ENUM(GroupValue, SUM, MEAN, CENTRED)

namespace {

// Returns a - b, or 0 if both are the same infinity.
double difference(double a, double b) { return a == b ? 0 : a - b; }

// The two sequences to be matched, of m items: the values in descending order times `alpha`, and the places in
// descending order times `beta`. Only differences between items are used, so large other items don't affect the
// accuracy.
struct Sequences {
  const double* value;
  double alpha, beta;

  double values(int64_t from, int64_t to) const { return difference(value[from], value[to]) * alpha; }
  double places(int64_t from, int64_t to) const { return static_cast<double>(to - from) * beta; }
};

// A pool of adjacent items and the constant that fits it by least squares or, in the other two types, by least
// divergence. For ranks the pools fit values minus places, for `sort` places minus values; sums and constant are
// relative to the pool's first item.
struct MeanPool {
  double a, b;  // the sum of its items and their number
  int64_t begin;
  double fit = 0;

  static MeanPool of(int64_t place, double) { return {0, 1, place}; }
  static double above(const Sequences& s, bool sort, int64_t from, int64_t to) {
    const double up = s.values(from, to) - s.places(from, to);
    return sort ? -up : up;
  }
  void merge(const MeanPool& next, const Sequences& s, bool sort) {
    a += next.a - next.b * above(s, sort, begin, next.begin);
    b += next.b;
    fit = a / b;
  }
};

double logaddexp(double x, double y) {
  return x == y ? x + std::log(2.0) : std::max(x, y) + std::log1p(std::exp(-std::abs(x - y)));
}

struct LogPool {
  double a, b;  // the logarithms of the sums of exponentials of the fitted sequence and of its target
  int64_t begin;
  double fit = a - b;

  // For ranks the target's weights, the logarithms of the places, are absolute and not relative to the first item.
  static LogPool of(int64_t place, double weight) { return {0, weight, place}; }
  static double above(const Sequences& s, bool sort, int64_t from, int64_t to) {
    return sort ? s.places(from, to) - s.values(from, to) : s.values(from, to);
  }
  void merge(const LogPool& next, const Sequences& s, bool sort) {
    a = logaddexp(a, next.a - (sort ? s.places(begin, next.begin) : s.values(begin, next.begin)));
    b = logaddexp(b, next.b - (sort ? s.values(begin, next.begin) : 0));
    fit = a - b;
  }
};

// The pool of exponentials of values that differ by at most `kExponents`.
struct ExponentialPool {
  double a, b;  // the sums of both exponentials
  int64_t begin;
  double fit = a / b;

  void merge(const ExponentialPool& next) {
    a += next.a;
    b += next.b;
    fit = a / b;
  }
};

constexpr double kExponents = 600;

// Computes the pools of the non-increasing sequence nearest to m items and returns their number; one(place) is a pool
// of one item. not_above(pool, next) tells whether the constant of a pool isn't above that of the next one.
template <class Pool, class One, class NotAbove, class Merge>
int64_t pool_adjacent_violators(int64_t m, Pool* pools, const One& one, const NotAbove& not_above, const Merge& merge) {
  int64_t count = 0;
  for (int64_t p = 0; p < m; ++p) {
    Pool pool = one(p);
    while (count && not_above(pools[count - 1], pool)) {
      Pool before = pools[--count];
      merge(before, pool);
      pool = before;
    }
    pools[count++] = pool;
  }
  return count;
}

int32_t item_of(int32_t entry) { return entry < 0 ? ~entry : entry; }

template <class A>
void store(double value, A& to) {
  to = static_cast<A>(value);
}

// A run of places of a row, [first, last), which hold the items of one group.
struct Group {
  int64_t row;             // the offset of the row
  const int32_t* entries;  // the row's entries of `groups`
  int64_t list, count;     // the offset of the group's list in the row, and the number of its places that hold an item
  int64_t first, last;

  int32_t item(int64_t place) const { return item_of(entries[place]); }
};

// Returns a tensor like x, filled by f(x, group, out) for each group, and 0 where there is no item; both pointers point
// to the row.
template <class F>
Tensor of_groups(const Tensor& x_in, const Tensor& groups_in, const std::optional<Tensor>& offsets, int64_t cost,
                 const F& f) {
  const Tensor x = dense(x_in), groups = dense(groups_in);
  check(groups.scalar_type() == ScalarType::Int && sizes(groups) == sizes(x),
        "groups: expected int32 of the shape of x");
  const Lists lists(x, std::nullopt, offsets);
  const int64_t n = lists.items, total = lists.examples * n;
  const int32_t* all = data<int32_t>(groups);
  for (int64_t i = 0; i < total; ++i)
    check(item_of(all[i]) < n + (all[i] >= 0), "groups: expected items from 0 to ", n - 1, ", got ", item_of(all[i]));
  Tensor out = fresh(x, sizes(x));
  dispatch_accumulator(x, "x", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* xp = data<A>(x);
    A* op = mutable_data<A>(out);
    lists.clear_outside(op);
    lists.parallel(cost, [&](int64_t index, int64_t begin, int64_t end, Scratch&) {
      const int64_t row = lists.row_of(index);
      const int32_t* entries = all + row;
      std::fill(op + begin, op + end, A(0));
      int64_t count = 0;
      while (begin + count < end && all[begin + count] != n) ++count;
      const int64_t start = begin - row, stop = start + count;
      each_part(count, [&](int64_t part, int64_t from, int64_t to) {  // the groups that begin in the part
        Group group{row, entries, start, count, start + from, 0};
        while (part && group.first < start + to && entries[group.first] >= 0) ++group.first;
        for (; group.first < start + to; group.first = group.last) {
          group.last = group.first + 1;
          while (group.last < stop && entries[group.last] >= 0) ++group.last;
          f(xp + row, group, op + row);
        }
      });
    });
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> isotonic(const Tensor& x_in, const std::optional<Tensor>& valid_in,
                                    const std::optional<Tensor>& offsets, double strength, bool kl, bool sort) {
  const Tensor x = dense(x_in);
  const Lists lists(x, valid_in, offsets);
  check(lists.items <= INT32_MAX, "x: expected less than 2^31 items");
  const int32_t none = static_cast<int32_t>(lists.items);
  Tensor out = fresh(x, sizes(x));
  Tensor groups = fresh(x, sizes(x), ScalarType::Int);
  int32_t* gp = mutable_data<int32_t>(groups);
  const bool* valid = lists.valid_data();
  lists.clear_outside(gp, none);
  dispatch_accumulator(x, "x", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* xp = data<A>(x);
    A* op = mutable_data<A>(out);
    lists.clear_outside(op);
    lists.parallel(64, [&](int64_t index, int64_t begin, int64_t end, Scratch& scratch) {
      const int64_t n = end - begin, start = lists.row_of(index);
      int32_t* items = scratch.get<int32_t>(n);
      A* keys = scratch.get<A>(n);
      int64_t m = 0;
      for (int64_t i = begin; i < end; ++i) {
        if (valid && !valid[i]) continue;
        items[m] = static_cast<int32_t>(i - start);
        keys[m++] = sort ? -xp[i] : xp[i];
      }
      A* row = op + start;
      A* to = op + begin;
      int32_t* group = gp + begin;
      if (m < n) std::fill(to, to + n, A(0));
      std::fill(group + m, group + n, none);
      if (!m) return;

      const int32_t* order = order_descending(keys, m, scratch);
      double* s = scratch.get<double>(m);
      each_part(m, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t p = from; p < to; ++p) {
          s[p] = static_cast<double>(keys[order[p]]);
          group[p] = items[order[p]];
        }
      });
      const Sequences sequences{s, sort ? 1 : 1 / strength, sort ? 1 / strength : 1};
      // value(p, pool) is the result at place p of a pool.
      const auto put = [&](const auto* pools, int64_t count, const auto& value) {
        each_part(count, [&](int64_t, int64_t from, int64_t stop) {
          for (int64_t k = from; k < stop; ++k) {
            const int64_t last = k + 1 < count ? pools[k + 1].begin : m;
            for (int64_t p = pools[k].begin; p < last; ++p)
              (sort ? to[p] : row[group[p]]) = static_cast<A>(value(p, pools[k]));
            group[pools[k].begin] = ~group[pools[k].begin];
          }
        });
      };
      const auto fit = [&](auto* pools, const auto& weight, const auto& value) {
        using Pool = std::remove_pointer_t<decltype(pools)>;
        const int64_t count = pool_adjacent_violators(
            m, pools, [&](int64_t p) { return Pool::of(p, weight(p)); },
            [&](const Pool& pool, const Pool& next) {
              return Pool::above(sequences, sort, pool.begin, next.begin) <= next.fit - pool.fit;
            },
            [&](Pool& pool, const Pool& next) { pool.merge(next, sequences, sort); });
        put(pools, count, value);
      };
      const auto of_sort = [&](int64_t p, const auto& pool) {
        return -s[pool.begin] + (pool.fit + sequences.places(pool.begin, p));
      };
      if (!kl) {
        const auto of_rank = [&](int64_t p, const MeanPool& pool) {
          return static_cast<double>(m - pool.begin) - (sequences.values(pool.begin, p) + pool.fit);
        };
        const auto none = [](int64_t) { return 0.0; };
        MeanPool* pools = scratch.get<MeanPool>(m);
        return sort ? fit(pools, none, of_sort) : fit(pools, none, of_rank);
      }
      if (sequences.values(0, m - 1) <= kExponents && (!sort || sequences.places(0, m - 1) <= kExponents)) {
        double* a = scratch.get<double>(m);
        double* b = scratch.get<double>(m);
        multiversion([&]() ALWAYS_INLINE {
          for (int64_t p = 0; p < m; ++p) {
            const double e = exp_nonpositive((s[p] - s[0]) * sequences.alpha);
            a[p] = sort ? exp_nonpositive(static_cast<double>(-p) * sequences.beta) : e;
            b[p] = sort ? e : static_cast<double>(m - p);
          }
        });
        ExponentialPool* pools = scratch.get<ExponentialPool>(m);
        const int64_t count = pool_adjacent_violators(
            m, pools, [&](int64_t p) { return ExponentialPool{a[p], b[p], p}; },
            // Constants that are equal up to rounding are merged.
            [](const ExponentialPool& pool, const ExponentialPool& next) {
              return pool.fit <= next.fit * (1 + 0x1p-48);
            },
            [](ExponentialPool& pool, const ExponentialPool& next) { pool.merge(next); });
        return put(pools, count, [&](int64_t p, const ExponentialPool& pool) {
          if (!sort) return a[p] / pool.fit;
          const int64_t first = pool.begin;  // relative to `first` the rest is small if the pool has one item
          return -s[first] + (std::log(pool.fit / (a[first] / b[first])) + sequences.places(first, p));
        });
      }
      const auto weight = [&](int64_t p) { return sort ? 0 : std::log(static_cast<double>(m - p)); };
      const auto of_rank = [&](int64_t p, const LogPool& pool) {
        return std::exp(-sequences.values(pool.begin, p) - pool.fit);
      };
      LogPool* pools = scratch.get<LogPool>(m);
      return sort ? fit(pools, weight, of_sort) : fit(pools, weight, of_rank);
    });
  });
  return {out, groups};
}

Tensor group_reduce(const Tensor& x, const Tensor& groups, const std::optional<Tensor>& offsets, GroupValue value,
                    bool from_order, bool to_order, double scale) {
  return of_groups(x, groups, offsets, 4, [&](const auto* from, const Group& group, auto* to) {
    double sum = 0;
    for (int64_t p = group.first; p < group.last; ++p) sum += from[from_order ? p : group.item(p)];
    const double shared = value == GroupValue::SUM ? sum : sum / static_cast<double>(group.last - group.first);
    for (int64_t p = group.first; p < group.last; ++p) {
      const double x = static_cast<double>(from[from_order ? p : group.item(p)]);
      const double own = value == GroupValue::CENTRED ? x - shared : shared;
      store(scale * own, to[to_order ? p : group.item(p)]);
    }
  });
}

Tensor group_share(const Tensor& v, const Tensor& ranks_in, const Tensor& groups, const std::optional<Tensor>& offsets,
                   double scale) {
  const Tensor ranks = dense(ranks_in);
  check(sizes(ranks) == sizes(v) && ranks.scalar_type() == v.scalar_type(), "ranks: expected the shape and dtype of v");
  const void* all_ranks = ranks.const_data_ptr();
  return of_groups(v, groups, offsets, 4, [&](const auto* from, const Group& group, auto* to) {
    const auto* rank = static_cast<decltype(from)>(all_ranks) + group.row;
    const double base = static_cast<double>(from[group.item(group.first)]);  // makes the result of an item alone 0
    double whole = 0, moved = 0;
    for (int64_t p = group.first; p < group.last; ++p) {
      const double r = static_cast<double>(rank[group.item(p)]);
      whole += r;
      moved += r * (static_cast<double>(from[group.item(p)]) - base);
    }
    for (int64_t p = group.first; p < group.last; ++p) {
      const int32_t item = group.item(p);
      const double r = static_cast<double>(rank[item]);
      store(scale * (r * (static_cast<double>(from[item]) - base - moved / whole)), to[item]);
    }
  });
}

Tensor group_softmax(const Tensor& x, const Tensor& groups, const std::optional<Tensor>& offsets, double scale,
                     bool weighted) {
  return of_groups(x, groups, offsets, 32, [&](const auto* from, const Group& group, auto* to) {
    const int64_t first = group.first - group.list, last = group.last - group.list;
    const auto value = [&](int64_t p) { return static_cast<double>(from[group.item(p)]); };
    double top = value(group.first), sum = 0;
    for (int64_t p = group.first; p < group.last; ++p)
      if (scale > 0 ? value(p) > top : value(p) < top) top = value(p);
    const auto exponential = [&](int64_t p) { return std::exp(scale * difference(value(p), top)); };
    for (int64_t p = group.first; p < group.last; ++p) sum += exponential(p);
    // `whole` is the sum of the ranks of the group's places.
    const double whole = weighted ? static_cast<double>((last - first) * (2 * group.count - first - last + 1)) / 2 : 1;
    for (int64_t p = group.first; p < group.last; ++p) store(whole * (exponential(p) / sum), to[group.item(p)]);
  });
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(isotonic)
CUSTOM_OPS_CPU_KERNEL(group_reduce)
CUSTOM_OPS_CPU_KERNEL(group_share)
CUSTOM_OPS_CPU_KERNEL(group_softmax)
