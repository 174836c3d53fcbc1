// Losses of one margin per pair of a preferred and a rejected item, elementwise or reduced.
#include "bits.h"
#include "elementary.h"

namespace custom_ops {

CUSTOM_OPS_ENUM(PreferenceLoss, LOGISTIC, HINGE, SQUARED, DIVERGENCE, SIGMOID, BLEND)

namespace {

constexpr int64_t kSpan = 1 << 14;
constexpr int64_t kTile = 512;  // elements whose intermediate values fit into the first-level cache

struct Parameters {
  double beta, p, q;
};

// Computes sigmoid(z), its complement, softplus(-z) and softplus(z) from one exponential.
template <class A>
struct Logistic {
  A up, down, low, high;

  ALWAYS_INLINE explicit Logistic(A z) {
    const A u = exp_nonpositive(z < 0 ? z : -z), whole = 1 + u;
    up = (z < 0 ? u : A(1)) / whole;
    down = (z < 0 ? A(1) : u) / whole;
    const A rest = log1p_unit(u);
    low = (z < 0 ? -z : A(0)) + rest;
    high = (z < 0 ? A(0) : z) + rest;
  }
};

// Each loss has a function that returns its derivative of order kOrder at the difference d.

// p softplus(-z) + q softplus(z), with z = beta d
struct LogisticLoss {
  template <int kOrder, class A>
  ALWAYS_INLINE static A at(A d, A beta, A p, A q) {
    const Logistic<A> f(beta * d);
    if constexpr (kOrder == 0) return weigh(p, f.low) + weigh(q, f.high);
    else if constexpr (kOrder == 1) return beta * (q * f.up - p * f.down);
    else if constexpr (kOrder == 2) return beta * beta * (p + q) * (f.up * f.down);
    else return beta * beta * beta * (p + q) * (f.up * f.down * (f.down - f.up));
  }
};

// The same for q = 0, which takes a third less time.
struct OneSidedLoss {
  template <int kOrder, class A>
  ALWAYS_INLINE static A at(A d, A beta, A p, A) {
    const Logistic<A> f(beta * d);
    if constexpr (kOrder == 0) return p * f.low;
    else if constexpr (kOrder == 1) return -(beta * p) * f.down;
    else return LogisticLoss::at<kOrder>(d, beta, p, A(0));
  }
};

// max(0, 1 - z); the gradient at the kink is 0
struct HingeLoss {
  template <int kOrder, class A>
  ALWAYS_INLINE static A at(A d, A beta, A, A) {
    const A rest = 1 - beta * d;
    if constexpr (kOrder == 0) return rest < 0 ? A(0) : rest;
    else if constexpr (kOrder == 1) return rest <= 0 ? A(0) : -beta;
    else return d != d ? d : A(0);
  }
};

// (d - p)^2
struct SquaredLoss {
  template <int kOrder, class A>
  ALWAYS_INLINE static A at(A d, A, A p, A) {
    if constexpr (kOrder == 0) return (d - p) * (d - p);
    else if constexpr (kOrder == 1) return 2 * (d - p);
    else return d != d ? d : A(kOrder == 2 ? 2 : 0);
  }
};

// KL(sigmoid(z) || exp(-p)) of two outcomes, with z = beta d; the other outcome has the probability exp(-q)
struct DivergenceLoss {
  template <int kOrder, class A>
  ALWAYS_INLINE static A at(A d, A beta, A p, A q) {
    const A z = beta * d;
    const Logistic<A> f(z);
    if constexpr (kOrder == 0) return weigh(f.up, p - f.low) + weigh(f.down, q - f.high);
    const A rest = z - (q - p), both = f.up * f.down, slope = f.down - f.up;
    if constexpr (kOrder == 1) return beta * weigh(both, rest);
    else if constexpr (kOrder == 2) return beta * beta * weigh(both, slope * rest + 1);
    else return beta * beta * beta * weigh(both, (slope * slope - 2 * both) * rest + 2 * slope);
  }
};

// p sigmoid(-z) + q sigmoid(z), with z = beta d
struct SigmoidLoss {
  template <int kOrder, class A>
  ALWAYS_INLINE static A at(A d, A beta, A p, A q) {
    const Logistic<A> f(beta * d);
    const A both = f.up * f.down, slope = f.down - f.up;
    if constexpr (kOrder == 0) return p * f.down + q * f.up;
    else if constexpr (kOrder == 1) return beta * (q - p) * both;
    else if constexpr (kOrder == 2) return beta * beta * (q - p) * (both * slope);
    else return beta * beta * beta * (q - p) * (both * (slope * slope - 2 * both));
  }
};

// sigmoid(-p z) softplus(-z) + sigmoid(p z) exp(-z), with z = beta d and p >= 1
struct BlendLoss {
  template <int kOrder, class A>
  ALWAYS_INLINE static A at(A d, A beta, A p, A) {
    const A z = beta * d;
    const Logistic<A> f(z), share(p * z);
    // exp(-z) sigmoid(p z), in which neither factor overflows
    const A exponential = exp_nonpositive(z < 0 ? weigh(p - 1, z) : -z) * (z < 0 ? share.down : share.up);
    if constexpr (kOrder == 0) return weigh(share.down, f.low) + exponential;
    // The derivatives of the share sigmoid(p z), and the logarithmic slope of the exponential term with its derivatives
    const A m = p * (share.up * share.down), turn = p * (share.down - share.up), g = p * share.down - 1;
    if constexpr (kOrder == 1) return beta * (exponential * g - share.down * f.down - weigh(m, f.low));
    const A both = f.up * f.down, dg = -p * m, m2 = m * turn;
    if constexpr (kOrder == 2)
      return beta * beta * (share.down * both + 2 * f.down * m - weigh(m2, f.low) + exponential * (g * g + dg));
    const A m3 = m * (turn * turn - 2 * p * m), bend = both * (f.down - f.up);
    return beta * beta * beta *
           (share.down * bend - 3 * both * m + 3 * f.down * m2 - weigh(m3, f.low) +
            exponential * (g * g * g + 3 * g * dg - p * m2));
  }
};

// Replaces the differences of a tile by the loss's derivatives of that order.
template <class A>
void differentiate(PreferenceLoss kind, int64_t order, A* v, int64_t n, A beta, A p, A q) {
  const auto run = [=](auto loss, auto constant) {
    multiversion_wide([=]() ALWAYS_INLINE {
      for (int64_t k = 0; k < n; ++k) v[k] = loss.template at<decltype(constant)::value>(v[k], beta, p, q);
    });
  };
  const auto with_order = [=](auto loss) {
    switch (order) {
      case 0: return run(loss, std::integral_constant<int, 0>{});
      case 1: return run(loss, std::integral_constant<int, 1>{});
      case 2: return run(loss, std::integral_constant<int, 2>{});
      default: return run(loss, std::integral_constant<int, 3>{});
    }
  };
  switch (kind) {
    case PreferenceLoss::LOGISTIC: return q == 0 ? with_order(OneSidedLoss{}) : with_order(LogisticLoss{});
    case PreferenceLoss::HINGE: return with_order(HingeLoss{});
    case PreferenceLoss::SQUARED: return with_order(SquaredLoss{});
    case PreferenceLoss::DIVERGENCE: return with_order(DivergenceLoss{});
    case PreferenceLoss::SIGMOID: return with_order(SigmoidLoss{});
    case PreferenceLoss::BLEND: return with_order(BlendLoss{});
  }
}

// The differences chosen - rejected - chosen_offset + rejected_offset - margin, elementwise; an offset may be missing.
// The rounding error of each sum is kept and added at the end, so cancelling large terms don't lose the others.
struct Differences {
  Tensor chosen, rejected;
  std::optional<Tensor> chosen_offset, rejected_offset;
  double margin;

