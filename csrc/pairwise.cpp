// Pairwise losses.
#include "pairs.h"

namespace custom_ops {
namespace {

// ---------------------------------------------------------------- functions of sigmoids

struct SoftZeroOne {
  static constexpr bool kLog = false, kUnbounded = false;
  template <class V>
  static ALWAYS_INLINE V value(const Pair<V>& x) {
    return x.p;
  }
  template <class V>
  static ALWAYS_INLINE V slope(const Pair<V>& x) {
    return -x.p * x.r;
  }
  template <class V>
  static ALWAYS_INLINE V curvature(const Pair<V>& x) {
    return x.p * x.r * (x.r - x.p);
  }
};

struct Exponential {
  static constexpr bool kLog = false, kUnbounded = true;
  template <class V>
  static ALWAYS_INLINE V value(const Pair<V>& x) {
    return x.q;
  }
  template <class V>
  static ALWAYS_INLINE V slope(const Pair<V>& x) {
    return -x.q;
  }
  template <class V>
  static ALWAYS_INLINE V curvature(const Pair<V>& x) {
    return x.q;
  }
};

struct Pairwise {
  int64_t phi;  // the position in PHI, in custom_ops/ranking/pairwise.py
  double sigma;
  bool normalize;

  template <class A>
  void operator()(List<A>& list) const {
    const ByLabel<A> items(list);
    const double scale = normalize && items.pairs > 0 ? 1 / items.pairs : 1;
    if (phi == 0) pair_loss<Logistic>(list, items, sigma, scale);
    else if (phi == 1) pair_loss<SoftZeroOne>(list, items, sigma, scale);
    else pair_loss<Exponential>(list, items, sigma, scale);
  }
};

// ---------------------------------------------------------------- hinge

// Of some items: how many, and the sums of their scores, squares and v.
struct Sums {
  double count = 0, s = 0, squares = 0, v = 0;
  void operator+=(const Sums& other) { count += other.count, s += other.s, squares += other.squares, v += other.v; }
};

// The same in one vector; and x if `yes`, else zeros, without a branch.
using SumsOf = VectorOf<double>;
ALWAYS_INLINE inline SumsOf only(bool yes, const SumsOf& x) {
  using I = Vector<double>::I;
  const I mask = I{} - static_cast<int64_t>(yes);
  return reinterpret_cast<SumsOf>(reinterpret_cast<I>(x) & mask);
}

// Of the items added so far, by label.
class Counters {
 public:
  Counters(int64_t levels, Scratch& scratch) : levels_(levels), tree_(scratch.get<Sums>(levels + 1)) { clear(); }
  void clear() { std::fill(tree_, tree_ + levels_ + 1, Sums()); }
  void add(int64_t level, const Sums& item) {
    for (int64_t k = level + 1; k <= levels_; k += k & -k) tree_[k] += item;
  }
  // Of the levels before this one.
  Sums before(int64_t level) const {
    Sums sums;
    for (int64_t k = level; k > 0; k -= k & -k) sums += tree_[k];
    return sums;
  }

 private:
  int64_t levels_;
  Sums* tree_;  // a Fenwick tree
};

// In O(n log n): for each item, the pairs within the margin are counted while the items are swept in the
// order of their scores.
struct PairwiseHinge {
  double margin;
  bool squared, normalize;

