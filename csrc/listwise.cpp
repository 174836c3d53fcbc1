// Listwise losses: softmax cross entropies, and scans over the items in the order of their labels. All O(n)
// but for the sort; only differences of scores are exponentiated, none above 0, so that no range is too wide.
#include "list_loss.h"

#include <cmath>
#include <limits>

namespace custom_ops {

CUSTOM_OPS_ENUM(Ties, INDEX, SCORE, BRESLOW)
CUSTOM_OPS_ENUM(PositionWeights, UNIFORM, EXPONENTIAL, DISCOUNT)

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kExponents = 600;  // the range of scores whose exponentials are normal numbers

// A list with a single distinct label has nothing to rank.
template <class A>
bool tied(const A* y, int64_t n) {
  return std::all_of(y, y + n, [&](A label) { return label == y[0]; });
}

// ---------------------------------------------------------------- softmax cross entropy

// Of e^(x - top) summed up: NaN where several x are at the infinite top, as of their differences.
double defined(double sum, double top) {
  return sum > 1 && std::isinf(top) ? std::numeric_limits<double>::quiet_NaN() : sum;
}

// e^(x - the largest x): in `out` each, and their sum.
template <class A>
ALWAYS_INLINE inline double exponentials(const A* __restrict x, int64_t n, A& top, A* __restrict out) {
  const A largest = largest_of<A>(n, [&](int64_t i) ALWAYS_INLINE { return x[i]; });
  for (int64_t i = 0; i < n; ++i) {
    const A e = exp_nonpositive(x[i] - largest);
    out[i] = x[i] == largest ? A(1) : e;  // at infinity, too
  }
  top = largest;
  return defined(sum_of<A>(n, [&](int64_t i) ALWAYS_INLINE { return out[i]; }), static_cast<double>(largest));
}

// The sum of p_i (log sum e^s - s_i), for p the labels or their softmax.
struct ListSoftmax {
  bool softmax_labels;

  template <class A>
  void operator()(List<A>& list) const {
    if (tied(list.y, list.n)) return list.fill_slope(0);
    list.active = true;
    multiversion([&]() ALWAYS_INLINE { run(list); });
  }

  template <class A>
  ALWAYS_INLINE void run(List<A>& list) const {
    const int64_t n = list.n;
    const A* s = list.s;
    A* __restrict slope = list.slope;
    A* q = list.scratch.template get<A>(n);
    A top;
    const double sum = exponentials(s, n, top, q);
    const A* p = list.y;
    A scale = 1;
    if (softmax_labels) {
      A* e = list.scratch.template get<A>(n);
      A top_label;
      scale = static_cast<A>(1 / exponentials(list.y, n, top_label, e));
      p = e;
    }
    const double total = softmax_labels ? 1 : sum_of<A>(n, [&](int64_t i) ALWAYS_INLINE { return p[i]; });
    const A share = static_cast<A>(total / sum);
    if (!list.v) {
      const double behind = sum_of<A>(n, [&](int64_t i) ALWAYS_INLINE {  // by halves, whose difference is no overflow
        const A term = p[i] * (top / 2 - s[i] / 2);
        return (p[i] == 0) | (s[i] == top) ? A(0) : term;
      });
      list.loss = static_cast<A>(total * std::log(sum) + 2 * static_cast<double>(scale) * behind);
      for (int64_t i = 0; i < n; ++i) slope[i] = q[i] * share - p[i] * scale;
    } else {
      const A* v = list.v;
      const A mean = static_cast<A>(sum_of<A>(n, [&](int64_t i) ALWAYS_INLINE { return q[i] * v[i]; }) / sum);
      for (int64_t i = 0; i < n; ++i) slope[i] = q[i] * share * (v[i] - mean);
    }
  }
};

// ---------------------------------------------------------------- scans in label order

// log(1 + e^x), and its derivative.
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
double sigmoid(double x) {
  const double e = std::exp(-std::abs(x));
  return (x >= 0 ? 1 : e) / (1 + e);
}

// A list's items in groups, or each alone, each of which competes with all items from itself on. L is the logarithm
// of the sum of e^(scale s) over a group and those after it.
template <bool kGrouped>
struct Scan {
  int64_t n, groups;
  const int64_t* first;  // of each group: its first item; and the end. Of items alone it isn't read
  const double* s;       // of each item: its score,
  double scale;
  double* share;  // and e^(scale s - L) for its group's L
  double* later;  // of each group: the shares of all later ones in its L,
  double* whole;  // and of its own items, if grouped;
  double* top;    // a score near the highest,
  double* log;    // and L - scale top

