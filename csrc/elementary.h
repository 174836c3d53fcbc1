// Sums, and exp, log and log1p on the intervals that the losses need. Loops over these functions vectorise and give the
// same bits on every instruction set. NaN stays NaN.
#pragma once

#include "isa.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace custom_ops {

// Return e^x for x <= 0 (or up to 80), and 0 where the result is near or below the smallest normal number. V is a
// number or a vector of numbers, and Bits the unsigned integers of the same size.
template <class V, class Bits>
ALWAYS_INLINE inline V exp_nonpositive_double(const V& x) {
  constexpr double kRound = 6755399441055744;  // 1.5 * 2^52; adding it leaves the nearest integer in the low bits
  const V shifted = x * 1.4426950408889634 + kRound, n = shifted - kRound;
  const V r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  // The polynomial is unrolled, because GCC 12 doesn't vectorise a loop around another one.
  V y = 1 / 6227020800. * r + 1 / 479001600.;
  y = (y * r + 1 / 39916800.) * r + 1 / 3628800.;
  y = (y * r + 1 / 362880.) * r + 1 / 40320.;
  y = (y * r + 1 / 5040.) * r + 1 / 720.;
  y = (y * r + 1 / 120.) * r + 1 / 24.;
  y = ((y * r + 1 / 6.) * r + 0.5) * r + 1.;
  y = y * r + 1.;
  Bits bits;  // unsigned, because the sum may overflow outside of the interval, where the result isn't used
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 52) + 0x3ff0000000000000u;
  V power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -700. ? V{} : y * power;
}
template <class V, class Bits>
ALWAYS_INLINE inline V exp_nonpositive_float(const V& x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23; adding it leaves the nearest integer in the low bits
  const V shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first with few bits
  // A minimax polynomial, in parts that don't wait for each other; its error is 3e-9 of the result.
  const V square = r * r, low = 0.16666521f * r + 0.49999994f, high = 0.00836872f * r + 0.04166839f;
  const V y = ((0.00138146f * square + high) * square + low) * square + r + 1.f;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  V power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -86.f ? V{} : y * power;
}
ALWAYS_INLINE inline double exp_nonpositive(double x) { return exp_nonpositive_double<double, uint64_t>(x); }
ALWAYS_INLINE inline float exp_nonpositive(float x) { return exp_nonpositive_float<float, uint32_t>(x); }

// Returns log(1 + u) for 0 <= u <= 1. It is 2 artanh(u / (2 + u)), here u less a small term, accurate for small u too.
ALWAYS_INLINE inline double log1p_unit(double u) { return std::log1p(u); }
ALWAYS_INLINE inline float log1p_unit(float u) {
  const float s = u / (2 + u), q = s * s;
  // A minimax polynomial as above; its error is 5e-9 of the result.
  const float low = 0.40021706f * q + 0.66666412f, high = 0.28025147f * q + 0.27999011f;
  return u - s * (u - (high * (q * q) + low) * q);
}

// Returns log x of a normal x > 0. The mantissa m, between the roots of 1/2 and 2, gives 2 artanh((m - 1) / (m + 1)).
ALWAYS_INLINE inline double log_normal(double x) {
  constexpr double kTwo52 = 4503599627370496;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  uint64_t power = bits >> 52 | 0x4330000000000000u;  // stores the exponent in the low digits of 2^52
  bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
  double m, e;
  std::memcpy(&m, &bits, sizeof(m));
  std::memcpy(&e, &power, sizeof(e));
  const bool large = m > 1.4142135623730951;
  m = large ? 0.5 * m : m;
  e = e - (large ? kTwo52 + 1022 : kTwo52 + 1023);
  const double z = (m - 1) / (m + 1), q = z * z;
  double y = 2 / 23. * q + 2 / 21.;
  y = (y * q + 2 / 19.) * q + 2 / 17.;
  y = (y * q + 2 / 15.) * q + 2 / 13.;
  y = (y * q + 2 / 11.) * q + 2 / 9.;
  y = (y * q + 2 / 7.) * q + 2 / 5.;
  y = (y * q + 2 / 3.) * q;
  const double log = e * 6.93147180369123816490e-01 + (2 * z + (z * y + e * 1.90821492927058770002e-10));
  return x != x ? x : log;
}

// Returns weight * value, but 0 for a weight of 0 whatever the value is.
template <class A>
ALWAYS_INLINE inline A weigh(A weight, A value) {
  return weight == 0 ? A(0) : weight * value;
}

constexpr int64_t kSumTile = 1024;  // elements summed in A before the sum goes on in double
constexpr int64_t kSumLanes = 16;

// Returns the largest of n terms term(i), in lanes that vectorise: -inf if n is 0; a NaN is ignored.
template <class A, class Term>
ALWAYS_INLINE inline A largest_of(int64_t n, const Term& term) {
  const auto larger = [](A a, A b) ALWAYS_INLINE { return a > b ? a : b; };
  A lanes[kSumLanes];
  std::fill(lanes, lanes + kSumLanes, -std::numeric_limits<A>::infinity());
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int64_t k = 0; k < kSumLanes; ++k) lanes[k] = larger(term(i + k), lanes[k]);
  for (; i < n; ++i) lanes[0] = larger(term(i), lanes[0]);
  for (int64_t half = kSumLanes / 2; half; half /= 2)
    for (int64_t k = 0; k < half; ++k) lanes[k] = larger(lanes[k + half], lanes[k]);
  return lanes[0];
}

// Returns the sum of term(i) over n terms, in lanes that vectorise.
template <class A, class Term>
ALWAYS_INLINE inline double sum_of(int64_t n, const Term& term) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kSumTile) {
    const int64_t end = std::min(begin + kSumTile, n);
    A lanes[kSumLanes] = {};
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes)
      for (int64_t k = 0; k < kSumLanes; ++k) lanes[k] += term(i + k);
    for (; i < end; ++i) lanes[0] += term(i);
    for (int64_t half = kSumLanes / 2; half; half /= 2)
      for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    sum += lanes[0];
  }
  return sum;
}

}  // namespace custom_ops
