// NDCG of a list that NeuralSort has sorted softly. Row i of the relaxed permutation is the softmax over j of z_ij =
// a_i x_j - b_j, with a_i = n + 1 - 2 i (i from 1), x the scores over the temperature, and b_j the sum of |x_j - x_k|
// over k. In the order of descending scores, z_ij rises up to j = i and falls after it. A row is therefore summed over
// the items around its own whose term isn't 0, one row at a time, in O(n) memory. Where two neighbours are so far apart
// that no row has terms on both sides, the list is divided into segments. z_ij - z_ii doesn't depend on items outside
// of the segment of i and j, so each segment has distances, slopes and an origin of its own.
#include "list_loss.h"

#include <cmath>
#include <limits>

namespace custom_ops {
namespace {

constexpr int64_t kPartRows = 4096;  // the least number of rows per thread

template <class A>
constexpr double kVanishes = std::is_same_v<A, double> ? -745.0 : -86.0;  // exponentials below this are 0

// The items of a list in double, by descending score.
struct Sorted {
  int64_t n;
  const int32_t* order;
  int64_t *first, *last;  // bounds of each item's segment
  int64_t *start, *end;   // bounds of the items with the same score
  double* lead;           // per item: the items below it minus the items above it, within its segment
  double *x, *b;

  template <class A>
  Sorted(const List<A>& list, double temperature) : n(list.n) {
    Scratch& scratch = list.scratch;
    order = order_descending(list.s, n, scratch);
    first = scratch.get<int64_t>(n);
    last = scratch.get<int64_t>(n);
    start = scratch.get<int64_t>(n);
    end = scratch.get<int64_t>(n);
    lead = scratch.get<double>(n);
    x = scratch.get<double>(n);
    b = scratch.get<double>(n);
    const auto ahead = [&](int64_t i, int64_t j) {  // the distance from item j up to item i
      const double high = static_cast<double>(list.s[order[i]]), low = static_cast<double>(list.s[order[j]]);
      return high == low ? 0 : (high - low) / temperature;
    };
    for (int64_t i = 0; i < n; ++i) {
      const double step = i ? ahead(i - 1, i) : 0;
      start[i] = i && step == 0 ? start[i - 1] : i;
      first[i] = i && step <= -kVanishes<A> ? first[i - 1] : i;
      x[i] = -ahead(first[i], i);
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      end[i] = i + 1 < n && start[i + 1] == start[i] ? end[i + 1] : i + 1;
      last[i] = i + 1 < n && first[i + 1] == first[i] ? last[i + 1] : i + 1;
    }
    for (int64_t i = 0; i < n; ++i) lead[i] = static_cast<double>(last[i] - end[i] - (start[i] - first[i]));
    opposed(x, b, scratch);
    for (int64_t i = 0; i < n; ++i) b[i] = lead[i] * x[i] - b[i];
  }

  // Stores, for each item, the sum of t over the items below it in its segment minus the sum over those above it.
  void opposed(const double* t, double* out, Scratch& scratch) const {
    double* before = scratch.get<double>(n + 1);
    before[0] = 0;
    for (int64_t i = 0; i < n; ++i) before[i + 1] = before[i] + t[i];
    for (int64_t i = 0; i < n; ++i) out[i] = (before[last[i]] - before[end[i]]) - (before[start[i]] - before[first[i]]);
  }

  double slope_of_row(int64_t i) const { return static_cast<double>(last[i] + first[i] - 1 - 2 * i); }
  // Returns z_ij - z_ii, where z_ii is the largest of the row.
  ALWAYS_INLINE double logit(int64_t i, int64_t j) const { return slope_of_row(i) * (x[j] - x[i]) - (b[j] - b[i]); }

  // Finds the items between which the terms of row i don't vanish.
  template <class A>
  void reach(int64_t i, int64_t& begin, int64_t& stop) const {
    int64_t low = first[i], high = i;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (logit(i, middle) < kVanishes<A>) low = middle + 1;
      else high = middle;
    }
    begin = low;
    low = i + 1, high = last[i];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (logit(i, middle) < kVanishes<A>) high = middle;
      else low = middle + 1;
    }
    stop = low;
  }
};

// A part's sums over its rows, for each column: the sum of w_ij, and the sum of w_ij (lead of the column - slope of the
// row). w_ij is minus the derivative of the loss with respect to z_ij, or its tangent.
struct Totals {
  double *own, *ahead;
};

template <class A>
struct NeuralSortRows {
  const Sorted& items;
  const double* discount;
  const A* gain;
  const double* u;  // the tangent of x, or null if the slope is wanted
  const double* q;  // per item, the part of its logits' tangent that comes from other items

  // Returns these rows' share of the metric.
  double run(int64_t begin, int64_t end, const Totals& totals) const {
    Scratch scratch;
    A* e = scratch.get<A>(items.n);
    A* t = scratch.get<A>(items.n);
    double found = 0;
    for (int64_t i = begin; i < end; ++i)
      multiversion([&]() ALWAYS_INLINE { found += u ? row<true>(i, totals, e, t) : row<false>(i, totals, e, t); });
    return found;
  }

