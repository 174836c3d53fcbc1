// Bit masks: one bit per element, eight elements to a byte, lowest bit first, each example of a
// batch starting on a byte. Padding bits are 0.
#pragma once

#include "common.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define CUSTOM_OPS_AVX2 1
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2")))
#endif

#define ALWAYS_INLINE __attribute__((always_inline))

namespace custom_ops {

inline bool cpu_has_avx2() {
#ifdef CUSTOM_OPS_AVX2
  static const bool yes = __builtin_cpu_supports("avx2");
  return yes;
#else
  return false;
#endif
}

#ifdef CUSTOM_OPS_AVX2
template <class Body>
TARGET_AVX2 void run_avx2(const Body& body) {
  body();
}
#endif

// Runs `body` compiled twice: for AVX2 where the machine has it, and portably. `body` must be a
// lambda marked ALWAYS_INLINE, so that each copy is vectorised for its own instruction set.
template <class Body>
void multiversion(const Body& body) {
#ifdef CUSTOM_OPS_AVX2
  if (cpu_has_avx2()) return run_avx2(body);
#endif
  body();
}

// out[i] = f(i) for n elements; `f` marked ALWAYS_INLINE, as for `multiversion`.
template <class T, class F>
void each_element(T* out, int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 32768, [&](int64_t begin, int64_t end) {
    multiversion([=]() ALWAYS_INLINE {  // all copied, since what is written could be what a reference is to
      for (int64_t i = begin; i < end; ++i) out[i] = f(i);
    });
  });
}

// Whether a fresh output is written past the caches. A large one is: they would fetch each line only to have it
// overwritten, and push it out again before anyone reads it. Then `flush` before the thread says that it is done.
class Streaming {
 public:
  static constexpr int64_t kLarge = 8 << 20, kLine = 64;

  explicit Streaming(const Tensor& out) {
#ifdef __SSE2__
    on_ = out.numel() * static_cast<int64_t>(out.element_size()) >= kLarge;
#endif
  }

  // Whether lines from `p` on are. One that is written in part must be fetched in any case.
  bool at(const void* p) const { return on_ && reinterpret_cast<uintptr_t>(p) % kLine == 0; }

  void flush() const {
#ifdef __SSE2__
    if (on_) _mm_sfence();
#endif
  }

 private:
  bool on_ = false;
};

// The masks of a batch: `examples` masks of `elements` bits each, for the elements of `x` beyond its
// first `batch_dims` dimensions.
struct MaskLayout {
  Shape batch;
  int64_t examples, elements, bytes;

  MaskLayout(const Tensor& x, int64_t batch_dims) {
    custom_ops::check(batch_dims >= 0 && batch_dims <= x.dim(), "batch_dims: expected 0 to ", x.dim(), ", got ",
                      batch_dims);
    batch = sizes(x, 0, batch_dims);
    examples = product(batch);
    elements = product(sizes(x, batch_dims, x.dim()));
    bytes = (elements + 7) / 8;
  }

  static MaskLayout of_mask(const Tensor& mask, const Tensor& x) {
    const MaskLayout layout(x, mask.dim() - 1);
    custom_ops::check(mask.scalar_type() == ScalarType::Byte && sizes(mask) == append(layout.batch, {layout.bytes}),
                      "mask: expected ", layout.bytes, " bytes for each of ", layout.examples, " examples");
    return layout;
  }

  // Calls f(example, begin, end) over spans of at most `span` elements that together cover the
  // batch; begin is a multiple of 8. The spans don't depend on the number of threads.
  template <class F>
  void parallel_spans(int64_t span, const F& f) const {
    const int64_t per_example = (elements + span - 1) / span;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::min(span, std::max<int64_t>(elements, 1)));
    torch::stable::parallel_for(0, examples * per_example, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % per_example * span;
        f(i / per_example, begin, std::min(begin + span, elements));
      }
    });
  }
};

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
void select_bits(const void* from, const uint8_t* mask, void* to, int64_t n, bool stream) {
  using Word = typename Bits<kWidth>::Word;
  const Word* x = static_cast<const Word*>(from);
  Word* out = static_cast<Word*>(to);
  int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
  if (cpu_has_avx2()) i = avx2::select_bits<kWidth>(x, mask, out, n, stream);
#endif
  for (; i < n; ++i) out[i] = (mask[i >> 3] >> (i & 7)) & 1 ? x[i] : 0;
}

}  // namespace custom_ops
