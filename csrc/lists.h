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
      advise_huge_pages(blocks_.back().get(), size_ + kAlign);
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
constexpr int64_t kLong = 1 << 16;  // items from which on a pass over a list is worth its threads

// Returns the number of parts of a list with so many pairs. It depends on the size only, so no sum depends on the
// threads.
inline int64_t parts_of(double pairs) { return pairs < (1 << 20) ? 1 : kParts; }

// Calls run(part, begin, end) for the parts of [0, n): one, or kParts of a long list, in parallel if there is only one
// list.
template <class Run>
void each_part(int64_t n, const Run& run) {
  if (n < kLong) return run(0, 0, n);
  torch::stable::parallel_for(0, kParts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) run(part, n * part / kParts, n * (part + 1) / kParts);
  });
}

// Returns the sum of run(begin, end) over the parts of [0, n).
template <class Run>
double sum_each_part(int64_t n, const Run& run) {
  if (n < kLong) return run(0, n);
  double sums[kParts];
  each_part(n, [&](int64_t part, int64_t begin, int64_t end) { sums[part] = run(begin, end); });
  return std::accumulate(sums, sums + kParts, 0.0);
}

// Does the same for a sum that `multiversion_wide` compiles; `run` must be marked ALWAYS_INLINE.
template <class Run>
double sum_each_part_wide(int64_t n, const Run& run) {
  return sum_each_part(n, [&](int64_t begin, int64_t end) {
    double sum = 0;
    multiversion_wide([&]() ALWAYS_INLINE { sum = run(begin, end); });
    return sum;
  });
}

// Calls run(part, sums) for each part, in parallel if there is only one list. `sums` are n zeros to which the part
// adds. Returns the total of all parts, in scratch memory.
template <class Run>
double* sum_parts(int64_t n, int64_t parts, Scratch& scratch, const Run& run) {
  double* sums = scratch.get<double>(parts * n);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      std::fill(sums + part * n, sums + (part + 1) * n, 0.0);
      run(part, sums + part * n);
    }
  });
  each_part(parts > 1 ? n : 0, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[part * n + i];
  });
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

// Stores n grades and counts them; returns false unless all x are integers from 0 to 15.
template <class A>
ALWAYS_INLINE inline bool count_grades(const A* __restrict x, int64_t n, int32_t* __restrict grade, int32_t* counts) {
  int32_t other = 0, highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    grade[i] = static_cast<int32_t>((x[i] >= 0) & (x[i] < kGrades) ? x[i] : A(0));
    other |= static_cast<A>(grade[i]) != x[i];
    highest = grade[i] > highest ? grade[i] : highest;
  }
  if (other) return false;
  for (int32_t g = 0; g < kGrades; ++g) counts[g] = 0;
  for (int32_t g = highest; g >= 0; --g)
    for (int64_t i = 0; i < n; ++i) counts[g] += grade[i] == g;
  return true;
}

// Computes the positions 0..n-1 in the order of descending x, ties by position. Returns false unless all x are integers
// from 0 to 15.
template <class A>
bool order_of_grades(const A* x, int64_t n, int32_t* grade, int32_t* order) {
  int32_t next[kParts][kGrades] = {};
  bool graded[kParts];
  std::fill(graded, graded + kParts, true);
  each_part(n, [&](int64_t part, int64_t begin, int64_t end) {
    multiversion([&]()
                     ALWAYS_INLINE { graded[part] = count_grades(x + begin, end - begin, grade + begin, next[part]); });
  });
  if (!std::all_of(graded, graded + kParts, [](bool all) { return all; })) return false;
  int32_t start = 0;
  for (int32_t g = kGrades - 1; g >= 0; --g)
    for (auto& of_part : next) start += std::exchange(of_part[g], start);
  each_part(n, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) order[next[part][grade[i]]++] = static_cast<int32_t>(i);
  });
  return true;
}

// An item in the order of descending x. No two are equal, so a sort has one result.
template <class A>
struct Keyed {
  int32_t at;
  decltype(rank_bits(A())) key;

  Keyed() = default;
  Keyed(A x, int64_t at) : at(static_cast<int32_t>(at)), key(static_cast<decltype(key)>(~rank_bits(x))) {}
  bool operator<(const Keyed& o) const {
    if constexpr (sizeof(key) == 8) return (key < o.key) | ((key == o.key) & (at < o.at));
    const auto both = [](const Keyed& k) { return uint64_t{k.key} << 32 | static_cast<uint32_t>(k.at); };
    return both(*this) < both(o);
  }
};

