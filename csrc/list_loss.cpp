// The bodies of a list loss's two ops, which call its kernel.
#include "list_loss.h"

namespace custom_ops {
namespace {

// Calls kernel(list), except for a list with a NaN label, whose loss is NaN, and for the Hessian times a zero vector,
// which is 0 even if a score is infinite or NaN.
template <class A>
void run_list(List<A>& list, const ListKernel& kernel) {
  bool defined = true, moves = true;
  multiversion([&]() ALWAYS_INLINE {
    int32_t other = 0, nonzero = !list.v;
    for (int64_t i = 0; i < list.n; ++i) other |= list.y[i] != list.y[i];
    for (int64_t i = 0; i < (list.v ? list.n : 0); ++i) nonzero |= list.v[i] != 0;
    defined = !other, moves = nonzero;
  });
  if (!moves) return list.fill_slope(0);
  if (defined) return kernel(list);
  list.active = true;
  list.fill_nan();
}

// Runs the kernel on each list with a valid item, then calls put(index, list) for every list.
template <class A, class Put>
void for_each_list(const ListInputs& in, const A* v, A* slope, const ListKernel& kernel, const Put& put) {
  const A* s = data<A>(in.scores);
  const A* y = data<A>(in.labels);
  const A* w = in.item_weights ? data<A>(*in.item_weights) : nullptr;
  const bool* valid = in.lists.valid_data();
  in.lists.clear_outside(slope);
  in.lists.parallel(16, [&](int64_t index, int64_t begin, int64_t end, Scratch& scratch) {
    const int64_t items = end - begin;
    if (!valid) {
      List<A> list{items,         s + begin, y + begin, w ? w + begin : nullptr, v ? v + begin : nullptr,
                   slope + begin, scratch};
      if (items) run_list(list, kernel);
      return put(index, list);
    }
    A* compact_s = scratch.get<A>(items);
    A* compact_y = scratch.get<A>(items);
    A* compact_w = scratch.get<A>(w ? items : 0);
    A* compact_v = scratch.get<A>(v ? items : 0);
    A* compact_slope = scratch.get<A>(items);
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (!valid[i]) continue;
      compact_s[n] = s[i];
      compact_y[n] = y[i];
      if (w) compact_w[n] = w[i];
      if (v) compact_v[n] = v[i];
      ++n;
    }
    List<A> list{n, compact_s, compact_y, w ? compact_w : nullptr, v ? compact_v : nullptr, compact_slope, scratch};
    if (n) run_list(list, kernel);
    for (int64_t i = begin, k = 0; i < end; ++i) slope[i] = valid[i] ? compact_slope[k++] : A(0);
    put(index, list);
  });
}

}  // namespace

ListInputs::ListInputs(const Tensor& scores_in, const Tensor& labels_in, const std::optional<Tensor>& valid,
                       const std::optional<Tensor>& offsets, const std::optional<Tensor>& item_weights_in)
    : scores(dense(scores_in)),
      labels(alike("labels", labels_in)),
      lists(scores, valid, offsets) {
  if (item_weights_in) item_weights = alike("item_weights", *item_weights_in);
}

Tensor ListInputs::alike(const char* name, const Tensor& t) const {
  check(sizes(t) == sizes(scores) && t.scalar_type() == scores.scalar_type(), name,
        ": expected the shape and dtype of the scores");
  return dense(t);
}

std::tuple<Tensor, Tensor, Tensor> list_loss(const ListInputs& in, Reduction reduction, int64_t batch_dims,
                                             const ListKernel& kernel) {
  const Tensor& scores = in.scores;
  const Lists& lists = in.lists;
  check(batch_dims >= 0 && batch_dims < scores.dim(), "batch_dims: expected 0 to ", scores.dim() - 1, ", got ",
        batch_dims);
  const bool reduced = reduction != Reduction::NONE;
  const Shape examples = sizes(scores, 0, batch_dims);
  Tensor loss = fresh(scores, reduced ? examples : lists.per_list());
  Tensor slope = fresh(scores, sizes(scores));
  Tensor active = fresh(scores, lists.per_list(), ScalarType::Bool);
  bool* ap = mutable_data<bool>(active);
  dispatch_accumulator(scores, "scores", [&](auto type) {
    using A = typename decltype(type)::type;
    std::vector<A> each(static_cast<size_t>(reduced ? active.numel() : 0));
    A* lp = reduced ? each.data() : mutable_data<A>(loss);
    A* sp = mutable_data<A>(slope);
    const A* none = nullptr;
    for_each_list(in, none, sp, kernel, [&](int64_t l, const List<A>& list) {
      lp[l] = list.loss;
      ap[l] = list.active;
    });
    for (int64_t e = 0, of = reduced ? product(examples) : 0; e < of; ++e) {
      const int64_t n = active.numel() / of, items = slope.numel() / of;
      const int64_t count = count_active(ap + e * n, n, reduction == Reduction::MEAN);
      const double sum = std::accumulate(lp + e * n, lp + (e + 1) * n, 0.0);
      mutable_data<A>(loss)[e] = static_cast<A>(sum / static_cast<double>(count));
      if (count == 1) continue;
      const A share = static_cast<A>(1 / static_cast<double>(count));
      torch::stable::parallel_for(e * items, (e + 1) * items, 32768, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sp[i] *= share;
      });
    }
  });
  return {loss, slope, active};
}

Tensor list_slope(const ListInputs& in, const std::optional<Tensor>& v_in, const ListKernel& kernel) {
  const Tensor v = v_in ? in.alike("v", *v_in) : in.scores;
  Tensor slope = fresh(in.scores, sizes(in.scores));
  dispatch_accumulator(in.scores, "scores", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* vp = v_in ? data<A>(v) : nullptr;
    for_each_list(in, vp, mutable_data<A>(slope), kernel, [](int64_t, const List<A>&) {});
  });
  return slope;
}

}  // namespace custom_ops
