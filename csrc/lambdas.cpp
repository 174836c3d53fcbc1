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
      for (int64_t l = 0; l < kWidth<A>; ++l) u[l] = std::exp(s[j + l] - s[i]);
    } else {
      load<A>(u, up + j);
      u *= down[i];
    }
  }

  // For the same; `first` tells where i has the higher label.
  template <int64_t kWeighting>
  ALWAYS_INLINE void weight(int64_t i, int64_t j, const typename Vector<A>::I& first, VectorOf<A>& w) const {
    using V = VectorOf<A>;
    if constexpr (kWeighting == kRanknet) {
      w = V{} + A(1);
    } else if constexpr (kWeighting == kLabelDiff) {
      load<A>(w, y + j);
      w = first ? y[i] - w : w - y[i];
    } else {
      V d, t = V{};
      load<A>(w, gain + j);
      load<A>(d, discount + j);
      if constexpr (kWeighting == kNdcg1) {
        w = first ? V{} + gain[i] * discount[i] : w * d;
      } else {
        w = first ? gain[i] - w : w - gain[i];
        if constexpr (kWeighting != kLambdarank) load<A>(t, by_distance + (j - i));
        w *= kWeighting == kNdcg2 ? t : kWeighting == kLambdarank ? discount[i] - d : discount[i] - d + t;
      }
    }
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

// Adds to `sums` the slopes (or with v the Hessian times v) by rank, but for sigma.
template <int64_t kWeighting, bool kHessian, bool kWide, class A>
ALWAYS_INLINE inline Sums sum_ranked(const Ranked<A>& x, double* sums) {
  using V = VectorOf<A>;
  using I = typename Vector<A>::I;
  using Integer = std::remove_reference_t<decltype(I{}[0])>;
  constexpr int64_t W = kWidth<A>;
  A columns[kPairColumns];
  Sums total;
  I lanes;
  for (int64_t l = 0; l < W; ++l) lanes[l] = static_cast<Integer>(l);
  for (int64_t top = 0; top < x.rows; top += kPairRows) {
    const int64_t bottom = std::min(top + kPairRows, x.rows);
    for (int64_t left = (top + 1) / W * W; left < x.columns; left += kPairColumns) {
      const int64_t right = std::min(left + kPairColumns, x.columns);
      std::fill(columns, columns + kPairColumns, A(0));
      for (int64_t i = top; i < bottom; ++i) {
        const int64_t begin = std::max(i + 1, left);
        V row = V{}, value = V{}, count = V{};
        for (int64_t j = begin / W * W; j < right; j += W) {
          V u, y, w, g, column;
          load<A>(y, x.y + j);
          const I inside = (lanes >= static_cast<Integer>(begin - j)) & (lanes < static_cast<Integer>(right - j));
          const I first = inside & (y < x.y[i]), last = inside & (y > x.y[i]), paired = first | last;
          x.template ratio<kWide>(i, j, u);
          x.template weight<kWeighting>(i, j, first, w);
          const V next = A(1) + u, other = A(2) + u, inverse = A(1) / (next * other), r = inverse * other;
          if constexpr (kHessian) {
            load<A>(g, x.v + j);
            g = w * u * r * r * (x.v[i] - g);
          } else {
            V s;
            load<A>(s, x.s + j);
            V log;
            log_one_plus<A>(u * (inverse * next), log);
            log = first ? log : log + (x.s[i] - s);
            value += paired ? w * log : V{};
            count += paired ? V{} + A(1) : V{};
            g = w * (first ? -u * r : r);
          }
          g = paired ? g : V{};
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

  double gain(double label, double highest) const {  // relative to the highest label: 2^label may overflow
    return exponential ? std::exp2(label - highest) - std::exp2(-highest) : label;
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
    bool contributes = true;
    if (weighting != kRanknet && weighting != kLabelDiff) contributes = weights(list, x, length);

    double* sums = scratch.get<double>(n);
    std::fill(sums, sums + n, 0.0);
    Sums total;
    if (contributes) total = run(x, sums, list.v != nullptr);
    // The Hessian isn't asked for its pairs, which the normalised needs.
    const double pairs = normalize && list.v ? run(x, scratch.get<double>(n), false).pairs : total.pairs;
    const double factor = normalize && pairs > 0 ? scale / pairs : scale;
    const double slope = factor * (list.v ? sigma * sigma : sigma);
    for (int64_t i = 0; i < n; ++i) list.slope[x.order[i]] = static_cast<A>(slope * sums[i]);
    list.loss = static_cast<A>(factor * total.loss);
    list.active = total.pairs > 0;
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
    double* discount = scratch.get<double>(n + 2);
    for (int64_t i = 0; i < n + 2; ++i) discount[i] = 1 / std::log2(static_cast<double>(i + 2));
    double most = 0;
    for (int64_t i = 0; i < x.rows; ++i) most += gain(static_cast<double>(list.y[ideal[i]]), highest) * discount[i];
    if (most <= 0) return false;
    x.gain = scratch.get<A>(length);
    x.discount = scratch.get<A>(length);
    x.by_distance = scratch.get<A>(length + kWidth<A>) + kWidth<A>;  // a vector may begin before the distance 0
    std::fill(x.by_distance - kWidth<A>, x.by_distance, A(0));
    for (int64_t i = 0; i < length; ++i) {
      x.gain[i] = i < n ? static_cast<A>(gain(static_cast<double>(x.y[i]), highest) / most) : A(0);
      x.discount[i] = i < n ? static_cast<A>(discount[i]) : A(0);
      const double by = i > 0 && i < n ? discount[i - 1] - discount[i] : 0;
      x.by_distance[i] = static_cast<A>(weighting == kNdcg2pp ? mu * by : by);
    }
    return true;
  }

  template <class A>
  Sums run(const Ranked<A>& x, double* sums, bool hessian) const {
    switch (weighting) {
      case kRanknet: return run<kRanknet>(x, sums, hessian);
      case kLambdarank: return run<kLambdarank>(x, sums, hessian);
      case kNdcg1: return run<kNdcg1>(x, sums, hessian);
      case kNdcg2: return run<kNdcg2>(x, sums, hessian);
      case kNdcg2pp: return run<kNdcg2pp>(x, sums, hessian);
      default: return run<kLabelDiff>(x, sums, hessian);
    }
  }

  template <int64_t kWeighting, class A>
  static Sums run(const Ranked<A>& x, double* sums, bool hessian) {
    Sums total;
    multiversion([&]() ALWAYS_INLINE {
      if (x.wide)
        total = hessian ? sum_ranked<kWeighting, true, true>(x, sums) : sum_ranked<kWeighting, false, true>(x, sums);
      else
        total = hessian ? sum_ranked<kWeighting, true, false>(x, sums) : sum_ranked<kWeighting, false, false>(x, sums);
    });
    return total;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lambda_pairs(const Tensor& scores, const Tensor& labels,
                                                const std::optional<Tensor>& valid,
                                                const std::optional<Tensor>& offsets, int64_t weighting, int64_t k,
                                                bool both, bool exponential, double sigma, double mu, double scale,
                                                bool normalize) {
  const LambdaLoss kernel{weighting, k, both, exponential, sigma, mu, scale, normalize};
  return list_loss(scores, labels, valid, offsets, kernel);
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
