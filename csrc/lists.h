// The lists of a batch: their positions, a loop over them, and the memory, sums and orders that their kernels need.
#pragma once

#include "elementary.h"

#include <limits>
#include <memory>
#include <numeric>

namespace custom_ops {

// Uninitialised memory for one list, which the next list on the same thread reuses.
class Scratch {
 public:
  template <class T>
  T* get(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    if (blocks_.empty() || used_ + bytes > size_) {
      size_ = std::max(bytes, 2 * size_);
      used_ = 0;
      blocks_.emplace_back(new char[size_ + kAlign]);
    }
    const uintptr_t base = reinterpret_cast<uintptr_t>(blocks_.back().get());
    char* at = blocks_.back().get() + (kAlign - base % kAlign) + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(at);
  }

  // Gives all memory back.
  void reset() {
    if (blocks_.size() > 1) blocks_.erase(blocks_.begin(), blocks_.end() - 1);
    used_ = 0;
  }

 private:
  static constexpr size_t kAlign = 64;
  std::vector<std::unique_ptr<char[]>> blocks_;
  size_t size_ = 0, used_ = 0;
};

template <class F>
void dispatch_accumulator(const Tensor& t, const char* argument, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    default:
      check(false, argument, ": expected float32 or float64, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

// The positions of the lists: `examples` rows of `items`, each with `lists` lists between the same bounds.
struct Lists {
  Shape batch;
  int64_t examples, items, lists;
  std::optional<Tensor> valid;
  std::vector<int64_t> bounds;

  Lists(const Tensor& x, const std::optional<Tensor>& valid_in, const std::optional<Tensor>& offsets);

  Shape per_list() const { return append(batch, {lists}); }
  int64_t row_of(int64_t index) const { return index / lists * items; }  // the offset of the row that a list is in
  const bool* valid_data() const { return valid ? data<bool>(*valid) : nullptr; }

  // Calls f(index, begin, end, scratch) for each list, in parallel. begin and end are positions in the whole tensor,
  // and `cost` is the cost of an item.
  template <class F>
  void parallel(int64_t cost, const F& f) const {
    const int64_t total = examples * lists;
    const int64_t mean = std::max<int64_t>(1, examples * items / std::max<int64_t>(1, total));
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, mean * cost));
    const auto run = [&](int64_t first, int64_t last) {
      Scratch scratch;
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = row_of(i), l = i % lists;
        scratch.reset();
        f(i, at + bounds[l], at + bounds[l + 1], scratch);
      }
    };
    if (total == 1) return run(0, 1);  // not in parallel_for, so the list may run its own parts in parallel
    torch::stable::parallel_for(0, total, grain, run);
  }

  // Stores `value` in the items of x that are in no list.
  template <class A>
  void clear_outside(A* x, A value = A(0)) const {
    for (int64_t e = 0; e < examples; ++e) {
      std::fill(x + e * items, x + e * items + bounds.front(), value);
      std::fill(x + e * items + bounds.back(), x + (e + 1) * items, value);
    }
  }
};

// Returns the divisor of the sum over n lists.
inline int64_t count_active(const bool* active, int64_t n, bool mean) {
  return mean ? std::max<int64_t>(1, std::count(active, active + n, true)) : 1;
}

// ---------------------------------------------------------------- long lists

constexpr int64_t kParts = 8;

// Returns the number of parts of a list with so many pairs. It depends on the size only, so no sum depends on the
// threads.
inline int64_t parts_of(double pairs) { return pairs < (1 << 20) ? 1 : kParts; }

// Calls run(part, sums) for each part, in parallel if there is only one list. `sums` are n zeros to which the part
// adds. Returns the total of all parts, in scratch memory.
template <class Run>
double* sum_parts(int64_t n, int64_t parts, Scratch& scratch, const Run& run) {
  double* sums = scratch.get<double>(parts * n);
  std::fill(sums, sums + parts * n, 0.0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) run(part, sums + part * n);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < n; ++i) sums[i] += sums[part * n + i];
  return sums;
}

// ---------------------------------------------------------------- discounts and orders

// Returns 1 / log2(1 + r) for the rank r = 1, 2, ..., where `rank` is r - 1.
inline double discount_at(int64_t rank) {
  constexpr int64_t kTable = 1024;
  const auto compute = [](int64_t i) { return 1 / std::log2(static_cast<double>(i + 2)); };
  static const std::vector<double> table = [&] {
    std::vector<double> out;
    for (int64_t i = 0; i < kTable; ++i) out.push_back(compute(i));
    return out;
  }();
  return rank < kTable ? table[static_cast<size_t>(rank)] : compute(rank);
}

// Returns 2^label - 1 over 2^highest, or label over highest, so nothing overflows; a label of at most 0 has no gain.
inline double relative_gain(double label, double highest, bool exponential) {
  if (label <= 0) return 0;
  if (!exponential) return label / highest;
  // expm1 is accurate for tiny labels too.
  return -std::expm1(-0.693147180559945309 * label) * std::exp2(label - highest);
}

