// Pairwise losses.
#include "lists.h"

namespace custom_ops {
namespace {

// With x = s - y, or x = v for the Hessian: the sum of (x_i - x_j)^2 over the ordered pairs, 2 n sum (x - mean)^2.
struct PairwiseMse {
  bool normalize;

  template <class A>
  void operator()(List<A>& list) const {
    const double n = static_cast<double>(list.n);
    const double scale = normalize ? 1 / (n - 1) : n;
    if (list.n < 2) return std::fill(list.slope, list.slope + list.n, A(0));
    const auto x = [&](int64_t i) ALWAYS_INLINE {
      return list.v ? static_cast<double>(list.v[i]) : static_cast<double>(list.s[i]) - static_cast<double>(list.y[i]);
    };
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < list.n; ++i) sum += x(i);
    for (int64_t i = 0; i < list.n; ++i) {
      const double centred = x(i) - sum / n;
      squares += centred * centred;
      list.slope[i] = static_cast<A>(4 * scale * centred);
    }
    list.loss = static_cast<A>(2 * scale * squares);
    list.active = true;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> pairwise_mse(const Tensor& scores, const Tensor& labels,
                                                const std::optional<Tensor>& valid,
                                                const std::optional<Tensor>& offsets, bool normalize) {
  return list_loss(scores, labels, valid, offsets, PairwiseMse{normalize});
}

Tensor pairwise_mse_slope(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& valid,
                          const std::optional<Tensor>& offsets, const std::optional<Tensor>& v, bool normalize) {
  return list_slope(scores, labels, valid, offsets, v, PairwiseMse{normalize});
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(pairwise_mse)
CUSTOM_OPS_CPU_KERNEL(pairwise_mse_slope)
