// Losses over a catalogue: each row of x scores all V words, z = scale x W' + bias, of which one is the row's target.
// No tensor of N x V is allocated: a pass runs over blocks of rows. torch's BLAS multiplies the matrices; the kernels
// here turn a block of logits into its rows' results or, in place, into its cotangent.
#include "elementary.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <limits>
#include <numeric>
#include <string>

namespace custom_ops {

namespace {

// A block of logits has at most so many bytes, in a multiple of kLeastRows rows, and at least so many rows. Forward and
// backward of 2048 rows x 32,000 words x 256 take 8 % longer in blocks of 196 rows.
constexpr int64_t kBlockBytes = int64_t{32} << 20;
constexpr int64_t kLeastRows = 64;
constexpr int64_t kWords = 4096;  // the words of a 16-bit catalogue that are widened at a time

// ---------------------------------------------------------------- matrices

Tensor part(Tensor t, int64_t dim, int64_t begin, int64_t length) {
  return torch::stable::narrow(t, dim, begin, length);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// Sets out = alpha a b, plus out itself if `add`. A `bias`, which is a row, is added to each row.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, double alpha, bool add = false,
              const Tensor* bias = nullptr) {
  if (out.numel() == 0) return;
  const Tensor& self = bias ? *bias : out;
  const int status = aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), add || bias ? 1 : 0, alpha);
  check(status == AOTI_TORCH_SUCCESS, "out of memory: a product of matrices failed");
}

void zero(Tensor& t) { torch::stable::zero_(t); }

// Returns t in the dtype `wide`, which is t itself if it has that dtype.
Tensor widened(const Tensor& t, ScalarType wide) {
  if (t.scalar_type() == wide) return t;
  Tensor out = fresh(t, sizes(t), wide);
  torch::stable::copy_(out, t);
  return out;
}

// ---------------------------------------------------------------- arguments

// The arguments that all ops share, and their sizes: B examples, each with N rows, V words and D dimensions.
struct Catalogue {
  Tensor x, weight, target;
  std::optional<Tensor> bias, mask, row_group, word_group;
  double scale;
  int64_t ignored, first, total;
  bool binary;
  int64_t examples, rows, words, dims;
  ScalarType wide;  // the dtype of logits and sums

  Catalogue(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in, const Tensor& target_in,
            const std::optional<Tensor>& mask_in, const std::optional<Tensor>& row_group_in,
            const std::optional<Tensor>& word_group_in, double scale, int64_t ignored, int64_t first, int64_t total,
            bool binary)
      : x(x_in),
        weight(weight_in),
        target(dense(target_in)),
        scale(scale),
        ignored(ignored),
        first(first),
        total(total),
        binary(binary) {
    check(x.dim() == 3 && weight.dim() == 3 && target.dim() == 2, "x, weight, target: expected 3, 3 and 2 dimensions");
    examples = x.size(0), rows = x.size(1), dims = x.size(2), words = weight.size(1);
    check(weight.size(0) == examples && weight.size(2) == dims && target.size(0) == examples && target.size(1) == rows,
          "x, weight, target: expected [B, N, D], [B, V, D] and [B, N]");
    check(target.scalar_type() == ScalarType::Long, "target: expected int64");
    const bool is_double = x.scalar_type() == ScalarType::Double;
    check(is_double == (weight.scalar_type() == ScalarType::Double), "x, weight: expected both in float64, or neither");
    wide = is_double ? ScalarType::Double : ScalarType::Float;
    if (bias_in) bias = of_words("bias", *bias_in);
    if (mask_in) {
      check(sizes(*mask_in) == Shape{examples, rows, words} && mask_in->scalar_type() == ScalarType::Byte,
            "mask: expected uint8 [B, N, V]");
      mask = dense(*mask_in);
    }
    check(row_group_in.has_value() == word_group_in.has_value(), "row_group, word_group: expected both or neither");
    if (row_group_in) {
      check(sizes(*row_group_in) == Shape{examples, rows} && sizes(*word_group_in) == Shape{examples, words} &&
                row_group_in->scalar_type() == ScalarType::Long && word_group_in->scalar_type() == ScalarType::Long,
            "row_group, word_group: expected int64 [B, N] and [B, V]");
      row_group = dense(*row_group_in), word_group = dense(*word_group_in);
    }
    const int64_t* t = data<int64_t>(target);
    for (int64_t i = 0; i < target.numel(); ++i) {
      if (t[i] == ignored || (t[i] >= 0 && t[i] < total)) continue;
      const bool none = ignored == std::numeric_limits<int64_t>::min();  // the contrastive losses ignore no target
      check(false, "target: expected 0 to ", total - 1, none ? "" : " or ignore_index " + std::to_string(ignored),
            ", got ", t[i]);
    }
  }

  Tensor of_words(const char* name, const Tensor& t) const {
    check(sizes(t) == Shape{examples, words} && t.scalar_type() == wide, name, ": expected [B, V] in the wide dtype");
    return dense(t);
  }
  Tensor of_rows(const char* name, const Tensor& t) const {
    check(sizes(t) == Shape{examples, rows} && t.scalar_type() == wide, name, ": expected [B, N] in the wide dtype");
    return dense(t);
  }
  std::optional<Tensor> of_rows(const char* name, const std::optional<Tensor>& t) const {
    return t ? std::optional<Tensor>(of_rows(name, *t)) : std::nullopt;
  }
  // Sets the logits of the words that are left out of row i of [B, N] to minus infinity.
  template <class A>
  void leave_out(A* z, int64_t i, int64_t at) const {
    constexpr A kOut = -std::numeric_limits<A>::infinity();
    const A target = at >= 0 ? z[at] : 0;
    const uint8_t* counts = mask ? data<uint8_t>(*mask) + i * words : nullptr;
    if (row_group) {
      const int64_t own = data<int64_t>(*row_group)[i];
      const int64_t* group = data<int64_t>(*word_group) + i / rows * words;
      if (mask) {
        for (int64_t v = 0; v < words; ++v) z[v] = counts[v] == 2 || group[v] != own ? z[v] : kOut;
      } else {
        for (int64_t v = 0; v < words; ++v) z[v] = group[v] != own ? z[v] : kOut;
      }
    }
    if (mask)
      for (int64_t v = 0; v < words; ++v) z[v] = counts[v] ? z[v] : kOut;
    if (at >= 0) z[at] = target;
  }