  Differences(const Tensor& chosen_in, const Tensor& rejected_in, const std::optional<Tensor>& chosen_offset_in,
              const std::optional<Tensor>& rejected_offset_in, double margin)
      : chosen(dense(chosen_in)),
        rejected(alike(rejected_in)),
        margin(margin) {
    if (chosen_offset_in) chosen_offset = alike(*chosen_offset_in);
    if (rejected_offset_in) rejected_offset = alike(*rejected_offset_in);
  }

  template <class T, class A>
  void tile(int64_t at, int64_t n, A* out) const {
    if (rejected_offset) return margin == 0 ? sum<T, 2, false>(at, n, out) : sum<T, 2, true>(at, n, out);
    if (chosen_offset) return margin == 0 ? sum<T, 1, false>(at, n, out) : sum<T, 1, true>(at, n, out);
    return margin == 0 ? sum<T, 0, false>(at, n, out) : sum<T, 0, true>(at, n, out);
  }

 private:
  template <class A>
  static constexpr A kQuarter = 0.25;  // sums of quarters can't overflow

  template <class A>
  ALWAYS_INLINE static void add(A x, A& sum, A& rest) {
    const A before = sum, added = (sum += x) - before;
    rest += (before - (sum - added)) + (x - added);
  }

  template <class T, int kOffsets, bool kMargin, class A>
  void sum(int64_t at, int64_t n, A* to) const {
    const T* c = data<T>(chosen) + at;
    const T* r = data<T>(rejected) + at;
    const T* own = kOffsets > 0 ? data<T>(*chosen_offset) + at : c;  // or a placeholder
    const T* other = kOffsets > 1 ? data<T>(*rejected_offset) + at : c;
    const A m = kQuarter<A> * static_cast<A>(margin);
    multiversion_wide([=]() ALWAYS_INLINE {
      A* __restrict out = to;
      if constexpr (kOffsets == 0 && !kMargin) {  // a single difference is rounded once
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(c[i]) - static_cast<A>(r[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          A total = kQuarter<A> * static_cast<A>(c[i]), rest = 0;
          add(-kQuarter<A> * static_cast<A>(r[i]), total, rest);
          if constexpr (kOffsets > 0) add(-kQuarter<A> * static_cast<A>(own[i]), total, rest);
          if constexpr (kOffsets > 1) add(kQuarter<A> * static_cast<A>(other[i]), total, rest);
          if constexpr (kMargin) add(-m, total, rest);
          const A whole = total + rest;
          out[i] = (whole == whole ? whole : total) / kQuarter<A>;  // `rest` is NaN if a term is infinite
        }
      }
    });
  }

  Tensor alike(const Tensor& t) const {
    check(sizes(t) == sizes(chosen) && t.scalar_type() == chosen.scalar_type(),
          "chosen, rejected and their offsets: expected the same shape and dtype");
    return dense(t);
  }
};

template <class A>
ALWAYS_INLINE inline double sum(const A* __restrict v, int64_t n) {
  A lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t k = 0; k < 16; ++k) lanes[k] += v[i + k];
  double total = 0;
  for (A lane : lanes) total += lane;
  for (; i < n; ++i) total += v[i];
  return total;
}

}  // namespace

Tensor preference(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& chosen_offset,
                  const std::optional<Tensor>& rejected_offset, PreferenceLoss kind, double margin, double beta,
                  double p, double q, int64_t divisor, bool reduce, int64_t batch_dims) {
  const Differences differences(chosen, rejected, chosen_offset, rejected_offset, margin);
  const MaskLayout layout(chosen, batch_dims);
  Tensor loss = fresh(differences.chosen, reduce ? layout.batch : sizes(chosen));
  const int64_t spans = (layout.elements + kSpan - 1) / kSpan;
  std::vector<double> partial(reduce ? layout.examples * spans : 0);
  dispatch_floating(chosen, "chosen", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    T* lp = mutable_data<T>(loss);
    const A b = static_cast<A>(beta), wp = static_cast<A>(p), wq = static_cast<A>(q);
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      double total = 0;
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = std::min(kTile, end - i), at = example * layout.elements + i;
        A v[kTile];
        differences.tile<T>(at, n, v);
        differentiate(kind, 0, v, n, b, wp, wq);
        multiversion_wide([&]() ALWAYS_INLINE {
          if (reduce) total += sum(v, n);
          else
            for (int64_t k = 0; k < n; ++k) lp[at + k] = static_cast<T>(v[k]);
        });
      }
      if (reduce) partial[example * spans + begin / kSpan] = total;
    });
    if (reduce)
      for (int64_t e = 0; e < layout.examples; ++e) {
        double total = 0;
        for (int64_t k = 0; k < spans; ++k) total += partial[e * spans + k];
        lp[e] = static_cast<T>(static_cast<A>(total / static_cast<double>(std::max<int64_t>(divisor, 1))));
      }
  });
  return loss;
}

