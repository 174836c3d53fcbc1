// LambdaLoss: the logistic loss of pairs, weighted by the change of the metric if the two items were swapped.
#include "pairs.h"

namespace custom_ops {

CUSTOM_OPS_ENUM(PairWeighting, RANKNET, LAMBDARANK, NDCG1, NDCG2, NDCG2PP, LABEL_DIFF)
CUSTOM_OPS_ENUM(TopPairs, OR, AND, METRIC)
CUSTOM_OPS_ENUM(PairNormalization, NONE, PAIRS, LAMBDAS)

namespace {

// The items of a list in the order of their ranks. Every array is padded by a vector's width.
template <class A>
struct Ranked {
  int64_t n, rows, columns;  // a pair has one of the first `rows` items and a later one of the first `columns`
  const int32_t* order;
  A* y;
  // The weight of item i above j is the difference of their gains times (the difference of their discounts +
  // `by_distance` of the distance of their ranks), or only the gain of i. The Form below selects which.
  A *gain, *discount, *by_distance;
  const A *up, *down;  // u = exp(-sigma (s_i - s_j)) = up[j] * down[i]
  A* s;                // s / 2, whose differences can't overflow; u is computed from it if `wide`
  A twice;             // 2 sigma
  bool wide;
  // These are read only by a Special form, below, which serves all lists that have them.
  A* item;             // the items' weights or ones; a pair is weighted by their product
  A* far;              // the factor of `by_distance` for the lower item
  bool by_difference;  // a pair's weight is divided by 0.01 + |s_i - s_j|
  A* v;

  // Computes u for item i and the vector of items from j on.
  template <bool kWide>
  ALWAYS_INLINE void ratio(int64_t i, int64_t j, VectorOf<A>& u) const {
    if constexpr (kWide) {
      for (int64_t l = 0; l < kWidth<A>; ++l) u[l] = exp_nonpositive((s[j + l] - s[i]) * twice);
    } else {
      load<A>(u, up + j);
      u *= down[i];
    }
  }

  // Computes the weights of i above j and of j above i, for the same items, or 0 outside of `inside`.
  template <class Form>
  ALWAYS_INLINE void weights(int64_t i, int64_t j, const typename Vector<A>::I& inside, VectorOf<A>& first,
                             VectorOf<A>& last) const {
    using V = VectorOf<A>;
    using I = typename Vector<A>::I;
    V label, w;
    load<A>(label, y + j);
    if constexpr (Form::kGains) load<A>(w, gain + j);
    else w = V{} + A(1);
    const I higher = Form::kEvery ? inside : inside & (label < y[i]);
    const I lower = Form::kEvery ? inside : inside & (label > y[i]);
    V own = w;
    if constexpr (Form::kDifferences) {
      V d, t;
      w = higher ? gain[i] - w : w - gain[i];
      if constexpr (Form::kDiscounts) load<A>(d, discount + j);
      if constexpr (Form::kDistances) load<A>(t, by_distance + (j - i));
      if constexpr (Form::kDistances && Form::kSpecial) {
        load<A>(own, far + j);
        t *= own;
      }
      if constexpr (Form::kDiscounts && Form::kDistances) w *= discount[i] - d + t;
      else if constexpr (Form::kDiscounts) w *= discount[i] - d;
      else if constexpr (Form::kDistances) w *= t;
      own = w;
    } else if constexpr (Form::kGains) {
      own = V{} + gain[i];
    }
    if constexpr (Form::kSpecial) {
      load<A>(label, item + j);
      label *= item[i];
      if (by_difference) {
        V apart;
        load<A>(apart, s + j);
        apart = s[i] - apart;
        label /= A(0.01) + (apart == apart ? A(2) * apart : V{});  // NaN must not reach a weight of 0
      }
      own *= label;
      w *= label;
    }
    first = higher ? own : V{};
    last = lower ? w : V{};
  }

