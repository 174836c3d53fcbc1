// Listwise losses: softmax cross entropies, and scans over the items in the order of their labels. Everything but the
// sort takes O(n) time. Only non-positive differences of scores are exponentiated, so no range is too wide.
#include "list_loss.h"

#include <cmath>
#include <limits>

namespace custom_ops {

CUSTOM_OPS_ENUM(Ties, INDEX, SCORE, BRESLOW)
CUSTOM_OPS_ENUM(PositionWeights, UNIFORM, EXPONENTIAL, DISCOUNT)

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kExponents = 600;  // a range of scores within which exponentials are normal numbers

// Returns whether all labels are equal, so that there is nothing to rank.
template <class A>
bool tied(const A* y, int64_t n) {
  return std::all_of(y, y + n, [&](A label) { return label == y[0]; });
}

// ---------------------------------------------------------------- softmax cross entropy

// Returns the sum of e^(x - top). It is NaN if several x equal an infinite top, since their difference is NaN.
double defined(double sum, double top) {
  return sum > 1 && std::isinf(top) ? std::numeric_limits<double>::quiet_NaN() : sum;
}

// Stores e^(x - the largest x) in `out` and returns the sum.
template <class A>
ALWAYS_INLINE inline double exponentials(const A* __restrict x, int64_t n, A& top, A* __restrict out) {
  const A largest = largest_of<A>(n, [&](int64_t i) ALWAYS_INLINE { return x[i]; });
  top = largest;
  const double sum = sum_of<A>(n, [&](int64_t i) ALWAYS_INLINE {
    const A e = exp_nonpositive(x[i] - largest);
    return out[i] = x[i] == largest ? A(1) : e;  // exact even if the largest is infinite
  });
  return defined(sum, static_cast<double>(largest));
}

// The sum of p_i (log sum e^s - s_i), where p is the labels or their softmax.
struct ListSoftmax {
  bool softmax_labels;

  template <class A>
  void operator()(List<A>& list) const {
    if (tied(list.y, list.n)) return list.fill_slope(0);
    list.active = true;
    multiversion_wide([&]() ALWAYS_INLINE { run(list); });
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
      const double behind = sum_of<A>(n, [&](int64_t i) ALWAYS_INLINE {  // the difference of halves can't overflow
        const A term = p[i] * scale * (top / 2 - s[i] / 2);
        return (p[i] == 0) | (s[i] == top) ? A(0) : term;
      });
      list.loss = static_cast<A>(total * std::log(sum) + 2 * behind);
      for (int64_t i = 0; i < n; ++i) slope[i] = q[i] * share - p[i] * scale;
    } else {
      const A* v = list.v;
      const A mean = static_cast<A>(sum_of<A>(n, [&](int64_t i) ALWAYS_INLINE { return q[i] * v[i]; }) / sum);
      for (int64_t i = 0; i < n; ++i) slope[i] = q[i] * share * (v[i] - mean);
    }
  }
};

// ---------------------------------------------------------------- scans in label order

// Returns the derivative of log(1 + e^x).
double sigmoid(double x) {
  const double e = std::exp(-std::abs(x));
  return (x >= 0 ? 1 : e) / (1 + e);
}

// A scan over the items of a list, in groups or one by one. Each item competes with all items from its group on. L of a
// group is the logarithm of the sum of e^(scale s) over the group and all later ones.
template <bool kGrouped>
struct Scan {
  int64_t n, groups;
  const int64_t* first;  // first item of each group, and n; unused without groups
  const double* s;       // score of each item
  const double* weight;  // the factor of each item's exponential, or null for 1
  double scale;
  double* share;  // e^(scale s - L) of each item, with its group's L
  double* later;  // per group: the share of all later groups in its L
  double* whole;  // per group: the share of its own items in its L, if grouped
  double* top;    // per group: a score near the highest
  double* log;    // per group: L - scale top

  Scan(const double* s, int64_t n, const int64_t* first, int64_t groups, double scale, Scratch& scratch,
       const double* weight = nullptr)
      : n(n),
        groups(groups),
        first(first),
        s(s),
        weight(weight),
        scale(scale),
        share(scratch.get<double>(n)),
        later(scratch.get<double>(groups)),
        whole(kGrouped ? scratch.get<double>(groups) : nullptr),
        top(scratch.get<double>(groups)),
        log(scratch.get<double>(groups)) {
    bool narrow;
    multiversion_wide([&]() ALWAYS_INLINE {
      const double highest = largest_of<double>(n, [&](int64_t i) ALWAYS_INLINE { return s[i]; });
      const double lowest = -largest_of<double>(n, [&](int64_t i) ALWAYS_INLINE { return -s[i]; });
      narrow = scale * (highest - lowest) <= kExponents;
      if (narrow) sum_narrow(highest);
    });
    if (!narrow) sum_wide();
  }

