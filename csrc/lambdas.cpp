// LambdaLoss: the logistic loss of pairs, weighted by what swapping them would do to the ranking.
#include "pairs.h"

namespace custom_ops {
namespace {

// The positions in WEIGHTINGS, in custom_ops/ranking/lambdas.py.
enum Weighting : int64_t { kRanknet, kLambdarank, kNdcg1, kNdcg2, kNdcg2pp, kLabelDiff };

// The items of a list by rank. All arrays go on for a vector's width behind the end.
template <class A>
struct Ranked {
  int64_t n, rows, columns;  // a pair is one of the first `rows` and a later one of the first `columns`
  const int32_t* order;
  A *y, *gain, *discount;
  A* by_distance;  // mu |1 / log2(1 + a) - 1 / log2(2 + a)| for ranks that differ by a
  A* up;           // u = exp(-sigma (s_i - s_j)) is up[j] * down[i],
  A* down;
  A* s;  // sigma s, from which it is taken where `wide`
  bool wide;
  A* v;

  // For item i and those from j on.
  template <bool kWide>
  ALWAYS_INLINE void ratio(int64_t i, int64_t j, VectorOf<A>& u) const {
    if constexpr (kWide) {
      for (int64_t l = 0; l < kWidth<A>; ++l) u[l] = exp_nonpositive(s[j + l] - s[i]);
    } else {
      load<A>(u, up + j);
      u *= down[i];
    }
  }

  // For the same, of those `inside`: the weights of i above j, and of j above i.
  template <int64_t kWeighting>
  ALWAYS_INLINE void weights(int64_t i, int64_t j, const typename Vector<A>::I& inside, VectorOf<A>& first,
                             VectorOf<A>& last) const {
    using V = VectorOf<A>;
    V w, d, t = V{};
    if constexpr (kWeighting == kNdcg1) {
      load<A>(w, gain + j);
      load<A>(d, discount + j);
      first = inside ? V{} + gain[i] * discount[i] : V{};
      last = inside ? w * d : V{};
      return;
    }
    V label;
    load<A>(label, y + j);
    if constexpr (kWeighting == kRanknet) {
      w = V{} + A(1);
    } else if constexpr (kWeighting == kLabelDiff) {
      w = label < y[i] ? y[i] - label : label - y[i];
    } else {
      load<A>(w, gain + j);
      load<A>(d, discount + j);
      w = label < y[i] ? gain[i] - w : w - gain[i];
      if constexpr (kWeighting != kLambdarank) load<A>(t, by_distance + (j - i));
      w *= kWeighting == kNdcg2 ? t : kWeighting == kLambdarank ? discount[i] - d : discount[i] - d + t;
    }
    first = inside & (label < y[i]) ? w : V{};
    last = inside & (label > y[i]) ? w : V{};
  }

  // How many pairs the same are: 0, 1, or for NDCG-Loss 1 both orders.
  template <int64_t kWeighting>
  ALWAYS_INLINE void count(int64_t i, int64_t j, const typename Vector<A>::I& inside, VectorOf<A>& pairs) const {
    using V = VectorOf<A>;
    V label;
    load<A>(label, y + j);
    pairs += kWeighting == kNdcg1                         ? (inside ? V{} + A(2) : V{})
             : inside & ((label < y[i]) | (label > y[i])) ? V{} + A(1)
                                                          : V{};
  }
};

// log(1 + u) for 0 <= u <= 1 from z = u / (2 + u), which is at most 1/3: 2 (z + z^3 / 3 + z^5 / 5 + ...).
template <class A>
ALWAYS_INLINE inline void log_one_plus(const VectorOf<A>& z, VectorOf<A>& out) {
  const VectorOf<A> square = z * z;
  VectorOf<A> series = VectorOf<A>{};
  for (int k = std::is_same_v<A, float> ? 7 : 16; k > 0; --k) series = (series + A(1) / A(2 * k + 1)) * square;
  out = A(2) * (z + z * series);
}

struct Sums {
  double loss = 0, pairs = 0;
};

// Adds to `sums` the slopes (or with v the Hessian times v) by rank, but for sigma; of every parts-th block of rows.
template <int64_t kWeighting, bool kHessian, bool kWide, class A>
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
        V row = V{}, value = V{}, count = V{};
        for (int64_t j = begin / W * W; j < right; j += W) {
          V u, first, last, g, column;
          const I inside = (lanes >= static_cast<Integer>(begin - j)) & (lanes < static_cast<Integer>(right - j));
          x.template ratio<kWide>(i, j, u);
          x.template weights<kWeighting>(i, j, inside, first, last);
          if constexpr (kWide) u = (first == V{}) & (last == V{}) ? V{} : u;  // of two infinite scores it is NaN
          const V next = A(1) + u, other = A(2) + u, inverse = A(1) / (next * other), r = inverse * other;
          if constexpr (kHessian) {
            load<A>(g, x.v + j);
            g = (first + last) * u * r * r * (x.v[i] - g);
          } else {
            V s, log;
            load<A>(s, x.s + j);
            log_one_plus<A>(u * (inverse * next), log);
            V difference = x.s[i] - s;
            if constexpr (kWide) difference = last == V{} ? V{} : difference;
            value += first * log + last * (log + difference);
            x.template count<kWeighting>(i, j, inside, count);
            g = (last - first * u) * r;
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
      }
      for (int64_t k = left; k < right; ++k) sums[k] -= static_cast<double>(columns[k - left]);
    }
  }
  return total;
}

