// Elements and their bits in vector registers, past which they are stored as `Streaming` says if `stream`.
#pragma once

#include "bits.h"

#include <cstring>

#ifdef CUSTOM_OPS_AVX2
#include <immintrin.h>
#endif

namespace custom_ops {

// The integer of a float's width, as which floats are moved and tested. Memory is read through Word,
// which may alias any type.
template <size_t kWidth>
struct Bits {
  using Integer = std::conditional_t<kWidth == 2, int16_t, std::conditional_t<kWidth == 4, int32_t, int64_t>>;
  typedef Integer __attribute__((may_alias)) Word;
};

#ifdef CUSTOM_OPS_AVX2
namespace avx2 {

TARGET_AVX2 inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

TARGET_AVX2 inline void store(void* p, __m256i v, bool stream) {
  if (stream) _mm256_stream_si256(static_cast<__m256i*>(p), v);
  else _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
TARGET_AVX2 inline void store(void* p, __m128i v, bool stream) {
  if (stream) _mm_stream_si128(static_cast<__m128i*>(p), v);
  else _mm_storeu_si128(static_cast<__m128i*>(p), v);
}

// The lanes of x from bit `first` of `bits` on, 0 where the lane's bit isn't set. Each bit of `bits` is
// moved to its lane's sign, by which wide lanes are selected.
template <size_t kWidth>
TARGET_AVX2 inline __m256i select(__m256i x, uint32_t bits, int first) {
  if constexpr (kWidth == 2) {
    const __m256i lane = _mm256_set_epi16(-32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i spread = _mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits >> first)), lane);
    return _mm256_and_si256(x, _mm256_cmpeq_epi16(spread, lane));
  } else if constexpr (kWidth == 4) {
    const __m256i to_sign =
        _mm256_sub_epi32(_mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31), _mm256_set1_epi32(first));
    const __m256i sign = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(bits)), to_sign);
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_setzero_ps(), _mm256_castsi256_ps(x), _mm256_castsi256_ps(sign)));
  } else {
    const __m256i to_sign = _mm256_sub_epi64(_mm256_set_epi64x(60, 61, 62, 63), _mm256_set1_epi64x(first));
    const __m256i sign = _mm256_sllv_epi64(_mm256_set1_epi64x(bits), to_sign);
    return _mm256_castpd_si256(
        _mm256_blendv_pd(_mm256_setzero_pd(), _mm256_castsi256_pd(x), _mm256_castsi256_pd(sign)));
  }
}

// One bit for each lane: its sign.
template <size_t kWidth>
TARGET_AVX2 inline uint32_t gather(__m256i lanes) {
  if constexpr (kWidth == 2) {
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  } else if constexpr (kWidth == 4) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
  } else {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(lanes)));
  }
}

// Elements handled at a time: the bits of one 4-byte access of the mask.
constexpr int64_t kStep = 32;
template <size_t kWidth>
constexpr int64_t kLanes = 32 / kWidth;

template <size_t kWidth, class Word>
TARGET_AVX2 int64_t select_bits(const Word* x, const uint8_t* mask, Word* out, int64_t n, bool stream) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    uint32_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    for (int64_t k = 0; k < kStep; k += kLanes<kWidth>)
      store(out + i + k, select<kWidth>(load(x + i + k), bits, static_cast<int>(k)), stream);
  }
  return i;
}

}  // namespace avx2
#endif

// out[i] = bit i of mask ? x[i] : 0, for n elements of kWidth bytes; `stream` as `Streaming` says at `to`.
template <size_t kWidth>
void select_bits(const void* from, const uint8_t* mask, void* to, int64_t n, [[maybe_unused]] bool stream) {
  using Word = typename Bits<kWidth>::Word;
  const Word* x = static_cast<const Word*>(from);
  Word* out = static_cast<Word*>(to);
  int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
  if (use_avx2) i = avx2::select_bits<kWidth>(x, mask, out, n, stream);
#endif
  for (; i < n; ++i) out[i] = (mask[i >> 3] >> (i & 7)) & 1 ? x[i] : 0;
}

