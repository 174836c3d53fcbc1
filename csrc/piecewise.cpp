// Piecewise-linear activations: what backward needs of one is one bit per element.
#include "activation.h"

#include <limits>

namespace custom_ops {
namespace {

// Keeps v between `low` and `high`; elsewhere it is slope * v, or `below` and `above` if the slope is 0.
template <class A>
struct Piecewise {
  A low, high, below, above, slope;
  bool nan_passes;

  bool apply(A v, bool, A& y) const {
    const bool keep = (nan_passes ? !(v <= low) : v > low) && !(v >= high);
    y = keep ? v : slope != 0 ? slope * v : v >= high ? above : v <= low ? below : v;
    return keep;
  }

#ifdef CUSTOM_OPS_AVX2
  using V = Vector<A>;

  TARGET_LANES V apply(V v, V, V& y) const {
    const V under = v <= V::all(low), over = v >= V::all(high);
    const V keep = (nan_passes ? V::all(A(-0.0)).and_not(under) : v > V::all(low)).and_not(over);
    y = slope != 0 ? (v * V::all(slope)).replaced(v, keep)
                   : v.replaced(V::all(below), under).replaced(V::all(above), over);
    return keep;
  }
#endif
};

#ifdef CUSTOM_OPS_AVX2
template <class T>
TARGET_LANES int64_t apply_mask_vectors(const T* x, const uint8_t* mask, T* out, int64_t n, Accumulator<T> on,
                                        Accumulator<T> off) {
  using V = Vector<Accumulator<T>>;
  int64_t i = 0;
  for (; i + avx2::kStep <= n; i += avx2::kStep) {
    uint32_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    for (int64_t k = 0; k < avx2::kStep; k += V::kLanes) {
      const V v = V::load(x + i + k), rest = off != 0 ? v * V::all(off) : V::all(0);
      rest.replaced(v * V::all(on), V::signs_of(bits, static_cast<int>(k))).store(out + i + k);
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
    const A never = std::numeric_limits<A>::quiet_NaN();
    const Piecewise<A> rule{static_cast<A>(low),   static_cast<A>(high.value_or(never)),
                            static_cast<A>(below), static_cast<A>(above),
                            static_cast<A>(slope), nan_passes};
    const T* xp = data<T>(x);
    const T* bp = data<T>(bias);
    T* yp = mutable_data<T>(y);
    uint8_t* mp = mutable_data<uint8_t>(mask);
    layout.parallel_spans(kSpan, [&, &layout = layout](int64_t example, int64_t begin, int64_t end) {
      const int64_t at = example * layout.elements;
      uint8_t* bits = mp + example * layout.bytes;
      if (!bias_in)
        return activate_span(rule, xp + at + begin, nullptr, nullptr, yp + at + begin, bits + begin / 8, end - begin);
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = std::min(kTile, end - i);
        A tile[kTile];
        for (int64_t k = 0, run; k < n; k += run) {
          const int64_t channel = (i + k) / inner % channels;
          const T* value = bp + example * channels + channel;
          run = std::min(n - k, inner > 1 ? inner - (i + k) % inner : channels - channel);
          for (int64_t j = 0; j < run; ++j) tile[k + j] = static_cast<A>(value[inner > 1 ? 0 : j]);
        }
        activate_span(rule, xp + at + i, tile, nullptr, yp + at + i, bits + i / 8, n);
      }
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
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      const int64_t at = example * layout.elements + begin, n = end - begin;
      const uint8_t* bits = mp + example * layout.bytes + begin / 8;
      if (on == 1 && off == 0) return select_bits<sizeof(T)>(xp + at, bits, op + at, n);
      const A scale = static_cast<A>(on), rest = static_cast<A>(off);
      int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
      if (cpu_has_lanes()) i = apply_mask_vectors(xp + at, bits, op + at, n, scale, rest);
#endif
      for (; i < n; ++i) {
        const A v = static_cast<A>(xp[at + i]);
        op[at + i] = static_cast<T>(bit(bits, i) ? v * scale : rest != 0 ? v * rest : A(0));
      }
    });
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(piecewise_linear)
CUSTOM_OPS_CPU_KERNEL(apply_mask)