 private:
  // Sums from the end, with exponentials relative to the highest score.
  ALWAYS_INLINE void sum_narrow(double highest) {
    for (int64_t i = 0; i < n; ++i) share[i] = exp_nonpositive(scale * (s[i] - highest));
    for (int64_t i = 0; weight && i < n; ++i) share[i] *= weight[i];
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

  // Sums from the end, with exponentials relative to the highest score so far.
  void sum_wide() {
    double highest = -kInfinity, sum = 0;
    for (int64_t g = groups - 1; g >= 0; --g) {
      const double before = highest;
      for (int64_t i = begin(g); i < begin(g + 1); ++i) highest = std::max(highest, s[i]);
      if (highest > before) sum *= std::exp(scale * (before - highest));
      const double rest = sum;
      double own = 0;
      for (int64_t i = begin(g); i < begin(g + 1); ++i)
        own += share[i] = (weight ? weight[i] : 1) * (s[i] == highest ? 1 : std::exp(scale * (s[i] - highest)));
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

  // Returns L - scale * score for a group's L; the empty group at the end has L = -inf.
  double above(int64_t group, double score) const {
    return group == groups ? -kInfinity : scale * (top[group] - score) + log[group];
  }

  // Returns 1 - the share of item i in its group's L, which is exact for an item alone.
  double miss(int64_t i, int64_t group) const { return later[group] + (kGrouped ? whole[group] - share[i] : 0); }

  // Calls f(item, group) for all items in order.
  template <class F>
  ALWAYS_INLINE void each(const F& f) const {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = begin(g); i < begin(g + 1); ++i) f(i, g);
  }

  // Returns for each group the mean of v, weighted by e^s, over it and all later ones, and 0 at the end.
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

// The items of a list in double, by descending label.
struct Ordered {
  const int32_t* order;
  double *s, *y, *w, *v;  // y is set if grouped, w is null without weights, and v is null if the slope is wanted
  int64_t groups = 0;
  int64_t* first = nullptr;

  // Items with equal labels are in the order of descending score if by_score. There is a group per label if `grouped`,
  // else one per item.
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
    w = list.w ? widened(list.w, n, scratch) : nullptr;
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

// Calls run(ordered, n, scratch, out), which returns the loss, and stores the results if the list is active.
template <class A, class Run>
void in_label_order(List<A>& list, bool by_score, bool grouped, const Run& run) {
  if (tied(list.y, list.n)) return list.fill_slope(0);
  list.active = true;
  const Ordered ordered(list, by_score, grouped);
  double* out = list.scratch.template get<double>(list.n);
  list.loss = static_cast<A>(run(ordered, list.n, list.scratch, out));
  for (int64_t i = 0; i < list.n; ++i) list.slope[ordered.order[i]] = static_cast<A>(out[i]);
}

// The sum of w_i (L - s_i) over the first k items in label order.
struct ListMle {
  Ties ties;
  PositionWeights weights;
  int64_t k;

  // Returns the weight of each position in a list of n items.
  double* place_weights(int64_t n, Scratch& scratch) const {
    double* w = scratch.get<double>(n);
    const int64_t last = std::min(k, n);
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
          // Items with equal labels share the weights of their positions.
          for (int64_t g = 0; kGrouped && g < o.groups; ++g) {
            const double sum = std::accumulate(w + o.first[g], w + o.first[g + 1], 0.0);
            std::fill(w + o.first[g], w + o.first[g + 1], sum / static_cast<double>(o.first[g + 1] - o.first[g]));
          }
          for (int64_t i = 0; o.w && i < n; ++i) w[i] *= o.w[i];
          if (!o.v) return slope(scan, w, out);
          product(scan, w, o.v, scan.means(o.v, scratch), out);
          return 0.0;
        });
  }

  template <bool kGrouped>
  static double slope(const Scan<kGrouped>& scan, const double* w, double* out) {
    // `carry`: the earlier groups' weights, each times the share of this group's L in that group's
    double loss = 0, carry = 0;
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

// The sum of w_i softplus(L - s_i), with L of the next lower label; the w_i are the gains relative to the largest.
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
      for (int64_t g = 0; g < o.groups; ++g) {
        const double gain = relative_gain(o.y[o.first[g]], highest, exponential) / most;
        std::fill(w + o.first[g], w + o.first[g + 1], gain);
      }
      const int64_t gaining = std::find(w, w + n, 0.0) - w;  // items, which come first
      for (int64_t i = 0; o.w && i < gaining; ++i) w[i] *= o.w[i];
      if (!o.v) return slope(scan, w, gaining, out, scratch);
      product(scan, w, o.v, scan.means(o.v, scratch), out);
      return 0.0;
    });
  }

