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

// Returns the largest of sign * x; NaNs are ignored.
template <class A>
A largest(const A* x, int64_t n, A sign = 1) {
  A of_part[kParts];
  each_part(n, [&](int64_t part, int64_t begin, int64_t end) {
    multiversion_wide([&]() ALWAYS_INLINE {
      const A* own = x + begin;
      of_part[part] = largest_of<A>(end - begin, [=](int64_t i) ALWAYS_INLINE { return sign * own[i]; });
    });
  });
  return *std::max_element(of_part, of_part + (n < kLong ? 1 : kParts));
}

// Stores e^(x - the largest x) in `out` and returns the sum.
template <class A>
double exponentials(const A* x, int64_t n, A& top, A* out) {
  const A highest = top = largest(x, n);
  const double sum = sum_each_part_wide(n, [=](int64_t begin, int64_t end) ALWAYS_INLINE {
    const A* own = x + begin;
    A* __restrict to = out + begin;
    return sum_of<A>(end - begin, [=](int64_t i) ALWAYS_INLINE {
      const A e = exp_nonpositive(own[i] - highest);
      return to[i] = own[i] == highest ? A(1) : e;  // exact even if the largest is infinite
    });
  });
  return defined(sum, static_cast<double>(highest));
}

// The sum of p_i (log sum e^s - s_i), where p is the labels or their softmax.
struct ListSoftmax {
  bool softmax_labels;

