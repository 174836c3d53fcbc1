// Soft ranks and soft sorting: projections onto the permutahedron, which are isotonic regressions of the
// sorted values, by pooling adjacent violators in double.
//
// The result is constant or linear within groups of adjacent items of the order. `groups` says for each place in
// the order of a list which item of the row it holds: i, or ~i where a group begins; n, the row's length, where none.
#include "lists.h"

#include <cmath>

namespace custom_ops {
namespace {

// A pool of adjacent items, and the constant it is fitted by: of least squares, or of least divergence.
struct MeanPool {
  double a, b;  // the sum of its values, and their number; or sums of exponentials
  int64_t begin;
  double fit = a / b;

  void merge(const MeanPool& next) {
    a += next.a;
    b += next.b;
    fit = a / b;
  }
};

double logaddexp(double x, double y) {
  return x == y ? x + std::log(2.0) : std::max(x, y) + std::log1p(std::exp(-std::abs(x - y)));
}

struct LogPool {
  double a, b;  // the logarithms of the sums of exponentials, of what is fitted and of what to
  int64_t begin;
  double fit = a - b;

  void merge(const LogPool& next) {
    a = logaddexp(a, next.a);
    b = logaddexp(b, next.b);
    fit = a - b;
  }
};

constexpr double kExponents = 600;  // values that differ by no more may be exponentiated

// The non-increasing sequence nearest to the values (a, b) of m items: its pools. Returns their number.
template <class Pool>
int64_t pool_adjacent_violators(const double* a, const double* b, int64_t m, Pool* pools) {
  int64_t count = 0;
  for (int64_t p = 0; p < m; ++p) {
    Pool pool{a[p], b[p], p};
    while (count && pools[count - 1].fit <= pool.fit) {
      Pool before = pools[--count];
      before.merge(pool);
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

// A run of places of a row, from `first` to before `last`, which hold the items of one group.
struct Group {
  int64_t row;             // where the row begins
  const int32_t* entries;  // of its places
  int64_t list, count;     // where the group's list begins in it, and how many of its places hold an item
  int64_t first, last;

  int32_t item(int64_t place) const { return item_of(entries[place]); }
};

// Fills a tensor like x, 0 where there is no item, by f(x, group, out) for each group; both point to the row.
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
      Group group{row, entries, begin - row, 0, begin - row, 0};
      while (begin + group.count < end && all[begin + group.count] != n) ++group.count;
      for (const int64_t stop = group.list + group.count; group.first < stop; group.first = group.last) {
        group.last = group.first + 1;
        while (group.last < stop && entries[group.last] >= 0) ++group.last;
        f(xp + row, group, op + row);
      }
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

      // s: the values, descending, to be matched with w = m..1; the one of the two that is regularised is scaled.
      const int32_t* order = order_descending(keys, m, scratch);
      double* s = scratch.get<double>(m);
      double* w = scratch.get<double>(m);
      const double top = sort ? 0.0 : static_cast<double>(keys[order[0]]);
      for (int64_t p = 0; p < m; ++p) {
        s[p] = (static_cast<double>(keys[order[p]]) - top) / (sort ? 1.0 : strength);
        w[p] = static_cast<double>(m - p) / (sort ? strength : 1.0);
        group[p] = items[order[p]];
      }
      double* a = scratch.get<double>(m);
      double* b = scratch.get<double>(m);
      // value(place, fit of its pool)
      const auto put = [&](auto* pools, const auto& value) {
        const int64_t count = pool_adjacent_violators(a, b, m, pools);
        for (int64_t k = 0; k < count; ++k) {
          const int64_t last = k + 1 < count ? pools[k + 1].begin : m;
          const double fit = pools[k].fit;
          for (int64_t p = pools[k].begin; p < last; ++p)
            (sort ? to[p] : row[group[p]]) = static_cast<A>(value(p, fit));
          group[pools[k].begin] = ~group[pools[k].begin];
        }
      };
      if (!kl) {
        for (int64_t p = 0; p < m; ++p) a[p] = sort ? w[p] - s[p] : s[p] - w[p];
        std::fill(b, b + m, 1.0);
        const auto value = [&](int64_t p, double fit) { return sort ? fit - w[p] : s[p] - fit; };
        return put(scratch.get<MeanPool>(m), value);
      }
      const auto narrow = [&](const double* x) { return x[0] - x[m - 1] <= kExponents; };
      if (narrow(s) && (!sort || narrow(w))) {
        const double shift = sort ? w[0] - s[0] : 0;
        multiversion([&]() ALWAYS_INLINE {
          for (int64_t p = 0; p < m; ++p) {
            a[p] = exp_nonpositive(sort ? w[p] - w[0] : s[p]);
            b[p] = sort ? exp_nonpositive(s[p] - s[0]) : w[p];
          }
        });
        const auto value = [&](int64_t p, double fit) { return sort ? std::log(fit) + shift - w[p] : a[p] / fit; };
        return put(scratch.get<MeanPool>(m), value);
      }
      for (int64_t p = 0; p < m; ++p) {
        a[p] = sort ? w[p] : s[p];
        b[p] = sort ? s[p] : std::log(w[p]);
      }
      const auto value = [&](int64_t p, double fit) { return sort ? fit - w[p] : std::exp(s[p] - fit); };
      put(scratch.get<LogPool>(m), value);
    });
  });
  return {out, groups};
}

Tensor group_reduce(const Tensor& x, const Tensor& groups, const std::optional<Tensor>& offsets, int64_t mode,
                    bool from_order, bool to_order, double scale) {
  check(mode >= 0 && mode <= 2, "mode: expected 0 to 2, got ", mode);
  return of_groups(x, groups, offsets, 4, [&](const auto* from, const Group& group, auto* to) {
    double sum = 0;
    for (int64_t p = group.first; p < group.last; ++p) sum += from[from_order ? p : group.item(p)];
    const double shared = mode == 0 ? sum : sum / static_cast<double>(group.last - group.first);
    for (int64_t p = group.first; p < group.last; ++p) {
      const double own = mode == 2 ? static_cast<double>(from[from_order ? p : group.item(p)]) - shared : shared;
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
    const double base = static_cast<double>(from[group.item(group.first)]);  // so that an item alone gets 0
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
    double top = -INFINITY, sum = 0;
    for (int64_t p = group.first; p < group.last; ++p) top = std::max(top, scale * from[group.item(p)]);
    for (int64_t p = group.first; p < group.last; ++p) sum += std::exp(scale * from[group.item(p)] - top);
    // The ranks of the group's places add up to this.
    const double whole = weighted ? static_cast<double>((last - first) * (2 * group.count - first - last + 1)) / 2 : 1;
    for (int64_t p = group.first; p < group.last; ++p)
      store(whole * (std::exp(scale * from[group.item(p)] - top) / sum), to[group.item(p)]);
  });
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(isotonic)
CUSTOM_OPS_CPU_KERNEL(group_reduce)
CUSTOM_OPS_CPU_KERNEL(group_share)
CUSTOM_OPS_CPU_KERNEL(group_softmax)