  // Adds the number of pairs of the same items, or their weight: 0, 1, or both orders of every pair.
  template <class Form>
  ALWAYS_INLINE void count(int64_t i, int64_t j, const typename Vector<A>::I& inside, VectorOf<A>& pairs) const {
    using V = VectorOf<A>;
    using I = typename Vector<A>::I;
    V label;
    load<A>(label, y + j);
    const I paired = Form::kEvery ? inside : inside & ((label < y[i]) | (label > y[i]));
    V one = V{} + A(Form::kEvery ? 2 : 1);
    if constexpr (Form::kSpecial) {
      load<A>(label, item + j);
      one *= label * item[i];
    }
    pairs += paired ? one : V{};
  }
};

// The inputs that a weighting reads. As Special forms, `Differences`, `OneGain` and `EveryGain` also serve weightings
// that read less.
template <bool kG, bool kD, bool kDiscount, bool kDistance, bool kAll = false>
struct Form {
  static constexpr bool kGains = kG, kDifferences = kD, kDiscounts = kDiscount, kDistances = kDistance;
  static constexpr bool kEvery = kAll;  // pairs of any labels, in both orders
  static constexpr bool kSpecial = false;
};
template <class Form>
struct Special : Form {
  static constexpr bool kSpecial = true;  // weighted items, an unusual normalisation, a wide range, second derivatives
};
using Ones = Form<false, false, false, false>;
using OneGain = Form<true, false, false, false>;
using EveryGain = Form<true, false, false, false, true>;
using OnlyGains = Form<true, true, false, false>;
using OnlyDiscounts = Form<true, true, true, false>;
using OnlyDistances = Form<true, true, false, true>;
using Differences = Form<true, true, true, true>;

// Computes log(1 + u) for 0 <= u <= 1 from z = u / (2 + u), which is at most 1/3: 2 (z + z^3 / 3 + z^5 / 5 + ...).
template <class A>
ALWAYS_INLINE inline void log_one_plus(const VectorOf<A>& z, VectorOf<A>& out) {
  const VectorOf<A> square = z * z;
  VectorOf<A> series = VectorOf<A>{};
  for (int k = std::is_same_v<A, float> ? 7 : 16; k > 0; --k) series = (series + A(1) / A(2 * k + 1)) * square;
  out = A(2) * (z + z * series);
}

struct Sums {
  double loss = 0, pairs = 0;
  double lambdas = 0;  // the magnitudes of all pairs' slopes, only for a Special form

  void operator+=(const Sums& o) { loss += o.loss, pairs += o.pairs, lambdas += o.lambdas; }
};

// Adds the slopes, or with v the Hessian times v, to `sums` by rank, without the factors of sigma. A part takes every
// parts-th block of rows.
template <class Form, bool kHessian, bool kWide, class A>
ALWAYS_INLINE inline Sums sum_ranked(const Ranked<A>& x, int64_t part, int64_t parts, double* sums) {
  using V = VectorOf<A>;
  using I = typename Vector<A>::I;
  using Integer = std::remove_reference_t<decltype(I{}[0])>;
  constexpr int64_t W = kWidth<A>;
  A columns[kPairColumns];
  Sums total;
  I lanes;
  for (int64_t l = 0; l < W; ++l) lanes[l] = static_cast<Integer>(l);
  for (int64_t top = part * kPairRows; top < x.rows; top += parts * kPairRows) {
    const int64_t bottom = std::min(top + kPairRows, x.rows);
    for (int64_t left = (top + 1) / W * W; left < x.columns; left += kPairColumns) {
      const int64_t right = std::min(left + kPairColumns, x.columns);
      std::fill(columns, columns + kPairColumns, A(0));
      for (int64_t i = top; i < bottom; ++i) {
        const int64_t begin = std::max(i + 1, left);
        V row = V{}, value = V{}, count = V{}, lambda = V{};
        for (int64_t j = begin / W * W; j < right; j += W) {
          V u, first, last, g, column;
          const I inside = (lanes >= static_cast<Integer>(begin - j)) & (lanes < static_cast<Integer>(right - j));
          x.template ratio<kWide>(i, j, u);
          x.template weights<Form>(i, j, inside, first, last);
          // Infinite scores with weight 0 change nothing, though their difference may be NaN.
          if constexpr (kWide) u = (first == V{}) & (last == V{}) ? V{} : u;
          const V next = A(1) + u, other = A(2) + u, inverse = A(1) / (next * other), r = inverse * other;
          if constexpr (kHessian) {
            load<A>(g, x.v + j);
            g = (first + last) * u * r * r * (x.v[i] - g);
          } else {
            V s, log;
            load<A>(s, x.s + j);
            log_one_plus<A>(u * (inverse * next), log);
            log = first * log + last * (log + (last == V{} ? V{} : (x.s[i] - s) * x.twice));
            if constexpr (kWide)  // their mean can be finite when a sum in A isn't
              for (int64_t l = 0; l < W; ++l) total.loss += static_cast<double>(log[l]);
            else value += log;
            x.template count<Form>(i, j, inside, count);
            g = (last - first * u) * r;
            if constexpr (Form::kSpecial) lambda += (last + first * u) * r;
          }
          g = inside ? g : V{};
          row += g;
          load<A>(column, columns + (j - left));
          column += g;
          std::memcpy(columns + (j - left), &column, sizeof(column));
        }
        sums[i] += static_cast<double>(sum_lanes<A>(row));
        total.loss += static_cast<double>(sum_lanes<A>(value));
        total.pairs += static_cast<double>(sum_lanes<A>(count));
        total.lambdas += static_cast<double>(sum_lanes<A>(lambda));
      }
      for (int64_t k = left; k < right; ++k) sums[k] -= static_cast<double>(columns[k - left]);
    }
  }
  return total;
}

struct LambdaLoss {
  PairWeighting weighting;
  int64_t k;  // at most INT32_MAX
  TopPairs top;
  bool exponential;
  double sigma, mu, scale;
  PairNormalization normalize;
  bool by_difference;