  Scan(const double* s, int64_t n, const int64_t* first, int64_t groups, double scale, Scratch& scratch)
      : n(n),
        groups(groups),
        first(first),
        s(s),
        scale(scale),
        share(scratch.get<double>(n)),
        later(scratch.get<double>(groups)),
        whole(kGrouped ? scratch.get<double>(groups) : nullptr),
        top(scratch.get<double>(groups)),
        log(scratch.get<double>(groups)) {
    bool narrow;
    multiversion([&]() ALWAYS_INLINE {
      const double highest = largest_of<double>(n, [&](int64_t i) ALWAYS_INLINE { return s[i]; });
      const double lowest = -largest_of<double>(n, [&](int64_t i) ALWAYS_INLINE { return -s[i]; });
      narrow = scale * (highest - lowest) <= kExponents;
      if (narrow) sum_narrow(highest);
    });
    if (!narrow) sum_wide();
  }

 private:
  // From the end, of the exponentials below the highest score.
  ALWAYS_INLINE void sum_narrow(double highest) {
    for (int64_t i = 0; i < n; ++i) share[i] = exp_nonpositive(scale * (s[i] - highest));
    double sum = 0;
    for (int64_t g = groups - 1; g >= 0; --g) {
      later[g] = sum;
      double own = 0;
      for (int64_t i = begin(g); i < begin(g + 1); ++i) own += share[i];
      if (kGrouped) whole[g] = own;
      log[g] = sum += own;
    }
    each([&](int64_t i, int64_t g) ALWAYS_INLINE { share[i] /= log[g]; });
    for (int64_t g = 0; g < groups; ++g) {
      later[g] /= log[g];
      if (kGrouped) whole[g] /= log[g];
      log[g] = log_normal(log[g]);
      top[g] = highest;
    }
  }

  // From the end, of the exponentials below the highest score so far.
  void sum_wide() {
    double highest = -kInfinity, sum = 0;
    for (int64_t g = groups - 1; g >= 0; --g) {
      const double before = highest;
      for (int64_t i = begin(g); i < begin(g + 1); ++i) highest = std::max(highest, s[i]);
      if (highest > before) sum *= std::exp(scale * (before - highest));
      const double rest = sum;
      double own = 0;
      for (int64_t i = begin(g); i < begin(g + 1); ++i)
        own += share[i] = s[i] == highest ? 1 : std::exp(scale * (s[i] - highest));
      sum = rest + own;
      const double total = defined(sum, highest);
      for (int64_t i = begin(g); i < begin(g + 1); ++i) share[i] /= total;
      later[g] = rest / total;
      if (kGrouped) whole[g] = own / total;
      top[g] = highest;
      log[g] = std::log(sum);
    }
  }

 public:
  ALWAYS_INLINE int64_t begin(int64_t group) const { return kGrouped ? first[group] : group; }

  // By how much the L of a group is above a score, times the scale; -inf for the group at the end, of no items.
  double above(int64_t group, double score) const {
    return group == groups ? -kInfinity : scale * (top[group] - score) + log[group];
  }

  // What of a group's L isn't item i's: 1 - share, exact for an item alone.
  double miss(int64_t i, int64_t group) const { return later[group] + (kGrouped ? whole[group] - share[i] : 0); }

  // f(item, group) for all, in order.
  template <class F>
  ALWAYS_INLINE void each(const F& f) const {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = begin(g); i < begin(g + 1); ++i) f(i, g);
  }

