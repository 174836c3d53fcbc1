// Pairwise losses.
#include "pairs.h"

namespace custom_ops {

CUSTOM_OPS_ENUM(PairFunction, LOGISTIC, SOFT_ZERO_ONE, EXPONENTIAL)

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
  PairFunction phi;
  double sigma;
  bool normalize;

  template <class A>
  void operator()(List<A>& list) const {
    const ByLabel<A> items(list);
    const double scale = normalize && items.weight > 0 ? 1 / items.weight : 1;
    switch (phi) {
      case PairFunction::LOGISTIC: return pair_loss<Logistic>(list, items, sigma, scale);
      case PairFunction::SOFT_ZERO_ONE: return pair_loss<SoftZeroOne>(list, items, sigma, scale);
      case PairFunction::EXPONENTIAL: return pair_loss<Exponential>(list, items, sigma, scale);
    }
  }
};

// ---------------------------------------------------------------- hinge

// The pairs of an item with score `at` that violate the margin, weighted by the other items: their number and, if the
// template arguments ask for them, the sum of the violations, the sum of their squares, and the sum of v over the other
// items.
template <bool kSum, bool kSquares, bool kV>
struct Violations {
  double count = 0, sum = 0, squares = 0, v = 0, at = 0;

  // Moves the item away from the others. Every term is positive, so nothing cancels, however far apart the scores are.
  void move(double to) {
    if constexpr (!kSum) return;
    if (count > 0 && to != at) {
      const double step = std::abs(to - at), more = count * step;
      if constexpr (kSquares) squares += step * (2 * sum + more);
      sum += more;
    }
    at = to;
  }
  void add(double violation, double of_v, double w) {
    count += w;
    if constexpr (kSum) sum += w * violation;
    if constexpr (kSquares) squares += w * violation * violation;
    if constexpr (kV) v += w * of_v;
  }
  void operator+=(const Violations& o) { count += o.count, sum += o.sum, squares += o.squares, v += o.v; }
};

// Violations of the items added so far, by label.
template <bool... kWanted>
class Counters {
 public:
  using Of = Violations<kWanted...>;

  Counters(int64_t levels, Scratch& scratch) : levels_(levels), tree_(scratch.get<Of>(levels + 1)) {
    std::fill(tree_, tree_ + levels + 1, Of());
  }
  void add(int64_t level, double violation, double v, double w, double at) {
    for (int64_t k = level + 1; k <= levels_; k += k & -k) tree_[k].move(at), tree_[k].add(violation, v, w);
  }
  // Returns the violations of all levels before `level`.
  Of before(int64_t level, double at) {
    Of all;
    for (int64_t k = level; k > 0; k -= k & -k) tree_[k].move(at), all += tree_[k];
    return all;
  }

 private:
  int64_t levels_;
  Of* tree_;  // a Fenwick tree
};

constexpr int64_t kFewLevels = 5;  // the sums up to the last level are never read

// The same for few levels in one vector, in which a lane holds the sums of the levels up to its own.
template <bool kSum, bool kSquares, bool kV>
class FewCounters {
 public:
  using Of = Violations<kSum, kSquares, kV>;

  ALWAYS_INLINE void add(int64_t level, double violation, double v, double w, double at) {
    move(at);
    const V none = {};
    const I counted = I{0, 1, 2, 3} >= level;
    count_ += counted ? none + w : none;
    if constexpr (kSum) sum_ += counted ? none + w * violation : none;
    if constexpr (kSquares) squares_ += counted ? none + w * violation * violation : none;
    if constexpr (kV) v_ += counted ? none + w * v : none;
  }
  ALWAYS_INLINE Of before(int64_t level, double at) {
    if (level == 0) return {};
    move(at);
    const int64_t lane = level - 1;
    return {count_[lane], sum_[lane], squares_[lane], v_[lane], at};
  }