  static double slope(const Scan<true>& scan, const double* w, int64_t gaining, double* out, Scratch& scratch) {
    double *p = scratch.get<double>(scan.n), *term = scratch.get<double>(gaining);
    scan.each([&](int64_t i, int64_t g) { p[i] = i < gaining ? scan.above(g + 1, scan.s[i]) : 0; });
    double loss;
    multiversion([&]() ALWAYS_INLINE {
      for (int64_t i = 0; i < gaining; ++i) {
        const double x = p[i], e = exp_nonpositive(x < 0 ? x : -x), t = 1 + e;
        const double share = (x < 0 ? e : 1) / t, log = (x < 0 ? 0 : x) + (log_normal(t) + (e - (t - 1)) / t);
        p[i] = w[i] == 0 ? 0 : w[i] * share;
        term[i] = w[i] == 0 ? 0 : w[i] * log;
      }
      loss = sum_of<double>(gaining, [&](int64_t i) ALWAYS_INLINE { return term[i]; });
    });
    double carry = 0;  // the earlier groups' p, each times the share of this L in its own
    for (int64_t g = 0; g < scan.groups; ++g) {
      double pushed = 0;
      for (int64_t i = scan.first[g]; i < scan.first[g + 1]; ++i) {
        out[i] = weigh(carry, scan.share[i]) - p[i];
        pushed += p[i];
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

// a - b as the rounded difference `high` and its rounding error `low`, so that differences of differences are exact.
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
      // `down` sums e^s over lower labels; `up`, on the reversed list, sums e^-s over higher labels.
      const Scan<true> down(o.s, n, o.first, groups, scale, scratch, o.w);
      double* log_weight = scratch.get<double>(n);
      for (int64_t i = 0; i < n; ++i) log_weight[i] = o.w ? std::log(o.w[i]) : 0;
      double* reversed = scratch.get<double>(n);
      double* reversed_w = scratch.get<double>(n);
      for (int64_t i = 0; o.w && i < n; ++i) reversed_w[i] = o.w[n - 1 - i];
      int64_t* first = scratch.get<int64_t>(groups + 1);
      for (int64_t i = 0; i < n; ++i) reversed[i] = -o.s[n - 1 - i];
      for (int64_t g = 0; g <= groups; ++g) first[g] = n - o.first[groups - g];
      const Scan<true> up(reversed, n, first, groups, scale, scratch, o.w ? reversed_w : nullptr);

      // The largest term is kept as a difference and a logarithm, both 0 for the term 1. All terms are relative to it.
      Difference most(0, 0);
      double log = 0;
      const auto exponent = [&](double worse, double better, double logarithm) {
        return scale * Difference(worse, better).over(most) + (logarithm - log);
      };
      down.each([&](int64_t i, int64_t g) {
        if (g + 1 < groups && exponent(down.top[g + 1], o.s[i], down.log[g + 1] + log_weight[i]) > 0)
          most = Difference(down.top[g + 1], o.s[i]), log = down.log[g + 1] + log_weight[i];
      });
      const double top = scale * most.high + log;
      // `lower` and `higher` sum the terms of an item's pairs with lower and with higher labels, over all terms.
      double *lower = scratch.get<double>(n), *higher = scratch.get<double>(n);
      down.each([&](int64_t i, int64_t g) {
        lower[i] = g + 1 == groups ? -kInfinity : exponent(down.top[g + 1], o.s[i], down.log[g + 1] + log_weight[i]);
        higher[i] = g == 0 ? -kInfinity : exponent(o.s[i], -up.top[groups - g], up.log[groups - g] + log_weight[i]);
      });
      double sum, whole;
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t i = 0; i < n; ++i) lower[i] = exp_nonpositive(lower[i]), higher[i] = exp_nonpositive(higher[i]);
        sum = sum_of<double>(n, [&](int64_t i) ALWAYS_INLINE { return lower[i]; });
        whole = std::exp(-top) + sum;
        for (int64_t i = 0; i < n; ++i) lower[i] /= whole, higher[i] /= whole;
      });
      if (!o.v) {
        for (int64_t i = 0; i < n; ++i) out[i] = scale * (higher[i] - lower[i]);
        return std::isinf(top) ? top : top > 0 ? top + std::log(whole) : std::log1p(sum);
      }
      const double* v = o.v;
      for (int64_t i = 0; i < n; ++i) reversed[i] = v[n - 1 - i];
      const double* mean_lower = down.means(v, scratch);
      const double* mean_higher = up.means(reversed, scratch);
      double mean = 0;
      for (int64_t i = 0; i < n; ++i) mean += (higher[i] - lower[i]) * v[i];
      down.each([&](int64_t i, int64_t g) {
        out[i] =
            weigh(higher[i], v[i] - mean_higher[groups - g] - mean) - weigh(lower[i], mean_lower[g + 1] - v[i] - mean);
        out[i] *= scale * scale;
      });
      return 0.0;
    });
  }
};

}  // namespace

}  // namespace custom_ops

CUSTOM_OPS_LIST_LOSS(list_softmax, ListSoftmax, bool)
CUSTOM_OPS_WEIGHTED_LIST_LOSS(list_mle, ListMle, Ties, PositionWeights, int64_t)
CUSTOM_OPS_WEIGHTED_LIST_LOSS(unique_softmax, UniqueSoftmax, bool)
CUSTOM_OPS_WEIGHTED_LIST_LOSS(cosent, Cosent, double)
