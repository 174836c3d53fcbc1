// Margin ranking loss.
#include "bits.h"

namespace custom_ops {
namespace {

constexpr int64_t kSpan = 1 << 14;
constexpr int64_t kTile = 512;  // elements whose intermediate values stay in the first-level cache

// n elements of T as accumulators: in place where the types agree, converted into `tile` otherwise.
template <class T, class A>
ALWAYS_INLINE inline const A* widen(const T* p, A* tile, int64_t n) {
  if constexpr (std::is_same_v<T, A>) return p;
  for (int64_t i = 0; i < n; ++i) tile[i] = static_cast<A>(p[i]);
  return tile;
}

template <class A>
ALWAYS_INLINE inline void hinge_arguments(const A* __restrict x1, const A* __restrict x2, const A* __restrict y,
                                          A margin, A* __restrict v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) v[i] = -y[i] * (x1[i] - x2[i]) + margin;
}

// A NaN is no less than 0 and stays.
template <class A>
ALWAYS_INLINE inline A hinge(A v) {
  return v < 0 ? A(0) : v;
}

template <class A>
ALWAYS_INLINE inline void multiply(const A* __restrict a, const A* __restrict b, bool elementwise, A* __restrict out,
                                   int64_t n) {
  if (elementwise)
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[0];
}

template <class A>
ALWAYS_INLINE inline void subtract(const A* __restrict a, const A* __restrict b, A* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
}

template <class T>
ALWAYS_INLINE inline void negate(const T* __restrict a, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(0 - static_cast<Accumulator<T>>(a[i]));
}

template <class A>
ALWAYS_INLINE inline double sum_hinges(const A* __restrict v, int64_t n) {
  A lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t k = 0; k < 16; ++k) lanes[k] += hinge(v[i + k]);
  double sum = 0;
  for (A lane : lanes) sum += lane;
  for (; i < n; ++i) sum += hinge(v[i]);
  return sum;
}

// Bit i of mask = v[i] >= 0.
template <class A>
void pack_nonnegative(const A* v, uint8_t* mask, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint8_t bits = 0;
    for (int64_t k = 0; k < std::min<int64_t>(8, n - i); ++k) bits |= static_cast<uint8_t>((v[i + k] >= 0) << k);
    mask[i / 8] = bits;
  }
}

#ifdef CUSTOM_OPS_AVX2
TARGET_AVX2 void pack_nonnegative_avx2(const float* v, uint8_t* mask, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    mask[i / 8] = static_cast<uint8_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(v + i), _mm256_setzero_ps(), _CMP_GE_OQ)));
  pack_nonnegative(v + i, mask + i / 8, n - i);
}
#endif

void pack(const double* v, uint8_t* mask, int64_t n) { pack_nonnegative(v, mask, n); }
void pack(const float* v, uint8_t* mask, int64_t n) {
#ifdef CUSTOM_OPS_AVX2
  if (cpu_has_avx2()) return pack_nonnegative_avx2(v, mask, n);
#endif
  pack_nonnegative(v, mask, n);
}

// out[i] = bit i of mask ? T(v[i]) : 0.
template <class T, class A>
void select_tile(const A* v, const uint8_t* mask, T* out, int64_t n) {
  T tile[kTile];
  const T* narrow = tile;
  if constexpr (std::is_same_v<T, A>) narrow = v;
  else
    for (int64_t i = 0; i < n; ++i) tile[i] = static_cast<T>(v[i]);
  select_bits<sizeof(T)>(narrow, mask, out, n);
}

struct Pairs {
  Tensor x1, x2, target;

  Pairs(const Tensor& x1, const Tensor& x2, const Tensor& target)
      : x1(dense(x1)),
        x2(dense(x2)),
        target(dense(target)) {
    for (const Tensor& t : {this->x1, this->x2})
      check(sizes(t) == sizes(target) && t.scalar_type() == target.scalar_type(),
            "input1, input2, target: expected the same shape and dtype");
  }
};

}  // namespace