  template <class A>
  void operator()(List<A>& list) const {
    Scratch& scratch = list.scratch;
    const int64_t n = list.n;
    const int32_t* by_label = order_descending(list.y, n, scratch);
    const int32_t* by_score = order_descending(list.s, n, scratch);
    int32_t* level = scratch.get<int32_t>(n);  // 0 is the highest label
    int32_t levels = 0;
    double pairs = 0;
    for (int64_t k = 0, start = 0; k < n; ++k) {
      if (k && list.y[by_label[k - 1]] > list.y[by_label[k]]) ++levels, start = k;
      level[by_label[k]] = levels;
      pairs += static_cast<double>(start);
    }
    ++levels;
    list.active = pairs > 0;
    const double scale = normalize && pairs > 0 ? 1 / pairs : 1;

    double centre = 0, finite = 0;
    bool nan = false;
    int32_t infinite[2] = {-1, -1};  // the level of an item at -inf, and at inf: two levels there make inf - inf
    for (int64_t i = 0; i < n; ++i) {
      nan |= list.s[i] != list.s[i];
      if (std::isfinite(list.s[i])) centre += static_cast<double>(list.s[i]), finite += 1;
      if (!std::isinf(list.s[i])) continue;
      const int32_t other = std::exchange(infinite[list.s[i] > 0], level[i]);
      nan |= other >= 0 && other != level[i];
    }
    if (nan && list.active) {
      list.loss = std::numeric_limits<A>::quiet_NaN();
      return std::fill(list.slope, list.slope + n, list.loss);
    }
    if (finite > 0) centre /= finite;
    double* s = scratch.get<double>(n);
    for (int64_t i = 0; i < n; ++i) s[i] = static_cast<double>(list.s[i]) - centre;
    double* sums = scratch.get<double>(n);
    std::fill(sums, sums + n, 0.0);

    const auto item = [&](int64_t i) {
      return Sums{1, s[i], s[i] * s[i], list.v ? static_cast<double>(list.v[i]) : 0};
    };
    const auto add_gradient = [&](int64_t i, const Sums& c, double a, double sign) {
      if (list.v) sums[i] += squared ? 2 * (c.count * static_cast<double>(list.v[i]) - c.v) : 0;
      else sums[i] += sign * (squared ? 2 * (c.count * a - sign * c.s) : c.count);
    };
    // c: those of a lower label that aren't below item i by the margin.
    double loss = 0;
    const auto add_lower = [&](int64_t i, const Sums& c) {
      const double a = margin - s[i];
      if (c.count == 0) return;
      const bool finite = std::isfinite(a) && std::isfinite(c.s);
      const double sum = squared ? c.count * a * a + 2 * a * c.s + c.squares : c.count * a + c.s;
      loss += finite ? sum : std::numeric_limits<double>::infinity();
      add_gradient(i, c, a, -1);
    };
    // c: those of a higher label that aren't above it by the margin.
    const auto add_higher = [&](int64_t i, const Sums& c) {
      if (c.count > 0) add_gradient(i, c, margin + s[i], 1);
    };

    // In the order of the scores: how many aren't below item i by the margin, and how many are above it by the
    // margin or more.
    int32_t* near = scratch.get<int32_t>(n);
    int32_t* above = scratch.get<int32_t>(n);
    const double* ordered = gather(s, by_score, n, scratch);
    for (int64_t k = 0, next = 0; k < n; ++k) {
      while (next < n && ordered[next] > ordered[k] - margin) ++next;
      near[by_score[k]] = static_cast<int32_t>(next);
    }
    for (int64_t k = n, next = n; k-- > 0;) {
      while (next > 0 && ordered[next - 1] < margin + ordered[k]) --next;
      above[by_score[k]] = static_cast<int32_t>(next);
    }
    if (levels <= 8) {  // which are swept one by one, sooner than in a tree
      SumsOf* of_place = scratch.get<SumsOf>(n);
      SumsOf* sum = scratch.get<SumsOf>(n + 1);
      int32_t* level_of_place = gather(level, by_score, n, scratch);
      for (int64_t k = 0; k < n; ++k) {
        const Sums x = item(by_score[k]);
        of_place[k] = SumsOf{x.count, x.s, x.squares, x.v};
      }
      const auto sums_at = [&](int32_t place) {
        const SumsOf& x = sum[place];
        return Sums{x[0], x[1], x[2], x[3]};
      };
      for (int64_t t = 0, begin = 0; t + 1 < levels; ++t) {
        // Of those of a lower label than t, before each place.
        multiversion([&]() ALWAYS_INLINE {
          SumsOf running = sum[0] = SumsOf{};
          for (int64_t k = 0; k < n; ++k) sum[k + 1] = running += only(level_of_place[k] > t, of_place[k]);
        });
        for (; begin < n && level[by_label[begin]] == t; ++begin)
          add_lower(by_label[begin], sums_at(near[by_label[begin]]));
        // Of those of a higher label than the next, from each place on.
        multiversion([&]() ALWAYS_INLINE {
          SumsOf running = sum[n] = SumsOf{};
          for (int64_t k = n; k-- > 0;) sum[k] = running += only(level_of_place[k] <= t, of_place[k]);
        });
        for (int64_t m = begin; m < n && level[by_label[m]] == t + 1; ++m)
          add_higher(by_label[m], sums_at(above[by_label[m]]));
      }
    } else {
      Counters counters(levels, scratch);
      for (int64_t k = 0, next = 0; k < n; ++k) {
        const int64_t i = by_score[k];
        for (; next < near[i]; ++next) counters.add(levels - 1 - level[by_score[next]], item(by_score[next]));
        add_lower(i, counters.before(levels - 1 - level[i]));
      }
      counters.clear();
      for (int64_t k = n, next = n; k-- > 0;) {
        const int64_t i = by_score[k];
        for (; next > above[i]; --next) counters.add(level[by_score[next - 1]], item(by_score[next - 1]));
        add_higher(i, counters.before(level[i]));
      }
    }
    for (int64_t i = 0; i < n; ++i) list.slope[i] = static_cast<A>(scale * sums[i]);
    list.loss = static_cast<A>(scale * loss);
  }
};

// ---------------------------------------------------------------- squared error

// With x = s - y, or x = v for the Hessian: the sum of (x_i - x_j)^2 over the ordered pairs, 2 n sum (x - mean)^2.
struct PairwiseMse {
  bool normalize;