  // Of each group: the mean of v, weighted with e^s, over it and those after it; and 0 at the end.
  double* means(const double* v, Scratch& scratch) const {
    double* mean = scratch.get<double>(groups + 1);
    mean[groups] = 0;
    for (int64_t g = groups - 1; g >= 0; --g) {
      mean[g] = weigh(later[g], mean[g + 1]);
      for (int64_t i = begin(g); i < begin(g + 1); ++i) mean[g] += share[i] * v[i];
    }
    return mean;
  }
};

// A list in label order, highest first, in double.
struct Ordered {
  const int32_t* order;
  double *s, *y, *v;  // the labels if grouped; v is null where the slope is wanted
  int64_t groups = 0;
  int64_t* first = nullptr;

  // Of equal labels the higher score comes first if by_score. A group for each label if `grouped`, else
  // for each item.
  template <class A>
  Ordered(const List<A>& list, bool by_score, bool grouped) {
    Scratch& scratch = list.scratch;
    const int64_t n = list.n;
    if (by_score) {
      const int32_t* by_scores = order_descending(list.s, n, scratch);
      const int32_t* then = order_descending(gather(list.y, by_scores, n, scratch), n, scratch);
      order = gather(by_scores, then, n, scratch);
    } else {
      order = order_descending(list.y, n, scratch);
    }
    s = widened(list.s, n, scratch);
    v = list.v ? widened(list.v, n, scratch) : nullptr;
    y = grouped ? widened(list.y, n, scratch) : nullptr;
    if (!grouped) {
      groups = n;
      return;
    }
    first = scratch.template get<int64_t>(n + 1);
    for (int64_t i = 0; i < n; ++i)
      if (i == 0 || y[i] != y[i - 1]) first[groups++] = i;
    first[groups] = n;
  }

  template <class A>
  double* widened(const A* x, int64_t n, Scratch& scratch) const {
    double* out = scratch.get<double>(n);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(x[order[i]]);
    return out;
  }
};

// Puts run(ordered, n, scratch, out) -> loss in place, if the list is to contribute.
template <class A, class Run>
void in_label_order(List<A>& list, bool by_score, bool grouped, const Run& run) {
  if (tied(list.y, list.n)) return list.fill_slope(0);
  list.active = true;
  const Ordered ordered(list, by_score, grouped);
  double* out = list.scratch.template get<double>(list.n);
  list.loss = static_cast<A>(run(ordered, list.n, list.scratch, out));
  for (int64_t i = 0; i < list.n; ++i) list.slope[ordered.order[i]] = static_cast<A>(out[i]);
}

// The sum of w_i (L - s_i), of the first k items in label order.
struct ListMle {
  Ties ties;
  PositionWeights weights;
  int64_t k;  // 0 for all

  // Of the places of a list of n items.
  double* place_weights(int64_t n, Scratch& scratch) const {
    double* w = scratch.get<double>(n);
    const int64_t last = k > 0 ? std::min(k, n) : n;
    const double least = std::exp2(static_cast<double>(1 - n));
    for (int64_t i = 0; i < last; ++i)  // (2^(n-1-i) - 1) / (2^(n-1) - 1), 1 / log2(2 + i) or 1
      w[i] = weights == PositionWeights::EXPONENTIAL ? (std::exp2(-static_cast<double>(i)) - least) / (1 - least)
             : weights == PositionWeights::DISCOUNT  ? discount_at(i)
                                                     : 1;
    std::fill(w + last, w + n, 0.0);
    return w;
  }

  template <class A>
  void operator()(List<A>& list) const {
    if (ties == Ties::BRESLOW) run<true>(list);
    else run<false>(list);
  }

  template <bool kGrouped, class A>
  void run(List<A>& list) const {
    in_label_order(
        list, ties == Ties::SCORE, kGrouped, [&](const Ordered& o, int64_t n, Scratch& scratch, double* out) {
          const Scan<kGrouped> scan(o.s, n, o.first, o.groups, 1, scratch);
          double* w = place_weights(n, scratch);
          for (int64_t g = 0; kGrouped && g < o.groups; ++g) {  // the items share those of their places
            const double sum = std::accumulate(w + o.first[g], w + o.first[g + 1], 0.0);
            std::fill(w + o.first[g], w + o.first[g + 1], sum / static_cast<double>(o.first[g + 1] - o.first[g]));
          }
          if (!o.v) return slope(scan, w, out);
          product(scan, w, o.v, scan.means(o.v, scratch), out);
          return 0.0;
        });
  }