  // Changes the signs of the right words of row i.
  template <class A>
  void turn(A* z, int64_t i, int64_t at) const {
    const A target = at >= 0 ? z[at] : 0;
    if (mask) {
      const uint8_t* counts = data<uint8_t>(*mask) + i * words;
      for (int64_t v = 0; v < words; ++v) z[v] = counts[v] == 2 ? -z[v] : z[v];
    }
    if (at >= 0) z[at] = -target;
  }

  void check_alike(const char* name, const std::optional<Tensor>& t, const Tensor& like) const {
    check(!t || (sizes(*t) == sizes(like) && t->scalar_type() == like.scalar_type()), name,
          ": expected the shape and dtype of what it is the tangent of");
  }
};

// The derivative that a pass returns, for those of the three tensors for which it is wanted.
struct Gradients {
  Tensor x, weight, bias;
  bool of_x, of_weight, of_bias;

  // They have the dtypes of the arguments, or are `wide`.
  Gradients(const Catalogue& in, bool of_x, bool of_weight, bool of_bias, bool wide = false)
      : x(fresh(in.x, of_x ? sizes(in.x) : Shape{0}, wide ? in.wide : in.x.scalar_type())),
        weight(fresh(in.weight, of_weight ? sizes(in.weight) : Shape{0}, wide ? in.wide : in.weight.scalar_type())),
        bias(fresh(in.x, of_bias ? Shape{in.examples, in.words} : Shape{0}, in.wide)),
        of_x(of_x),
        of_weight(of_weight),
        of_bias(of_bias) {}

  bool wanted() const { return of_x || of_weight || of_bias; }
};

// ---------------------------------------------------------------- blocks

// One example: its rows that count, and its matrices.
struct Example {
  const Catalogue& in;
  int64_t index;
  Tensor x, weight;
  std::optional<Tensor> bias;
  std::vector<int64_t> kept;  // the rows that aren't ignored
  int64_t block;              // rows per block

  Example(const Catalogue& in, int64_t index, int64_t buffers)
      : in(in),
        index(index),
        x(of(in.x)),
        weight(of(in.weight)) {
    if (in.bias) bias = torch::stable::select(*in.bias, 0, index);
    const int64_t* t = data<int64_t>(in.target) + index * in.rows;
    for (int64_t i = 0; i < in.rows; ++i)
      if (t[i] != in.ignored) kept.push_back(i);
    const int64_t bytes = std::max<int64_t>(1, in.words) * (in.wide == ScalarType::Double ? 8 : 4) * buffers;
    block = std::max(kLeastRows, kBlockBytes / bytes / kLeastRows * kLeastRows);
    block = std::max<int64_t>(1, std::min<int64_t>(block, static_cast<int64_t>(kept.size())));
  }

  // Returns this example's matrix.
  Tensor of(const Tensor& t) const { return dense(torch::stable::select(t, 0, index)); }

  int64_t blocks() const { return (static_cast<int64_t>(kept.size()) + block - 1) / block; }
};

// The rows [begin, end) of an example's kept rows.
struct Block {
  const Example& of;
  int64_t begin, end;

  Block(const Example& of, int64_t number)
      : of(of),
        begin(number * of.block),
        end(std::min<int64_t>(begin + of.block, static_cast<int64_t>(of.kept.size()))) {}

  int64_t rows() const { return end - begin; }
  const int64_t* kept() const { return of.kept.data() + begin; }
  bool together() const { return of.kept[end - 1] - of.kept[begin] == end - 1 - begin; }

  // Returns these rows of `matrix` [N, D], which is dense, in the wide dtype.
  Tensor gathered(const Tensor& matrix) const {
    if (together()) return widened(part(matrix, 0, of.kept[begin], rows()), of.in.wide);
    Tensor out = fresh(matrix, {rows(), matrix.size(1)});
    const size_t bytes = static_cast<size_t>(matrix.size(1)) * matrix.element_size();
    const char* from = static_cast<const char*>(matrix.const_data_ptr());
    char* to = static_cast<char*>(out.mutable_data_ptr());
    for (int64_t r = 0; r < rows(); ++r)
      std::memcpy(to + static_cast<size_t>(r) * bytes, from + static_cast<size_t>(kept()[r]) * bytes, bytes);
    return widened(out, of.in.wide);
  }

  // Returns whether these rows of `matrix` [N, D] can hold a result of the dtype `wide`, without a copy.
  bool is_place(const Tensor& matrix, ScalarType wide) const { return together() && matrix.scalar_type() == wide; }

  // Returns these rows of `matrix`, or another tensor of them to `scatter`.
  Tensor place(const Tensor& matrix, ScalarType wide) const {
    return is_place(matrix, wide) ? part(matrix, 0, of.kept[begin], rows())
                                  : fresh(matrix, {rows(), matrix.size(1)}, wide);
  }

  // Stores `values` into these rows of `matrix` [N, D], with conversion.
  void scatter(const Tensor& values, const Tensor& matrix) const {
    if (together()) {
      Tensor rows_of = part(matrix, 0, of.kept[begin], rows());
      torch::stable::copy_(rows_of, values);
      return;
    }
    const Tensor narrow = widened(values, matrix.scalar_type());
    const size_t bytes = static_cast<size_t>(matrix.size(1)) * matrix.element_size();
    const char* from = static_cast<const char*>(narrow.const_data_ptr());
    char* to = static_cast<char*>(matrix.mutable_data_ptr());
    for (int64_t r = 0; r < rows(); ++r)
      std::memcpy(to + static_cast<size_t>(kept()[r]) * bytes, from + static_cast<size_t>(r) * bytes, bytes);
  }
};

// Calls f(begin, words in the wide dtype) for parts of a matrix of words [V, D]: for the whole if it has that dtype.
template <class F>
void for_words(const Tensor& matrix, ScalarType wide, const F& f) {
  if (matrix.scalar_type() == wide || matrix.size(0) <= kWords) return f(0, widened(matrix, wide));
  for (int64_t begin = 0; begin < matrix.size(0); begin += kWords)
    f(begin, widened(part(matrix, 0, begin, std::min(kWords, matrix.size(0) - begin)), wide));
}

