// Gradient shaping: a spike, and the slope of the smooth step as which it is differentiated.
#include "elementary.h"

namespace custom_ops {
namespace {

constexpr int64_t kSpan = 1 << 14;

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
  torch::stable::parallel_for(0, n, kSpan, [&](int64_t begin, int64_t end) {
    multiversion([=]() ALWAYS_INLINE {
      for (int64_t i = begin; i < end; ++i) {
        const A slope = Step::slope(static_cast<A>(x[i]) / width) / width;
        out[i] = static_cast<T>(static_cast<A>(grad[i]) * slope);
      }
    });
  });
}

}  // namespace

Tensor surrogate_step(const Tensor& x_in, int64_t, double) {
  const Tensor x = dense(x_in);
  Tensor y = fresh(x, sizes(x));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* xp = data<T>(x);
    T* yp = mutable_data<T>(y);
    torch::stable::parallel_for(0, x.numel(), kSpan, [&](int64_t begin, int64_t end) {
      multiversion([=]() ALWAYS_INLINE {
        const T zero = static_cast<T>(A(0)), one = static_cast<T>(A(1));
        for (int64_t i = begin; i < end; ++i) yp[i] = static_cast<A>(xp[i]) >= 0 ? one : zero;
      });
    });
  });
  return y;
}

Tensor surrogate_slope(const Tensor& grad_in, const Tensor& x_in, int64_t shape, double width) {
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
      case 0: return run(Sigmoid{});
      case 1: return run(Atan{});
      case 2: return run(Triangle{});
      case 3: return run(Boxcar{});
      default: check(false, "shape: expected 0 to 3, got ", shape);
    }
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(surrogate_step)
CUSTOM_OPS_CPU_KERNEL(surrogate_slope)
