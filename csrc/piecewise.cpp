// Piecewise-linear activations: what backward needs of one is one bit per element.
#include "activation.h"

#include <type_traits>

namespace custom_ops {
namespace {

// Keeps v between `low` and, if kBounded, `high`; elsewhere it is slope * v if kSloped, else `below` and `above`.
// What a rule doesn't need, it doesn't compute: at a few instructions per element each one counts.
template <class A, bool kSloped, bool kBounded, bool kNanPasses>
struct Piecewise {
  static constexpr bool kExact = !kSloped;  // the result is v or a constant that T holds
  A low, high, below, above, slope;

  bool apply(A v, bool, A& y) const {
    const bool over = kBounded && v >= high, under = v <= low;
    const bool keep = (kNanPasses ? !under : v > low) && !over;
    y = keep ? v : kSloped ? slope * v : over ? above : under ? below : v;
    return keep;
  }

#ifdef CUSTOM_OPS_AVX2
  using V = Vector<A>;

  TARGET_LANES V apply(V v, V, V& y) const {
    const V above_low = kNanPasses ? v.not_at_most(V::all(low)) : v > V::all(low);
    const V over = kBounded ? v >= V::all(high) : V::all(A(0));
    const V keep = kBounded ? above_low.and_not(over) : above_low;
    if constexpr (kSloped) {
      y = (v * V::all(slope)).replaced(v, keep);
    } else {
      y = kNanPasses ? V::all(below).replaced(v, above_low) : v.replaced(V::all(below), v <= V::all(low));
      if constexpr (kBounded) y = y.replaced(V::all(above), over);
    }
    return keep;
  }
#endif
};

template <class F>
void with_constant(bool value, const F& f) {
  if (value) f(std::true_type{});
  else f(std::false_type{});
}

// `bias`, one value for each channel of each example, may be null.
template <class T, class Rule>
void activate(const Rule& rule, const T* x, const T* bias, int64_t inner, int64_t channels, const MaskLayout& layout,
              T* y, uint8_t* mask, const Streaming& streaming) {
  using A = Accumulator<T>;
  layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
    const int64_t at = example * layout.elements;
    uint8_t* bits = mask + example * layout.bytes;
    const int64_t step = bias == nullptr ? end - begin : kTile;
    for (int64_t i = begin; i < end; i += step) {
      const int64_t n = std::min(step, end - i);
      A tile[kTile];
      for (int64_t k = 0, run; bias != nullptr && k < n; k += run) {
        const int64_t channel = (i + k) / inner % channels;
        const T* value = bias + example * channels + channel;
        run = std::min(n - k, inner > 1 ? inner - (i + k) % inner : channels - channel);
        for (int64_t j = 0; j < run; ++j) tile[k + j] = static_cast<A>(value[inner > 1 ? 0 : j]);
      }
      activate_span(rule, x + at + i, bias == nullptr ? nullptr : tile, nullptr, y + at + i, bits + i / 8, n,
                    streaming.at(y + at + i));
    }
    streaming.flush();
  });
}

#ifdef CUSTOM_OPS_AVX2
template <class T>
TARGET_LANES int64_t apply_mask_vectors(const T* x, const uint8_t* mask, T* out, int64_t n, Accumulator<T> on,
                                        Accumulator<T> off, bool stream) {
  using V = Vector<Accumulator<T>>;
  int64_t i = 0;
  for (; i + avx2::kStep <= n; i += avx2::kStep) {
    uint32_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    for (int64_t k = 0; k < avx2::kStep; k += V::kLanes) {
      const V v = V::load(x + i + k), rest = off != 0 ? v * V::all(off) : V::all(0);
      rest.replaced(v * V::all(on), V::signs_of(bits, static_cast<int>(k))).store(out + i + k, stream);
    }
  }
  return i;
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> piecewise_linear(const Tensor& x_in, const std::optional<Tensor>& bias_in, int64_t inner,
                                            double low, std::optional<double> high, double below, double above,
                                            double slope, bool nan_passes, int64_t batch_dims) {
  const Tensor x = dense(x_in), bias = bias_in ? dense(*bias_in) : x;
  const auto [y, mask, layout] = activation_outputs(x, batch_dims);
  int64_t channels = 1;
  if (bias_in) {
    channels = bias.dim() > 0 ? bias.size(bias.dim() - 1) : 0;
    check(bias.scalar_type() == x.scalar_type() && sizes(bias) == append(layout.batch, {channels}) && inner > 0 &&
              (channels > 0 ? layout.elements % (channels * inner) == 0 : layout.elements == 0),
          "bias: expected x's dtype and one value for each of its channels");
  }
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* xp = data<T>(x);
    const T* bp = bias_in ? data<T>(bias) : nullptr;
    T* yp = mutable_data<T>(y);
    uint8_t* mp = mutable_data<uint8_t>(mask);
    with_constant(slope != 0, [&](auto sloped) {
      with_constant(high.has_value(), [&](auto bounded) {
        with_constant(nan_passes, [&](auto passes) {
          using Rule = Piecewise<A, decltype(sloped)::value, decltype(bounded)::value, decltype(passes)::value>;
          const auto held = [](double constant) { return static_cast<A>(static_cast<T>(constant)); };
          const Rule rule{static_cast<A>(low), static_cast<A>(high.value_or(0)), held(below), held(above),
                          static_cast<A>(slope)};
          activate(rule, xp, bp, inner, channels, layout, yp, mp, Streaming(y));
        });
      });
    });
  });
  return {y, mask};
}

Tensor apply_mask(const Tensor& x_in, const Tensor& mask_in, double on, double off) {
  const Tensor x = dense(x_in), mask = dense(mask_in);
  const MaskLayout layout = MaskLayout::of_mask(mask, x);
  Tensor out = fresh(x, sizes(x));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* xp = data<T>(x);
    const uint8_t* mp = data<uint8_t>(mask);
    T* op = mutable_data<T>(out);
    const Streaming streaming(out);
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      const int64_t at = example * layout.elements + begin, n = end - begin;
      const uint8_t* bits = mp + example * layout.bytes + begin / 8;
      const bool stream = streaming.at(op + at);
      if (on == 1 && off == 0) {
        select_bits<sizeof(T)>(xp + at, bits, op + at, n, stream);
      } else {
        const A scale = static_cast<A>(on), rest = static_cast<A>(off);
        int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
        if (cpu_has_lanes()) i = apply_mask_vectors(xp + at, bits, op + at, n, scale, rest, stream);
#endif
        for (; i < n; ++i) {
          const A v = static_cast<A>(xp[at + i]);
          op[at + i] = static_cast<T>(bit(bits, i) ? v * scale : rest != 0 ? v * rest : A(0));
        }
      }
      streaming.flush();
    });
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(piecewise_linear)
CUSTOM_OPS_CPU_KERNEL(apply_mask)