// Sets z [R, V] = scale a words' + bias, plus z itself if `add`.
void logits_of(const Tensor& z, const Tensor& a, const Tensor& words, double scale, bool add, const Tensor* bias) {
  for_words(words, a.scalar_type(), [&](int64_t begin, const Tensor& some) {
    const int64_t n = some.size(0);
    if (n == words.size(0)) return multiply(z, a, transposed(some), scale, add, bias);
    const std::optional<Tensor> row = bias ? std::optional<Tensor>(part(*bias, 0, begin, n)) : std::nullopt;
    multiply(part(z, 1, begin, n), a, transposed(some), scale, add, row ? &*row : nullptr);
  });
}

// Sets out [R, D] = scale cotangent words, plus out itself if `add`.
void pull(const Tensor& out, const Tensor& cotangent, const Tensor& words, double scale, bool add) {
  for_words(words, cotangent.scalar_type(), [&](int64_t begin, const Tensor& some) {
    const int64_t n = some.size(0);
    multiply(out, n == words.size(0) ? cotangent : part(cotangent, 1, begin, n), some, scale, add || begin > 0);
  });
}

// The sums of one example over its blocks, in the wide dtype. `store` rounds them.
class Sums {
 public:
  Sums(const Gradients& to, const Example& of)
      : to_(to),
        of_(of),
        columns_(static_cast<size_t>(to.of_bias ? of.in.words : 0)) {
    if (to.of_x) {
      x_ = torch::stable::select(to.x, 0, of.index);
      if (static_cast<int64_t>(of.kept.size()) < of.in.rows) zero(*x_);
    }
    if (to.of_weight) {
      weight_ = torch::stable::select(to.weight, 0, of.index);
      sum_ = to.weight.scalar_type() == of.in.wide ? *weight_ : fresh(*weight_, sizes(*weight_), of.in.wide);
      if (of.kept.empty()) zero(*sum_);
    }
  }

  // Adds a cotangent [R, V] of the block times words to the gradient of its rows, at first or once more.
  void add_to_rows(const Block& block, const Tensor& cotangent, const Tensor& words, bool more = false) {
    if (!to_.of_x) return;
    if (!more) of_block_ = block.place(*x_, of_.in.wide);
    pull(*of_block_, cotangent, words, of_.in.scale, more);
  }

  // Adds a cotangent [R, V] of the block times rows to the gradient of the words, at first or once more.
  void add_to_words(const Block& block, const Tensor& cotangent, const Tensor& rows, bool more = false) {
    if (to_.of_weight) multiply(*sum_, transposed(cotangent), rows, of_.in.scale, block.begin > 0 || more);
  }

  // Ends a block.
  template <class A>
  void finish(const Block& block, const Tensor& cotangent) {
    if (to_.of_x && !block.is_place(*x_, of_.in.wide)) block.scatter(*of_block_, *x_);
    if (!to_.of_bias) return;
    const A* z = data<A>(cotangent);
    const int64_t rows = block.rows(), words = of_.in.words;
    torch::stable::parallel_for(0, words, 1024, [&](int64_t begin, int64_t end) {
      multiversion([&]() ALWAYS_INLINE {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t v = begin; v < end; ++v) columns_[v] += z[r * words + v];
      });
    });
  }

  template <class A>
  void store() {
    if (to_.of_weight && to_.weight.scalar_type() != of_.in.wide) torch::stable::copy_(*weight_, *sum_);
    if (to_.of_bias) std::copy(columns_.begin(), columns_.end(), mutable_data<A>(to_.bias) + of_.index * of_.in.words);
  }

 private:
  const Gradients& to_;
  const Example& of_;
  std::optional<Tensor> x_, weight_, sum_, of_block_;
  std::vector<double> columns_;
};

// ---------------------------------------------------------------- rows

// No sum has a term whose logit is so far below the largest: e^x is 0 there, and x e^x is 0 instead of NaN at -inf.
template <class A>
constexpr A kLowest = std::is_same_v<A, double> ? -750 : -100;

template <class A>
ALWAYS_INLINE inline A above_lowest(A x) {
  return x < kLowest<A> ? kLowest<A> : x;
}

// Returns the logarithm of the probability of logit z in that row. A word that is left out has none, even beside NaN.
template <class A, class R>
ALWAYS_INLINE inline A log_probability(A z, const R& row) {
  return z == -std::numeric_limits<A>::infinity() ? kLowest<A> : above_lowest((z - row.top) - row.log_sum);
}

// The stats of a row are the largest logit, the logarithm of the sum of e^(z - top), and the entropy.
template <class A>
struct Row {
  A top, log_sum, entropy;
};

// Sums term(i, first, second) over n terms, both in lanes that vectorise.
template <class A, class Term>
ALWAYS_INLINE inline void two_sums(int64_t n, const Term& term, double& first, double& second) {
  first = second = 0;
  for (int64_t begin = 0; begin < n; begin += kSumTile) {
    const int64_t end = std::min(begin + kSumTile, n);
    A a[kSumLanes] = {}, b[kSumLanes] = {};
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes)
      for (int64_t k = 0; k < kSumLanes; ++k) term(i + k, a[k], b[k]);
    for (; i < end; ++i) term(i, a[0], b[0]);
    for (int64_t half = kSumLanes / 2; half; half /= 2)
      for (int64_t k = 0; k < half; ++k) a[k] += a[k + half], b[k] += b[k + half];
    first += a[0], second += b[0];
  }
}

template <class A>
A top_of(const A* z, int64_t n) {
  A top;
  multiversion([&]() ALWAYS_INLINE { top = largest_of<A>(n, [=](int64_t i) ALWAYS_INLINE { return z[i]; }); });
  return top;
}

// Returns the stats of a row of logits, and the sum of e^(z - top). If `kept`, the logits become these exponentials.
template <bool kept, class A>
Row<A> row_of(A* z, int64_t n, A top_in, double& sum) {
  double moment;
  multiversion_wide([&]() ALWAYS_INLINE {
    const A top = top_in;
    A* const at = z;
    two_sums<A>(
        n,
        [=](int64_t i, A& e, A& m) ALWAYS_INLINE {
          const A x = above_lowest(at[i] - top), p = exp_nonpositive(x);
          if constexpr (kept) at[i] = at[i] == -std::numeric_limits<A>::infinity() ? A(0) : p;
          e += p, m += p * x;
        },
        sum, moment);
  });
  if (n == 0) return {top_in, 0, 0};
  return {top_in, static_cast<A>(std::log(sum)), static_cast<A>(std::log(sum) - moment / sum)};
}

