// Ranking metrics: each is a sum over the places of a list, up to a cutoff, of what is expected there over all orders
// of the items tied in score.
#include "lists.h"

namespace custom_ops {

CUSTOM_OPS_ENUM(RankMetric, PRECISION, RECALL, F1, HIT_RATE, R_PRECISION, RECIPROCAL_RANK, AVERAGE_PRECISION, DCG, NDCG,
                ERR, AUC)
CUSTOM_OPS_ENUM(TiedScores, AVERAGE, INDEX, TOGETHER)

namespace {

constexpr int64_t kAll = INT64_MAX;  // the cutoff that lets all places count

// The items of one list.
template <class A>
struct Items {
  int64_t n;
  const A* s;
  const double* y;

  bool defined() const {
    for (int64_t i = 0; i < n; ++i)
      if (s[i] != s[i] || y[i] != y[i]) return false;
    return true;
  }
};

struct Metric {
  RankMetric metric;
  TiedScores ties;
  bool exponential;
  const int64_t* cutoffs;
  int64_t count;         // the number of cutoffs
  const double* places;  // the discount of each place, or null for 1 / log2(1 + rank)

  double discount(int64_t place) const { return places ? places[place] : discount_at(place); }

  // Stores the metric at each cutoff and returns whether it is defined; if not, the metric is 0.
  template <class A>
  bool run(const Items<A>& list, Scratch& scratch, double* out) const {
    const int64_t n = list.n;
    std::fill(out, out + count, 0.0);
    if (!list.defined()) {
      std::fill(out, out + count, std::numeric_limits<double>::quiet_NaN());
      return true;
    }
    double highest = 0;
    int64_t relevant = 0;
    for (int64_t i = 0; i < n; ++i) {
      highest = std::max(highest, list.y[i]);
      relevant += list.y[i] > 0;
    }
    if (!relevant || (metric == RankMetric::AUC && relevant == n)) return false;
    const int32_t* order = order_descending(list.s, n, scratch);
    double* sums = scratch.get<double>(n + 1);  // over the places before each
    const A* s = gather(list.s, order, n, scratch);
    double* value = gather(list.y, order, n, scratch);  // each item's gain or relevance
    const bool discounted = metric == RankMetric::DCG || metric == RankMetric::NDCG;
    double* discounts = scratch.get<double>(discounted ? n : 0);
    each_part(n, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        if (metric == RankMetric::NDCG) value[p] = relative_gain(value[p], highest, exponential);
        else if (!discounted && metric != RankMetric::ERR) value[p] = static_cast<double>(value[p] > 0);
        if (discounted) discounts[p] = discount(p);
      }
    });
    const double pairs = static_cast<double>(relevant) * static_cast<double>(n - relevant);
    double before = 0, left = 1;  // the sum of all earlier groups, and the probability that a user looks further
    sums[0] = 0;
    for (int64_t start = 0, end; start < n; start = end) {
      end = start + 1;
      if (ties != TiedScores::INDEX)
        while (end < n && s[end] == s[start]) ++end;
      const double size = static_cast<double>(end - start), sum = std::accumulate(value + start, value + end, 0.0);
      double none = 1;  // the probability that no relevant item of the group is at an earlier place
      for (int64_t p = start; p < end; ++p) {
        const double rank = static_cast<double>(p + 1), earlier = static_cast<double>(p - start), mean = sum / size;
        double term = 0;
        switch (metric) {
          case RankMetric::DCG:
          case RankMetric::NDCG: term = mean == 0 ? 0 : mean * discounts[p]; break;
          case RankMetric::ERR:
            term = left * value[p] / rank;
            left *= 1 - value[p];
            break;
          case RankMetric::HIT_RATE:
          case RankMetric::RECIPROCAL_RANK:
            if (before > 0 || sum == 0) break;
            if (ties == TiedScores::TOGETHER) {
              term = p + 1 == end;
            } else if (none > 0) {
              term = none * sum / (size - earlier);
              none *= std::max(0.0, size - sum - earlier) / (size - earlier);
            }
            if (metric == RankMetric::RECIPROCAL_RANK) term /= rank;
            break;
          case RankMetric::AVERAGE_PRECISION:
            if (ties == TiedScores::TOGETHER) term = p + 1 == end ? sum * (before + sum) / rank : 0;
            else term = mean * (before + earlier * (sum - 1) / std::max(size - 1, 1.0) + 1) / rank;
            break;
          case RankMetric::AUC:  // the pairs with the irrelevant items below, and half of those with tied ones
            term = mean * (static_cast<double>(n - relevant - start) + before - (size - sum) / 2) / pairs;
            break;
          default: term = mean;
        }
        sums[p + 1] = sums[p] + term;
      }
      before += sum;
    }
    double* ideal = metric == RankMetric::NDCG ? ideal_sums(list, highest, discounts, scratch) : nullptr;
    const double total = static_cast<double>(relevant);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t k = cutoffs[c], last = std::min(k, n);
      const double places = static_cast<double>(k == kAll ? n : k), sum = sums[last];
      switch (metric) {
        case RankMetric::PRECISION: out[c] = sum / places; break;
        case RankMetric::RECALL: out[c] = sum / total; break;
        case RankMetric::F1: out[c] = 2 * sum / (places + total); break;
        case RankMetric::R_PRECISION: out[c] = sums[relevant] / total; break;
        case RankMetric::AVERAGE_PRECISION: out[c] = sum / std::min(places, total); break;
        case RankMetric::NDCG: out[c] = ideal[last] == 0 ? 0 : sum / ideal[last]; break;
        default: out[c] = sum;
      }
    }
    return true;
  }

 private:
  // Returns the sums of the best order.
  template <class A>
  double* ideal_sums(const Items<A>& list, double highest, const double* discounts, Scratch& scratch) const {
    const int64_t n = list.n;
    const double* y = gather(list.y, order_descending(list.y, n, scratch), n, scratch);
    double* sums = scratch.get<double>(n + 1);
    sums[0] = 0;
    each_part(n, [&](int64_t, int64_t begin, int64_t end) {
      double gain = 0;
      for (int64_t p = begin; p < end; ++p) {
        if (p == begin || y[p] != y[p - 1]) gain = relative_gain(y[p], highest, exponential);
        sums[p + 1] = gain == 0 ? 0 : gain * discounts[p];
      }
    });
    for (int64_t p = 0; p < n; ++p) sums[p + 1] += sums[p];
    return sums;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> rank_metric(const Tensor& scores_in, const Tensor& labels_in,
                                       const std::optional<Tensor>& valid, const std::optional<Tensor>& offsets,
                                       const Tensor& cutoffs_in, const std::optional<Tensor>& discounts_in,
                                       RankMetric metric, TiedScores ties, bool exponential) {
  const Tensor scores = dense(scores_in), labels = dense(labels_in), cutoffs = dense(cutoffs_in);
  const Lists lists(scores, valid, offsets);
  check(sizes(labels) == sizes(scores) && labels.scalar_type() == ScalarType::Double,
        "labels: expected float64 of the shape of the scores");
  check(cutoffs.dim() == 1 && cutoffs.scalar_type() == ScalarType::Long, "cutoffs: expected a 1-d int64 tensor");
  const Tensor discounts = discounts_in ? dense(*discounts_in) : labels;
  check(!discounts_in || (discounts.scalar_type() == ScalarType::Double && discounts.numel() >= lists.items),
        "discounts: expected float64, one for each place");
  const int64_t count = cutoffs.numel();
  for (int64_t c = 0; c < count; ++c)
    check(data<int64_t>(cutoffs)[c] >= 1, "cutoffs: expected at least 1, got ", data<int64_t>(cutoffs)[c]);
  const Metric kernel{
      metric, ties, exponential, data<int64_t>(cutoffs), count, discounts_in ? data<double>(discounts) : nullptr};
  Tensor out = fresh(labels, append(lists.per_list(), {count}));
  Tensor active = fresh(labels, lists.per_list(), ScalarType::Bool);
  double* op = mutable_data<double>(out);
  bool* ap = mutable_data<bool>(active);
  const bool* keep = lists.valid_data();
  const double* y = data<double>(labels);
  dispatch_accumulator(scores, "scores", [&](auto type) {
    using A = typename decltype(type)::type;
    const A* s = data<A>(scores);
    lists.parallel(16, [&](int64_t index, int64_t begin, int64_t end, Scratch& scratch) {
      Items<A> list{end - begin, s + begin, y + begin};
      if (keep) {
        A* kept_s = scratch.get<A>(list.n);
        double* kept_y = scratch.get<double>(list.n);
        list = {0, kept_s, kept_y};
        for (int64_t i = begin; i < end; ++i)
          if (keep[i]) kept_s[list.n] = s[i], kept_y[list.n++] = y[i];
      }
      ap[index] = kernel.run(list, scratch, op + index * count);
    });
  });
  return {out, active};
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(rank_metric)
