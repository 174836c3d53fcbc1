// Margin ranking loss.
#include "activation.h"

#include <utility>

namespace custom_ops {
namespace {

// A NaN is no less than 0 and stays.
template <class A>
A hinge(A v) {
  return v < 0 ? A(0) : v;
}

constexpr int64_t kLanes = 32;  // elements whose bits are one word of the mask

// The sum of a span's n elements: of each tile those that are kLanes apart are added up first. The last ones, with
// which no kLanes are full, are added one by one.
template <class A>
class LaneSum {
 public:
  explicit LaneSum(int64_t n) : whole_(n / kLanes * kLanes) {}

  void add(int64_t i, A value) {
    if (i >= whole_) {
      total += value;
      return;
    }
    lanes_[i % kLanes] += value;
    if ((i + 1) % kTile == 0 || i + 1 == whole_)
      for (A& lane : lanes_) total += std::exchange(lane, A(0));
  }

  double total = 0;

 private:
  int64_t whole_;
  A lanes_[kLanes] = {};
};

#ifdef CUSTOM_OPS_AVX2
static_assert(kLanes == avx2::kStep);

template <class V>
TARGET_AVX2 V hinge_vector(V v) {
  return v.and_not(V::all(0) > v);
}

// The hinges, stored in `loss` or, without one, added to `sum`, in the order of LaneSum; mask: which arguments are at
// least 0.
template <class T>
TARGET_AVX2 int64_t hinge_vectors(const T* x1, const T* x2, const T* y, Accumulator<T> margin, T* loss, uint8_t* mask,
                                  double& sum, int64_t n, bool stream) {
  using A = Accumulator<T>;
  using L = Lanes<T>;
  using V = typename L::V;
  constexpr int64_t kVectors = avx2::kStep / V::kLanes;
  int64_t i = 0;
  while (i + avx2::kStep <= n) {
    V sums[kVectors];
    for (V& v : sums) v = V::all(0);
    for (const int64_t end = std::min(n - avx2::kStep, i + kTile - avx2::kStep); i <= end; i += avx2::kStep) {
      V kept[kVectors];
      for (int64_t k = 0; k < kVectors; k += 2) {
        const int64_t at = i + k * V::kLanes;
        V low[2], high[2], sign[2], hinges[2];
        L::load(x1 + at, low), L::load(x2 + at, high), L::load(y + at, sign);
        for (int64_t j = 0; j < 2; ++j) {
          const V v = (high[j] - low[j]) * sign[j] + V::all(margin);
          kept[k + j] = v >= V::all(0);
          hinges[j] = hinge_vector(v);
          if (loss == nullptr) sums[k + j] = sums[k + j] + hinges[j];
        }
        if (loss != nullptr) L::store(hinges, loss + at, stream);
      }
      const uint32_t bits = L::signs(kept);
      std::memcpy(mask + i / 8, &bits, sizeof(bits));
    }
    A lanes[avx2::kStep];
    for (int64_t k = 0; k < kVectors; k += 2) L::store({sums[k], sums[k + 1]}, lanes + k * V::kLanes, false);
    for (A lane : lanes) sum += lane;
  }
  return i;
}

template <class T>
TARGET_AVX2 int64_t hinge_gradient_vectors(const T* x1, const T* x2, const T* y, const T* grads, Accumulator<T> grad,
                                           const uint8_t* mask, T* grad1, T* grad2, T* grad_y, int64_t n, bool stream) {
  using L = Lanes<T>;
  using V = typename L::V;
  const V zero = V::all(0);
  int64_t i = 0;
  for (; i + avx2::kStep <= n; i += avx2::kStep) {
    uint32_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof(bits));
    for (int64_t k = 0; k < avx2::kStep; k += 2 * V::kLanes) {
      const int64_t at = i + k;
      V low[2], high[2], sign[2], g[2] = {V::all(grad), V::all(grad)}, toward1[2], toward2[2], toward_y[2];
      L::load(y + at, sign);
      if (grads != nullptr) L::load(grads + at, g);
      if (grad_y != nullptr) L::load(x1 + at, low), L::load(x2 + at, high);
      for (int64_t j = 0; j < 2; ++j) {
        const V kept = L::signs_of(bits, k, j);
        toward2[j] = zero.replaced(sign[j] * g[j], kept);
        toward1[j] = zero - toward2[j];
        if (grad_y != nullptr) toward_y[j] = zero.replaced((high[j] - low[j]) * g[j], kept);
      }
      L::store(toward1, grad1 + at, stream);
      L::store(toward2, grad2 + at, stream);
      if (grad_y != nullptr) L::store(toward_y, grad_y + at, stream);
    }
  }
  return i;
}
#endif

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
    const Streaming streaming(loss);
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      const int64_t at = example * layout.elements + begin, n = end - begin;
      uint8_t* bits = mp + example * layout.bytes + begin / 8;
      LaneSum<A> sum(n);
      int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
      if (use_avx2)
        i = hinge_vectors(x1 + at, x2 + at, y + at, m, reduce ? nullptr : lp + at, bits, sum.total, n,
                          streaming.at(lp + at));
#endif
      for (; i < n; ++i) {
        const A v = (static_cast<A>(x2[at + i]) - static_cast<A>(x1[at + i])) * static_cast<A>(y[at + i]) + m;
        if (reduce) sum.add(i, hinge(v));
        else lp[at + i] = static_cast<T>(hinge(v));
        if (i % 8 == 0) bits[i / 8] = 0;
        bits[i / 8] |= static_cast<uint8_t>((v >= 0) << (i % 8));
      }
      streaming.flush();
      if (reduce) partial[example * spans + begin / kSpan] = sum.total;
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
    const Streaming streaming(grad1);
    layout.parallel_spans(kSpan, [&](int64_t example, int64_t begin, int64_t end) {
      const int64_t at = example * layout.elements + begin, n = end - begin;
      const uint8_t* bits = mp + example * layout.bytes + begin / 8;
      const T* grads = reduce ? nullptr : gp + at;
      const A mean_grad = reduce ? static_cast<A>(gp[example]) * scale : A(0);
      [[maybe_unused]] const bool stream =
          streaming.at(o1 + at) && streaming.at(o2 + at) && (!with_target || streaming.at(oy + at));
      int64_t i = 0;
#ifdef CUSTOM_OPS_AVX2
      if (use_avx2)
        i = hinge_gradient_vectors(x1 + at, x2 + at, y + at, grads, mean_grad, bits, o1 + at, o2 + at,
                                   with_target ? oy + at : nullptr, n, stream);
#endif
      for (; i < n; ++i) {
        const bool kept = bit(bits, i);
        const A g = reduce ? mean_grad : static_cast<A>(grads[i]);
        const A toward2 = kept ? static_cast<A>(y[at + i]) * g : A(0);
        o2[at + i] = static_cast<T>(toward2);
        o1[at + i] = static_cast<T>(0 - toward2);
        if (!with_target) continue;
        const A difference = static_cast<A>(x2[at + i]) - static_cast<A>(x1[at + i]);
        oy[at + i] = static_cast<T>(kept ? difference * g : A(0));
      }
      streaming.flush();
    });
  });
  return {grad1, grad2, grad_target};
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(margin_ranking)
CUSTOM_OPS_CPU_KERNEL(margin_ranking_backward)