  template <bool kGrouped>
  static double slope(const Scan<kGrouped>& scan, const double* w, double* out) {
    double loss = 0, carry = 0;  // the earlier groups' weights, each times the share of this L in its own
    for (int64_t g = 0; g < scan.groups; ++g) {
      double total = 0;
      for (int64_t i = scan.begin(g); i < scan.begin(g + 1); ++i) total += w[i];
      for (int64_t i = scan.begin(g); i < scan.begin(g + 1); ++i) {
        const double miss = scan.miss(i, g);
        loss += weigh(w[i], miss < 0.5 ? -std::log1p(-miss) : scan.above(g, scan.s[i]));
        out[i] = weigh(carry + (total - w[i]), scan.share[i]) - weigh(w[i], miss);
      }
      carry = weigh(carry + total, scan.later[g]);
    }
    return loss;
  }

  template <bool kGrouped>
  static void product(const Scan<kGrouped>& scan, const double* w, const double* v, const double* mean, double* out) {
    double carry = 0, moved = 0;
    for (int64_t g = 0; g < scan.groups; ++g) {
      for (int64_t i = scan.begin(g); i < scan.begin(g + 1); ++i) carry += w[i], moved += weigh(w[i], mean[g]);
      for (int64_t i = scan.begin(g); i < scan.begin(g + 1); ++i) out[i] = weigh(v[i] * carry - moved, scan.share[i]);
      carry = weigh(carry, scan.later[g]), moved = weigh(moved, scan.later[g]);
    }
  }
};

// The sum of w_i softplus(L - s_i), L of the next lower label; w: gains over the largest one.
struct UniqueSoftmax {
  bool exponential;

  template <class A>
  void operator()(List<A>& list) const {
    const A top = *std::max_element(list.y, list.y + list.n);
    if (top <= 0) return list.fill_slope(0);
    in_label_order(list, false, true, [&](const Ordered& o, int64_t n, Scratch& scratch, double* out) {
      const Scan<true> scan(o.s, n, o.first, o.groups, 1, scratch);
      double* w = o.y;
      const double highest = o.y[0], most = relative_gain(highest, highest, exponential);
      for (int64_t i = 0; i < n; ++i) w[i] = relative_gain(o.y[i], highest, exponential) / most;
      if (!o.v) return slope(scan, w, out);
      product(scan, w, o.v, scan.means(o.v, scratch), out);
      return 0.0;
    });
  }

  static double slope(const Scan<true>& scan, const double* w, double* out) {
    double loss = 0, carry = 0;
    for (int64_t g = 0; g < scan.groups; ++g) {
      double pushed = 0;
      for (int64_t i = scan.first[g]; i < scan.first[g + 1]; ++i) {
        const double x = scan.above(g + 1, scan.s[i]), p = weigh(w[i], sigmoid(x));
        loss += weigh(w[i], softplus(x));
        out[i] = weigh(carry, scan.share[i]) - p;
        pushed += p;
      }
      carry = weigh(carry, scan.later[g]) + pushed;
    }
    return loss;
  }

  static void product(const Scan<true>& scan, const double* w, const double* v, const double* mean, double* out) {
    double carry = 0, moved = 0;
    for (int64_t g = 0; g < scan.groups; ++g) {
      double pushed = 0, pushed_moved = 0;
      for (int64_t i = scan.first[g]; i < scan.first[g + 1]; ++i) {
        const double x = scan.above(g + 1, scan.s[i]), p = weigh(w[i], sigmoid(x));
        const double dp = weigh(p, sigmoid(-x) * (mean[g + 1] - v[i]));
        out[i] = weigh(v[i] * carry + moved, scan.share[i]) - dp;
        pushed += p, pushed_moved += dp - weigh(p, mean[g + 1]);
      }
      carry = weigh(carry, scan.later[g]) + pushed;
      moved = weigh(moved, scan.later[g]) + pushed_moved;
    }
  }
};