// The cotangents of a row's log_prob, entropy and lse.
template <class A>
struct Weights {
  A log_prob, entropy, lse;

  // The cotangent of z_v is p_v times this, plus log_prob at the target; `log_p` is log p_v.
  ALWAYS_INLINE A of(const Row<A>& row, A log_p) const { return (lse - log_prob) - entropy * (log_p + row.entropy); }
};

// Turns a row of logits into its cotangent; `at` is the target's place, or negative if it isn't here.
template <class A>
void cotangent_of(A* z, int64_t n, int64_t at, Row<A> row_in, Weights<A> g_in) {
  multiversion_wide([=]() ALWAYS_INLINE {
    // Stores to z can't change these copies, so that the loops vectorise.
    const Row<A> row = row_in;
    const Weights<A> g = g_in;
    if (g.entropy == 0) {
      const A factor = g.lse - g.log_prob;
      for (int64_t i = 0; i < n; ++i) z[i] = exp_nonpositive(log_probability(z[i], row)) * factor;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const A log_p = log_probability(z[i], row);
        z[i] = exp_nonpositive(log_p) * g.of(row, log_p);
      }
    }
  });
  if (at >= 0) z[at] += g_in.log_prob;
}

// Makes z the cotangent of a row of which e^(z - top) and the sum of it are known. It has no part of the entropy.
template <class A>
void scale_to_cotangent(A* z, const A* e, int64_t n, int64_t at, double sum, Weights<A> g) {
  multiversion([=]() ALWAYS_INLINE {
    const A factor = static_cast<A>((g.lse - g.log_prob) / sum);
    for (int64_t i = 0; i < n; ++i) z[i] = e[i] * factor;
  });
  if (at >= 0) z[at] += g.log_prob;
}

// Adds rows to the largest logit and the sum of e^(z - top) of each of some columns. `z` has `stride` words a row.
template <class A>
void add_to_columns(const A* z, int64_t rows, int64_t stride, int64_t columns, A* top, double* sum) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  constexpr int64_t kWidth = 256, kHeight = 64;  // a tile stays in the cache between its two loops
  const int64_t tiles = (columns + kWidth - 1) / kWidth;
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, 32768 / (kWidth * rows)), [&](int64_t from, int64_t to) {
    multiversion_wide([=]() ALWAYS_INLINE {
      for (int64_t at = from * kWidth; at < std::min(to * kWidth, columns); at += kWidth) {
        const int64_t n = std::min(kWidth, columns - at);
        for (int64_t begin = 0; begin < rows; begin += kHeight) {
          const A* const tile = z + begin * stride + at;
          const int64_t height = std::min(kHeight, rows - begin);
          A best[kWidth], base[kWidth], part[kWidth] = {};
          std::copy(top + at, top + at + n, best);
          for (int64_t r = 0; r < height; ++r)
            for (int64_t k = 0; k < n; ++k) best[k] = tile[r * stride + k] > best[k] ? tile[r * stride + k] : best[k];
          // Where all words were left out so far, there is no largest logit yet.
          for (int64_t k = 0; k < n; ++k) base[k] = best[k] == kNone ? A(0) : best[k];
          for (int64_t r = 0; r < height; ++r)
            for (int64_t k = 0; k < n; ++k) part[k] += exp_nonpositive(above_lowest(tile[r * stride + k] - base[k]));
          for (int64_t k = 0; k < n; ++k) {
            const A before = top[at + k];
            const A factor = before == best[k] ? A(1) : exp_nonpositive(above_lowest(before - best[k]));
            sum[at + k] = sum[at + k] * factor + part[k];
            top[at + k] = best[k];
          }
        }
      }
    });
  });
}

// Turns a row of logits into the derivative of minus the targets' log_prob, in the row and in the first `columns`
// columns, which have these largest logits and logarithms of the sums of e^(z - top).
template <class A>
void symmetric_cotangent(A* z, int64_t n, int64_t at, Row<A> row_in, const A* top, const A* log_sum, int64_t columns) {
  multiversion_wide([=]() ALWAYS_INLINE {
    const Row<A> row = row_in;  // as above
    for (int64_t i = 0; i < columns; ++i) {
      const A p = exp_nonpositive(log_probability(z[i], row));
      z[i] = p + exp_nonpositive(log_probability(z[i], Row<A>{top[i], log_sum[i], 0}));
    }
    for (int64_t i = columns; i < n; ++i) z[i] = exp_nonpositive(log_probability(z[i], row));
  });
  z[at] -= 2;
}

// The tangents of a row's log_prob, entropy and lse, for the tangent `move` of its logits. If `turned`, the logits
// become their cotangent, and `move` the tangent of that.
template <class A>
Weights<A> tangent_of(A* z, A* move, int64_t n, int64_t at, Row<A> row, Weights<A> g, bool turned) {
  double mean, product;
  multiversion([&]() ALWAYS_INLINE {
    two_sums<A>(
        n,
        [=](int64_t i, A& m, A& c) ALWAYS_INLINE {
          const A log_p = log_probability(z[i], row), p = exp_nonpositive(log_p);
          m += p * move[i], c += p * log_p * move[i];
        },
        mean, product);
  });
  const A lse = static_cast<A>(mean), entropy = static_cast<A>(-(product + row.entropy * mean));
  const Weights<A> out{(at >= 0 ? move[at] : A(0)) - lse, entropy, lse};
  if (!turned) return out;
  multiversion([=]() ALWAYS_INLINE {
    const Row<A> own = row;  // as above
    const Weights<A> of_row = g;
    const A mean = lse, bend = entropy;
    for (int64_t i = 0; i < n; ++i) {
      const A log_p = log_probability(z[i], own), p = exp_nonpositive(log_p);
      const A of = of_row.of(own, log_p), change = move[i] - mean;
      z[i] = p * of;
      move[i] = p * (change * of - of_row.entropy * (change + bend));
    }
  });
  if (at >= 0) z[at] += g.log_prob;
  return out;
}