  template <class A>
  void operator()(List<A>& list) const {
    const double n = static_cast<double>(list.n);
    const double scale = normalize ? 1 / (n - 1) : n;
    if (list.n < 2) return std::fill(list.slope, list.slope + list.n, A(0));
    const auto x = [&](int64_t i) ALWAYS_INLINE {
      return list.v ? static_cast<double>(list.v[i]) : static_cast<double>(list.s[i]) - static_cast<double>(list.y[i]);
    };
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < list.n; ++i) sum += x(i);
    for (int64_t i = 0; i < list.n; ++i) {
      const double centred = x(i) - sum / n;
      squares += centred * centred;
      list.slope[i] = static_cast<A>(4 * scale * centred);
    }
    list.loss = static_cast<A>(2 * scale * squares);
    list.active = true;
  }
};

}  // namespace

using MaybeTensor = std::optional<Tensor>;
using Losses = std::tuple<Tensor, Tensor, Tensor>;

Losses pairwise(const Tensor& scores, const Tensor& labels, const MaybeTensor& valid, const MaybeTensor& offsets,
                int64_t reduction, int64_t batch_dims, int64_t phi, double sigma, bool normalize) {
  return list_loss(scores, labels, valid, offsets, reduction, batch_dims, Pairwise{phi, sigma, normalize});
}

Tensor pairwise_slope(const Tensor& scores, const Tensor& labels, const MaybeTensor& valid, const MaybeTensor& offsets,
                      const MaybeTensor& v, int64_t phi, double sigma, bool normalize) {
  return list_slope(scores, labels, valid, offsets, v, Pairwise{phi, sigma, normalize});
}

Losses pairwise_hinge(const Tensor& scores, const Tensor& labels, const MaybeTensor& valid, const MaybeTensor& offsets,
                      int64_t reduction, int64_t batch_dims, double margin, bool squared, bool normalize) {
  return list_loss(scores, labels, valid, offsets, reduction, batch_dims, PairwiseHinge{margin, squared, normalize});
}

Tensor pairwise_hinge_slope(const Tensor& scores, const Tensor& labels, const MaybeTensor& valid,
                            const MaybeTensor& offsets, const MaybeTensor& v, double margin, bool squared,
                            bool normalize) {
  return list_slope(scores, labels, valid, offsets, v, PairwiseHinge{margin, squared, normalize});
}

Losses pairwise_mse(const Tensor& scores, const Tensor& labels, const MaybeTensor& valid, const MaybeTensor& offsets,
                    int64_t reduction, int64_t batch_dims, bool normalize) {
  return list_loss(scores, labels, valid, offsets, reduction, batch_dims, PairwiseMse{normalize});
}

Tensor pairwise_mse_slope(const Tensor& scores, const Tensor& labels, const MaybeTensor& valid,
                          const MaybeTensor& offsets, const MaybeTensor& v, bool normalize) {
  return list_slope(scores, labels, valid, offsets, v, PairwiseMse{normalize});
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(pairwise)
CUSTOM_OPS_CPU_KERNEL(pairwise_slope)
CUSTOM_OPS_CPU_KERNEL(pairwise_hinge)
CUSTOM_OPS_CPU_KERNEL(pairwise_hinge_slope)
CUSTOM_OPS_CPU_KERNEL(pairwise_mse)
CUSTOM_OPS_CPU_KERNEL(pairwise_mse_slope)