 private:
  using V = VectorOf<double>;
  using I = Vector<double>::I;
  V count_ = {}, sum_ = {}, squares_ = {}, v_ = {};
  double at_ = 0;

  ALWAYS_INLINE void move(double to) {
    if constexpr (!kSum) return;
    if (to == at_) return;
    const double step = std::abs(to - at_);
    const V none = {}, more = count_ > 0 ? count_ * step : none;
    if constexpr (kSquares) squares_ += count_ > 0 ? step * (2 * sum_ + more) : none;
    sum_ += more;
    at_ = to;
  }
};

// The hinge loss in O(n log n): a sweep over the items in the order of their scores counts, for each item, the pairs
// within the margin.
struct PairwiseHinge {
  double margin;
  bool squared, normalize;

  template <class A>
  void operator()(List<A>& list) const {
    Scratch& scratch = list.scratch;
    const int64_t n = list.n;
    const int32_t* by_label = order_descending(list.y, n, scratch);
    const int32_t* by_score = order_descending(list.s, n, scratch);
    int32_t* level = scratch.get<int32_t>(n);  // level 0 has the highest label
    int32_t levels = 0;
    double pairs = 0, seen = 0, higher = 0;  // the weights of all pairs, of the items so far, and of higher labels
    for (int64_t k = 0; k < n; ++k) {
      if (k && list.y[by_label[k - 1]] > list.y[by_label[k]]) ++levels, higher = seen;
      level[by_label[k]] = levels;
      const double own = list.w ? static_cast<double>(list.w[by_label[k]]) : 1;
      pairs += own * higher;
      seen += own;
    }
    ++levels;
    list.active = pairs > 0;
    const double scale = normalize && pairs > 0 ? 1 / pairs : 1;

    bool nan = false;
    // These are the levels of an item at -inf and of one at inf. Items of two levels at the same infinity make inf -
    // inf.
    int32_t infinite[2] = {-1, -1};
    for (int64_t i = 0; i < n; ++i) {
      nan |= list.s[i] != list.s[i];
      if (!std::isinf(list.s[i])) continue;
      const int32_t other = std::exchange(infinite[list.s[i] > 0], level[i]);
      nan |= other >= 0 && other != level[i];
    }
    if (nan && list.active) {
      list.loss = std::numeric_limits<A>::quiet_NaN();
      return std::fill(list.slope, list.slope + n, list.loss);
    }
    const Swept<A> items{gather(list.s, by_score, n, scratch),
                         gather(level, by_score, n, scratch),
                         list.w ? gather(list.w, by_score, n, scratch) : nullptr,
                         list.v ? gather(list.v, by_score, n, scratch) : nullptr,
                         n,
                         levels};
    double* sums = scratch.get<double>(n);
    std::fill(sums, sums + n, 0.0);
    double loss = 0;
    const auto run = [&](auto lower, auto sum, auto squares, auto of_v) {
      constexpr bool kSum = decltype(sum)::value, kSquares = decltype(squares)::value, kV = decltype(of_v)::value;
      const auto in = [&](auto counters) ALWAYS_INLINE { sweep<decltype(lower)::value>(items, counters, sums, loss); };
      if (levels > kFewLevels) in(Counters<kSum, kSquares, kV>(levels, scratch));
      else multiversion([&]() ALWAYS_INLINE { in(FewCounters<kSum, kSquares, kV>()); });
    };
    const std::true_type yes;
    const std::false_type no;
    if (!list.v && !squared) run(yes, yes, no, no), run(no, no, no, no);
    else if (!list.v) run(yes, yes, yes, no), run(no, yes, no, no);
    else if (squared) run(yes, no, no, yes), run(no, no, no, yes);
    for (int64_t k = 0; k < n; ++k) list.slope[by_score[k]] = static_cast<A>(scale * sums[k]);
    list.loss = static_cast<A>(scale * loss);
  }