// The second derivatives of a row's log_prob, entropy and lse along the tangents t and u of its logits, of which `both`
// is the second derivative along the same tangents.
template <class A>
Weights<A> curve_of(const A* z, const A* t, const A* u, const A* both, int64_t n, int64_t at, Row<A> row) {
  double mean_t, mean_u, mean_both, covariance, bent, unused;
  multiversion([&]() ALWAYS_INLINE {
    two_sums<A>(
        n,
        [=](int64_t i, A& a, A& b) ALWAYS_INLINE {
          const A p = exp_nonpositive(log_probability(z[i], row));
          a += p * t[i], b += p * u[i];
        },
        mean_t, mean_u);
    const A off_t = static_cast<A>(mean_t), off_u = static_cast<A>(mean_u);
    two_sums<A>(
        n,
        [=](int64_t i, A& a, A& b) ALWAYS_INLINE {
          const A p = exp_nonpositive(log_probability(z[i], row));
          a += p * both[i], b += p * (t[i] - off_t) * (u[i] - off_u);
        },
        mean_both, covariance);
    const A off_both = static_cast<A>(mean_both);
    two_sums<A>(
        n,
        [=](int64_t i, A& a, A&) ALWAYS_INLINE {
          const A log_p = log_probability(z[i], row), p = exp_nonpositive(log_p);
          const A product = (t[i] - off_t) * (u[i] - off_u);
          a += p * (product * (log_p + row.entropy + 1) + log_p * (both[i] - off_both));
        },
        bent, unused);
  });
  const A lse = static_cast<A>(mean_both + covariance);
  return {(at >= 0 ? both[at] : A(0)) - lse, static_cast<A>(-bent), lse};
}

// ---------------------------------------------------------------- binary rows

// The logits of these rows have been turned: log_prob is minus the sum of log(1 + e^z), whose derivative is sigmoid(z).

// Returns e^-|z|, of which both are made.
template <class A>
ALWAYS_INLINE inline A smaller_odds(A z) {
  return exp_nonpositive(z > 0 ? -z : z);
}

template <class A>
ALWAYS_INLINE inline A sigmoid(A z) {
  const A e = smaller_odds(z);
  return (z > 0 ? 1 : e) / (1 + e);
}

template <class A>
A binary_log_prob(const A* z, int64_t n) {
  double sum;
  multiversion_wide([&]() ALWAYS_INLINE {
    sum = sum_of<A>(n, [=](int64_t i) ALWAYS_INLINE { return (z[i] > 0 ? z[i] : 0) + log1p_unit(smaller_odds(z[i])); });
  });
  return static_cast<A>(-sum);
}

// Turns a row of logits into its cotangent, for a cotangent g of its log_prob.
template <class A>
void binary_cotangent(A* z, int64_t n, A g) {
  multiversion_wide([=]() ALWAYS_INLINE {
    const A factor = -g;
    for (int64_t i = 0; i < n; ++i) z[i] = factor * sigmoid(z[i]);
  });
}

// Returns the tangent of log_prob for the tangent `move` of the turned logits. If `turned`, the logits become their
// cotangent, and `move` the tangent of that.
template <class A>
A binary_tangent(A* z, A* move, int64_t n, A g, bool turned) {
  double sum;
  multiversion([&]() ALWAYS_INLINE {
    sum = sum_of<A>(n, [=](int64_t i) ALWAYS_INLINE { return sigmoid(z[i]) * move[i]; });
    if (!turned) return;
    const A factor = -g;
    for (int64_t i = 0; i < n; ++i) {
      const A e = smaller_odds(z[i]), p = 1 / (1 + e);
      move[i] = factor * (e * p * p) * move[i];
      z[i] = factor * (z[i] > 0 ? p : e * p);
    }
  });
  return static_cast<A>(-sum);
}

// Returns the second derivative of log_prob along the tangents t and u, as in `curve_of`; `both` has been turned.
template <class A>
A binary_curve(const A* z, const A* t, const A* u, const A* both, int64_t n) {
  double sum;
  multiversion([&]() ALWAYS_INLINE {
    sum = sum_of<A>(n, [=](int64_t i) ALWAYS_INLINE {
      const A e = smaller_odds(z[i]), p = 1 / (1 + e);
      return (z[i] > 0 ? p : e * p) * both[i] + (e * p * p) * t[i] * u[i];
    });
  });
  return static_cast<A>(-sum);
}

// ---------------------------------------------------------------- passes

// The tangents of x, weight and bias in an example; a missing one is 0.
struct Moves {
  std::optional<Tensor> x, weight, bias;

  Moves(const Example& of, const std::optional<Tensor>& x_t, const std::optional<Tensor>& weight_t,
        const std::optional<Tensor>& bias_t) {
    of.in.check_alike("x_t", x_t, of.in.x);
    of.in.check_alike("weight_t", weight_t, of.in.weight);
    if (x_t) x = of.of(*x_t);
    if (weight_t) weight = of.of(*weight_t);
    if (bias_t) bias = torch::stable::select(of.in.of_words("bias_t", *bias_t), 0, of.index);
  }

  std::optional<Tensor> rows(const Block& block) const {
    return x ? std::optional<Tensor>(block.gathered(*x)) : std::nullopt;
  }

  // Sets `move` to the tangent of a block's logits; `rows` and `rows_t` are its rows and their tangent.
  void logits(const Example& of, Tensor& move, const Tensor& rows, const std::optional<Tensor>& rows_t) const {
    if (bias) torch::stable::copy_(move, *bias);
    else zero(move);
    if (rows_t) logits_of(move, *rows_t, of.weight, of.in.scale, true, nullptr);
    if (weight) logits_of(move, rows, *weight, of.in.scale, true, nullptr);
  }
};

// The cotangents of the rows' results; a missing one is 0.
struct RowWeights {
  std::optional<Tensor> log_prob, entropy, lse;

  template <class A>
  Weights<A> at(int64_t i) const {
    return {log_prob ? data<A>(*log_prob)[i] : A(0), entropy ? data<A>(*entropy)[i] : A(0),
            lse ? data<A>(*lse)[i] : A(0)};
  }
};

// Calls f(row of the block, index in [B, N], place of the target) for each row of a block, in parallel.
template <class F>
void each_row(const Block& block, const F& f) {
  const Catalogue& in = block.of.in;
  const int64_t* target = data<int64_t>(in.target);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, in.words));
  torch::stable::parallel_for(0, block.rows(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = block.of.index * in.rows + block.kept()[r], at = target[i] - in.first;
      f(r, i, at < in.words ? std::max<int64_t>(at, -1) : -1);
    }
  });
}