Tensor preference_slope(const Tensor& weight_in, const Tensor& chosen, const Tensor& rejected,
                        const std::optional<Tensor>& chosen_offset, const std::optional<Tensor>& rejected_offset,
                        int64_t order, PreferenceLoss kind, double margin, double beta, double p, double q,
                        int64_t divisor, bool reduce) {
  const Tensor weight = dense(weight_in);
  const Differences differences(chosen, rejected, chosen_offset, rejected_offset, margin);
  const MaskLayout layout(chosen, reduce ? weight.dim() : 0);
  check(sizes(weight) == (reduce ? layout.batch : sizes(chosen)) && weight.scalar_type() == chosen.scalar_type(),
        "weight: expected the shape and dtype of the loss");
  Tensor slope = fresh(differences.chosen, sizes(chosen));
  check(order >= 1 && order <= 3, "order: expected 1 to 3, got ", order);
  dispatch_floating(chosen, "chosen", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* wp = data<T>(weight);
    T* sp = mutable_data<T>(slope);
    const A b = static_cast<A>(beta), fp = static_cast<A>(p), fq = static_cast<A>(q);
    const A scale = static_cast<A>(1.0 / static_cast<double>(std::max<int64_t>(divisor, 1)));
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = std::min(kTile, end - i), at = example * layout.elements + i;
        A v[kTile];
        differences.tile<T>(at, n, v);
        differentiate(kind, order, v, n, b, fp, fq);
        multiversion_wide([&]() ALWAYS_INLINE {
          if (reduce) {
            const A w = static_cast<A>(wp[example]) * scale;
            for (int64_t k = 0; k < n; ++k) sp[at + k] = static_cast<T>(w * v[k]);
          } else {
            for (int64_t k = 0; k < n; ++k) sp[at + k] = static_cast<T>(static_cast<A>(wp[at + k]) * v[k]);
          }
        });
      }
    });
  });
  return slope;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(preference)
CUSTOM_OPS_CPU_KERNEL(preference_slope)
