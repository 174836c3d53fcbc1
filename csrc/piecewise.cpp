// Piecewise-linear activations, whose backward needs one bit per element.
#include "activation.h"
#include "elementary.h"

#include <type_traits>
#include <vector>

namespace custom_ops {
namespace {

// Keeps v between `low` and, if kBounded, `high`. Elsewhere the result is slope * v if kSloped, else `below` and
// `above`. An instance computes only what its rule needs, since each of its few instructions per element counts.
template <class A, bool kSloped, bool kBounded, bool kNanPasses>
struct Piecewise {
  static constexpr bool kExact = !kSloped;  // the result is v or a constant, both representable in T
  A low, high, below, above, slope;

  bool apply(A v, bool, A& y) const {
    const bool over = kBounded && v >= high, under = v <= low;
    const bool keep = (kNanPasses ? !under : v > low) && !over;
    y = keep ? v : kSloped ? slope * v : over ? above : under ? below : v;
    return keep;
  }

#ifdef CUSTOM_OPS_AVX2
  using V = Vector<A>;

  TARGET_AVX2 V apply(V v, V, V& y) const {
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

// Returns whether the examples of the layout consist of whole channels.
bool divides(int64_t channels, int64_t inner, const MaskLayout& layout) {
  if (channels <= 0 || inner <= 0) return channels == 0 && inner > 0 && layout.elements == 0;
  return layout.elements % channels == 0 && layout.elements / channels % inner == 0;
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
TARGET_AVX2 int64_t apply_mask_vectors(const T* x, const uint8_t* mask, T* out, Accumulator<T>* values, int64_t n,
                                       Accumulator<T> on, Accumulator<T> off, bool stream) {
  using L = Lanes<T>;
  using V = typename L::V;
  int64_t i = 0;
  for (; i + avx2::kStep <= n; i += avx2::kStep) {
    uint32_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    for (int64_t k = 0; k < avx2::kStep; k += 2 * V::kLanes) {
      V v[2];
      L::load(x + i + k, v);
      for (int64_t j = 0; j < 2; ++j) {
        const V rest = off != 0 ? v[j] * V::all(off) : V::all(0);
        v[j] = rest.replaced(v[j] * V::all(on), L::signs_of(bits, k, j));
      }
      L::store(v, out + i + k, stream);
      if (values != nullptr) L::store(v, values + i + k, false);
    }
  }
  return i;
}
#endif

// `values`, the results before rounding, may be null; `stream` is `Streaming::at(out)`.
template <class T>
void apply_mask_span(const T* x, const uint8_t* mask, T* out, Accumulator<T>* values, int64_t n, Accumulator<T> on,
                     Accumulator<T> off, bool stream) {
  using A = Accumulator<T>;
  if (on == 1 && off == 0 && values == nullptr) return select_bits<sizeof(T)>(x, mask, out, n, stream);
  int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
  if (use_avx2) i = apply_mask_vectors(x, mask, out, values, n, on, off, stream);
#endif
  for (; i < n; ++i) {
    const A v = static_cast<A>(x[i]), masked = bit(mask, i) ? v * on : off != 0 ? v * off : A(0);
    out[i] = static_cast<T>(masked);
    if (values != nullptr) values[i] = masked;
  }
}

// Adds up consecutive elements, starting with element `first`. Runs of `inner` elements belong to the `slots` sums in
// turn, and the first sum follows the last.
class RunSums {
 public:
  RunSums(int64_t first, int64_t inner, double* sums, int64_t slots)
      : inner_(inner),
        left_(inner - first % inner),
        sums_(sums),
        slots_(slots) {}

  template <class A>
  ALWAYS_INLINE void add(const A* x, int64_t n) {
    for (int64_t taken; n > 0; x += taken, n -= taken) {
      if (inner_ == 1) {
        taken = std::min(n, slots_ - slot_);
        for (int64_t j = 0; j < taken; ++j) sums_[slot_ + j] += static_cast<double>(x[j]);
        slot_ += taken;
      } else {
        taken = std::min(n, left_);
        sums_[slot_] += sum_of<A>(taken, [=](int64_t j) ALWAYS_INLINE { return x[j]; });
        left_ -= taken;
        if (left_ == 0) ++slot_, left_ = inner_;
      }
      if (slot_ == slots_) slot_ = 0;
    }
  }

 private:
  int64_t inner_, left_, slot_ = 0;
  double* sums_;
  int64_t slots_;
};

}  // namespace

std::tuple<Tensor, Tensor> piecewise_linear(const Tensor& x_in, const std::optional<Tensor>& bias_in, int64_t inner,
                                            double low, std::optional<double> high, double below, double above,
                                            double slope, bool nan_passes, int64_t batch_dims) {
  const Tensor x = dense(x_in), bias = bias_in ? dense(*bias_in) : x;
  const auto [y, mask, layout] = activation_outputs(x, batch_dims);
  int64_t channels = 1;
  if (bias_in) {
    channels = bias.dim() > 0 ? bias.size(bias.dim() - 1) : 0;
    check(bias.scalar_type() == x.scalar_type() && sizes(bias) == append(layout.batch, {channels}) &&
              divides(channels, inner, layout),
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
      const int64_t at = example * layout.elements + begin;
      apply_mask_span(xp + at, mp + example * layout.bytes + begin / 8, op + at, static_cast<A*>(nullptr), end - begin,
                      static_cast<A>(on), static_cast<A>(off), streaming.at(op + at));
      streaming.flush();
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> apply_mask_and_sum(const Tensor& x_in, const Tensor& mask_in, int64_t inner,
                                              int64_t channels, double off) {
  const Tensor x = dense(x_in), mask = dense(mask_in);
  const MaskLayout layout = MaskLayout::of_mask(mask, x);
  const int64_t elements = layout.elements;
  check(divides(channels, inner, layout), "channels, inner: expected divisors of ", elements, " elements, got ",
        channels, " and ", inner);
  Tensor out = fresh(x, sizes(x)), sums = fresh(x, append(layout.batch, {channels}));
  // Each example is summed in pieces, whose number doesn't depend on the threads, so the bits don't either. A piece has
  // a sum for each channel, or for each run if it has fewer runs. A few channels get several sums each, so that the
  // loops over sums are long enough. With many channels there are few pieces, so that the sums take less memory than x.
  constexpr int64_t kPieces = 128, kLeast = 1 << 16, kSlots = 64;
  const int64_t run = channels == 1 ? std::max<int64_t>(elements, 1) : inner;
  const int64_t pieces = std::clamp<int64_t>(elements / std::max(kLeast, 8 * channels), 1, kPieces);
  const int64_t span = std::max<int64_t>((elements + pieces * kTile - 1) / (pieces * kTile), 1) * kTile;
  const int64_t round = (kSlots + channels - 1) / std::max<int64_t>(channels, 1) * channels;
  const int64_t slots = std::min(round, (std::min(span, elements) - 1) / run + 2);
  std::vector<double> partial(static_cast<size_t>(layout.examples * pieces * slots));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* xp = data<T>(x);
    const uint8_t* mp = data<uint8_t>(mask);
    T* op = mutable_data<T>(out);
    const Streaming streaming(out);
    layout.parallel_spans(span, [&](int64_t example, int64_t begin, int64_t end) {
      RunSums into(begin, run, partial.data() + (example * pieces + begin / span) * slots, slots);
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t at = example * elements + i, n = std::min(kTile, end - i);
        A values[kTile];
        apply_mask_span(xp + at, mp + example * layout.bytes + i / 8, op + at, values, n, A(1), static_cast<A>(off),
                        streaming.at(op + at));
        multiversion([&]() ALWAYS_INLINE { into.add(values, n); });
      }
      streaming.flush();
    });
    T* sp = mutable_data<T>(sums);
    std::vector<double> total(static_cast<size_t>(channels));
    for (int64_t example = 0; example < layout.examples; ++example) {
      std::fill(total.begin(), total.end(), 0.);
      const double* from = partial.data() + example * pieces * slots;
      for (int64_t begin = 0; begin < elements; begin += span, from += slots)
        for (int64_t s = 0, c = begin / run % channels; s < slots; ++s, c = c + 1 < channels ? c + 1 : 0)
          total[static_cast<size_t>(c)] += from[s];
      for (int64_t c = 0; c < channels; ++c)
        sp[example * channels + c] = static_cast<T>(static_cast<A>(total[static_cast<size_t>(c)]));
    }
  });
  return {out, sums};
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(piecewise_linear)
CUSTOM_OPS_CPU_KERNEL(apply_mask)
CUSTOM_OPS_CPU_KERNEL(apply_mask_and_sum)
