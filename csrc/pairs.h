// Sums over the pairs of items of a list with different labels, in vectors of 32 bytes.
//
// The items are in the order of descending label, so the items that an item should be above are those after the end of
// its level. Each pair is visited once: it adds to its row (the better item) and, with the opposite sign, to its
// column.
#pragma once

#include "list_loss.h"

#include <cmath>

namespace custom_ops {

template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLogMax = 87;  // exp(kLogMax) is finite
};
template <>
struct Vector<double> {
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLogMax = 708;
};
template <class A>
using VectorOf = typename Vector<A>::V;
template <class A>
constexpr int64_t kWidth = 32 / sizeof(A);

template <class A>
ALWAYS_INLINE inline void load(VectorOf<A>& v, const A* p) {
  std::memcpy(&v, p, sizeof(v));
}

template <class A>
ALWAYS_INLINE inline A sum_lanes(const VectorOf<A>& v) {
  A sum = 0;
  for (int64_t l = 0; l < kWidth<A>; ++l) sum += v[l];
  return sum;
}

// ---------------------------------------------------------------- the items in the order of their labels

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class A>
struct ByLabel {
  int64_t n;
  const int32_t* order;
  const A* s;            // the scores
  const A* w;            // the items' weights, or null for 1
  const A* v;            // null if the slope is wanted
  const int64_t* below;  // per item, the first item with a lower label
  double pairs = 0;
  double weight = 0;  // the total of all pairs

  explicit ByLabel(List<A>& list) : n(list.n), order(order_descending(list.y, n, list.scratch)) {
    s = gather(list.s, order, n, list.scratch);
    w = list.w ? gather(list.w, order, n, list.scratch) : nullptr;
    v = list.v ? gather(list.v, order, n, list.scratch) : nullptr;
    int64_t* end = list.scratch.template get<int64_t>(n);
    double seen = 0, lower = 0;  // the weights of all items from i on, and of those with lower labels
    for (int64_t i = n - 1, next = n; i >= 0; --i) {
      if (i + 1 < n && list.y[order[i]] > list.y[order[i + 1]]) next = i + 1, lower = seen;
      end[i] = next;
      pairs += static_cast<double>(n - next);
      const double own = w ? static_cast<double>(w[i]) : 1;
      weight += own * lower;
      seen += own;
    }
    below = end;
  }

  // Stores `scale` times `sums`, which are in label order, as the list's slope.
  void finish(List<A>& list, const double* sums, double scale) const {
    for (int64_t i = 0; i < n; ++i) list.slope[order[i]] = static_cast<A>(scale * sums[i]);
  }
};

// ---------------------------------------------------------------- an exponential for each item

// Returns whether exp(d) and its inverse are finite and normal for all differences d up to `width`.
template <class A>
bool has_ratios(double width) {
  return !(width > Vector<A>::kLogMax - 7);
}

// Factors of exp(sigma (s_j - s_i)) = up[j] * down[i].
template <class A>
struct Ratios {
  A* up;    // exp(sigma (s - middle)), and 0 from n to `length`
  A* down;  // 1 / up

  Ratios(const A* s, int64_t n, int64_t length, double sigma, const Range& range, Scratch& scratch)
      : up(scratch.get<A>(length)),
        down(scratch.get<A>(n)) {
    const double middle = range.middle();
    multiversion([&, up = up, down = down]() ALWAYS_INLINE {
      for (int64_t i = 0; i < n; ++i) {
        up[i] = static_cast<A>(exp_nonpositive(sigma * (static_cast<double>(s[i]) - middle)));
        down[i] = 1 / up[i];
      }
    });
    std::fill(up + n, up + length, A(0));
  }
};

// ---------------------------------------------------------------- one pair

// The exponentials of a pair with d = sigma (s_i - s_j), in which item i should be above j.
template <class V>
struct Pair {
  V q;  // exp(-d)
  V p;  // 1 / (1 + exp(d)), the probability of the wrong order
  V r;  // 1 - p
};

// A function of a pair defines its value and its first and second derivatives with respect to d. If the value is log(1
// + q), it isn't defined but kLog is set. kUnbounded says that the function reads q, which has no bound.
struct Logistic {
  static constexpr bool kLog = true, kUnbounded = false;
  template <class V>
  static ALWAYS_INLINE V slope(const Pair<V>& x) {
    return -x.p;
  }
  template <class V>
  static ALWAYS_INLINE V curvature(const Pair<V>& x) {
    return x.p * x.r;
  }
};

// The sum of log(1 + q) as the logarithm of a product whose exponent is extracted before it overflows. The rounding
// error of 1 + q is added to first order, so small q count in full.
template <class A>
struct LogSum {
  using V = VectorOf<A>;
  using I = typename Vector<A>::I;
  using Integer = std::remove_reference_t<decltype(I{}[0])>;
  V product = V{} + A(1), rounded = V{};
  double sum = 0;

