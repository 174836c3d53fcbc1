// Losses of smooth ranks, r_i = 1 + the sum over j != i of sigmoid((s_j - s_i) / temperature). A loss is a metric in
// which these replace the ranks of the relevant items. Only the rows of relevant items are computed, in O(n) memory.
#include "list_loss.h"

#include <cmath>
#include <limits>

namespace custom_ops {

CUSTOM_OPS_ENUM(SmoothMetric, NDCG, NDCG_LINEAR, MRR, AVERAGE_PRECISION)

namespace {

constexpr int64_t kColumns = 512;  // items whose values fit into the first-level cache
constexpr int64_t kRows = 64;      // rows summed in A before the sum goes on in double

// ---------------------------------------------------------------- pairs

// A pair type keeps one number per score, and computes from two of them p = sigmoid(scale (other - own)) and q = 1 - p
// without cancellation.
template <class A>
struct Ratio {  // keeps e^(scale (s - middle)), so a pair takes a quotient and only an item an exponential
  // Within this range of the exponent nothing overflows.
  static constexpr double kRange = std::is_same_v<A, double> ? 700 : 80;
  static constexpr A kNone = 0;  // the number kept in a gap
  double scale, middle;
  ALWAYS_INLINE A keep(A s) const { return static_cast<A>(exp_nonpositive(scale * (static_cast<double>(s) - middle))); }
  ALWAYS_INLINE void compare(A own, A other, A& p, A& q) const {
    const A inverse = 1 / (own + other);
    p = other * inverse, q = own * inverse;
  }
};
template <class A>
struct Difference {  // keeps s / 2, whose differences can't overflow, for any range; an infinite s is larger than all
  static constexpr A kNone = -std::numeric_limits<A>::infinity(), kMost = std::numeric_limits<A>::max();
  A twice;  // 2 scale
  ALWAYS_INLINE A keep(A s) const {
    const A half = s / 2;
    return half > kMost ? kMost : half < -kMost ? -kMost : half;
  }
  ALWAYS_INLINE void compare(A own, A other, A& p, A& q) const {
    const A d = (other - own) * twice, e = exp_nonpositive(-std::abs(d)), inverse = 1 / (1 + e);
    p = (d < 0 ? e : 1) * inverse, q = (d < 0 ? 1 : e) * inverse;
  }
};

template <class A, class Pair>
ALWAYS_INLINE inline double sum_ranks(const Pair& pair, A own, const A* __restrict other, int64_t n) {
  return sum_of<A>(n, [&](int64_t j) ALWAYS_INLINE {
    A p, q;
    pair.compare(own, other[j], p, q);
    return p;
  });
}

template <class A, class Pair>
ALWAYS_INLINE inline double sum_moves(const Pair& pair, A own, const A* __restrict other, A own_v,
                                      const A* __restrict v, int64_t n) {
  return sum_of<A>(n, [&](int64_t j) ALWAYS_INLINE {
    A p, q;
    pair.compare(own, other[j], p, q);
    return p * q * (v[j] - own_v);
  });
}

// Adds a row's slope with respect to each column to `out`, and returns the sum, which is subtracted from its own item.
template <class A, class Pair>
ALWAYS_INLINE inline double give_slope(const Pair& pair, A own, const A* __restrict other, A weight, A* __restrict out,
                                       int64_t n) {
  return sum_of<A>(n, [&](int64_t j) ALWAYS_INLINE {
    A p, q;
    pair.compare(own, other[j], p, q);
    const A given = weight * p * q;
    out[j] += given;
    return given;
  });
}

template <class A, class Pair>
ALWAYS_INLINE inline double give_product(const Pair& pair, A own, const A* __restrict other, A own_v,
                                         const A* __restrict v, A weight, A moved, A* __restrict out, int64_t n) {
  return sum_of<A>(n, [&](int64_t j) ALWAYS_INLINE {
    A p, q;
    pair.compare(own, other[j], p, q);
    const A given = p * q * (weight * (q - p) * (v[j] - own_v) + moved);
    out[j] += given;
    return given;
  });
}

// ---------------------------------------------------------------- metrics

// A rank and the rank among the relevant items, or their tangents, or the loss's derivatives with respect to them.
struct Ranks {
  double all, relevant;
};

// An item's share of the metric as a function of its ranks; `gain` is its gain over the gain of the ideal ranking.
struct Share {
  SmoothMetric metric;
  double gain;