// Stores the positions of the n items at `from`, which are by position, in their order. It is a radix sort, which skips
// the digits that all keys share.
template <class A>
void sort_keyed(Keyed<A>* from, Keyed<A>* to, int64_t n, int32_t* order) {
  constexpr int kDigits = sizeof(from->key);
  int32_t counts[kDigits][256] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int d = 0; d < kDigits; ++d) ++counts[d][from[i].key >> (8 * d) & 255];
  for (int d = 0; n && d < kDigits; ++d) {
    int32_t* count = counts[d];
    if (count[from[0].key >> (8 * d) & 255] == n) continue;
    int32_t start = 0;
    for (int k = 0; k < 256; ++k) start += std::exchange(count[k], start);
    for (int64_t i = 0; i < n; ++i) to[count[from[i].key >> (8 * d) & 255]++] = from[i];
    std::swap(from, to);
  }
  for (int64_t i = 0; i < n; ++i) order[i] = from[i].at;
}

constexpr int64_t kBuckets = 16, kSamples = 16 * kBuckets;

// Does the same as `sort_keyed` for the items of x, in parallel: it divides them into buckets of about the same size,
// between the quantiles of a sample, and sorts each.
template <class A>
void sort_long(const A* x, Keyed<A>* items, Keyed<A>* spare, int64_t n, Scratch& scratch, int32_t* order) {
  Keyed<A> sample[kSamples], bounds[kBuckets];
  for (int64_t k = 0; k < kSamples; ++k) sample[k] = {x[k * n / kSamples], k * n / kSamples};
  std::sort(sample, sample + kSamples);
  for (int64_t b = 0; b < kBuckets; ++b) bounds[b] = sample[b * (kSamples / kBuckets)];
  uint8_t* bucket = scratch.get<uint8_t>(n);
  int64_t next[kParts][kBuckets], ends[kBuckets];
  each_part(n, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t counts[kBuckets] = {};
    for (int64_t i = begin; i < end; ++i) {
      const Keyed<A> item(x[i], i);
      int64_t b = 0;
      for (int64_t half = kBuckets / 2; half; half /= 2)  // without a branch, which nothing could predict
        b += half & (static_cast<int64_t>(item < bounds[b + half]) - 1);
      bucket[i] = static_cast<uint8_t>(b);
      ++counts[b];
    }
    std::copy(counts, counts + kBuckets, next[part]);
  });
  int64_t start = 0;
  for (int64_t b = 0; b < kBuckets; ++b) {
    for (auto& of_part : next) start += std::exchange(of_part[b], start);
    ends[b] = start;
  }
  each_part(n, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t put[kBuckets];
    std::copy(next[part], next[part] + kBuckets, put);
    for (int64_t i = begin; i < end; ++i) items[put[bucket[i]]++] = {x[i], i};
  });
  torch::stable::parallel_for(0, kBuckets, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b ? ends[b - 1] : 0;
      sort_keyed(items + begin, spare + begin, ends[b] - begin, order + begin);
    }
  });
}

// Returns the positions 0..n-1 in the order of descending x, ties by position, in scratch memory.
template <class A>
const int32_t* order_descending(const A* x, int64_t n, Scratch& scratch) {
  check(n <= INT32_MAX, "scores: expected lists of less than 2^31 items");
  int32_t* order = scratch.get<int32_t>(n);
  Keyed<A>* items = scratch.get<Keyed<A>>(n);
  if (order_of_grades(x, n, reinterpret_cast<int32_t*>(items), order)) return order;
  Keyed<A>* spare = scratch.get<Keyed<A>>(n);
  if (n >= kLong && torch::stable::get_num_threads() > 1) {
    sort_long(x, items, spare, n, scratch, order);
  } else {
    for (int64_t i = 0; i < n; ++i) items[i] = {x[i], i};
    sort_keyed(items, spare, n, order);
  }
  return order;
}

// Returns out[i] = x[order[i]], in scratch memory.
template <class A>
A* gather(const A* x, const int32_t* order, int64_t n, Scratch& scratch) {
  A* out = scratch.get<A>(n);
  each_part(n, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = x[order[i]];
  });
  return out;
}

}  // namespace custom_ops