  template <class A>
  void operator()(List<A>& list) const {
    if (tied(list.y, list.n)) return list.fill_slope(0);
    list.active = true;
    const int64_t n = list.n;
    const A* s = list.s;
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
    const double total = softmax_labels ? 1 : sum_each_part_wide(n, [=](int64_t begin, int64_t end) ALWAYS_INLINE {
      return sum_of<A>(end - begin, [=](int64_t i) ALWAYS_INLINE { return p[begin + i]; });
    });
    const A share = static_cast<A>(total / sum);
    A* slope = list.slope;
    if (!list.v) {
      const double behind = sum_each_part_wide(n, [=](int64_t begin, int64_t end) ALWAYS_INLINE {
        A* __restrict to = slope;
        const double behind = sum_of<A>(end - begin, [=](int64_t k) ALWAYS_INLINE {
          const int64_t i = begin + k;
          const A term = p[i] * scale * (top / 2 - s[i] / 2);  // the difference of halves can't overflow
          return (p[i] == 0) | (s[i] == top) ? A(0) : term;
        });
        for (int64_t i = begin; i < end; ++i) to[i] = q[i] * share - p[i] * scale;
        return behind;
      });
      list.loss = static_cast<A>(total * std::log(sum) + 2 * behind);
    } else {
      const A* v = list.v;
      const double moved = sum_each_part_wide(n, [=](int64_t begin, int64_t end) ALWAYS_INLINE {
        return sum_of<A>(end - begin, [=](int64_t i) ALWAYS_INLINE { return q[begin + i] * v[begin + i]; });
      });
      const A mean = static_cast<A>(moved / sum);
      each_part(n, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) slope[i] = q[i] * share * (v[i] - mean);
      });
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
    const double highest = largest(s, n);
    if (scale * (highest + largest(s, n, -1.0)) <= kExponents) sum_narrow(highest);
    else sum_wide();
  }

 private:
  // Sums from the end, with exponentials relative to the highest score.
  void sum_narrow(double highest) {
    each_part(n, [&](int64_t, int64_t begin, int64_t end) {
      multiversion_wide([=, s = s, weight = weight, scale = scale, share = share]() ALWAYS_INLINE {
        double* __restrict e = share;
        for (int64_t i = begin; i < end; ++i) e[i] = exp_nonpositive(scale * (s[i] - highest));
        for (int64_t i = begin; weight && i < end; ++i) e[i] *= weight[i];
      });
    });
    double sum = 0;
    for (int64_t g = groups - 1; g >= 0; --g) {
      later[g] = sum;
      double own = 0;
      for (int64_t i = begin(g); i < begin(g + 1); ++i) own += share[i];
      if (kGrouped) whole[g] = own;
      log[g] = sum += own;
    }
    each_part(n, [&](int64_t, int64_t from, int64_t to) {
      multiversion_wide([&]() ALWAYS_INLINE {
        double* __restrict e = share;
        const double* sum = log;
        each(from, to, [=](int64_t i, int64_t g) ALWAYS_INLINE { e[i] /= sum[g]; });
      });
    });
    each_part(groups, [&](int64_t, int64_t from, int64_t to) {
      multiversion_wide([&]() ALWAYS_INLINE {
        double* __restrict rest = later;
        double* __restrict own = whole;
        double* __restrict sum = log;
        for (int64_t g = from; g < to; ++g) {
          rest[g] /= sum[g];
          if (kGrouped) own[g] /= sum[g];
          sum[g] = log_normal(sum[g]);
        }
      });
      std::fill(top + from, top + to, highest);
    });
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

  // Calls f(item, group) for the items [from, to) in order.
  template <class F>
  ALWAYS_INLINE void each(int64_t from, int64_t to, const F& f) const {
    if constexpr (!kGrouped) {
      for (int64_t i = from; i < to; ++i) f(i, i);
    } else {
      int64_t g = from ? std::upper_bound(first, first + groups, from) - first - 1 : 0;
      for (int64_t i = from; i < to; ++g)
        for (const int64_t stop = std::min(first[g + 1], to); i < stop; ++i) f(i, g);
    }
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
    each_part(n, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = static_cast<double>(x[order[i]]);
    });
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
  each_part(list.n, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) list.slope[ordered.order[i]] = static_cast<A>(out[i]);
  });
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
    each_part(last, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)  // (2^(n-1-i) - 1) / (2^(n-1) - 1), 1 / log2(2 + i) or 1
        w[i] = weights == PositionWeights::EXPONENTIAL ? (std::exp2(-static_cast<double>(i)) - least) / (1 - least)
               : weights == PositionWeights::DISCOUNT  ? discount_at(i)
                                                       : 1;
    });
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
          if (!o.v) return slope(scan, w, out, scratch);
          product(scan, w, o.v, scan.means(o.v, scratch), out);
          return 0.0;
        });
  }

  template <bool kGrouped>
  static double slope(const Scan<kGrouped>& scan, const double* w, double* out, Scratch& scratch) {
    double* totals = kGrouped ? scratch.get<double>(scan.groups) : nullptr;
    double* carries = scratch.get<double>(scan.groups);
    // `carry`: the earlier groups' weights, each times the share of this group's L in that group's
    double carry = 0;
    for (int64_t g = 0; g < scan.groups; ++g) {
      double total = 0;
      for (int64_t i = scan.begin(g); i < scan.begin(g + 1); ++i) total += w[i];
      if (kGrouped) totals[g] = total;
      carries[g] = carry;
      carry = weigh(carry + total, scan.later[g]);
    }
    return sum_each_part(scan.n, [&](int64_t begin, int64_t end) {
      double loss = 0;
      scan.each(begin, end, [&](int64_t i, int64_t g) {
        const double miss = scan.miss(i, g);
        loss += weigh(w[i], miss < 0.5 ? -std::log1p(-miss) : scan.above(g, scan.s[i]));
        out[i] = weigh(carries[g] + (kGrouped ? totals[g] - w[i] : 0), scan.share[i]) - weigh(w[i], miss);
      });
      return loss;
    });
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
      each_part(n, [&](int64_t, int64_t begin, int64_t end) {
        double gain = 0;
        scan.each(begin, end, [&](int64_t i, int64_t g) {
          if (i == begin || i == o.first[g]) gain = relative_gain(o.y[i], highest, exponential) / most;
          w[i] = gain;
        });
      });
      const int64_t gaining = std::find(w, w + n, 0.0) - w;  // items, which come first
      for (int64_t i = 0; o.w && i < gaining; ++i) w[i] *= o.w[i];
      if (!o.v) return slope(scan, w, gaining, out, scratch);
      product(scan, w, o.v, scan.means(o.v, scratch), out);
      return 0.0;
    });
  }

  static double slope(const Scan<true>& scan, const double* w, int64_t gaining, double* out, Scratch& scratch) {
    double *p = scratch.get<double>(scan.n), *term = scratch.get<double>(gaining);
    const double loss = sum_each_part(scan.n, [&](int64_t begin, int64_t end) {
      scan.each(begin, end, [&](int64_t i, int64_t g) { p[i] = i < gaining ? scan.above(g + 1, scan.s[i]) : 0; });
      const int64_t stop = std::max(begin, std::min(end, gaining));
      double sum = 0;
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t i = begin; i < stop; ++i) {
          const double x = p[i], e = exp_nonpositive(x < 0 ? x : -x), t = 1 + e;
          const double share = (x < 0 ? e : 1) / t, log = (x < 0 ? 0 : x) + (log_normal(t) + (e - (t - 1)) / t);
          p[i] = w[i] == 0 ? 0 : w[i] * share;
          term[i] = w[i] == 0 ? 0 : w[i] * log;
        }
        sum = sum_of<double>(stop - begin, [&](int64_t i) ALWAYS_INLINE { return term[begin + i]; });
      });
      return sum;
    });
    double* carries = scratch.get<double>(scan.groups);
    double carry = 0;  // the earlier groups' p, each times the share of this L in its own
    for (int64_t g = 0; g < scan.groups; ++g) {
      double pushed = 0;
      for (int64_t i = scan.first[g]; i < scan.first[g + 1]; ++i) pushed += p[i];
      carries[g] = carry;
      carry = weigh(carry, scan.later[g]) + pushed;
    }
    each_part(scan.n, [&](int64_t, int64_t begin, int64_t end) {
      scan.each(begin, end, [&](int64_t i, int64_t g) { out[i] = weigh(carries[g], scan.share[i]) - p[i]; });
    });
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
      double* reversed = scratch.get<double>(n);
      double* reversed_w = scratch.get<double>(o.w ? n : 0);
      each_part(n, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          log_weight[i] = o.w ? std::log(o.w[i]) : 0;
          reversed[i] = -o.s[n - 1 - i];
          if (o.w) reversed_w[i] = o.w[n - 1 - i];
        }
      });
      int64_t* first = scratch.get<int64_t>(groups + 1);
      for (int64_t g = 0; g <= groups; ++g) first[g] = n - o.first[groups - g];
      const Scan<true> up(reversed, n, first, groups, scale, scratch, o.w ? reversed_w : nullptr);

      // The largest term is kept as a difference and a logarithm, both 0 for the term 1. All terms are relative to it.
      struct Term {
        Difference apart{0, 0};
        double log = 0;
      };
      const auto over = [&](const Term& term, const Term& other) {
        return scale * term.apart.over(other.apart) + (term.log - other.log);
      };
      const auto below = [&](int64_t i, int64_t g) {
        return Term{Difference(down.top[g + 1], o.s[i]), down.log[g + 1] + log_weight[i]};
      };
      Term largest[kParts], most;
      each_part(n, [&](int64_t part, int64_t begin, int64_t end) {
        Term own;
        down.each(begin, end, [&](int64_t i, int64_t g) {
          if (g + 1 < groups && over(below(i, g), own) > 0) own = below(i, g);
        });
        largest[part] = own;
      });
      for (const Term& of_part : largest)
        if (over(of_part, most) > 0) most = of_part;
      const double top = scale * most.apart.high + most.log;
      // `lower` and `higher` sum the terms of an item's pairs with lower and with higher labels, over all terms.
      double *lower = scratch.get<double>(n), *higher = scratch.get<double>(n);
      const double sum = sum_each_part(n, [&](int64_t begin, int64_t end) {
        down.each(begin, end, [&](int64_t i, int64_t g) {
          const int64_t h = groups - g;
          lower[i] = g + 1 == groups ? -kInfinity : over(below(i, g), most);
          higher[i] = g == 0 ? -kInfinity : over({Difference(o.s[i], -up.top[h]), up.log[h] + log_weight[i]}, most);
        });
        double sum = 0;
        multiversion([&]() ALWAYS_INLINE {
          for (int64_t i = begin; i < end; ++i)
            lower[i] = exp_nonpositive(lower[i]), higher[i] = exp_nonpositive(higher[i]);
          sum = sum_of<double>(end - begin, [&](int64_t i) ALWAYS_INLINE { return lower[begin + i]; });
        });
        return sum;
      });
      const double whole = std::exp(-top) + sum;
      each_part(n, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          lower[i] /= whole, higher[i] /= whole;
          out[i] = scale * (higher[i] - lower[i]);
        }
      });
      if (!o.v) return std::isinf(top) ? top : top > 0 ? top + std::log(whole) : std::log1p(sum);
      const double* v = o.v;
      for (int64_t i = 0; i < n; ++i) reversed[i] = v[n - 1 - i];
      const double* mean_lower = down.means(v, scratch);
      const double* mean_higher = up.means(reversed, scratch);
      double mean = 0;
      for (int64_t i = 0; i < n; ++i) mean += (higher[i] - lower[i]) * v[i];
      down.each(0, n, [&](int64_t i, int64_t g) {
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
