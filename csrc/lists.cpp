// The lists of a batch, and the ops that every list loss needs beside its own: scaling each list, the sum over lists,
// and their adjoints.
#include "lists.h"

namespace custom_ops {
Lists::Lists(const Tensor& x, const std::optional<Tensor>& valid_in, const std::optional<Tensor>& offsets) {
  check(x.dim() >= 1, "scores: expected at least one dimension");
  batch = sizes(x, 0, x.dim() - 1);
  examples = product(batch);
  items = x.size(x.dim() - 1);
  if (valid_in) {
    check(valid_in->scalar_type() == ScalarType::Bool && sizes(*valid_in) == sizes(x),
          "mask: expected bool of the shape of the scores");
    valid = dense(*valid_in);
  }
  if (!offsets) {
    bounds = {0, items};
  } else {
    check(offsets->dim() == 1 && offsets->size(0) >= 1 && offsets->scalar_type() == ScalarType::Long,
          "cu_lengths: expected a 1-d int64 tensor of at least one element");
    const Tensor flat = dense(*offsets);
    bounds.assign(data<int64_t>(flat), data<int64_t>(flat) + flat.size(0));
    int64_t last = 0;
    for (int64_t bound : bounds) {
      check(bound >= last && bound <= items, "cu_lengths: expected non-decreasing values from 0 to ", items, ", got ",
            bound, last ? " after " : "", last ? std::to_string(last) : "");
      last = bound;
    }
  }
  lists = static_cast<int64_t>(bounds.size()) - 1;
}

Tensor list_scale(const Tensor& weight_in, const Tensor& x_in, const std::optional<Tensor>& valid,
                  const std::optional<Tensor>& offsets) {
  const Tensor weight = dense(weight_in), x = dense(x_in);
  const Lists lists(x, valid, offsets);
  check(sizes(weight) == lists.per_list() && weight.scalar_type() == x.scalar_type(),
        "weight: expected one for each list, in the dtype of x");
  Tensor out = fresh(x, sizes(x));
  const bool* keep = lists.valid_data();
  dispatch_accumulator(x, "x", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* wp = data<A>(weight);
    const A* xp = data<A>(x);
    A* op = mutable_data<A>(out);
    lists.clear_outside(op);
    lists.parallel(1, [&](int64_t index, int64_t begin, int64_t end, Scratch&) {
      const A w = wp[index];
      if (w == 0) return std::fill(op + begin, op + end, A(0));  // whatever x is
      multiversion([&]() ALWAYS_INLINE {
        if (!keep)
          for (int64_t i = begin; i < end; ++i) op[i] = w * xp[i];
        else
          for (int64_t i = begin; i < end; ++i) op[i] = keep[i] ? w * xp[i] : A(0);
      });
    });
  });
  return out;
}

Tensor list_dot(const Tensor& x_in, const Tensor& y_in, const std::optional<Tensor>& valid,
                const std::optional<Tensor>& offsets) {
  const Tensor x = dense(x_in), y = dense(y_in);
  const Lists lists(x, valid, offsets);
  check(sizes(y) == sizes(x) && y.scalar_type() == x.scalar_type(), "y: expected the shape and dtype of x");
  Tensor out = fresh(x, lists.per_list());
  const bool* keep = lists.valid_data();
  dispatch_accumulator(x, "x", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* xp = data<A>(x);
    const A* yp = data<A>(y);
    A* op = mutable_data<A>(out);
    lists.parallel(1, [&](int64_t index, int64_t begin, int64_t end, Scratch&) {
      double sum = 0;
      for (int64_t i = begin; i < end; ++i)
        if (!keep || keep[i]) sum += static_cast<double>(xp[i]) * static_cast<double>(yp[i]);
      op[index] = static_cast<A>(sum);
    });
  });
  return out;
}

Tensor list_total(const Tensor& loss_in, const Tensor& active_in, bool mean, int64_t batch_dims) {
  const Tensor loss = dense(loss_in), active = dense(active_in);
  check(batch_dims >= 0 && batch_dims <= loss.dim(), "batch_dims: expected 0 to ", loss.dim(), ", got ", batch_dims);
  check(active.scalar_type() == ScalarType::Bool && sizes(active) == sizes(loss),
        "active: expected bool of the shape of the loss");
  const Shape batch = sizes(loss, 0, batch_dims);
  const int64_t lists = product(sizes(loss, batch_dims, loss.dim()));
  Tensor out = fresh(loss, batch);
  dispatch_accumulator(loss, "loss", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* lp = data<A>(loss);
    const bool* ap = data<bool>(active);
    A* op = mutable_data<A>(out);
    for (int64_t e = 0; e < product(batch); ++e, lp += lists, ap += lists) {
      const double sum = std::accumulate(lp, lp + lists, 0.0);
      op[e] = static_cast<A>(sum / static_cast<double>(count_active(ap, lists, mean)));
    }
  });
  return out;
}

Tensor list_share(const Tensor& grad_in, const Tensor& active_in, bool mean) {
  const Tensor grad = dense(grad_in), active = dense(active_in);
  const int64_t batch_dims = grad.dim();
  check(active.scalar_type() == ScalarType::Bool && active.dim() >= batch_dims &&
            sizes(active, 0, batch_dims) == sizes(grad),
        "active: expected bool, of the shape of grad and more dimensions");
  const int64_t lists = product(sizes(active, batch_dims, active.dim())), examples = grad.numel();
  Tensor out = fresh(grad, sizes(active));
  dispatch_accumulator(grad, "grad", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* gp = data<A>(grad);
    const bool* ap = data<bool>(active);
    A* op = mutable_data<A>(out);
    for (int64_t e = 0; e < examples; ++e) {
      const double count = static_cast<double>(count_active(ap + e * lists, lists, mean));
      std::fill_n(op + e * lists, lists, static_cast<A>(static_cast<double>(gp[e]) / count));
    }
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(list_scale)
CUSTOM_OPS_CPU_KERNEL(list_dot)
CUSTOM_OPS_CPU_KERNEL(list_total)
CUSTOM_OPS_CPU_KERNEL(list_share)
