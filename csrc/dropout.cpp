// Dropout of ReLU, with both masks merged into one bit per element.
#include "activation.h"

#include <cmath>

namespace custom_ops {
namespace {

// Keeps scale * v where v is positive and its random bit is set; a NaN stays.
template <class A>
struct Dropout {
  static constexpr bool kExact = false;
  A scale;

  bool apply(A v, bool random, A& y) const {
    const bool keep = random && !(v <= 0);
    y = keep ? scale * v : v != v ? v : A(0);
    return keep;
  }

#ifdef CUSTOM_OPS_AVX2
  using V = Vector<A>;

  TARGET_AVX2 V apply(V v, V random, V& y) const {
    const V keep = random.and_not(v <= V::all(0));
    y = V::all(0).replaced(v * V::all(scale), keep).replaced(v, v.is_nan());
    return keep;
  }
#endif
};

// Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Counter i gives the draws of
// elements 4 i to 4 i + 3. Bit k of `kept` is set if the draw of element 4 * counter + k is at least `least`.
ALWAYS_INLINE inline void draw(uint64_t seed, uint64_t counter, uint64_t least, uint8_t* kept, int64_t n) {
  constexpr int64_t kCounters = 32;
  for (int64_t first = 0; first < n; first += 4 * kCounters) {
    uint32_t c[4][kCounters], key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int64_t j = 0; j < kCounters; ++j) {
      const uint64_t at = counter + static_cast<uint64_t>(first / 4 + j);
      c[0][j] = static_cast<uint32_t>(at), c[1][j] = static_cast<uint32_t>(at >> 32), c[2][j] = 0, c[3][j] = 0;
    }
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85)
      for (int64_t j = 0; j < kCounters; ++j) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0][j], b = uint64_t{0xCD9E8D57} * c[2][j];
        const uint32_t c1 = c[1][j], c3 = c[3][j];
        c[0][j] = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0, c[1][j] = static_cast<uint32_t>(b);
        c[2][j] = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1, c[3][j] = static_cast<uint32_t>(a);
      }
    for (int64_t j = 0; j < kCounters / 2; ++j) {
      uint8_t bits = 0;
      for (int64_t k = 0; k < 8; ++k) bits |= static_cast<uint8_t>((c[k % 4][2 * j + k / 4] >= least) << k);
      kept[first / 8 + j] = bits;
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> relu_dropout_forward(const Tensor& x_in, const Tensor& seed_in, double p,
                                                int64_t batch_dims) {
  const Tensor x = dense(x_in), seed = dense(seed_in);
  const auto [y, mask, layout] = activation_outputs(x, batch_dims);
  check(seed.scalar_type() == ScalarType::Long && sizes(seed) == layout.batch,
        "seed: expected an int64 for each example");
  check(p >= 0 && p <= 1, "p: expected a probability, got ", p);
  const int64_t* sp = data<int64_t>(seed);
  const uint64_t least = static_cast<uint64_t>(std::llround(p * 4294967296.0));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const Dropout<A> rule{static_cast<A>(p < 1 ? 1 / (1 - p) : 0)};
    const T* xp = data<T>(x);
    T* yp = mutable_data<T>(y);
    uint8_t* mp = mutable_data<uint8_t>(mask);
    const Streaming streaming(y);
    layout.parallel_spans(kSpan, [&, &layout = layout](int64_t example, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = std::min(kTile, end - i), at = example * layout.elements + i;
        uint8_t kept[kTile / 8];
        multiversion([&]() ALWAYS_INLINE {
          draw(static_cast<uint64_t>(sp[example]), static_cast<uint64_t>(i / 4), least, kept, n);
        });
        activate_span<T>(rule, xp + at, nullptr, kept, yp + at, mp + example * layout.bytes + i / 8, n,
                         streaming.at(yp + at));
      }
      streaming.flush();
    });
  });
  return {y, mask};
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(relu_dropout_forward)