#ifdef CUSTOM_OPS_AVX2
// Vectors of floats: 8 lanes of float for the 16- and 32-bit types, 4 of double for the 64-bit one, and how elements
// lie in them.
template <class A>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int64_t kLanes = 8;
  __m256 v;

  TARGET_AVX2 static Vector all(float x) { return {_mm256_set1_ps(x)}; }
  TARGET_AVX2 static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  TARGET_AVX2 static Vector load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  TARGET_AVX2 void store(float* p, bool stream) const { avx2::store(p, _mm256_castps_si256(v), stream); }
  TARGET_AVX2 void store(Half* p, bool stream) const {
    avx2::store(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), stream);
  }
  TARGET_AVX2 Vector operator+(Vector o) const { return {_mm256_add_ps(v, o.v)}; }
  TARGET_AVX2 Vector operator-(Vector o) const { return {_mm256_sub_ps(v, o.v)}; }
  TARGET_AVX2 Vector operator*(Vector o) const { return {_mm256_mul_ps(v, o.v)}; }
  TARGET_AVX2 Vector operator&(Vector o) const { return {_mm256_and_ps(v, o.v)}; }
  TARGET_AVX2 Vector and_not(Vector o) const { return {_mm256_andnot_ps(o.v, v)}; }  // this where not o
  // All ones or zeros; a comparison with a NaN is false.
  TARGET_AVX2 Vector operator>(Vector o) const { return {_mm256_cmp_ps(v, o.v, _CMP_GT_OQ)}; }
  TARGET_AVX2 Vector operator>=(Vector o) const { return {_mm256_cmp_ps(v, o.v, _CMP_GE_OQ)}; }
  TARGET_AVX2 Vector operator<=(Vector o) const { return {_mm256_cmp_ps(v, o.v, _CMP_LE_OQ)}; }
  TARGET_AVX2 Vector not_at_most(Vector o) const { return {_mm256_cmp_ps(v, o.v, _CMP_NLE_UQ)}; }  // true of a NaN
  TARGET_AVX2 Vector is_nan() const { return {_mm256_cmp_ps(v, v, _CMP_UNORD_Q)}; }
  TARGET_AVX2 static uint32_t signs(const Vector (&x)[4]) {
    const auto pair = [&](int i) TARGET_AVX2 {
      return _mm256_packs_epi32(_mm256_castps_si256(x[i].v), _mm256_castps_si256(x[i + 1].v));
    };
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works on each half of a vector
    const __m256i bytes = _mm256_packs_epi16(pair(0), pair(2));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(bytes, order)));
  }
  // `yes` where the lane's sign is set, else this.
  TARGET_AVX2 Vector replaced(Vector yes, Vector where) const { return {_mm256_blendv_ps(v, yes.v, where.v)}; }
  // Every kApart-th bit from `first` on, as the sign of its lane.
  template <int kApart = 1>
  TARGET_AVX2 static Vector signs_of(uint32_t bits, int first) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i to_sign =
        _mm256_sub_epi32(_mm256_set1_epi32(31 - first), _mm256_mullo_epi32(_mm256_set1_epi32(kApart), lane));
    return {_mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(bits)), to_sign))};
  }
};

template <>
struct Vector<double> {
  static constexpr int64_t kLanes = 4;
  __m256d v;

  TARGET_AVX2 static Vector all(double x) { return {_mm256_set1_pd(x)}; }
  TARGET_AVX2 static Vector load(const double* p) { return {_mm256_loadu_pd(p)}; }
  TARGET_AVX2 void store(double* p, bool stream) const { avx2::store(p, _mm256_castpd_si256(v), stream); }
  TARGET_AVX2 Vector operator+(Vector o) const { return {_mm256_add_pd(v, o.v)}; }
  TARGET_AVX2 Vector operator-(Vector o) const { return {_mm256_sub_pd(v, o.v)}; }
  TARGET_AVX2 Vector operator*(Vector o) const { return {_mm256_mul_pd(v, o.v)}; }
  TARGET_AVX2 Vector operator&(Vector o) const { return {_mm256_and_pd(v, o.v)}; }
  TARGET_AVX2 Vector and_not(Vector o) const { return {_mm256_andnot_pd(o.v, v)}; }
  TARGET_AVX2 Vector operator>(Vector o) const { return {_mm256_cmp_pd(v, o.v, _CMP_GT_OQ)}; }
  TARGET_AVX2 Vector operator>=(Vector o) const { return {_mm256_cmp_pd(v, o.v, _CMP_GE_OQ)}; }
  TARGET_AVX2 Vector operator<=(Vector o) const { return {_mm256_cmp_pd(v, o.v, _CMP_LE_OQ)}; }
  TARGET_AVX2 Vector not_at_most(Vector o) const { return {_mm256_cmp_pd(v, o.v, _CMP_NLE_UQ)}; }
  TARGET_AVX2 Vector is_nan() const { return {_mm256_cmp_pd(v, v, _CMP_UNORD_Q)}; }
  TARGET_AVX2 static uint32_t signs(const Vector (&x)[8]) {
    uint32_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(_mm256_movemask_pd(x[i].v)) << (4 * i);
    return bits;
  }
  TARGET_AVX2 Vector replaced(Vector yes, Vector where) const { return {_mm256_blendv_pd(v, yes.v, where.v)}; }
  TARGET_AVX2 static Vector signs_of(uint32_t bits, int first) {
    const __m256i to_sign = _mm256_sub_epi64(_mm256_set_epi64x(60, 61, 62, 63), _mm256_set1_epi64x(first));
    return {_mm256_castsi256_pd(_mm256_sllv_epi64(_mm256_set1_epi64x(bits), to_sign))};
  }
};

