// One-bit activations: what backward needs of a piecewise-linear activation is one bit per element.
#include "bits.h"

namespace custom_ops {
namespace {

constexpr int64_t kSpan = 1 << 14;

// relu keeps x unless x <= 0, so a NaN stays and lets its gradient pass, as in torch. Seen as a
// signed integer a float is kept iff it is not +0 and lies above -inf: positive floats and NaNs do,
// negative floats count downwards to -inf.
template <size_t kWidth, int64_t kMinusInfinity>
struct Relu {
  using Word = typename Bits<kWidth>::Word;

  static bool keeps(int64_t x) { return x > kMinusInfinity && x != 0; }

  static void portable(const Word* x, Word* y, uint8_t* mask, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
      uint8_t bits = 0;
      for (int64_t k = 0; k < std::min<int64_t>(8, n - i); ++k) {
        const bool keep = keeps(x[i + k]);
        bits |= static_cast<uint8_t>(keep << k);
        y[i + k] = keep ? x[i + k] : 0;
      }
      mask[i / 8] = bits;
    }
  }

#ifdef CUSTOM_OPS_AVX2
  TARGET_AVX2 static __m256i lanes_kept(__m256i x) {
    if constexpr (kWidth == 2)
      return _mm256_andnot_si256(_mm256_cmpeq_epi16(x, _mm256_setzero_si256()),
                                 _mm256_cmpgt_epi16(x, _mm256_set1_epi16(kMinusInfinity)));
    else if constexpr (kWidth == 4)
      return _mm256_castps_si256(_mm256_cmp_ps(_mm256_castsi256_ps(x), _mm256_setzero_ps(), _CMP_NLE_UQ));
    else return _mm256_castpd_si256(_mm256_cmp_pd(_mm256_castsi256_pd(x), _mm256_setzero_pd(), _CMP_NLE_UQ));
  }

  TARGET_AVX2 static int64_t vectorised(const Word* x, Word* y, uint8_t* mask, int64_t n) {
    int64_t i = 0;
    for (; i + avx2::kStep <= n; i += avx2::kStep) {
      uint32_t bits = 0;
      for (int64_t k = 0; k < avx2::kStep; k += avx2::kLanes<kWidth>) {
        const __m256i v = avx2::load(x + i + k), kept = lanes_kept(v);
        avx2::store(y + i + k, _mm256_and_si256(v, kept));
        bits |= avx2::gather<kWidth>(kept) << k;
      }
      std::memcpy(mask + i / 8, &bits, sizeof(bits));
    }
    return i;
  }
#endif

  static void span(const Word* x, Word* y, uint8_t* mask, int64_t n) {
    int64_t done = 0;
#ifdef CUSTOM_OPS_AVX2
    if (cpu_has_avx2()) done = vectorised(x, y, mask, n);
#endif
    portable(x + done, y + done, mask + done / 8, n - done);
  }

  static void run(const Tensor& x, Tensor& y, Tensor& mask, const MaskLayout& layout) {
    const Word* xp = data<Word>(x);
    Word* yp = mutable_data<Word>(y);
    uint8_t* mp = mutable_data<uint8_t>(mask);
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      const int64_t at = example * layout.elements + begin;
      span(xp + at, yp + at, mp + example * layout.bytes + begin / 8, end - begin);
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor> relu_forward(const Tensor& x_in, int64_t batch_dims) {
  const Tensor x = dense(x_in);
  const MaskLayout layout(x, batch_dims);
  Tensor y = fresh(x, sizes(x));
  Tensor mask = fresh(x, append(layout.batch, {layout.bytes}), ScalarType::Byte);
  switch (x.scalar_type()) {
    case ScalarType::Float: Relu<4, static_cast<int32_t>(0xFF800000)>::run(x, y, mask, layout); break;
    case ScalarType::Double: Relu<8, static_cast<int64_t>(0xFFF0000000000000)>::run(x, y, mask, layout); break;
    case ScalarType::Half: Relu<2, static_cast<int16_t>(0xFC00)>::run(x, y, mask, layout); break;
    case ScalarType::BFloat16: Relu<2, static_cast<int16_t>(0xFF80)>::run(x, y, mask, layout); break;
    default: check(false, "x: expected a floating-point tensor");
  }
  return {y, mask};
}

Tensor apply_mask(const Tensor& x_in, const Tensor& mask_in) {
  const Tensor x = dense(x_in), mask = dense(mask_in);
  const MaskLayout layout = MaskLayout::of_mask(mask, x);
  Tensor out = fresh(x, sizes(x));
  const auto run = [&](auto width) {
    constexpr size_t kWidth = decltype(width)::value;
    const char* xp = data<char>(x);
    const uint8_t* mp = data<uint8_t>(mask);
    char* op = mutable_data<char>(out);
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      const int64_t at = (example * layout.elements + begin) * static_cast<int64_t>(kWidth);
      select_bits<kWidth>(xp + at, mp + example * layout.bytes + begin / 8, op + at, end - begin);
    });
  };
  switch (x.element_size()) {
    case 2: run(std::integral_constant<size_t, 2>{}); break;
    case 4: run(std::integral_constant<size_t, 4>{}); break;
    case 8: run(std::integral_constant<size_t, 8>{}); break;
    default: check(false, "x: expected elements of 2, 4 or 8 bytes");
  }
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(relu_forward)
CUSTOM_OPS_CPU_KERNEL(apply_mask)