 private:
  template <bool kTangent>
  ALWAYS_INLINE inline double row(int64_t i, const Totals& totals, A* __restrict e, A* __restrict t) const {
    int64_t begin, stop;
    items.reach<A>(i, begin, stop);
    const int64_t m = stop - begin;
    const double *x = items.x + begin, *b = items.b + begin, *lead = items.lead + begin;
    const double slope = items.slope_of_row(i), own_x = items.x[i], own_b = items.b[i];
    const A* __restrict g = gain + begin;
    for (int64_t j = 0; j < m; ++j) t[j] = static_cast<A>(slope * (x[j] - own_x) - (b[j] - own_b));
    for (int64_t j = 0; j < m; ++j) e[j] = exp_nonpositive(t[j]);
    const double sum = sum_of<A>(m, [&](int64_t j) ALWAYS_INLINE { return e[j]; });
    const double found = sum_of<A>(m, [&](int64_t j) ALWAYS_INLINE { return e[j] * g[j]; }) / sum;
    const A share = static_cast<A>(discount[i] / sum), mean = static_cast<A>(found);
    if constexpr (kTangent) {
      const double own = (slope - items.lead[i]) * u[i] + q[i];  // relative to this, the tangents are near 0
      for (int64_t j = 0; j < m; ++j) t[j] = static_cast<A>((slope - lead[j]) * u[begin + j] + (q[begin + j] - own));
      const double moved = sum_of<A>(m, [&](int64_t j) ALWAYS_INLINE { return e[j] * t[j]; }) / sum;
      const A centre = static_cast<A>(moved);
      const A of_found = static_cast<A>(
          sum_of<A>(m, [&](int64_t j) ALWAYS_INLINE { return e[j] * (t[j] - centre) * (g[j] - mean); }) / sum);
      for (int64_t j = 0; j < m; ++j) e[j] *= share * ((t[j] - centre) * (g[j] - mean) - of_found);
    } else {
      for (int64_t j = 0; j < m; ++j) e[j] *= share * (g[j] - mean);
    }
    double* __restrict of_own = totals.own + begin;
    double* __restrict of_ahead = totals.ahead + begin;
    const double rounded = sum_of<double>(m, [&](int64_t j) ALWAYS_INLINE {
      const double w = static_cast<double>(e[j]);
      of_own[j] += w;
      of_ahead[j] += w * (lead[j] - slope);
      return w;
    });
    // The row sums to 0, so its rounding error goes to its own item rather than to items far away.
    of_own[i - begin] -= rounded;
    of_ahead[i - begin] -= rounded * (items.lead[i] - slope);
    return discount[i] * found;
  }
};

// Returns whether a score is NaN, or two items with different gains are at the same infinity, so their order has no
// limit.
template <class A>
bool undefined(const List<A>& list) {
  A label[2];
  bool found[2] = {false, false};
  for (int64_t i = 0; i < list.n; ++i) {
    if (list.s[i] != list.s[i]) return true;
    if (!std::isinf(list.s[i])) continue;
    const bool up = list.s[i] > 0;
    const A gaining = std::max(list.y[i], A(0));  // a label below 0 has no gain
    if (std::exchange(found[up], true) && label[up] != gaining) return true;
    label[up] = gaining;
  }
  return false;
}

struct NeuralSort {
  double temperature;
  int64_t k;
  bool exponential;

  template <class A>
  void operator()(List<A>& list) const {
    Scratch& scratch = list.scratch;
    const int64_t n = list.n, rows = std::min(k, n);
    const int32_t* ideal = order_descending(list.y, n, scratch);
    const double highest = static_cast<double>(list.y[ideal[0]]);
    list.active = highest > 0 && list.y[ideal[0]] != list.y[ideal[n - 1]];
    if (!list.active) return list.fill_slope(0);
    if (undefined(list)) return list.fill_nan();
    double* discount = scratch.get<double>(rows);
    double best = 0;
    for (int64_t i = 0; i < rows; ++i) {
      discount[i] = std::log(2.0) / std::log(static_cast<double>(i + 2));
      best += discount[i] * relative_gain(static_cast<double>(list.y[ideal[i]]), highest, exponential);
    }
    const Sorted items(list, temperature);
    A* gains = scratch.get<A>(n);
    for (int64_t i = 0; i < n; ++i)
      gains[i] =
          static_cast<A>(relative_gain(static_cast<double>(list.y[items.order[i]]), highest, exponential) / best);
    double *u = nullptr, *q = nullptr;
    if (list.v) {
      u = scratch.get<double>(n);
      q = scratch.get<double>(n);
      for (int64_t i = 0; i < n; ++i) u[i] = static_cast<double>(list.v[items.order[i]]) / temperature;
      items.opposed(u, q, scratch);
    }

    const NeuralSortRows<A> kernel{items, discount, gains, u, q};
    const int64_t parts = std::clamp<int64_t>(rows / kPartRows, 1, kParts);
    double found[kParts] = {};
    double* own = sum_parts(2 * n, parts, scratch, [&](int64_t part, double* sums) {
      found[part] = kernel.run(rows * part / parts, rows * (part + 1) / parts, {sums, sums + n});
    });
    const double* ahead = own + n;

    // `others` is the part of the gradient that comes from other items' distances to this item.
    double* others = scratch.get<double>(n);
    items.opposed(own, others, scratch);
    for (int64_t i = 0; i < n; ++i) list.slope[items.order[i]] = static_cast<A>((ahead[i] + others[i]) / temperature);
    list.loss = static_cast<A>(1 - std::accumulate(found, found + parts, 0.0));
  }
};

}  // namespace

}  // namespace custom_ops

CUSTOM_OPS_LIST_LOSS(neural_sort, NeuralSort, double, int64_t, bool)
