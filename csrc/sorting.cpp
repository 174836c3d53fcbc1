// Soft ranks and soft sorting: projections onto the permutahedron, which are isotonic regressions of the
// sorted values, by pooling adjacent violators in double.
//
// The result is constant or linear within groups of adjacent items of the order. `groups` says for each place
// in the order which item it holds: i, or ~i where a group begins; n behind the last valid item.
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

// Calls f(begin, end) for each group of places.
template <class F>
void for_each_group(const int32_t* groups, int64_t n, const F& f) {
  for (int64_t begin = 0; begin < n && groups[begin] != n;) {
    int64_t end = begin + 1;
    while (end < n && groups[end] >= 0 && groups[end] != n) ++end;
    f(begin, end);
    begin = end;
  }
}

Tensor checked_groups(const Tensor& groups, const Tensor& x) {
  check(groups.scalar_type() == ScalarType::Int && sizes(groups) == sizes(x),
        "groups: expected int32 of the shape of x");
  const Tensor flat = dense(groups);
  const int64_t total = x.numel(), n = total ? x.size(x.dim() - 1) : 0;
  const int32_t* entries = data<int32_t>(flat);
  for (int64_t i = 0; i < total; ++i)
    check(item_of(entries[i]) < n + (entries[i] >= 0), "groups: expected items from 0 to ", n - 1, ", got ",
          item_of(entries[i]));
  return flat;
}

}  // namespace

std::tuple<Tensor, Tensor> isotonic(const Tensor& x_in, const std::optional<Tensor>& valid_in, double strength, bool kl,
                                    bool sort) {
  const Tensor x = dense(x_in);
  const Lists lists(x, valid_in, std::nullopt);
  const int64_t n = lists.items;
  Tensor out = fresh(x, sizes(x));
  Tensor groups = fresh(x, sizes(x), ScalarType::Int);
  int32_t* gp = mutable_data<int32_t>(groups);
  const bool* valid = lists.valid_data();
  dispatch_accumulator(x, "x", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* xp = data<A>(x);
    A* op = mutable_data<A>(out);
    lists.parallel(64, [&](int64_t, int64_t begin, int64_t end, Scratch& scratch) {
      int32_t* items = scratch.get<int32_t>(n);
      A* keys = scratch.get<A>(n);
      int64_t m = 0;
      for (int64_t i = begin; i < end; ++i) {
        if (valid && !valid[i]) continue;
        items[m] = static_cast<int32_t>(i - begin);
        keys[m++] = sort ? -xp[i] : xp[i];
      }
      A* to = op + begin;
      int32_t* group = gp + begin;
      if (m < n) std::fill(to, to + n, A(0));
      std::fill(group + m, group + n, static_cast<int32_t>(n));
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
          for (int64_t p = pools[k].begin; p < last; ++p) to[sort ? p : group[p]] = static_cast<A>(value(p, fit));
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

Tensor group_reduce(const Tensor& x_in, const Tensor& groups_in, int64_t mode, bool from_order, bool to_order,
                    double scale) {
  const Tensor x = dense(x_in), groups = checked_groups(groups_in, x);
  check(mode >= 0 && mode <= 2, "mode: expected 0 to 2, got ", mode);
  const Lists lists(x, std::nullopt, std::nullopt);
  const int64_t n = lists.items;
  Tensor out = fresh(x, sizes(x));
  dispatch_accumulator(x, "x", [&](auto type) {
    using A = typename decltype(type)::type;
    lists.parallel(4, [&](int64_t, int64_t begin, int64_t, Scratch&) {
      const A* from = data<A>(x) + begin;
      const int32_t* group = data<int32_t>(groups) + begin;
      A* to = mutable_data<A>(out) + begin;
      std::fill(to, to + n, A(0));
      for_each_group(group, n, [&](int64_t first, int64_t last) {
        double sum = 0;
        for (int64_t p = first; p < last; ++p) sum += from[from_order ? p : item_of(group[p])];
        const double shared = mode == 0 ? sum : sum / static_cast<double>(last - first);
        for (int64_t p = first; p < last; ++p) {
          const int32_t item = item_of(group[p]);
          const double own = mode == 2 ? static_cast<double>(from[from_order ? p : item]) - shared : shared;
          to[to_order ? p : item] = static_cast<A>(scale * own);
        }
      });
    });
  });
  return out;
}

Tensor group_share(const Tensor& v_in, const Tensor& ranks_in, const Tensor& groups_in, double scale) {
  const Tensor v = dense(v_in), ranks = dense(ranks_in), groups = checked_groups(groups_in, v);
  check(sizes(ranks) == sizes(v) && ranks.scalar_type() == v.scalar_type(), "ranks: expected the shape and dtype of v");
  const Lists lists(v, std::nullopt, std::nullopt);
  const int64_t n = lists.items;
  Tensor out = fresh(v, sizes(v));
  dispatch_accumulator(v, "v", [&](auto type) {
    using A = typename decltype(type)::type;
    lists.parallel(4, [&](int64_t, int64_t begin, int64_t, Scratch&) {
      const A* vp = data<A>(v) + begin;
      const A* rank = data<A>(ranks) + begin;
      const int32_t* group = data<int32_t>(groups) + begin;
      A* to = mutable_data<A>(out) + begin;
      std::fill(to, to + n, A(0));
      for_each_group(group, n, [&](int64_t first, int64_t last) {
        double whole = 0, moved = 0;
        for (int64_t p = first; p < last; ++p) {
          const int32_t item = item_of(group[p]);
          const double r = static_cast<double>(rank[item]);
          whole += r;
          moved += r * static_cast<double>(vp[item]);
        }
        for (int64_t p = first; p < last; ++p) {
          const int32_t item = item_of(group[p]);
          const double r = static_cast<double>(rank[item]);
          to[item] = static_cast<A>(scale * (r * (static_cast<double>(vp[item]) - moved / whole)));
        }
      });
    });
  });
  return out;
}

Tensor group_softmax(const Tensor& x_in, const Tensor& groups_in, double scale, bool weighted) {
  const Tensor x = dense(x_in), groups = checked_groups(groups_in, x);
  const Lists lists(x, std::nullopt, std::nullopt);
  const int64_t n = lists.items;
  Tensor out = fresh(x, sizes(x));
  dispatch_accumulator(x, "x", [&](auto type) {
    using A = typename decltype(type)::type;
    lists.parallel(32, [&](int64_t, int64_t begin, int64_t, Scratch&) {
      const A* from = data<A>(x) + begin;
      const int32_t* group = data<int32_t>(groups) + begin;
      A* to = mutable_data<A>(out) + begin;
      std::fill(to, to + n, A(0));
      int64_t m = 0;
      while (m < n && group[m] != n) ++m;
      for_each_group(group, n, [&](int64_t first, int64_t last) {
        double top = -INFINITY, sum = 0;
        for (int64_t p = first; p < last; ++p) top = std::max(top, scale * from[item_of(group[p])]);
        for (int64_t p = first; p < last; ++p) sum += std::exp(scale * from[item_of(group[p])] - top);
        // The ranks of the group's places add up to this.
        const double whole = weighted ? static_cast<double>((last - first) * (2 * m - first - last + 1)) / 2 : 1.0;
        for (int64_t p = first; p < last; ++p) {
          const int32_t item = item_of(group[p]);
          to[item] = static_cast<A>(whole * (std::exp(scale * from[item] - top) / sum));
        }
      });
    });
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(isotonic)
CUSTOM_OPS_CPU_KERNEL(group_reduce)
CUSTOM_OPS_CPU_KERNEL(group_share)
CUSTOM_OPS_CPU_KERNEL(group_softmax)