// Two vectors of consecutive elements of T: one half in each.
template <class T>
struct Lanes {
  using V = Vector<Accumulator<T>>;

  template <class From>
  TARGET_AVX2 static void load(const From* p, V (&v)[2]) {
    v[0] = V::load(p), v[1] = V::load(p + V::kLanes);
  }
  template <class To>
  TARGET_AVX2 static void store(const V (&v)[2], To* p, bool stream) {
    v[0].store(p, stream), v[1].store(p + V::kLanes, stream);
  }
  // Of numbers that a T holds.
  TARGET_AVX2 static void store_exact(const V (&v)[2], T* p, bool stream) { store(v, p, stream); }
  // The bits of vector `which` of those whose first element is the one of bit `first`.
  TARGET_AVX2 static V signs_of(uint32_t bits, int64_t first, int64_t which) {
    return V::signs_of(bits, static_cast<int>(first + which * V::kLanes));
  }
  TARGET_AVX2 static uint32_t signs(const V (&v)[avx2::kStep / V::kLanes]) { return V::signs(v); }
};

// The elements of even places, and those of odd ones: the low and the high half of each word of 32 bits.
template <>
struct Lanes<BFloat16> {
  using V = Vector<float>;

  TARGET_AVX2 static __m256i bits_of(V x) { return _mm256_castps_si256(x.v); }
  // The high half of each word, in place of its low one and in its own.
  TARGET_AVX2 static __m256i merged(__m256i even, __m256i odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
  }
  // To nearest, ties to even. The NaNs here carry 16 bits, so that rounding can't make an infinity of one.
  TARGET_AVX2 static __m256i rounded(V x) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits_of(x), 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits_of(x), _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  }

  TARGET_AVX2 static void load(const BFloat16* p, V (&v)[2]) {
    const __m256i both = avx2::load(p);
    v[0].v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    v[1].v = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_set1_epi32(0xFFFF), both));
  }
  TARGET_AVX2 static void load(const float* p, V (&v)[2]) {
    const __m256 low = _mm256_loadu_ps(p), high = _mm256_loadu_ps(p + V::kLanes);
    const __m256 first = _mm256_permute2f128_ps(low, high, 0x20), last = _mm256_permute2f128_ps(low, high, 0x31);
    const __m256 even = _mm256_shuffle_ps(first, last, 0x88), odd = _mm256_shuffle_ps(first, last, 0xDD);
    v[0].v = even, v[1].v = odd;
  }
  TARGET_AVX2 static void store(const V (&v)[2], BFloat16* p, bool stream) {
    avx2::store(p, merged(rounded(v[0]), rounded(v[1])), stream);
  }
  TARGET_AVX2 static void store_exact(const V (&v)[2], BFloat16* p, bool stream) {
    avx2::store(p, merged(bits_of(v[0]), bits_of(v[1])), stream);
  }
  TARGET_AVX2 static void store(const V (&v)[2], float* p, bool) {
    const __m256 low = _mm256_unpacklo_ps(v[0].v, v[1].v), high = _mm256_unpackhi_ps(v[0].v, v[1].v);
    _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(p + V::kLanes, _mm256_permute2f128_ps(low, high, 0x31));
  }
  TARGET_AVX2 static V signs_of(uint32_t bits, int64_t first, int64_t which) {
    return V::signs_of<2>(bits, static_cast<int>(first + which));
  }
  TARGET_AVX2 static uint32_t signs(const V (&v)[4]) {
    const __m256i bytes =
        _mm256_packs_epi16(merged(bits_of(v[0]), bits_of(v[1])), merged(bits_of(v[2]), bits_of(v[3])));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
  }
};
#endif

}  // namespace custom_ops
