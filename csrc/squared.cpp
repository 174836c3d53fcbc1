// Squared ReLU: max(x, 0)^2, and grad times its slope.
#include "isa.h"

namespace custom_ops {

Tensor squared_relu_forward(const Tensor& x_in) {
  const Tensor x = dense(x_in);
  Tensor y = fresh(x, sizes(x));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* xp = data<T>(x);
    each_element(mutable_data<T>(y), x.numel(), [=](int64_t i) ALWAYS_INLINE {
      const A v = static_cast<A>(xp[i]), kept = v <= 0 ? A(0) : v;
      return static_cast<T>(kept * kept);
    });
  });
  return y;
}

Tensor squared_relu_backward(const Tensor& grad_in, const Tensor& x_in) {
  const Tensor grad = dense(grad_in), x = dense(x_in);
  check(sizes(grad) == sizes(x) && grad.scalar_type() == x.scalar_type(), "grad: expected the shape and dtype of x");
  Tensor out = fresh(x, sizes(x));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const T* gp = data<T>(grad);
    const T* xp = data<T>(x);
    each_element(mutable_data<T>(out), x.numel(), [=](int64_t i) ALWAYS_INLINE {
      const A v = static_cast<A>(xp[i]), slope = 2 * static_cast<A>(gp[i]) * v;
      return static_cast<T>(v <= 0 ? A(0) : slope);
    });
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(squared_relu_forward)
CUSTOM_OPS_CPU_KERNEL(squared_relu_backward)