// a - b, as `high` and what its rounding leaves out: of differences of numbers of any size, differences stay exact.
struct Difference {
  double high, low = 0;

  Difference(double a, double b) : high(a - b) {
    if (!std::isfinite(high)) return;
    const double subtracted = a - high;
    low = (a - (high + subtracted)) + (subtracted - b);
  }
  double over(const Difference& other) const { return (high - other.high) + (low - other.low); }
};

// log(1 + the sum of e^(scale (s_j - s_i)) over the pairs with y_i > y_j).
struct Cosent {
  double scale;

  template <class A>
  void operator()(List<A>& list) const {
    in_label_order(list, false, true, [&](const Ordered& o, int64_t n, Scratch& scratch, double* out) {
      const int64_t groups = o.groups;
      // Over the lower labels of e^s, and, all reversed, over the higher ones of e^-s.
      const Scan<true> down(o.s, n, o.first, groups, scale, scratch);
      double* reversed = scratch.get<double>(n);
      int64_t* first = scratch.get<int64_t>(groups + 1);
      for (int64_t i = 0; i < n; ++i) reversed[i] = -o.s[n - 1 - i];
      for (int64_t g = 0; g <= groups; ++g) first[g] = n - o.first[groups - g];
      const Scan<true> up(reversed, n, first, groups, scale, scratch);

      // The largest term, of a difference and a logarithm; 1 has 0 for both. Then each term over it.
      Difference most(0, 0);
      double log = 0;
      const auto exponent = [&](double worse, double better, double logarithm) {
        return scale * Difference(worse, better).over(most) + (logarithm - log);
      };
      const auto term = [&](double worse, double better, double logarithm) {
        return std::exp(exponent(worse, better, logarithm));
      };
      down.each([&](int64_t i, int64_t g) {
        if (g + 1 < groups && exponent(down.top[g + 1], o.s[i], down.log[g + 1]) > 0)
          most = Difference(down.top[g + 1], o.s[i]), log = down.log[g + 1];
      });
      const double top = scale * most.high + log;
      // The terms of an item's pairs with those of lower and of higher labels.
      const auto below = [&](int64_t i, int64_t g) {
        return g + 1 == groups ? 0 : term(down.top[g + 1], o.s[i], down.log[g + 1]);
      };
      const auto over = [&](int64_t i, int64_t g) {
        return g == 0 ? 0 : term(o.s[i], -up.top[groups - g], up.log[groups - g]);
      };
      double sum = 0;
      down.each([&](int64_t i, int64_t g) { sum += below(i, g); });
      const double whole = std::exp(-top) + sum;
      const double total = std::isinf(top) ? top : top > 0 ? top + std::log(whole) : std::log1p(sum);
      const auto lower = [&](int64_t i, int64_t g) { return below(i, g) / whole; };
      const auto higher = [&](int64_t i, int64_t g) { return over(i, g) / whole; };

      if (!o.v) {
        down.each([&](int64_t i, int64_t g) { out[i] = scale * (higher(i, g) - lower(i, g)); });
        return total;
      }
      const double* v = o.v;
      for (int64_t i = 0; i < n; ++i) reversed[i] = v[n - 1 - i];
      const double* mean_lower = down.means(v, scratch);
      const double* mean_higher = up.means(reversed, scratch);
      double mean = 0;
      down.each([&](int64_t i, int64_t g) { mean += (higher(i, g) - lower(i, g)) * v[i]; });
      down.each([&](int64_t i, int64_t g) {
        out[i] = weigh(higher(i, g), v[i] - mean_higher[groups - g] - mean) -
                 weigh(lower(i, g), mean_lower[g + 1] - v[i] - mean);
        out[i] *= scale * scale;
      });
      return 0.0;
    });
  }
};

}  // namespace

}  // namespace custom_ops

CUSTOM_OPS_LIST_LOSS(list_softmax, ListSoftmax, bool)
CUSTOM_OPS_LIST_LOSS(list_mle, ListMle, Ties, PositionWeights, int64_t)
CUSTOM_OPS_LIST_LOSS(unique_softmax, UniqueSoftmax, bool)
CUSTOM_OPS_LIST_LOSS(cosent, Cosent, double)