 private:
  // A list's items in the order of descending score.
  template <class A>
  struct Swept {
    const A* s;
    const int32_t* level;
    const A* w;  // or null for 1
    const A* v;  // or null
    int64_t n;
    int32_t levels;
  };

  // Adds an item's pairs to its sum: those with lower labels, by descending score, or those with higher labels, by
  // ascending score. The former are also added to the loss.
  template <bool kLower, class CountersOf, class A>
  ALWAYS_INLINE void sweep(const Swept<A>& items, CountersOf& counters, double* sums, double& loss) const {
    const int64_t n = items.n;
    const double sign = kLower ? 1 : -1;
    const auto at = [n](int64_t turn) ALWAYS_INLINE { return kLower ? turn : n - 1 - turn; };
    const auto place_of_level = [&](int64_t k) ALWAYS_INLINE {
      return kLower ? items.levels - 1 - items.level[k] : items.level[k];
    };
    const auto v = [&](int64_t k) ALWAYS_INLINE { return items.v ? static_cast<double>(items.v[k]) : 0; };
    const auto w = [&](int64_t k) ALWAYS_INLINE { return items.w ? static_cast<double>(items.w[k]) : 1; };
    for (int64_t turn = 0, next = 0; turn < n; ++turn) {
      const int64_t i = at(turn);
      const double s = static_cast<double>(items.s[i]);
      for (; next < n; ++next) {
        const int64_t j = at(next);
        const double lead = sign * (s - static_cast<double>(items.s[j]));  // the lead of the better item of the two
        if (!(lead < margin)) break;
        counters.add(place_of_level(j), margin - lead, v(j), w(j), s);
      }
      const auto c = counters.before(place_of_level(i), s);
      if (kLower) loss += w(i) * (squared ? c.squares : c.sum);
      if (!items.v) sums[i] -= w(i) * sign * (squared ? 2 * c.sum : c.count);
      else sums[i] += w(i) * 2 * (c.count * v(i) - c.v);
    }
  }
};

// ---------------------------------------------------------------- squared error

// The sum of (x_i - x_j)^2 over the ordered pairs is 2 n sum (x - mean)^2, with x = s - y, or x = v for the Hessian.
// With weights n is their sum, and the mean and the sum are weighted.
struct PairwiseMse {
  bool normalize;

  template <class A>
  void operator()(List<A>& list) const {
    const auto w = [&](int64_t i) ALWAYS_INLINE { return list.w ? static_cast<double>(list.w[i]) : 1; };
    double n = 0, alone = 0;
    for (int64_t i = 0; i < list.n; ++i) n += w(i), alone += w(i) * w(i);
    const double scale = normalize ? n / (n * n - alone) : n;
    if (list.n < 2) return list.fill_slope(0);
    const auto x = [&](int64_t i) ALWAYS_INLINE {
      const auto apart = [&](const A* x)
                             ALWAYS_INLINE { return static_cast<double>(x[i]) - static_cast<double>(x[0]); };
      // Differences from the first item give the same result.
      return list.v ? apart(list.v) : apart(list.s) - apart(list.y);
    };
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < list.n; ++i) sum += w(i) * x(i);
    for (int64_t i = 0; i < list.n; ++i) {
      const double centred = x(i) - sum / n;
      squares += w(i) * centred * centred;
      list.slope[i] = static_cast<A>(4 * scale * w(i) * centred);
    }
    list.loss = static_cast<A>(2 * scale * squares);
    list.active = true;
  }
};

}  // namespace

}  // namespace custom_ops

CUSTOM_OPS_WEIGHTED_LIST_LOSS(pairwise, Pairwise, PairFunction, double, bool)
CUSTOM_OPS_WEIGHTED_LIST_LOSS(pairwise_hinge, PairwiseHinge, double, bool, bool)
CUSTOM_OPS_WEIGHTED_LIST_LOSS(pairwise_mse, PairwiseMse, bool)
