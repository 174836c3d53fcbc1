// Gradient shaping: a spike, and the slope of the smooth step as which it is differentiated.
#include "elementary.h"

namespace custom_ops {

CUSTOM_OPS_ENUM(SurrogateShape, SIGMOID, ATAN, TRIANGLE, BOXCAR)

namespace {

// Slopes at u, each of integral 1; NaN stays NaN where the slope isn't constant.
struct Sigmoid {
  template <class A>
  ALWAYS_INLINE static A slope(A u) {
    const A e = exp_nonpositive(-std::fabs(u));
    return e / ((1 + e) * (1 + e));
  }
};
struct Atan {
  template <class A>
  ALWAYS_INLINE static A slope(A u) {
    return A(0.31830988618379067) / (1 + u * u);
  }
};
struct Triangle {
  template <class A>
  ALWAYS_INLINE static A slope(A u) {
    const A left = 1 - std::fabs(u);
    return left < 0 ? 0 : left;
  }
};
struct Boxcar {
  template <class A>
  ALWAYS_INLINE static A slope(A u) {
    return std::fabs(u) < 1 ? A(0.5) : A(0);
  }
};

template <class Step, class T>
void slopes(const T* grad, const T* x, T* out, int64_t n, double wide) {
  using A = Accumulator<T>;
  const A width = static_cast<A>(wide);
  each_element(out, n, [=](int64_t i) ALWAYS_INLINE {
    const A slope = Step::slope(static_cast<A>(x[i]) / width) / width;
    return static_cast<T>(static_cast<A>(grad[i]) * slope);
  });
}

}  // namespace

Tensor surrogate_step(const Tensor& x_in, SurrogateShape, double) {
  const Tensor x = dense(x_in);
  Tensor y = fresh(x, sizes(x));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* xp = data<T>(x);
    each_element(mutable_data<T>(y), x.numel(),
                 [=](int64_t i) ALWAYS_INLINE { return static_cast<T>(static_cast<A>(xp[i]) >= 0 ? A(1) : A(0)); });
  });
  return y;
}

Tensor surrogate_slope(const Tensor& grad_in, const Tensor& x_in, SurrogateShape shape, double width) {
  check(sizes(grad_in) == sizes(x_in), "grad: expected the shape of x");
  check(grad_in.scalar_type() == x_in.scalar_type(), "grad: expected the dtype of x");
  const Tensor grad = dense(grad_in), x = dense(x_in);
  Tensor out = fresh(x, sizes(x));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto step) {
      slopes<decltype(step)>(data<T>(grad), data<T>(x), mutable_data<T>(out), x.numel(), width);
    };
    switch (shape) {
      case SurrogateShape::SIGMOID: return run(Sigmoid{});
      case SurrogateShape::ATAN: return run(Atan{});
      case SurrogateShape::TRIANGLE: return run(Triangle{});
      case SurrogateShape::BOXCAR: return run(Boxcar{});
    }
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(surrogate_step)
CUSTOM_OPS_CPU_KERNEL(surrogate_slope)