std::tuple<Tensor, Tensor> margin_ranking(const Tensor& input1, const Tensor& input2, const Tensor& target,
                                          double margin, int64_t divisor, bool reduce, int64_t batch_dims) {
  const Pairs pairs(input1, input2, target);
  const MaskLayout layout(target, batch_dims);
  Tensor loss = fresh(pairs.target, reduce ? layout.batch : sizes(pairs.target));
  Tensor mask = fresh(pairs.target, append(layout.batch, {layout.bytes}), ScalarType::Byte);
  uint8_t* mp = mutable_data<uint8_t>(mask);
  const int64_t spans = (layout.elements + kSpan - 1) / kSpan;
  std::vector<double> partial(reduce ? layout.examples * spans : 0);
  dispatch_floating(pairs.target, "target", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* x1 = data<T>(pairs.x1);
    const T* x2 = data<T>(pairs.x2);
    const T* y = data<T>(pairs.target);
    T* lp = mutable_data<T>(loss);
    const A m = static_cast<A>(margin);
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      double sum = 0;
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = std::min(kTile, end - i), at = example * layout.elements + i;
        A b1[kTile], b2[kTile], by[kTile], v[kTile];
        double tile_sum = 0;
        multiversion([&]() ALWAYS_INLINE {
          const A* p1 = widen(x1 + at, b1, n);
          const A* p2 = widen(x2 + at, b2, n);
          const A* py = widen(y + at, by, n);
          hinge_arguments(p1, p2, py, m, v, n);
        });
        pack(v, mp + example * layout.bytes + i / 8, n);
        multiversion([&]() ALWAYS_INLINE {
          if (reduce) tile_sum = sum_hinges(v, n);
          else
            for (int64_t k = 0; k < n; ++k) lp[at + k] = static_cast<T>(hinge(v[k]));
        });
        sum += tile_sum;
      }
      if (reduce) partial[example * spans + begin / kSpan] = sum;
    });
    if (reduce)
      for (int64_t e = 0; e < layout.examples; ++e) {
        double sum = 0;
        for (int64_t k = 0; k < spans; ++k) sum += partial[e * spans + k];
        lp[e] = static_cast<T>(static_cast<A>(sum / static_cast<double>(divisor)));
      }
  });
  return {loss, mask};
}

std::tuple<Tensor, Tensor, Tensor> margin_ranking_backward(const Tensor& grad_in, const std::optional<Tensor>& input1,
                                                           const std::optional<Tensor>& input2, const Tensor& target,
                                                           const Tensor& mask_in, int64_t divisor, bool reduce) {
  const bool with_target = input1.has_value();
  check(with_target == input2.has_value(), "input1, input2: expected both or neither");
  const Tensor grad = dense(grad_in), mask = dense(mask_in);
  const Pairs pairs(with_target ? *input1 : target, with_target ? *input2 : target, target);
  const MaskLayout layout = MaskLayout::of_mask(mask, target);
  check(
      sizes(grad) == (reduce ? layout.batch : sizes(pairs.target)) && grad.scalar_type() == pairs.target.scalar_type(),
      "grad: expected the shape and dtype of the loss");
  Tensor grad1 = fresh(pairs.target, sizes(pairs.target));
  Tensor grad2 = fresh(pairs.target, sizes(pairs.target));
  Tensor grad_target = fresh(pairs.target, with_target ? sizes(pairs.target) : Shape{0});
  const uint8_t* mp = data<uint8_t>(mask);
  dispatch_floating(pairs.target, "target", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* x1 = data<T>(pairs.x1);
    const T* x2 = data<T>(pairs.x2);
    const T* y = data<T>(pairs.target);
    const T* gp = data<T>(grad);
    T* o1 = mutable_data<T>(grad1);
    T* o2 = mutable_data<T>(grad2);
    T* oy = mutable_data<T>(grad_target);
    const A scale = static_cast<A>(1.0 / static_cast<double>(divisor));
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t n = std::min(kTile, end - i), at = example * layout.elements + i;
        const uint8_t* bits = mp + example * layout.bytes + i / 8;
        A b1[kTile], b2[kTile], by[kTile], bg[kTile], v[kTile];
        A g_example = 0;
        const A* g = &g_example;  // with stride 0, or one for each element
        if (reduce) g_example = static_cast<A>(gp[example]) * scale;
        else g = widen(gp + at, bg, n);
        multiversion([&]() ALWAYS_INLINE { multiply(widen(y + at, by, n), g, !reduce, v, n); });
        select_tile(v, bits, o2 + at, n);
        multiversion([&]() ALWAYS_INLINE { negate(o2 + at, o1 + at, n); });
        if (!with_target) continue;
        multiversion([&]() ALWAYS_INLINE {
          subtract(widen(x2 + at, b2, n), widen(x1 + at, b1, n), by, n);
          multiply(by, g, !reduce, v, n);
        });
        select_tile(v, bits, oy + at, n);
      }
    });
  });
  return {grad1, grad2, grad_target};
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(margin_ranking)
CUSTOM_OPS_CPU_KERNEL(margin_ranking_backward)