  // Returns the share, and the derivative of the loss, which is 1 - the metric.
  ALWAYS_INLINE double value(Ranks r, Ranks& derivative) const {
    double value = gain / r.all;
    switch (metric) {
      case SmoothMetric::MRR: derivative = {value / r.all, 0}; break;
      case SmoothMetric::AVERAGE_PRECISION:
        derivative = {value * r.relevant / r.all, -value};
        value *= r.relevant;
        break;
      default: {
        const double log = log_normal(1 + r.all);
        value = gain * std::log(2.0) / log;
        derivative = {value / ((1 + r.all) * log), 0};
      }
    }
    return value;
  }
  // Returns the tangent of the derivative along t.
  Ranks second(Ranks r, Ranks t) const {
    const double square = r.all * r.all;
    switch (metric) {
      case SmoothMetric::MRR: return {-2 * gain / (square * r.all) * t.all, 0};
      case SmoothMetric::AVERAGE_PRECISION:
        return {gain * (t.relevant - 2 * r.relevant / r.all * t.all) / square, gain * t.all / square};
      default: {
        const double log = log_normal(1 + r.all);
        return {-gain * std::log(2.0) * (log + 2) / ((1 + r.all) * (1 + r.all) * log * log * log) * t.all, 0};
      }
    }
  }
};

// Stores each relevant item's gain over the total of the ideal ranking, and returns the number of relevant items. The
// labels y are in descending order.
template <class A>
int64_t relative_gains(SmoothMetric metric, const A* y, int64_t n, double* gain) {
  const bool exponential = metric == SmoothMetric::NDCG,
             discounted = exponential || metric == SmoothMetric::NDCG_LINEAR;
  double total = 0;
  int64_t relevant = 0;
  for (; relevant < n && !(y[relevant] <= 0); ++relevant) {
    double g;
    if (relevant > 0 && y[relevant] == y[relevant - 1]) g = gain[relevant - 1];
    else g = relative_gain(static_cast<double>(y[relevant]), static_cast<double>(y[0]), exponential);
    gain[relevant] = g;
    total += discounted ? g * discount_at(relevant) : g;
  }
  for (int64_t i = 0; i < relevant; ++i) gain[i] /= total;
  return relevant;
}

// ---------------------------------------------------------------- one list

// The columns are the relevant items, then, from a whole number of lanes on, the others; n is their padded number, so
// no sum has a rest. Gaps hold no item and add nothing to a sum.
int64_t padded(int64_t n) { return (n + kSumLanes - 1) / kSumLanes * kSumLanes; }

// Calls f(whether the columns are relevant, first column, columns) for every parts-th tile of columns.
template <class F>
void each_tile(int64_t relevant, int64_t n, int64_t part, int64_t parts, const F& f) {
  const int64_t others = padded(relevant);
  for (int64_t begin = 0, tile = 0; begin < n; ++tile) {
    const int64_t end = std::min(begin + kColumns, begin < others ? others : n);
    if (tile % parts == part) f(begin < others, begin, end - begin);
    begin = end;
  }
}

int64_t parts_of_rows(int64_t relevant, int64_t n) {
  return parts_of(static_cast<double>(relevant) * static_cast<double>(n));
}

// Returns the sums of row(i, first column, columns) over all columns, for each row.
template <class A, class Row>
Ranks* sum_rows(int64_t relevant, int64_t n, Scratch& scratch, const Row& row) {
  Ranks* sums = scratch.get<Ranks>(relevant);
  std::fill(sums, sums + relevant, Ranks{0, 0});
  const int64_t parts = parts_of_rows(relevant, n);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    each_tile(relevant, n, 0, 1, [&](bool among, int64_t begin, int64_t columns) {
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t i = relevant * first / parts; i < relevant * last / parts; ++i) {
          const double sum = row(i, begin, columns);
          sums[i].all += sum;
          if (among) sums[i].relevant += sum;
        }
      });
    });
  });
  return sums;
}

// Returns the sums of all rows for each column; row(i, whether the columns are relevant, first column, columns, out)
// adds a row.
template <class A, class Row>
double* give_rows(int64_t relevant, int64_t n, Scratch& scratch, const Row& row) {
  const int64_t parts = parts_of_rows(relevant, n);
  double* out = scratch.get<double>(n);
  const double* own = sum_parts(relevant, parts, scratch, [&](int64_t part, double* rows) {
    each_tile(relevant, n, part, parts, [&](bool among, int64_t begin, int64_t columns) {
      std::fill(out + begin, out + begin + columns, 0.0);
      for (int64_t first = 0; first < relevant; first += kRows) {
        A tile[kColumns] = {};
        multiversion([&]() ALWAYS_INLINE {
          for (int64_t i = first; i < std::min(first + kRows, relevant); ++i)
            rows[i] -= row(i, among, begin, columns, tile);
        });
        for (int64_t j = 0; j < columns; ++j) out[begin + j] += tile[j];
      }
    });
  });
  for (int64_t i = 0; i < relevant; ++i) out[i] += own[i];
  return out;
}

