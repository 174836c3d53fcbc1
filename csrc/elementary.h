// exp and log1p on the intervals that a logistic function needs, and sums, written so that loops over them
// vectorise; the same bits on every instruction set. NaN stays NaN.
#pragma once

#include "bits.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace custom_ops {

// e^x for x <= 0; 0 where that lies near or below the smallest normal number.
ALWAYS_INLINE inline double exp_nonpositive(double x) { return std::exp(x); }
ALWAYS_INLINE inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one short
  float y = 1 / 5040.f * r + 1 / 720.f;  // written out: with a loop here GCC 12 vectorises none around it
  y = (y * r + 1 / 120.f) * r + 1 / 24.f;
  y = ((y * r + 1 / 6.f) * r + 0.5f) * r + 1.f;
  y = y * r + 1.f;
  int32_t power, bits;
  std::memcpy(&power, &shifted, sizeof(power));
  std::memcpy(&bits, &y, sizeof(bits));
  bits += static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
  std::memcpy(&y, &bits, sizeof(y));
  return x < -86.f ? 0.f : y;
}

// log(1 + u) for 0 <= u <= 1, to the last digits of small u too: 2 artanh(u / (2 + u)).
ALWAYS_INLINE inline double log1p_unit(double u) { return std::log1p(u); }
ALWAYS_INLINE inline float log1p_unit(float u) {
  const float s = u / (2 + u), q = s * s;
  float y = 2 / 15.f * q + 2 / 13.f;  // written out, as above
  y = (y * q + 2 / 11.f) * q + 2 / 9.f;
  y = (y * q + 2 / 7.f) * q + 2 / 5.f;
  y = (y * q + 2 / 3.f) * q + 2.f;
  return y * s;
}

constexpr int64_t kSumTile = 1024;  // elements summed in A before the sum goes on in double
constexpr int64_t kSumLanes = 16;

// The largest x[i] that isn't above `bound`, in lanes that vectorise; -inf of none. A NaN isn't any.
template <class A>
ALWAYS_INLINE inline A largest_up_to(A bound, const A* x, int64_t n) {
  const auto larger = [&](A a, A b) ALWAYS_INLINE { return (a > b) & (a <= bound) ? a : b; };
  A lanes[kSumLanes], largest = -std::numeric_limits<A>::infinity();
  std::fill(lanes, lanes + kSumLanes, largest);
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int64_t k = 0; k < kSumLanes; ++k) lanes[k] = larger(x[i + k], lanes[k]);
  for (; i < n; ++i) largest = larger(x[i], largest);
  for (A lane : lanes) largest = larger(lane, largest);
  return largest;
}

// term(i) summed over n, in lanes that vectorise.
template <class A, class Term>
ALWAYS_INLINE inline double sum_of(int64_t n, const Term& term) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kSumTile) {
    const int64_t end = std::min(begin + kSumTile, n);
    A lanes[kSumLanes] = {}, rest = 0;
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes)
      for (int64_t k = 0; k < kSumLanes; ++k) lanes[k] += term(i + k);
    for (; i < end; ++i) rest += term(i);
    for (A lane : lanes) rest += lane;
    sum += rest;
  }
  return sum;
}

}  // namespace custom_ops