  ALWAYS_INLINE void add(const Pair<V>& x, const V& t) {
    product *= t;
    rounded += (x.q - (t - A(1))) * x.r;
  }
  // This must be called before the product can leave the range.
  ALWAYS_INLINE void normalise(I& exponents) {
    constexpr int kMantissa = Vector<A>::kMantissa;
    constexpr Integer kBias = Vector<A>::kBias;
    I bits;
    std::memcpy(&bits, &product, sizeof(bits));
    exponents += (bits >> kMantissa) - kBias;
    bits = (bits & ((Integer(1) << kMantissa) - 1)) | (kBias << kMantissa);
    std::memcpy(&product, &bits, sizeof(bits));
  }
  ALWAYS_INLINE void end_row(const I& exponents) {
    double exponent = 0;
    for (int64_t l = 0; l < kWidth<A>; ++l) exponent += static_cast<double>(exponents[l]);
    sum += 0.693147180559945309 * exponent + static_cast<double>(sum_lanes<A>(rounded));
    rounded = V{};
  }
  ALWAYS_INLINE double total() const {
    double out = sum;
    for (int64_t l = 0; l < kWidth<A>; ++l) out += std::log(static_cast<double>(product[l]));
    return out;
  }
};

// ---------------------------------------------------------------- all pairs

// Computes pairs with one exponential per item.
template <class A>
struct FromItems {
  using V = VectorOf<A>;
  using I = typename Vector<A>::I;
  static constexpr bool kRatios = true;
  const A *up, *down;
  int64_t chunk;  // a product of so many factors stays in the range

  ALWAYS_INLINE void operator()(int64_t i, int64_t j, const I& inside, Pair<V>& x, V& t) const {
    V e;
    load<A>(e, up + j);
    x.q = (inside ? e : V{}) * down[i];
    t = A(1) + x.q;
    x.r = A(1) / t;
    x.p = x.q * x.r;
  }
};

// Computes pairs with one exponential per pair, for scores whose own exponentials would leave the range.
template <class A, bool kUnbounded>
struct FromPairs {
  using V = VectorOf<A>;
  using I = typename Vector<A>::I;
  static constexpr bool kRatios = false;
  const A* s;  // s / 2, whose differences can't overflow
  A twice;     // 2 sigma
  A share;     // a factor of q, which keeps its sums finite
  int64_t n;
  int64_t chunk = INT64_MAX;

  // Here t is log(1 + q) itself.
  ALWAYS_INLINE void operator()(int64_t i, int64_t j, const I& inside, Pair<V>& x, V& t) const {
    for (int64_t l = 0; l < kWidth<A>; ++l) {
      const A d = inside[l] && j + l < n ? (s[i] - s[j + l]) * twice : std::numeric_limits<A>::infinity();
      const A z = exp_nonpositive(-std::abs(d)), r = 1 / (1 + z);
      if constexpr (kUnbounded) x.q[l] = share * (d < 0 ? std::exp(-d) : z);
      x.p[l] = d < 0 ? r : z * r;
      x.r[l] = d < 0 ? z * r : r;
      t[l] = log1p_unit(z) + (d < 0 ? -d : A(0));
    }
  }
};

constexpr int64_t kPairColumns = 512;  // columns whose sums stay in the accumulator's dtype ...
constexpr int64_t kPairRows = 64;      // ... for this many rows

