// exp and log1p on the intervals that a logistic function needs, written so that loops over them
// vectorise; the same bits on every instruction set. NaN stays NaN.
#pragma once

#include "bits.h"

#include <cmath>
#include <cstring>

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

}  // namespace custom_ops