struct LambdaLoss {
  int64_t weighting, k;  // k at most INT32_MAX
  bool both, exponential;
  double sigma, mu, scale;
  bool normalize;

  // Relative to the highest label's: 2^label may overflow, and 2^label - 1 may cancel.
  double gain(double label, double highest) const {
    if (!(label > 0)) return 0;
    if (!exponential) return label;
    constexpr double kLog2 = 0.693147180559945309;
    const double least = std::exp2(-highest);
    return label > 1 ? std::exp2(label - highest) - least : least * std::expm1(kLog2 * label);
  }

  template <class A>
  void operator()(List<A>& list) const {
    Scratch& scratch = list.scratch;
    const int64_t n = list.n, length = n + 2 * kWidth<A>;
    Ranked<A> x;
    x.n = n;
    x.rows = std::min(k, n);
    x.columns = both ? x.rows : n;
    x.order = order_descending(list.s, n, scratch);
    x.y = scratch.get<A>(length);
    x.s = scratch.get<A>(length);
    std::fill(x.y, x.y + length, A(0));
    std::fill(x.s, x.s + length, A(0));
    for (int64_t i = 0; i < n; ++i) {
      x.y[i] = list.y[x.order[i]];
      x.s[i] = static_cast<A>(sigma * static_cast<double>(list.s[x.order[i]]));
    }
    x.v = list.v ? scratch.get<A>(length) : nullptr;
    for (int64_t i = 0; list.v && i < length; ++i) x.v[i] = i < n ? list.v[x.order[i]] : A(0);
    exponentials(x, length, scratch);
    bool contributes = weighting == kNdcg1 ? n > 1 : !std::equal(list.y + 1, list.y + n, list.y);
    if (weighting != kRanknet && weighting != kLabelDiff) contributes = contributes && weights(list, x, length);

    if (!contributes) x.rows = 0;
    list.active = contributes;
    Sums total, counted;
    const double* sums = run(x, list.v != nullptr, scratch, total);
    if (normalize && list.v) run(x, false, scratch, counted);  // the Hessian isn't asked for its pairs
    const double pairs = list.v ? counted.pairs : total.pairs;
    const double factor = normalize && pairs > 0 ? scale / pairs : scale;
    const double slope = factor * (list.v ? sigma * sigma : sigma);
    for (int64_t i = 0; i < n; ++i) list.slope[x.order[i]] = static_cast<A>(slope * sums[i]);
    list.loss = static_cast<A>(factor * total.loss);
  }

 private:
  template <class A>
  static void exponentials(Ranked<A>& x, int64_t length, Scratch& scratch) {
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for (int64_t i = 0; i < x.n; ++i) {
      low = std::min(low, static_cast<double>(x.s[i]));
      high = std::max(high, static_cast<double>(x.s[i]));
    }
    x.wide = high - low > Vector<A>::kLogMax - 7;
    if (x.wide) return;
    const double middle = low <= high ? (low + high) / 2 : 0;
    x.up = scratch.get<A>(length);
    x.down = scratch.get<A>(x.n);
    for (int64_t i = 0; i < length; ++i) x.up[i] = i < x.n ? std::exp(static_cast<A>(x.s[i] - middle)) : A(0);
    for (int64_t i = 0; i < x.n; ++i) x.down[i] = 1 / x.up[i];
  }

