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
    const double scale = normalize && items.pairs > 0 ? 1 / items.pairs : 1;
    switch (phi) {
      case PairFunction::LOGISTIC: return pair_loss<Logistic>(list, items, sigma, scale);
      case PairFunction::SOFT_ZERO_ONE: return pair_loss<SoftZeroOne>(list, items, sigma, scale);
      case PairFunction::EXPONENTIAL: return pair_loss<Exponential>(list, items, sigma, scale);
    }
  }
};

// ---------------------------------------------------------------- hinge

// Of the pairs of an item whose score is `at` with some others, all of which violate the margin: how many they are,
// by how much, the sum and the sum of squares, and the others' sum of v.
struct Violations {
  double count = 0, sum = 0, squares = 0, v = 0, at = 0;

  // Moves the item away from the others. Each term is positive, so that none cancels, however far the scores are apart.
  void move(double to) {
    if (count > 0 && to != at) {
      const double step = std::abs(to - at), more = count * step;
      squares += step * (2 * sum + more);
      sum += more;
    }
    at = to;
  }
  void add(double violation, double of_v) { count += 1, sum += violation, squares += violation * violation, v += of_v; }
  void operator+=(const Violations& o) { count += o.count, sum += o.sum, squares += o.squares, v += o.v; }
};

// Of the items added so far, by label.
class Counters {
 public:
  Counters(int64_t levels, Scratch& scratch) : levels_(levels), tree_(scratch.get<Violations>(levels + 1)) {
    std::fill(tree_, tree_ + levels + 1, Violations());
  }
  void add(int64_t level, double violation, double v, double at) {
    for (int64_t k = level + 1; k <= levels_; k += k & -k) tree_[k].move(at), tree_[k].add(violation, v);
  }
  // Of the levels before this one.
  Violations before(int64_t level, double at) {
    Violations all;
    for (int64_t k = level; k > 0; k -= k & -k) tree_[k].move(at), all += tree_[k];
    return all;
  }

 private:
  int64_t levels_;
  Violations* tree_;  // a Fenwick tree
};

// The same of few levels, all in one vector: in a lane those of the levels up to its own.
class FewCounters {
 public:
  static constexpr int64_t kLevels = 5;  // nothing is asked of the last one

  FewCounters(int64_t, Scratch&) {}
  ALWAYS_INLINE void add(int64_t level, double violation, double v, double at) {
    move(at);
    const V one = {};
    const I counted = I{0, 1, 2, 3} >= level;
    count_ += counted ? one + 1 : one;
    sum_ += counted ? one + violation : one;
    squares_ += counted ? one + violation * violation : one;
    v_ += counted ? one + v : one;
  }
  ALWAYS_INLINE Violations before(int64_t level, double at) {
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
    if (to == at_) return;
    const double step = std::abs(to - at_);
    const V none = {}, more = count_ > 0 ? count_ * step : none;
    squares_ += count_ > 0 ? step * (2 * sum_ + more) : none;
    sum_ += more;
    at_ = to;
  }
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

    bool nan = false;
    int32_t infinite[2] = {-1, -1};  // the level of an item at -inf, and at inf: two levels there make inf - inf
    for (int64_t i = 0; i < n; ++i) {
      nan |= list.s[i] != list.s[i];
      if (!std::isinf(list.s[i])) continue;
      const int32_t other = std::exchange(infinite[list.s[i] > 0], level[i]);
      nan |= other >= 0 && other != level[i];
    }
    if (nan && list.active) return list.fill_nan();
    double* sums = scratch.get<double>(n);
    std::fill(sums, sums + n, 0.0);
    double loss = 0;
    for (const bool lower : {true, false}) {
      if (levels > FewCounters::kLevels) sweep<Counters>(list, by_score, level, levels, lower, sums, loss);
      else multiversion([&]() ALWAYS_INLINE { sweep<FewCounters>(list, by_score, level, levels, lower, sums, loss); });
    }
    for (int64_t i = 0; i < n; ++i) list.slope[i] = static_cast<A>(scale * sums[i]);
    list.loss = static_cast<A>(scale * loss);
  }

 private:
  // Adds each item's pairs with those of lower labels, by descending score, or else with those of higher ones, by
  // ascending score, to its own sum; the former to the loss, too.
  template <class CountersOf, class A>
  ALWAYS_INLINE void sweep(const List<A>& list, const int32_t* by_score, const int32_t* level, int32_t levels,
                           bool lower, double* sums, double& loss) const {
    const int64_t n = list.n;
    const double sign = lower ? 1 : -1;
    const auto item = [&](int64_t place) ALWAYS_INLINE { return by_score[lower ? place : n - 1 - place]; };
    const auto place_of_level = [&](int32_t i) ALWAYS_INLINE { return lower ? levels - 1 - level[i] : level[i]; };
    const auto v = [&](int32_t i) ALWAYS_INLINE { return list.v ? static_cast<double>(list.v[i]) : 0; };
    CountersOf counters(levels, list.scratch);
    for (int64_t k = 0, next = 0; k < n; ++k) {
      const int32_t i = item(k);
      const double s = static_cast<double>(list.s[i]);
      for (; next < n; ++next) {
        const int32_t j = item(next);
        const double lead = sign * (s - static_cast<double>(list.s[j]));  // of the better one of the two
        if (!(lead < margin)) break;
        counters.add(place_of_level(j), margin - lead, v(j), s);
      }
      const Violations c = counters.before(place_of_level(i), s);
      if (lower) loss += squared ? c.squares : c.sum;
      if (!list.v) sums[i] -= sign * (squared ? 2 * c.sum : c.count);
      else if (squared) sums[i] += 2 * (c.count * v(i) - c.v);
    }
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
    if (list.n < 2) return list.fill_slope(0);
    const auto x = [&](int64_t i) ALWAYS_INLINE {
      const auto apart = [&](const A* x)
                             ALWAYS_INLINE { return static_cast<double>(x[i]) - static_cast<double>(x[0]); };
      return list.v ? apart(list.v) : apart(list.s) - apart(list.y);  // above the first item, which changes nothing
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

}  // namespace custom_ops

CUSTOM_OPS_LIST_LOSS(pairwise, Pairwise, PairFunction, double, bool)
CUSTOM_OPS_LIST_LOSS(pairwise_hinge, PairwiseHinge, double, bool, bool)
CUSTOM_OPS_LIST_LOSS(pairwise_mse, PairwiseMse, bool)
