// What list losses are given, in the form that their kernels read: lengths as a mask, labels in the scores' dtype.
#include "lists.h"

#include <cmath>

namespace custom_ops {

CUSTOM_OPS_ENUM(LabelUse, ORDER, DIFFERENCE, EXPONENTIAL, VALUE)

namespace {

constexpr double kHighest =
    2048;  // beside labels so high no other number counts in 2^y: see custom_ops/ranking/_inputs.py

template <class A, class L>
ALWAYS_INLINE inline bool is_held(L label) {
  if constexpr (std::is_same_v<L, double>) {
    return std::isnan(label) || static_cast<double>(static_cast<A>(label)) == label;
  } else {
    constexpr L kExact = L(1) << (std::is_same_v<A, float> ? 24 : 53);
    return label >= -kExact && label <= kExact;
  }
}

// How far a label lies below the highest one.
inline double below(double, double) { return 0; }  // isn't asked for
inline double below(int64_t top, int64_t label) {
  return static_cast<double>(static_cast<uint64_t>(top) - static_cast<uint64_t>(label));
}

// An integer that is the greater the greater the float is, and its inverse, which is the same.
template <class Bits>
Bits in_order(Bits bits) {
  return bits < 0 ? bits ^ std::numeric_limits<Bits>::max() : bits;
}

// The labels of one list where A doesn't hold them all: rounded, and moved down by the least that keeps their order.
template <class A, class L>
void ordered(const L* label, const bool* keep, int64_t n, LabelUse use, A* out, Scratch& scratch) {
  using Bits = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;
  int64_t* at = scratch.get<int64_t>(n);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!keep || keep[i]) at[count++] = i;
  std::stable_sort(at, at + count, [&](int64_t a, int64_t b) {  // NaN first
    return label[a] != label[a] ? label[b] == label[b] : label[a] > label[b];
  });
  int64_t first = 0;
  while (first < count && label[at[first]] != label[at[first]]) out[at[first++]] = std::numeric_limits<A>::quiet_NaN();
  if (first == count) return;
  const L top = label[at[first]];
  const double highest = use == LabelUse::DIFFERENCE ? 0 : std::min(static_cast<double>(top), kHighest);
  Bits least = std::numeric_limits<Bits>::max();
  A rounded = 0;
  for (int64_t k = first, above = 0; k < count; ++k) {
    const L own = label[at[k]];
    if (k == first || own != label[at[k - 1]]) {
      above = k - first;
      rounded = use == LabelUse::ORDER   ? -static_cast<A>(above)
                : use == LabelUse::VALUE ? static_cast<A>(static_cast<double>(own))
                                         : static_cast<A>(highest - below(top, own));
      Bits bits;
      std::memcpy(&bits, &rounded, sizeof(bits));
      least = std::min(least, static_cast<Bits>(in_order(bits) + static_cast<Bits>(above)));
      bits = in_order(static_cast<Bits>(least - static_cast<Bits>(above)));
      std::memcpy(&rounded, &bits, sizeof(bits));
    }
    out[at[k]] = rounded;
  }
}

template <class A, class L>
void read(const Lists& lists, const Tensor& labels, LabelUse use, Tensor& out) {
  const L* lp = data<L>(labels);
  A* op = mutable_data<A>(out);
  const bool* keep = lists.valid_data();
  lists.clear_outside(op);
  lists.parallel(1, [&](int64_t, int64_t begin, int64_t end, Scratch& scratch) {
    int64_t others = 0;
    multiversion([&]() ALWAYS_INLINE {
      for (int64_t i = begin; i < end; ++i) {
        op[i] = static_cast<A>(lp[i]);
        others += (!keep || keep[i]) & !is_held<A>(lp[i]);
      }
    });
    if (others) ordered(lp + begin, keep ? keep + begin : nullptr, end - begin, use, op + begin, scratch);
  });
}

}  // namespace

Tensor list_valid(const Tensor& lengths_in, int64_t n) {
  const Tensor lengths = dense(lengths_in);
  check(lengths.scalar_type() == ScalarType::Long, "lengths: expected int64");
  Tensor out = fresh(lengths, append(sizes(lengths), {n}), ScalarType::Bool);
  const int64_t* lp = data<int64_t>(lengths);
  bool* op = mutable_data<bool>(out);
  for (int64_t l = 0; l < lengths.numel(); ++l) {
    check(lp[l] >= 0 && lp[l] <= n, "lengths: expected values from 0 to ", n, ", got ", lp[l]);
    std::fill(op + l * n, op + l * n + lp[l], true);
    std::fill(op + l * n + lp[l], op + (l + 1) * n, false);
  }
  return out;
}

Tensor list_labels(const Tensor& labels_in, const std::optional<Tensor>& valid, const std::optional<Tensor>& offsets,
                   bool wide, LabelUse use) {
  const Tensor labels = dense(labels_in);
  const Lists lists(labels, valid, offsets);
  Tensor out = fresh(labels, sizes(labels), wide ? ScalarType::Double : ScalarType::Float);
  const auto from = [&](auto type) {
    using L = typename decltype(type)::type;
    if (wide) read<double, L>(lists, labels, use, out);
    else read<float, L>(lists, labels, use, out);
  };
  const bool integers = labels.scalar_type() == ScalarType::Long;
  check(integers || (labels.scalar_type() == ScalarType::Double && use == LabelUse::ORDER),
        "labels: expected int64, or float64 for their order only");
  if (integers) from(Type<int64_t>{});
  else from(Type<double>{});
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(list_valid)
CUSTOM_OPS_CPU_KERNEL(list_labels)