// `item` has the item of each of the n columns, or -1 in a gap.
template <class A, class Pair>
void smooth_rank_of(List<A>& list, const int32_t* item, int64_t n, const Pair& pair, double scale, SmoothMetric metric,
                    const double* gain, int64_t relevant) {
  Scratch& scratch = list.scratch;
  A* kept = scratch.get<A>(n);
  each_part(n, [&](int64_t, int64_t begin, int64_t end) {
    multiversion([&]() ALWAYS_INLINE {
      for (int64_t i = begin; i < end; ++i) kept[i] = item[i] < 0 ? Pair::kNone : pair.keep(list.s[item[i]]);
    });
  });
  Ranks* rank = sum_rows<A>(relevant, n, scratch, [&](int64_t i, int64_t begin, int64_t columns) ALWAYS_INLINE {
    return sum_ranks<A>(pair, kept[i], kept + begin, columns);
  });
  struct Weights {
    A weight[2], moved[2];  // [0] for irrelevant columns, [1] for relevant ones
  };
  Weights* weights = scratch.get<Weights>(relevant);
  double metric_value = 0;
  for (int64_t i = 0; i < relevant; ++i) {
    rank[i] = {rank[i].all + 0.5, rank[i].relevant + 0.5};  // the item itself counts as 1, not as sigmoid(0)
    Ranks w;
    metric_value += Share{metric, gain[i]}.value(rank[i], w);
    weights[i].weight[0] = static_cast<A>(scale * w.all);
    weights[i].weight[1] = static_cast<A>(scale * (w.all + w.relevant));
  }
  list.loss = static_cast<A>(1 - metric_value);
  const double* out;
  if (!list.v) {
    out = give_rows<A>(relevant, n, scratch,
                       [&](int64_t i, bool among, int64_t begin, int64_t columns, A* tile) ALWAYS_INLINE {
                         return give_slope<A>(pair, kept[i], kept + begin, weights[i].weight[among], tile, columns);
                       });
  } else {
    A* v = scratch.get<A>(n);
    for (int64_t j = 0; j < n; ++j) v[j] = item[j] < 0 ? A(0) : list.v[item[j]];
    const Ranks* moves =
        sum_rows<A>(relevant, n, scratch, [&](int64_t i, int64_t begin, int64_t columns) ALWAYS_INLINE {
          return sum_moves<A>(pair, kept[i], kept + begin, v[i], v + begin, columns);
        });
    for (int64_t i = 0; i < relevant; ++i) {
      const Ranks w = Share{metric, gain[i]}.second(rank[i], {scale * moves[i].all, scale * moves[i].relevant});
      weights[i].moved[0] = static_cast<A>(scale * w.all);
      weights[i].moved[1] = static_cast<A>(scale * (w.all + w.relevant));
      for (A& weight : weights[i].weight) weight *= static_cast<A>(scale);
    }
    out = give_rows<A>(relevant, n, scratch,
                       [&](int64_t i, bool among, int64_t begin, int64_t columns, A* tile) ALWAYS_INLINE {
                         const Weights& w = weights[i];
                         return give_product<A>(pair, kept[i], kept + begin, v[i], v + begin, w.weight[among],
                                                w.moved[among], tile, columns);
                       });
  }
  each_part(n, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      if (item[j] >= 0) list.slope[item[j]] = static_cast<A>(out[j]);
  });
}

// Returns whether a relevant item and another one are at the same infinity, so their order has no limit.
template <class A>
bool undefined(const List<A>& list, const int32_t* item, int64_t relevant, int64_t columns) {
  for (const A end : {std::numeric_limits<A>::infinity(), -std::numeric_limits<A>::infinity()}) {
    const auto there = [&](int32_t i) { return i >= 0 && list.s[i] == end; };
    if (std::any_of(item, item + relevant, there) && std::count_if(item, item + columns, there) > 1) return true;
  }
  return false;
}

struct SmoothRank {
  double temperature;
  SmoothMetric metric;

  template <class A>
  void operator()(List<A>& list) const {
    const int64_t n = list.n;
    const int32_t* order = order_descending(list.y, n, list.scratch);
    const A* y = gather(list.y, order, n, list.scratch);
    double* gain = list.scratch.template get<double>(n);
    const int64_t relevant = relative_gains(metric, y, n, gain);
    const bool tied = metric == SmoothMetric::AVERAGE_PRECISION ? relevant == n : y[0] == y[n - 1];
    list.active = relevant > 0 && !tied;
    if (!list.active) return list.fill_slope(0);
    const Range range = list.range();
    const double scale = 1 / temperature;
    const int64_t others = padded(relevant), columns = others + padded(n - relevant);
    int32_t* item = list.scratch.template get<int32_t>(columns);
    std::fill(item, item + columns, -1);
    std::copy(order, order + relevant, item);
    std::copy(order + relevant, order + n, item + others);
    if (scale * (range.high - range.low) <= 2 * Ratio<A>::kRange)
      return smooth_rank_of<A>(list, item, columns, Ratio<A>{scale, range.middle()}, scale, metric, gain, relevant);
    if (undefined(list, item, relevant, columns)) return list.fill_nan();
    const Difference<A> pair{static_cast<A>(2 * scale)};
    smooth_rank_of<A>(list, item, columns, pair, scale, metric, gain, relevant);
  }
};

}  // namespace

}  // namespace custom_ops

CUSTOM_OPS_LIST_LOSS(smooth_rank, SmoothRank, double, SmoothMetric)