// Maps a float to an integer with the same order; -0 equals 0, and NaN is the largest.
inline uint32_t rank_bits(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return ~uint32_t{0};
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline uint64_t rank_bits(double x) {
  x += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return ~uint64_t{0};
  return bits & 0x8000000000000000u ? ~bits : bits | 0x8000000000000000u;
}

constexpr int64_t kGrades = 16;

// Computes the positions 0..n-1 in the order of descending x, ties by position. Returns false unless all x are integers
// from 0 to 15.
template <class A>
ALWAYS_INLINE inline bool order_of_grades(const A* __restrict x, int64_t n, int32_t* __restrict grade,
                                          int32_t* __restrict order) {
  int32_t other = 0, highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    grade[i] = static_cast<int32_t>((x[i] >= 0) & (x[i] < kGrades) ? x[i] : A(0));
    other |= static_cast<A>(grade[i]) != x[i];
    highest = grade[i] > highest ? grade[i] : highest;
  }
  if (other) return false;
  int32_t next[kGrades], before = 0;
  for (int32_t g = highest; g >= 0; --g) {
    next[g] = before;
    for (int64_t i = 0; i < n; ++i) before += grade[i] == g;
  }
  for (int64_t i = 0; i < n; ++i) order[next[grade[i]]++] = static_cast<int32_t>(i);
  return true;
}

template <class A>
struct Keyed {
  decltype(rank_bits(A())) key;
  int32_t at;
};

constexpr int64_t kLongSort = 1 << 16;  // items from which on two passes over each digit are worth their threads

// Sorts the n items at `from` by ascending key, stably, in kParts parts at a time: each part counts its digits, and
// then puts its items where those of all parts before it end. Returns where the items are: `from` or `to`.
template <class A>
Keyed<A>* sort_long(Keyed<A>* from, Keyed<A>* to, int64_t n, Scratch& scratch) {
  int32_t (*counts)[256] = reinterpret_cast<int32_t (*)[256]>(scratch.get<int32_t>(kParts * 256));
  const int64_t step = (n + kParts - 1) / kParts;
  const auto each_part = [&](const auto& run) {
    torch::stable::parallel_for(0, kParts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part)
        for (int64_t i = part * step; i < std::min((part + 1) * step, n); ++i) run(counts[part], i);
    });
  };
  for (size_t shift = 0; shift < 8 * sizeof(from->key); shift += 8) {
    std::memset(counts, 0, kParts * sizeof(*counts));
    each_part([&](int32_t* count, int64_t i) { ++count[from[i].key >> shift & 255]; });
    int32_t start = 0, most = 0;
    for (int k = 0; k < 256; ++k) {
      const int32_t before = start;
      for (int64_t part = 0; part < kParts; ++part) start += std::exchange(counts[part][k], start);
      most = std::max(most, start - before);
    }
    if (most == n) continue;
    each_part([&](int32_t* count, int64_t i) { to[count[from[i].key >> shift & 255]++] = from[i]; });
    std::swap(from, to);
  }
  return from;
}

// Returns the positions 0..n-1 in the order of descending x, ties by position, in scratch memory. Except for small
// integers it is a radix sort, which skips the digits that all keys share.
template <class A>
const int32_t* order_descending(const A* x, int64_t n, Scratch& scratch) {
  using Key = decltype(rank_bits(A()));
  constexpr int kDigits = sizeof(Key);
  using Item = Keyed<A>;
  check(n <= INT32_MAX, "scores: expected lists of less than 2^31 items");
  int32_t* order = scratch.get<int32_t>(n);
  Item* from = scratch.get<Item>(n);
  bool done;
  multiversion([&]() ALWAYS_INLINE { done = order_of_grades(x, n, reinterpret_cast<int32_t*>(from), order); });
  if (done) return order;
  Item* to = scratch.get<Item>(n);
  if (n >= kLongSort && torch::stable::get_num_threads() > 1) {
    torch::stable::parallel_for(0, n, kLongSort / kParts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) from[i] = {static_cast<Key>(~rank_bits(x[i])), static_cast<int32_t>(i)};
    });
    from = sort_long<A>(from, to, n, scratch);
    for (int64_t i = 0; i < n; ++i) order[i] = from[i].at;
    return order;
  }
  int32_t (*counts)[256] = reinterpret_cast<int32_t (*)[256]>(scratch.get<int32_t>(kDigits * 256));
  std::memset(counts, 0, kDigits * sizeof(*counts));
  for (int64_t i = 0; i < n; ++i) {
    const Key key = static_cast<Key>(~rank_bits(x[i]));
    from[i] = {key, static_cast<int32_t>(i)};
    for (int d = 0; d < kDigits; ++d) ++counts[d][key >> (8 * d) & 255];
  }
  for (int d = 0; d < kDigits; ++d) {
    int32_t* count = counts[d];
    if (count[from[0].key >> (8 * d) & 255] == n) continue;
    int32_t start = 0;
    for (int k = 0; k < 256; ++k) start += std::exchange(count[k], start);
    for (int64_t i = 0; i < n; ++i) to[count[from[i].key >> (8 * d) & 255]++] = from[i];
    std::swap(from, to);
  }
  for (int64_t i = 0; i < n; ++i) order[i] = from[i].at;
  return order;
}

// Returns out[i] = x[order[i]], in scratch memory.
template <class A>
A* gather(const A* x, const int32_t* order, int64_t n, Scratch& scratch) {
  A* out = scratch.get<A>(n);
  for (int64_t i = 0; i < n; ++i) out[i] = x[order[i]];
  return out;
}

}  // namespace custom_ops