// Stores the rows' results and what backward needs of them, if they are given.
struct Results {
  Tensor log_prob, entropy, lse, stats;

  explicit Results(const Catalogue& in)
      : log_prob(rows(in, {})),
        entropy(rows(in, {})),
        lse(rows(in, {})),
        stats(rows(in, {3})) {}

  // Returns the sum of e^(z - top), which the logits become if `kept`.
  template <bool kept, class A>
  double store(int64_t i, A* z, int64_t n, int64_t at) const {
    const A top = top_of(z, n), target = (at >= 0 ? z[at] : A(0)) - top;
    const bool infinite = std::isinf(top) && std::none_of(z, z + n, [](A x) { return x != x; });
    double sum;
    const Row<A> row = row_of<kept>(z, n, top, sum);
    mutable_data<A>(log_prob)[i] = target - row.log_sum;
    mutable_data<A>(entropy)[i] = row.entropy;
    mutable_data<A>(lse)[i] = infinite ? row.top : row.top + row.log_sum;
    A* s = mutable_data<A>(stats) + 3 * i;
    s[0] = row.top, s[1] = row.log_sum, s[2] = row.entropy;
    return sum;
  }

 private:
  static Tensor rows(const Catalogue& in, std::initializer_list<int64_t> tail) {
    const Tensor out = fresh(in.x, append({in.examples, in.rows}, tail), in.wide);
    std::memset(out.mutable_data_ptr(), 0, static_cast<size_t>(out.numel()) * out.element_size());  // for ignored rows
    return out;
  }
};

template <class F>
void dispatch_wide(const Catalogue& in, const F& f) {
  if (in.wide == ScalarType::Double) f(Type<double>{});
  else f(Type<float>{});
}

