// What the one-bit activations share: a rule applied to every element, its bits packed.
#pragma once

#include "lanes.h"

namespace custom_ops {

constexpr int64_t kSpan = 1 << 14;  // elements of one piece of work
constexpr int64_t kTile = 512;      // elements whose intermediate values stay in the first-level cache

#ifdef CUSTOM_OPS_AVX2
template <class T, class Rule>
TARGET_AVX2 int64_t activate_vectors(Rule rule, const T* x, const Accumulator<T>* bias, const uint8_t* random, T* y,
                                     uint8_t* mask, int64_t n, bool stream) {
  using L = Lanes<T>;
  using V = typename L::V;
  int64_t i = 0;
  for (; i + avx2::kStep <= n; i += avx2::kStep) {
    uint32_t draws = 0;
    if (random != nullptr) std::memcpy(&draws, random + i / 8, sizeof(draws));
    V kept[avx2::kStep / V::kLanes];
    for (int64_t k = 0; k < avx2::kStep; k += 2 * V::kLanes) {
      V v[2], shift[2], result[2];
      L::load(x + i + k, v);
      if (bias != nullptr) L::load(bias + i + k, shift);
      for (int64_t j = 0; j < 2; ++j) {
        if (bias != nullptr) v[j] = v[j] + shift[j];
        kept[k / V::kLanes + j] = rule.apply(v[j], L::signs_of(draws, k, j), result[j]);
      }
      if (Rule::kExact && bias == nullptr) L::store_exact(result, y + i + k, stream);
      else L::store(result, y + i + k, stream);
    }
    const uint32_t bits = L::signs(kept);
    std::memcpy(mask + i / 8, &bits, sizeof(bits));
  }
  return i;
}

#endif

inline bool bit(const uint8_t* mask, int64_t i) { return (mask[i >> 3] >> (i & 7)) & 1; }

// `bias`, one value for each element, and `random`, one bit for each, may be null; `stream` as `Streaming` says at `y`.
template <class T, class Rule>
void activate_span(const Rule& rule, const T* x, const Accumulator<T>* bias, const uint8_t* random, T* y, uint8_t* mask,
                   int64_t n, [[maybe_unused]] bool stream) {
  using A = Accumulator<T>;
  int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
  if (use_avx2) i = activate_vectors(rule, x, bias, random, y, mask, n, stream);
#endif
  for (; i < n; ++i) {
    A result;
    A v = static_cast<A>(x[i]);
    if (bias != nullptr) v += bias[i];  // not + 0, which loses the sign of a zero
    const bool keep = rule.apply(v, random != nullptr && bit(random, i), result);
    y[i] = static_cast<T>(result);
    if (i % 8 == 0) mask[i / 8] = 0;
    mask[i / 8] |= static_cast<uint8_t>(keep << (i % 8));
  }
}

inline std::tuple<Tensor, Tensor, MaskLayout> activation_outputs(const Tensor& x, int64_t batch_dims) {
  const MaskLayout layout(x, batch_dims);
  return {fresh(x, sizes(x)), fresh(x, append(layout.batch, {layout.bytes}), ScalarType::Byte), layout};
}

}  // namespace custom_ops