  template <class A>
  void operator()(List<A>& list) const {
    Scratch& scratch = list.scratch;
    const int64_t n = list.n, length = n + 2 * kWidth<A>;
    Ranked<A> x;
    x.n = n;
    x.rows = every_rank() ? n : std::min(k, n);
    x.columns = top == TopPairs::AND ? x.rows : n;
    x.order = order_descending(list.s, n, scratch);
    x.y = scratch.get<A>(length);
    x.s = scratch.get<A>(length);
    std::fill(x.y, x.y + length, A(0));
    std::fill(x.s, x.s + length, A(0));
    for (int64_t i = 0; i < n; ++i) {
      x.y[i] = list.y[x.order[i]];
      x.s[i] = list.s[x.order[i]] / 2;
    }
    x.twice = static_cast<A>(2 * sigma);
    const auto ranked = [&](const A* of_items) {
      A* out = scratch.get<A>(length);
      for (int64_t i = 0; i < length; ++i) out[i] = i >= n ? A(0) : of_items ? of_items[x.order[i]] : A(1);
      return out;
    };
    x.v = list.v ? ranked(list.v) : nullptr;
    const Range range = list.range();
    x.by_difference = by_difference && range.low != range.high;
    // NaN, which isn't in the range, or infinity comes first in the order. With weight 0 both change nothing.
    x.wide = !has_ratios<A>(sigma * (range.high - range.low)) || !std::isfinite(x.s[0]);
    const bool special = list.w || by_difference || normalize == PairNormalization::LAMBDAS || every_rank();
    x.item = special || x.wide || x.v ? ranked(list.w) : nullptr;
    if (!x.wide) {
      const Ratios<A> ratios(gather(list.s, x.order, n, scratch), n, length, sigma, range, scratch);
      x.up = ratios.up, x.down = ratios.down;
    }
    // The scores don't decide whether a list is active.
    const bool unequal = weighting == PairWeighting::NDCG1 ? n > 1 : !std::equal(list.y + 1, list.y + n, list.y);
    list.active = weights(list, x, length) && unequal;
    if (!list.active) x.rows = 0;
    Sums total, counted;
    const double* sums = run(x, list.v != nullptr, scratch, total);
    // The Hessian kernel doesn't count pairs.
    if (normalize != PairNormalization::NONE && list.v) run(x, false, scratch, counted);
    const double factor = scale * share(list.v ? counted : total);
    const double slope = factor * (list.v ? sigma * sigma : sigma);
    for (int64_t i = 0; i < n; ++i) list.slope[x.order[i]] = static_cast<A>(slope * sums[i]);
    list.loss = static_cast<A>(factor * total.loss);
  }

 private:
  // Returns whether all pairs count, which are then weighted by their lower item's rank.
  bool every_rank() const {
    return top == TopPairs::METRIC && (weighting == PairWeighting::NDCG2 || weighting == PairWeighting::NDCG2PP);
  }

  // Returns the factor that normalises a list's loss.
  double share(const Sums& sums) const {
    if (normalize == PairNormalization::PAIRS && sums.pairs > 0) return 1 / sums.pairs;
    const double lambdas = 2 * scale * sigma * sums.lambdas;
    return normalize == PairNormalization::LAMBDAS && lambdas > 0 ? std::log2(1 + lambdas) / lambdas : 1;
  }