// Adds the slopes of an item's pairs to its sum or, with v, the curvatures times v_i - v_j. Returns the sum of the
// values if v is null. A part takes every parts-th block of rows. A pair counts by the product of its items' weights w.
template <class Phi, bool kHessian, bool kWeighted, class A, class Terms>
ALWAYS_INLINE inline double sum_pairs(const ByLabel<A>& items, const A* w, const A* v, const Terms& terms, int64_t part,
                                      int64_t parts, double* sums) {
  using V = VectorOf<A>;
  using I = typename Vector<A>::I;
  constexpr int64_t W = kWidth<A>;
  constexpr bool kLog = Phi::kLog && !kHessian;
  constexpr bool kProduct = kLog && Terms::kRatios && !kWeighted;
  A columns[kPairColumns];
  LogSum<A> product;
  double values = 0;
  I all, lanes;
  for (int64_t l = 0; l < W; ++l) {
    all[l] = -1;
    lanes[l] = static_cast<std::remove_reference_t<decltype(lanes[0])>>(l);
  }
  for (int64_t top = part * kPairRows; top < items.n; top += parts * kPairRows) {
    const int64_t bottom = std::min(top + kPairRows, items.n);
    for (int64_t left = items.below[top] / W * W; left < items.n; left += kPairColumns) {
      const int64_t right = std::min(left + kPairColumns, padded(items.n, W));
      std::fill(columns, columns + (right - left), A(0));
      for (int64_t i = top; i < bottom; ++i) {
        const int64_t first = std::max(items.below[i], left);
        if (first >= std::min(right, items.n)) break;
        V row = V{}, value = V{};
        I exponents = I{};
        const auto step = [&](int64_t j, const I& inside) ALWAYS_INLINE {
          Pair<V> x;
          V t, column;
          terms(i, j, inside, x, t);
          V g;
          if constexpr (kHessian) {
            load<A>(g, v + j);
            g = Phi::curvature(x) * (v[i] - (inside ? g : V{}));
          } else {
            g = Phi::slope(x);
          }
          V weight = V{} + A(1);
          if constexpr (kWeighted) {
            load<A>(weight, w + j);
            weight *= w[i];
            g *= weight;
          }
          if constexpr (kProduct) {
            product.add(x, t);
          } else if constexpr (kLog) {  // their mean can be finite when a sum in A isn't
            if constexpr (kWeighted) t *= weight;
            for (int64_t l = 0; l < W; ++l) values += static_cast<double>(t[l]);
          } else if constexpr (kWeighted && !kHessian) {
            value += Phi::value(x) * weight;
          } else if constexpr (!kHessian) {
            value += Phi::value(x);
          }
          row += g;
          load<A>(column, columns + (j - left));
          column += g;
          std::memcpy(columns + (j - left), &column, sizeof(column));
        };
        int64_t j = first / W * W;
        step(j, lanes >= static_cast<std::remove_reference_t<decltype(lanes[0])>>(first - j));
        j += W;
        while (j < right) {
          const int64_t stop = kProduct ? std::min(right, j + terms.chunk * W - W) : right;
          for (; j < stop; j += W) step(j, all);
          if constexpr (kProduct) {
            product.normalise(exponents);
            if (j < right) step(j, all), j += W;
          }
        }
        if constexpr (kProduct) {
          product.normalise(exponents);
          product.end_row(exponents);
        }
        sums[i] += static_cast<double>(sum_lanes<A>(row));
        values += static_cast<double>(sum_lanes<A>(value));
      }
      for (int64_t k = 0; k < std::min(right, items.n) - left; ++k) sums[left + k] -= static_cast<double>(columns[k]);
    }
  }
  return values + product.total();
}

// Computes the loss of a list and its slopes for d = sigma (s_i - s_j), by the method that the range of the scores
// allows.
template <class Phi, class A>
void pair_loss(List<A>& list, const ByLabel<A>& items, double sigma, double scale) {
  const int64_t n = items.n, length = padded(n, kWidth<A>);
  Scratch& scratch = list.scratch;
  const Range range = list.range();
  const double width = sigma * (range.high - range.low);
  const auto padded_copy = [&](const A* x) -> const A* {
    if (!x) return nullptr;
    A* copy = scratch.get<A>(length);
    std::copy(x, x + n, copy);
    std::fill(copy + n, copy + length, A(0));
    return copy;
  };
  const bool ratios = has_ratios<A>(width) && !(Phi::kLog && items.w);  // a product of logarithms has no weights
  const A* w = padded_copy(items.w);
  const A* v = padded_copy(items.v);
  if (!ratios && !w) {
    A* ones = scratch.get<A>(length);
    std::fill(ones, ones + length, A(1));
    w = ones;
  }
  const A share = static_cast<A>(Phi::kUnbounded ? std::exchange(scale, 1) : 1);
  const int64_t parts = parts_of(items.pairs);
  double losses[kParts] = {};
  const double* sums;
  const auto run = [&](const auto& terms) {
    sums = sum_parts(n, parts, scratch, [&](int64_t part, double* own) {
      using Terms = std::decay_t<decltype(terms)>;
      multiversion([&]() ALWAYS_INLINE {
        if constexpr (!Terms::kRatios || !Phi::kLog) {
          if (w && v) sum_pairs<Phi, true, true>(items, w, v, terms, part, parts, own);
          else if (w) losses[part] = sum_pairs<Phi, false, true>(items, w, v, terms, part, parts, own);
        }
        if constexpr (Terms::kRatios) {
          if (!w && v) sum_pairs<Phi, true, false>(items, w, v, terms, part, parts, own);
          else if (!w) losses[part] = sum_pairs<Phi, false, false>(items, w, v, terms, part, parts, own);
        }
      });
    });
  };
  if (ratios) {
    const Ratios<A> of_items(items.s, n, length, sigma, range, scratch);
    const int64_t chunk = width >= 0 ? static_cast<int64_t>((Vector<A>::kLogMax - 1) / (width + 0.7)) : 1;
    A* down = scratch.get<A>(n);
    for (int64_t i = 0; i < n; ++i) down[i] = share * of_items.down[i];
    run(FromItems<A>{of_items.up, down, std::max<int64_t>(chunk, 1)});
  } else {
    A* halves = scratch.get<A>(length);
    for (int64_t i = 0; i < n; ++i) halves[i] = items.s[i] / 2;
    std::fill(halves + n, halves + length, A(0));
    run(FromPairs<A, Phi::kUnbounded>{halves, static_cast<A>(2 * sigma), share, n});
  }
  items.finish(list, sums, scale * (v ? sigma * sigma : sigma));
  list.loss = static_cast<A>(scale * std::accumulate(losses, losses + parts, 0.0));
  list.active = items.weight > 0;
}

}  // namespace custom_ops
