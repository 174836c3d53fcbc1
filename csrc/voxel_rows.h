// Rows of features in vector registers, and their loads and stores.
#pragma once

#include "bits.h"

#include <cstring>

namespace custom_ops {

// ---------------------------------------------------------------- registers

// A vector of kLanes numbers. It is written out because GCC 12 doesn't vectorise loops over an array of sums.
template <class A, int kLanes>
struct Lanes {
  typedef A V __attribute__((vector_size(kLanes * sizeof(A))));
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Bits Mask __attribute__((vector_size(kLanes * sizeof(A))));

  static ALWAYS_INLINE inline V all(A x) { return V{} + x; }
  static ALWAYS_INLINE inline Mask all_bits(Bits x) { return Mask{} + x; }
  template <class X>
  static ALWAYS_INLINE inline auto get(const X& v, int k) {
    return v[k];
  }
  static ALWAYS_INLINE inline A sum(const V& v) {
    if constexpr (kLanes == 8) return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    else if constexpr (kLanes == 4) return (v[0] + v[2]) + (v[1] + v[3]);
    else return v[0] + v[1];
  }
  template <class X>
  static ALWAYS_INLINE inline X choose(const Mask& m, const X& yes, const X& no) {
    return m ? yes : no;
  }
  static ALWAYS_INLINE inline V load(const A* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static ALWAYS_INLINE inline V load(const BFloat16* p) { return as_floats(load_words(p) << 16); }
  // A product with 2^112 would be 0 for subnormal numbers if the processor flushes those.
  static ALWAYS_INLINE inline V load(const Half* p) {
    const Words h = load_words(p), magnitude = (h & 0x7FFF) << 13, rebased = magnitude + (112u << 23);
    const Words subnormal = float_bits(as_floats(rebased + (1u << 23)) - as_floats(Words{} + (113u << 23)));
    const Words finite = (h & 0x7C00) == 0 ? subnormal : rebased;
    return as_floats(((h & 0x7C00) == 0x7C00 ? rebased + (112u << 23) : finite) | (h & 0x8000) << 16);
  }

 private:
  typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));

  template <class To, class From>
  static ALWAYS_INLINE inline To convert(const From& v) {
    return __builtin_convertvector(v, To);
  }
  static ALWAYS_INLINE inline Words load_words(const void* p) {
    Shorts s;
    std::memcpy(&s, p, sizeof(s));
    return convert<Words>(s);
  }
  static ALWAYS_INLINE inline V as_floats(const Words& w) {
    V v;
    std::memcpy(&v, &w, sizeof(v));
    return v;
  }
  static ALWAYS_INLINE inline Words float_bits(const V& v) {
    Words w;
    std::memcpy(&w, &v, sizeof(w));
    return w;
  }
};

template <class A>
struct Lanes<A, 1> {
  using V = A;
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Mask = Bits;

  static A all(A x) { return x; }
  static Bits all_bits(Bits x) { return x; }
  template <class X>
  static X get(X v, int) {
    return v;
  }
  static A sum(A v) { return v; }
  template <class X>
  static X choose(Bits m, X yes, X no) {
    return m ? yes : no;
  }
  template <class T>
  static A load(const T* p) {
    return static_cast<A>(*p);
  }
};

// kVectors vectors side by side: a block of columns.
template <class A, int kLanes, int kVectors>
struct Block {
  using L = Lanes<A, kLanes>;
  static constexpr int lanes = kLanes, vectors = kVectors;
};

// Calls f(block, first) for blocks that fit into the registers and together cover all columns of numbers of type T.
// The code that reads 16-bit numbers is long, so less of it is written side by side.
template <class T, class R, class F>
ALWAYS_INLINE inline void for_columns(R, int64_t columns, const F& f) {
  using A = Accumulator<T>;
  constexpr int kLanes = R::bytes / sizeof(A), kFewest = 16 / sizeof(A), kMost = sizeof(T) == 2 ? 4 : 8;
  int64_t c = 0;
  for (; c + kMost * kLanes <= columns; c += kMost * kLanes) f(Block<A, kLanes, kMost>{}, c);
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) f(Block<A, kLanes, 2>{}, c);
  for (; c + kFewest <= columns; c += kFewest) f(Block<A, kFewest, 1>{}, c);
  for (; c < columns; ++c) f(Block<A, 1, 1>{}, c);
}

// Calls f(lanes, first) for single vectors that together cover all columns. It is for loops that don't gain from more
// vectors at a time, and its code is shorter.
template <class A, class R, class F>
ALWAYS_INLINE inline void for_vectors(R, int64_t columns, const F& f) {
  constexpr int kLanes = R::bytes / sizeof(A), kFewest = 16 / sizeof(A);
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) f(Lanes<A, kLanes>{}, c);
  for (; c + kFewest <= columns; c += kFewest) f(Lanes<A, kFewest>{}, c);
  for (; c < columns; ++c) f(Lanes<A, 1>{}, c);
}

// ---------------------------------------------------------------- memory

// Inlining is forced: GCC 12 takes a function that only prefetches for one without effects and drops its calls.
ALWAYS_INLINE inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b);
}

// Writes whole rows of one tensor, past the caches if `Streaming` says so.
class RowWriter {
 public:
  RowWriter(const Tensor& out, int64_t columns)
      : bytes_(columns * static_cast<int64_t>(out.element_size())),
        streaming_(out),
        streams_(bytes_ % Streaming::kLine == 0 && streaming_.at(out.const_data_ptr())) {}

  ALWAYS_INLINE inline void copy(void* to, const void* from) const {
#ifdef __SSE2__
    if (streams_) {
      __m128i* target = static_cast<__m128i*>(to);
      const __m128i* source = static_cast<const __m128i*>(from);
      for (const __m128i* end = target + bytes_ / 16; target < end; target += 4, source += 4)
        for (int k = 0; k < 4; ++k) _mm_stream_si128(target + k, _mm_loadu_si128(source + k));
      return;
    }
#endif
    std::memcpy(to, from, static_cast<size_t>(bytes_));
  }

  ALWAYS_INLINE inline void zero(void* to, int64_t rows) const {
#ifdef __SSE2__
    if (streams_) {
      __m128i* target = static_cast<__m128i*>(to);
      for (const __m128i* end = target + rows * bytes_ / 16; target < end; target += 4)
        for (int k = 0; k < 4; ++k) _mm_stream_si128(target + k, _mm_setzero_si128());
      return;
    }
#endif
    std::memset(to, 0, static_cast<size_t>(rows * bytes_));
  }

  void flush() const { streaming_.flush(); }

  bool streams() const { return streams_; }

 private:
  int64_t bytes_;
  Streaming streaming_;
  bool streams_;
};

}  // namespace custom_ops