  // Computes the gains and discounts of the weights; returns false if no item has a gain.
  template <class A>
  bool weights(const List<A>& list, Ranked<A>& x, int64_t length) const {
    Scratch& scratch = list.scratch;
    const int64_t n = x.n;
    const auto zeros = [&](int64_t size) {
      A* out = scratch.get<A>(size);
      std::fill(out, out + size, A(0));
      return out;
    };
    x.gain = zeros(length);
    x.discount = zeros(length);
    x.by_distance = zeros(length + kWidth<A>) + kWidth<A>;  // a vector may begin before distance 0
    const int64_t limit = std::min(k, n);
    x.far = x.item ? scratch.get<A>(length) : nullptr;
    for (int64_t i = 0; x.far && i < length; ++i)
      x.far[i] = static_cast<A>(every_rank() && i >= limit ? 1 / (1 - discount_at(i)) : 1);
    if (weighting == PairWeighting::RANKNET) return std::fill(x.gain, x.gain + n, A(1)), true;
    if (weighting == PairWeighting::LABEL_DIFF) {
      std::copy(x.y, x.y + n, x.gain);
      return std::fill(x.by_distance, x.by_distance + n, A(1)), true;
    }
    const int32_t* ideal = order_descending(list.y, n, scratch);
    const double highest = static_cast<double>(list.y[ideal[0]]);
    double* gains = scratch.get<double>(n);
    double most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A label = list.y[ideal[i]];
      const bool same = i > 0 && label == list.y[ideal[i - 1]];
      const double own = same ? gains[ideal[i - 1]] : relative_gain(static_cast<double>(label), highest, exponential);
      gains[ideal[i]] = own;
      if (i < limit) most += own * discount_at(i);
    }
    if (most <= 0) return false;
    // For a distance of a, the difference of discounts is |1 / log2(1 + a) - 1 / log2(2 + a)|; NDCG2PP multiplies it by
    // mu and adds it to the discounts.
    const double distances = weighting == PairWeighting::NDCG2 ? 1 : weighting == PairWeighting::NDCG2PP ? mu : 0;
    for (int64_t i = 0; i < n; ++i) {
      const A gain = static_cast<A>(gains[x.order[i]] / most);
      const A discount = static_cast<A>(top == TopPairs::METRIC && i >= limit ? 0 : discount_at(i));
      x.gain[i] = weighting == PairWeighting::NDCG1 ? gain * discount : gain;
      if (weighting == PairWeighting::LAMBDARANK || weighting == PairWeighting::NDCG2PP) x.discount[i] = discount;
      if (i > 0 && distances != 0) x.by_distance[i] = static_cast<A>(distances * (discount_at(i - 1) - discount_at(i)));
    }
    return true;
  }

  // Returns the sums of all parts of the list by rank, and adds up their total.
  template <class A>
  double* run(const Ranked<A>& x, bool hessian, Scratch& scratch, Sums& total) const {
    const int64_t parts = parts_of(static_cast<double>(x.rows) * static_cast<double>(x.columns));
    Sums of_parts[kParts];
    double* sums = sum_parts(x.n, parts, scratch, [&](int64_t part, double* own) {
      const auto in = [&](auto form) {
        multiversion(
            [&]() ALWAYS_INLINE { of_parts[part] = sum_ranked<decltype(form), false, false>(x, part, parts, own); });
      };
      const auto rare = [&](auto form) {
        using Form = Special<decltype(form)>;
        multiversion([&]() ALWAYS_INLINE { of_parts[part] = sum_rare<Form>(x, part, parts, own, hessian); });
      };
      if (x.item) {
        return weighting == PairWeighting::NDCG1     ? rare(EveryGain{})
               : weighting == PairWeighting::RANKNET ? rare(OneGain{})
                                                     : rare(Differences{});
      }
      switch (weighting) {
        case PairWeighting::RANKNET: return in(Ones{});
        case PairWeighting::LAMBDARANK: return in(OnlyDiscounts{});
        case PairWeighting::NDCG1: return in(EveryGain{});
        case PairWeighting::NDCG2: return in(OnlyDistances{});
        case PairWeighting::NDCG2PP: return in(Differences{});
        default: return in(OnlyGains{});
      }
    });
    for (const Sums& of_part : of_parts) total += of_part;
    // This adds the pair of each item with itself.
    for (int64_t i = 0; weighting == PairWeighting::NDCG1 && i < x.rows; ++i) {
      const double weight = x.item ? static_cast<double>(x.item[i]) * static_cast<double>(x.item[i]) : 1;
      const double part = x.by_difference ? 100 * weight : weight;
      total.loss += std::log(2.0) * part * static_cast<double>(x.gain[i]);
      total.pairs += weight;
    }
    return sums;
  }

  // Computes second derivatives, and slopes with weights or of scores whose exponentials leave the range.
  template <class Form, class A>
  static ALWAYS_INLINE inline Sums sum_rare(const Ranked<A>& x, int64_t part, int64_t parts, double* sums,
                                            bool hessian) {
    if (x.wide && hessian) return sum_ranked<Form, true, true>(x, part, parts, sums);
    if (x.wide) return sum_ranked<Form, false, true>(x, part, parts, sums);
    if (hessian) return sum_ranked<Form, true, false>(x, part, parts, sums);
    return sum_ranked<Form, false, false>(x, part, parts, sums);
  }
};

}  // namespace

}  // namespace custom_ops

CUSTOM_OPS_WEIGHTED_LIST_LOSS(lambda_pairs, LambdaLoss, PairWeighting, int64_t, TopPairs, bool, double, double, double,
                              PairNormalization, bool)