// Computes the results, or with `stats` takes them as known, and the derivatives of their sum with these weights.
//
// Where `kept` isn't null, e^(z - top) is stored there, or with `stats` is taken from there.
void first_order(const Catalogue& in, const Results* results, const Tensor* stats, const RowWeights& weights,
                 const Gradients& to, const Tensor* kept = nullptr) {
  dispatch_wide(in, [&](auto type) {
    using A = typename decltype(type)::type;
    for (int64_t b = 0; b < in.examples; ++b) {
      const Example example(in, b, 1);
      if (kept && !stats && static_cast<int64_t>(example.kept.size()) < in.rows) {
        Tensor of_example = part(*kept, 0, b, 1);
        zero(of_example);
      }
      Sums sums(to, example);
      const Tensor buffer = fresh(in.x, {example.block, in.words}, in.wide);
      for (int64_t k = 0; k < example.blocks(); ++k) {
        const Block block(example, k);
        const Tensor rows = block.gathered(example.x), z = part(buffer, 0, 0, block.rows());
        if (!kept || !stats)
          logits_of(z, rows, example.weight, in.scale, false, example.bias ? &*example.bias : nullptr);
        each_row(block, [&](int64_t r, int64_t i, int64_t at) {
          A* const logits = mutable_data<A>(z) + r * in.words;
          if (kept && stats) {
            const double sum = std::exp(static_cast<double>(data<A>(*stats)[3 * i + 1]));
            return scale_to_cotangent(logits, data<A>(*kept) + i * in.words, in.words, at, sum, weights.at<A>(i));
          }
          in.leave_out(logits, i, at);
          if (in.binary) {
            in.turn(logits, i, at);
            if (results) mutable_data<A>(results->log_prob)[i] = binary_log_prob(logits, in.words);
            if (!to.wanted()) return;
            binary_cotangent(logits, in.words, weights.at<A>(i).log_prob);
            return in.turn(logits, i, at);
          }
          if (stats) {
            const A* s = data<A>(*stats) + 3 * i;
            cotangent_of(logits, in.words, at, {s[0], s[1], s[2]}, weights.at<A>(i));
          } else if (to.wanted()) {
            const double sum = results->store<true>(i, logits, in.words, at);
            scale_to_cotangent(logits, logits, in.words, at, sum, weights.at<A>(i));
          } else if (kept) {
            results->store<true>(i, logits, in.words, at);
            std::copy(logits, logits + in.words, mutable_data<A>(*kept) + i * in.words);
          } else {
            results->store<false>(i, logits, in.words, at);
          }
        });
        if (!to.wanted()) continue;
        sums.add_to_rows(block, z, example.weight);
        sums.add_to_words(block, z, rows);
        sums.finish<A>(block, z);
      }
      sums.store<A>();
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> catalogue_log_prob(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& row_group, const std::optional<Tensor>& word_group,
    double scale, int64_t ignore_index, int64_t first, int64_t total, bool binary, bool keep) {
  const Catalogue in(x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary);
  check(!keep || !binary, "keep: expected false for binary problems");
  const Results results(in);
  const Tensor kept = fresh(x, keep ? Shape{in.examples, in.rows, in.words} : Shape{0}, in.wide);
  first_order(in, &results, nullptr, {}, Gradients(in, false, false, false), keep ? &kept : nullptr);
  return {results.log_prob, results.entropy, results.lse, results.stats, kept};
}

std::tuple<Tensor, Tensor, Tensor> catalogue_backward(
    const std::optional<Tensor>& of_log_prob, const std::optional<Tensor>& of_entropy,
    const std::optional<Tensor>& of_lse, const Tensor& stats_in, const std::optional<Tensor>& kept_in, const Tensor& x,
    const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& row_group, const std::optional<Tensor>& word_group, double scale, int64_t ignore_index,
    int64_t first, int64_t total, bool binary, bool of_x, bool of_weight, bool of_bias) {
  const Catalogue in(x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary);
  const RowWeights weights{in.of_rows("of_log_prob", of_log_prob), in.of_rows("of_entropy", of_entropy),
                           in.of_rows("of_lse", of_lse)};
  const Tensor stats = dense(stats_in);
  check(sizes(stats) == Shape{in.examples, in.rows, 3} && stats.scalar_type() == in.wide, "stats: expected [B, N, 3]");
  const Gradients to(in, of_x, of_weight, of_bias);
  std::optional<Tensor> kept;
  if (kept_in) {
    check(sizes(*kept_in) == Shape{in.examples, in.rows, in.words} && kept_in->scalar_type() == in.wide,
          "kept: expected [B, N, V] in the wide dtype");
    if (!of_entropy && !binary) kept = dense(*kept_in);
  }
  first_order(in, nullptr, &stats, weights, to, kept ? &*kept : nullptr);
  return {to.x, to.weight, to.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> catalogue_second(
    const std::optional<Tensor>& of_log_prob, const std::optional<Tensor>& of_entropy,
    const std::optional<Tensor>& of_lse, const Tensor& stats_in, const std::optional<Tensor>& x_t,
    const std::optional<Tensor>& weight_t, const std::optional<Tensor>& bias_t, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& row_group, const std::optional<Tensor>& word_group, double scale, int64_t ignore_index,
    int64_t first, int64_t total, bool binary, bool of_x, bool of_weight, bool of_bias) {
  const Catalogue in(x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary);
  const RowWeights weights{in.of_rows("of_log_prob", of_log_prob), in.of_rows("of_entropy", of_entropy),
                           in.of_rows("of_lse", of_lse)};
  const Tensor stats = dense(stats_in);
  check(sizes(stats) == Shape{in.examples, in.rows, 3} && stats.scalar_type() == in.wide, "stats: expected [B, N, 3]");
  const Gradients to(in, of_x, of_weight, of_bias);
  const Results moved(in);
  dispatch_wide(in, [&](auto type) {
    using A = typename decltype(type)::type;
    for (int64_t b = 0; b < in.examples; ++b) {
      const Example example(in, b, 2);
      Sums sums(to, example);
      const Shape shape{example.block, in.words};
      const Tensor buffer = fresh(in.x, shape, in.wide), buffer_t = fresh(in.x, shape, in.wide);
      const Moves moves_of(example, x_t, weight_t, bias_t);
      for (int64_t k = 0; k < example.blocks(); ++k) {
        const Block block(example, k);
        const Tensor rows = block.gathered(example.x), z = part(buffer, 0, 0, block.rows());
        Tensor move = part(buffer_t, 0, 0, block.rows());
        logits_of(z, rows, example.weight, in.scale, false, example.bias ? &*example.bias : nullptr);
        const std::optional<Tensor> rows_t = moves_of.rows(block);
        moves_of.logits(example, move, rows, rows_t);
        each_row(block, [&](int64_t r, int64_t i, int64_t at) {
          const A* s = data<A>(stats) + 3 * i;
          A* const logits = mutable_data<A>(z) + r * in.words;
          A* const moves = mutable_data<A>(move) + r * in.words;
          in.leave_out(logits, i, at);
          if (in.binary) {
            in.turn(logits, i, at), in.turn(moves, i, at);
            mutable_data<A>(moved.log_prob)[i] =
                binary_tangent(logits, moves, in.words, weights.at<A>(i).log_prob, to.wanted());
            return in.turn(logits, i, at), in.turn(moves, i, at);
          }
          const Weights<A> t =
              tangent_of<A>(logits, moves, in.words, at, {s[0], s[1], s[2]}, weights.at<A>(i), to.wanted());
          mutable_data<A>(moved.log_prob)[i] = t.log_prob;
          mutable_data<A>(moved.entropy)[i] = t.entropy;
          mutable_data<A>(moved.lse)[i] = t.lse;
        });
        if (!to.wanted()) continue;
        sums.add_to_rows(block, move, example.weight);
        sums.add_to_words(block, move, rows);
        if (moves_of.weight) sums.add_to_rows(block, z, *moves_of.weight, true);
        if (rows_t) sums.add_to_words(block, z, *rows_t, true);
        sums.finish<A>(block, move);
      }
      sums.store<A>();
    }
  });
  return {moved.log_prob, moved.entropy, moved.lse, to.x, to.weight, to.bias};
}

std::tuple<Tensor, Tensor, Tensor> catalogue_curve(
    const Tensor& stats_in, const std::optional<Tensor>& x_t, const std::optional<Tensor>& weight_t,
    const std::optional<Tensor>& bias_t, const std::optional<Tensor>& x_u, const std::optional<Tensor>& weight_u,
    const std::optional<Tensor>& bias_u, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& target, const std::optional<Tensor>& mask, const std::optional<Tensor>& row_group,
    const std::optional<Tensor>& word_group, double scale, int64_t ignore_index, int64_t first, int64_t total,
    bool binary) {
  const Catalogue in(x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary);
  const Tensor stats = dense(stats_in);
  check(sizes(stats) == Shape{in.examples, in.rows, 3} && stats.scalar_type() == in.wide, "stats: expected [B, N, 3]");
  const Results curved(in);
  dispatch_wide(in, [&](auto type) {
    using A = typename decltype(type)::type;
    for (int64_t b = 0; b < in.examples; ++b) {
      const Example example(in, b, 4);
      const Tensor buffers = fresh(in.x, {4, example.block, in.words}, in.wide);
      const Moves of_t(example, x_t, weight_t, bias_t), of_u(example, x_u, weight_u, bias_u);
      for (int64_t k = 0; k < example.blocks(); ++k) {
        const Block block(example, k);
        const auto buffer = [&](int64_t i) { return part(torch::stable::select(buffers, 0, i), 0, 0, block.rows()); };
        Tensor z = buffer(0), t = buffer(1), u = buffer(2), both = buffer(3);
        const Tensor rows = block.gathered(example.x);
        const std::optional<Tensor> rows_t = of_t.rows(block), rows_u = of_u.rows(block);
        logits_of(z, rows, example.weight, in.scale, false, example.bias ? &*example.bias : nullptr);
        of_t.logits(example, t, rows, rows_t);
        of_u.logits(example, u, rows, rows_u);
        zero(both);
        if (rows_t && of_u.weight) logits_of(both, *rows_t, *of_u.weight, in.scale, true, nullptr);
        if (rows_u && of_t.weight) logits_of(both, *rows_u, *of_t.weight, in.scale, true, nullptr);
        each_row(block, [&](int64_t r, int64_t i, int64_t at) {
          A* const logits = mutable_data<A>(z) + r * in.words;
          A* const second = mutable_data<A>(both) + r * in.words;
          const A *along_t = data<A>(t) + r * in.words, *along_u = data<A>(u) + r * in.words;
          in.leave_out(logits, i, at);
          if (in.binary) {
            in.turn(logits, i, at), in.turn(second, i, at);
            mutable_data<A>(curved.log_prob)[i] = binary_curve(logits, along_t, along_u, second, in.words);
            return;
          }
          const A* s = data<A>(stats) + 3 * i;
          const Weights<A> c = curve_of<A>(logits, along_t, along_u, second, in.words, at, {s[0], s[1], s[2]});
          mutable_data<A>(curved.log_prob)[i] = c.log_prob;
          mutable_data<A>(curved.entropy)[i] = c.entropy;
          mutable_data<A>(curved.lse)[i] = c.lse;
        });
      }
    }
  });
  return {curved.log_prob, curved.entropy, curved.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> catalogue_loss(
    const Tensor& of_log_prob, const std::optional<Tensor>& of_lse, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& target, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& row_group, const std::optional<Tensor>& word_group, double scale, int64_t ignore_index,
    int64_t first, int64_t total, bool binary, bool of_x, bool of_weight, bool of_bias) {
  const Catalogue in(x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary);
  const RowWeights weights{in.of_rows("of_log_prob", of_log_prob), std::nullopt, in.of_rows("of_lse", of_lse)};
  const Gradients to(in, of_x, of_weight, of_bias, true);
  const Results results(in);
  first_order(in, &results, nullptr, weights, to);
  Tensor loss = fresh(in.x, {in.examples}, in.wide);
  dispatch_wide(in, [&](auto type) {
    using A = typename decltype(type)::type;
    const int64_t* t = data<int64_t>(in.target);
    for (int64_t b = 0; b < in.examples; ++b) {
      double sum = 0;
      for (int64_t i = b * in.rows; i < (b + 1) * in.rows; ++i) {
        if (t[i] == in.ignored) continue;
        const Weights<A> w = weights.at<A>(i);
        sum += weigh<double>(w.log_prob, data<A>(results.log_prob)[i]) + weigh<double>(w.lse, data<A>(results.lse)[i]);
      }
      mutable_data<A>(loss)[b] = static_cast<A>(sum);
    }
  });
  return {loss, results.stats, to.x, to.weight, to.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> catalogue_symmetric_loss(const Tensor& x, const Tensor& weight,
                                                                            const std::optional<Tensor>& mask,
                                                                            const std::optional<Tensor>& row_group,
                                                                            const std::optional<Tensor>& word_group,
                                                                            double scale, bool of_x, bool of_weight) {
  check(x.dim() == 3, "x: expected 3 dimensions");
  const Tensor target = fresh(x, {x.size(0), x.size(1)}, ScalarType::Long);
  for (int64_t i = 0; i < target.numel(); ++i) mutable_data<int64_t>(target)[i] = i % x.size(1);
  const Catalogue in(x, weight, std::nullopt, target, mask, row_group, word_group, scale, -1, 0, weight.size(1), false);
  const Gradients to(in, of_x, of_weight, false, true);
  const Results of_rows(in), of_columns(in);
  const Tensor loss = fresh(x, {in.examples}, in.wide);
  dispatch_wide(in, [&](auto type) {
    using A = typename decltype(type)::type;
    for (int64_t b = 0; b < in.examples; ++b) {
      const Example example(in, b, 1);
      Sums sums(to, example);
      const Tensor buffer = fresh(x, {example.block, in.words}, in.wide);
      const auto set_logits = [&](const Tensor& z, const Tensor& rows) {
        logits_of(z, rows, example.weight, scale, false, nullptr);
      };
      std::vector<A> own(in.rows), top(in.rows, -std::numeric_limits<A>::infinity()), log_sum(in.rows);
      std::vector<double> sum(in.rows);
      for (int64_t k = 0; k < example.blocks(); ++k) {
        const Block block(example, k);
        const Tensor z = part(buffer, 0, 0, block.rows());
        set_logits(z, block.gathered(example.x));
        each_row(block, [&](int64_t r, int64_t i, int64_t at) {
          A* const logits = mutable_data<A>(z) + r * in.words;
          in.leave_out(logits, i, at);
          of_rows.store<false>(i, logits, in.words, at);
          own[at] = logits[at];
        });
        add_to_columns(data<A>(z), block.rows(), in.words, in.rows, top.data(), sum.data());
      }
      double total = 0;
      for (int64_t j = 0; j < in.rows; ++j) {
        log_sum[j] = static_cast<A>(std::log(sum[j]));
        A* const s = mutable_data<A>(of_columns.stats) + 3 * (b * in.rows + j);
        s[0] = top[j], s[1] = log_sum[j];
        total -= data<A>(of_rows.log_prob)[b * in.rows + j] + ((own[j] - top[j]) - log_sum[j]);
      }
      mutable_data<A>(loss)[b] = static_cast<A>(total);
      if (!to.wanted()) continue;
      for (int64_t k = 0; k < example.blocks(); ++k) {
        const Block block(example, k);
        const Tensor rows = block.gathered(example.x), z = part(buffer, 0, 0, block.rows());
        if (example.blocks() > 1) set_logits(z, rows);
        each_row(block, [&](int64_t r, int64_t i, int64_t at) {
          A* const logits = mutable_data<A>(z) + r * in.words;
          const A* const s = data<A>(of_rows.stats) + 3 * i;
          if (example.blocks() > 1) in.leave_out(logits, i, at);
          symmetric_cotangent(logits, in.words, at, {s[0], s[1], s[2]}, top.data(), log_sum.data(), in.rows);
        });
        sums.add_to_rows(block, z, example.weight);
        sums.add_to_words(block, z, rows);
        sums.finish<A>(block, z);
      }
      sums.store<A>();
    }
  });
  return {loss, of_rows.stats, of_columns.stats, to.x, to.weight};
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(catalogue_log_prob)
CUSTOM_OPS_CPU_KERNEL(catalogue_backward)
CUSTOM_OPS_CPU_KERNEL(catalogue_second)
CUSTOM_OPS_CPU_KERNEL(catalogue_curve)
CUSTOM_OPS_CPU_KERNEL(catalogue_loss)
CUSTOM_OPS_CPU_KERNEL(catalogue_symmetric_loss)
