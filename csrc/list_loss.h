// A list loss has two ops. NAME returns its loss, its slope and whether each list is active; NAME_slope returns the
// slope again or the Hessian times a vector. Both run one kernel over the lists of a batch. A loss only defines that
// kernel: a struct whose fields are the loss's own arguments and whose operator() reads one List and fills it.
#pragma once

#include "lists.h"

namespace custom_ops {

CUSTOM_OPS_ENUM(Reduction, NONE, MEAN, SUM)

// The smallest and largest score of a list. NaNs are ignored; if all scores are NaN, `low` is above `high`.
struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  void add(double from, double to) { low = std::min(low, from), high = std::max(high, to); }
  double middle() const { return low <= high ? low + (high - low) / 2 : 0; }
};

// The n >= 1 valid items of one list, and the results of the kernel.
template <class A>
struct List {
  int64_t n;
  const A* s;  // scores
  const A* y;  // labels
  const A* w;  // the items' weights, or null for 1
  const A* v;  // the factor of the Hessian, or null if the slope is wanted
  A* slope;    // output: the slope, or the Hessian times v
  Scratch& scratch;
  A loss = 0;  // these two aren't read if only the slope is wanted
  bool active = false;

  void fill_slope(A value) { std::fill(slope, slope + n, value); }

  void fill_nan() {
    loss = std::numeric_limits<A>::quiet_NaN();
    fill_slope(loss);
  }

  Range range() const {
    Range of_part[kParts], out;
    each_part(n, [&](int64_t part, int64_t begin, int64_t end) {
      Range own;
      for (int64_t i = begin; i < end; ++i) own.add(static_cast<double>(s[i]), static_cast<double>(s[i]));
      of_part[part] = own;
    });
    for (const Range& own : of_part) out.add(own.low, own.high);
    return out;
  }
};

// Refers to a kernel that takes a List<float>& or a List<double>&, so that its callers are compiled once for all
// kernels.
class ListKernel {
 public:
  template <class Kernel>
  ListKernel(const Kernel& kernel) : kernel_(&kernel),
                                     float_(run<Kernel, float>),
                                     double_(run<Kernel, double>) {}

  void operator()(List<float>& list) const { float_(kernel_, list); }
  void operator()(List<double>& list) const { double_(kernel_, list); }

 private:
  template <class Kernel, class A>
  static void run(const void* kernel, List<A>& list) {
    (*static_cast<const Kernel*>(kernel))(list);
  }

  const void* kernel_;
  void (*float_)(const void*, List<float>&);
  void (*double_)(const void*, List<double>&);
};

// The inputs of both ops: dense, checked, and divided into lists.
struct ListInputs {
  Tensor scores, labels;
  Lists lists;
  std::optional<Tensor> item_weights;

  ListInputs(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& valid,
             const std::optional<Tensor>& offsets, const std::optional<Tensor>& item_weights = std::nullopt);
  Tensor alike(const char* name, const Tensor& t) const;
};

// The body of the first op. Unless the reduction is none, the loss is that of all lists in each example of the first
// `batch_dims` dimensions, and the slope is its derivative.
std::tuple<Tensor, Tensor, Tensor> list_loss(const ListInputs& in, Reduction reduction, int64_t batch_dims,
                                             const ListKernel& kernel);

// The body of the second op.
Tensor list_slope(const ListInputs& in, const std::optional<Tensor>& v, const ListKernel& kernel);

template <class Kernel, class... Arguments>
struct ListLoss {
  static std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& scores, const Tensor& labels,
                                                 const std::optional<Tensor>& valid,
                                                 const std::optional<Tensor>& offsets, Reduction reduction,
                                                 int64_t batch_dims, Arguments... arguments) {
    return list_loss({scores, labels, valid, offsets}, reduction, batch_dims, Kernel{arguments...});
  }

  static Tensor slope(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& valid,
                      const std::optional<Tensor>& offsets, const std::optional<Tensor>& v, Arguments... arguments) {
    return list_slope({scores, labels, valid, offsets}, v, Kernel{arguments...});
  }
};

// The ops of a loss whose kernel reads the weights of the items.
template <class Kernel, class... Arguments>
struct WeightedListLoss {
  static std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& scores, const Tensor& labels,
                                                 const std::optional<Tensor>& valid,
                                                 const std::optional<Tensor>& offsets,
                                                 const std::optional<Tensor>& item_weights, Reduction reduction,
                                                 int64_t batch_dims, Arguments... arguments) {
    return list_loss({scores, labels, valid, offsets, item_weights}, reduction, batch_dims, Kernel{arguments...});
  }

  static Tensor slope(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& valid,
                      const std::optional<Tensor>& offsets, const std::optional<Tensor>& item_weights,
                      const std::optional<Tensor>& v, Arguments... arguments) {
    return list_slope({scores, labels, valid, offsets, item_weights}, v, Kernel{arguments...});
  }
};

}  // namespace custom_ops

// Registers the two ops of a list loss: CUSTOM_OPS_LIST_LOSS(name, Kernel, the types of Kernel's fields).
#define CUSTOM_OPS_LIST_LOSS(name, ...) CUSTOM_OPS_LIST_LOSS_OF(name, ListLoss<__VA_ARGS__>)
#define CUSTOM_OPS_WEIGHTED_LIST_LOSS(name, ...) CUSTOM_OPS_LIST_LOSS_OF(name, WeightedListLoss<__VA_ARGS__>)
#define CUSTOM_OPS_LIST_LOSS_OF(name, ...)                \
  namespace custom_ops {                                  \
  using name = __VA_ARGS__;                               \
  }                                                       \
  CUSTOM_OPS_CPU_KERNEL_OF(name, &custom_ops::name::loss) \
  CUSTOM_OPS_CPU_KERNEL_OF(name##_slope, &custom_ops::name::slope)