  // Gains over the ideal discounted gain, and discounts; false if there is nothing to gain.
  template <class A>
  bool weights(const List<A>& list, Ranked<A>& x, int64_t length) const {
    Scratch& scratch = list.scratch;
    const int64_t n = x.n;
    const int32_t* ideal = order_descending(list.y, n, scratch);
    const double highest = std::max(0.0, static_cast<double>(list.y[ideal[0]]));
    double* gains = scratch.get<double>(n);
    double most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A label = list.y[ideal[i]];
      const bool same = i > 0 && label == list.y[ideal[i - 1]];
      const double own = same ? gains[ideal[i - 1]] : gain(static_cast<double>(label), highest);
      gains[ideal[i]] = own;
      if (i < x.rows) most += own * discount_at(i);
    }
    if (most <= 0) return false;
    x.gain = scratch.get<A>(length);
    x.discount = scratch.get<A>(length);
    x.by_distance = scratch.get<A>(length + kWidth<A>) + kWidth<A>;  // a vector may begin before the distance 0
    std::fill(x.by_distance - kWidth<A>, x.by_distance, A(0));
    for (int64_t i = 0; i < length; ++i) {
      x.gain[i] = i < n ? static_cast<A>(gains[x.order[i]] / most) : A(0);
      x.discount[i] = i < n ? static_cast<A>(discount_at(i)) : A(0);
      const double by = i > 0 && i < n ? discount_at(i - 1) - discount_at(i) : 0;
      x.by_distance[i] = static_cast<A>(weighting == kNdcg2pp ? mu * by : by);
    }
    return true;
  }

  // What all parts of the list add up to, by rank, and their total.
  template <class A>
  double* run(const Ranked<A>& x, bool hessian, Scratch& scratch, Sums& total) const {
    const int64_t parts = parts_of(static_cast<double>(x.rows) * static_cast<double>(x.columns));
    Sums of_parts[kParts];
    double* sums = sum_parts(x.n, parts, scratch, [&](int64_t part, double* own) {
      const auto in = [&](auto weights) {
        constexpr int64_t kWeighting = decltype(weights)::value;
        multiversion([&]() ALWAYS_INLINE { of_parts[part] = sum_part<kWeighting>(x, part, parts, own, hessian); });
      };
      switch (weighting) {
        case kRanknet: return in(Weights<kRanknet>{});
        case kLambdarank: return in(Weights<kLambdarank>{});
        case kNdcg1: return in(Weights<kNdcg1>{});
        case kNdcg2: return in(Weights<kNdcg2>{});
        case kNdcg2pp: return in(Weights<kNdcg2pp>{});
        default: return in(Weights<kLabelDiff>{});
      }
    });
    for (const Sums& of_part : of_parts) total.loss += of_part.loss, total.pairs += of_part.pairs;
    for (int64_t i = 0; weighting == kNdcg1 && i < x.rows; ++i) {  // each item with itself
      total.loss += std::log(2.0) * static_cast<double>(x.gain[i] * x.discount[i]);
      total.pairs += 1;
    }
    return sums;
  }

  template <int64_t kWeighting>
  using Weights = std::integral_constant<int64_t, kWeighting>;

  template <int64_t kWeighting, class A>
  static ALWAYS_INLINE inline Sums sum_part(const Ranked<A>& x, int64_t part, int64_t parts, double* sums,
                                            bool hessian) {
    if (x.wide && hessian) return sum_ranked<kWeighting, true, true>(x, part, parts, sums);
    if (x.wide) return sum_ranked<kWeighting, false, true>(x, part, parts, sums);
    if (hessian) return sum_ranked<kWeighting, true, false>(x, part, parts, sums);
    return sum_ranked<kWeighting, false, false>(x, part, parts, sums);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lambda_pairs(const Tensor& scores, const Tensor& labels,
                                                const std::optional<Tensor>& valid,
                                                const std::optional<Tensor>& offsets, int64_t reduction,
                                                int64_t batch_dims, int64_t weighting, int64_t k, bool both,
                                                bool exponential, double sigma, double mu, double scale,
                                                bool normalize) {
  const LambdaLoss kernel{weighting, k, both, exponential, sigma, mu, scale, normalize};
  return list_loss(scores, labels, valid, offsets, reduction, batch_dims, kernel);
}

Tensor lambda_pairs_slope(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& valid,
                          const std::optional<Tensor>& offsets, const std::optional<Tensor>& v, int64_t weighting,
                          int64_t k, bool both, bool exponential, double sigma, double mu, double scale,
                          bool normalize) {
  const LambdaLoss kernel{weighting, k, both, exponential, sigma, mu, scale, normalize};
  return list_slope(scores, labels, valid, offsets, v, kernel);
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(lambda_pairs)
CUSTOM_OPS_CPU_KERNEL(lambda_pairs_slope)
