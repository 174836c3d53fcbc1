// Voxel summing: sums over contiguous runs of points, and the gather that is their adjoint.
#include "bits.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace custom_ops {
namespace {

constexpr int64_t kPointsPerThread = 4096;
constexpr int64_t kColumns = 256;  // accumulators kept on the stack
constexpr int64_t kBlockRows = 64;

// Segment boundaries, checked once, so that no kernel below can reach memory it doesn't own.
struct Segments {
  Tensor keep;
  const int64_t* at;
  int64_t count, points;

  Segments(const Tensor& indptr, int64_t points) : keep(dense(indptr)), points(points) {
    check(keep.dim() == 1 && keep.size(0) >= 1 && keep.scalar_type() == ScalarType::Long,
          "indptr: expected a 1-d int64 tensor of at least one boundary");
    at = data<int64_t>(keep);
    count = keep.size(0) - 1;
    bool ordered = at[0] >= 0 && at[count] <= points;
    for (int64_t s = 0; s < count; ++s) ordered &= at[s] <= at[s + 1];
    check(ordered, "indptr: expected non-decreasing boundaries within [0, ", points, "]");
  }

  // The first segment whose place in the work list (its points before it, plus the segments before
  // it) is at least `work`: splitting by work balances long segments against many empty ones.
  int64_t first_from(int64_t work) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (at[mid] - at[0] + mid < work) low = mid + 1;
      else high = mid;
    }
    return low;
  }
  int64_t work() const { return at[count] - at[0] + count; }
};

// Long sums go in blocks, so that rounding errors grow with the blocks and not with the rows.
template <class T>
ALWAYS_INLINE inline void sum_rows(const T* x, int64_t rows, int64_t columns, T* out) {
  using A = Accumulator<T>;
  for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
    const int64_t width = std::min(kColumns, columns - c0);
    A total[kColumns], block[kColumns];
    for (int64_t c = 0; c < width; ++c) total[c] = 0;
    for (int64_t r0 = 0; r0 < rows; r0 += kBlockRows) {
      const int64_t end = std::min(rows, r0 + kBlockRows);
      for (int64_t c = 0; c < width; ++c) block[c] = static_cast<A>(x[r0 * columns + c0 + c]);
      for (int64_t r = r0 + 1; r < end; ++r) {
        const T* row = x + r * columns + c0;
        for (int64_t c = 0; c < width; ++c) block[c] += static_cast<A>(row[c]);
      }
      for (int64_t c = 0; c < width; ++c) total[c] += block[c];
    }
    for (int64_t c = 0; c < width; ++c) out[c0 + c] = static_cast<T>(total[c]);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> voxel_bounds(const Tensor& ranks_in, bool check_sorted) {
  const Tensor ranks = dense(ranks_in);
  const int64_t n = ranks.numel();
  const int64_t chunk = 1 << 15, chunks = (n + chunk - 1) / chunk;
  std::vector<int64_t> first(chunks + 1, 0);  // boundaries before each chunk
  std::atomic<bool> sorted{true};
  Tensor bounds, last;
  dispatch_index(ranks, "ranks", [&](auto type) {
    using I = typename decltype(type)::type;
    const I* r = data<I>(ranks);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        int64_t changes = 0;
        bool descends = false;
        multiversion([&]() ALWAYS_INLINE {
          I steps = 0, drops = 0;
          for (int64_t i = std::max<int64_t>(1, k * chunk); i < std::min(n, (k + 1) * chunk); ++i) {
            steps += r[i] != r[i - 1];
            drops |= r[i] < r[i - 1];
          }
          changes = steps, descends = drops != 0;
        });
        first[k + 1] = changes + (k == 0);
        if (descends) sorted = false;
      }
    });
    check(!check_sorted || sorted,
          "ranks: expected non-decreasing values, got an unsorted tensor; sort x, geometry and "
          "ranks by ranks first, or pass check_sorted=False to sum each run of equal ranks");
    for (int64_t k = 0; k < chunks; ++k) first[k + 1] += first[k];
    bounds = fresh(ranks, {first[chunks] + 1}, ScalarType::Long);
    int64_t* out = mutable_data<int64_t>(bounds);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        int64_t at = first[k];
        for (int64_t i = k * chunk; i < std::min(n, (k + 1) * chunk) && at < first[k + 1]; ++i) {
          out[at] = i;
          at += i == 0 || r[i] != r[i - 1];
        }
      }
    });
    const int64_t voxels = first[chunks];
    out[voxels] = n;
    last = fresh(ranks, {voxels}, ScalarType::Long);
    int64_t* lp = mutable_data<int64_t>(last);
    for (int64_t v = 0; v < voxels; ++v) lp[v] = out[v + 1] - 1;
  });
  return {bounds, last};
}

Tensor segment_sum(const Tensor& x_in, const Tensor& indptr) {
  const Tensor x = dense(x_in);
  check(x.dim() >= 2, "x: expected [..., N, C], got ", x.dim(), " dimensions");
  const int64_t points = x.size(x.dim() - 2), columns = x.size(x.dim() - 1);
  const Segments segments(indptr, points);
  const Shape batch = sizes(x, 0, x.dim() - 2);
  Tensor out = fresh(x, append(batch, {segments.count, columns}));
  const int64_t work = segments.work(),
                grain = std::max<int64_t>(1, kPointsPerThread * 16 / std::max<int64_t>(columns, 1));
  dispatch_floating(x, "x", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* xp = data<T>(x);
    T* op = mutable_data<T>(out);
    torch::stable::parallel_for(0, product(batch) * work, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / work, stop = std::min(end, (b + 1) * work);
        const int64_t last = segments.first_from(stop - b * work);
        for (int64_t s = segments.first_from(begin - b * work); s < last; ++s) {
          const T* rows = xp + (b * points + segments.at[s]) * columns;
          T* sum = op + (b * segments.count + s) * columns;
          const int64_t length = segments.at[s + 1] - segments.at[s];
          multiversion([&]() ALWAYS_INLINE { sum_rows(rows, length, columns, sum); });
        }
        begin = stop;
      }
    });
  });
  return out;
}

Tensor segment_gather(const Tensor& sums_in, const Tensor& indptr, int64_t points) {
  const Tensor sums = dense(sums_in);
  check(sums.dim() >= 2, "sums: expected [..., M, C], got ", sums.dim(), " dimensions");
  const Segments segments(indptr, points);
  check(sums.size(sums.dim() - 2) == segments.count, "sums: expected ", segments.count, " segments, got ",
        sums.size(sums.dim() - 2));
  const Shape batch = sizes(sums, 0, sums.dim() - 2);
  const int64_t columns = sums.size(sums.dim() - 1), row = columns * static_cast<int64_t>(sums.element_size());
  Tensor out = fresh(sums, append(batch, {points, columns}));
  const char* sp = data<char>(sums);
  char* op = mutable_data<char>(out);
  const int64_t* at = segments.at;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(row, 1));
  torch::stable::parallel_for(0, product(batch) * points, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / points, first = begin - b * points, last = std::min(end - b * points, points);
      // s is the last segment that starts at or before the point; -1 before all of them.
      int64_t s = std::upper_bound(at, at + segments.count + 1, first) - at - 1;
      for (int64_t p = first; p < last; ++p) {
        while (s < segments.count && at[s + 1] <= p) ++s;
        char* to = op + (b * points + p) * row;
        if (s < 0 || s >= segments.count) std::memset(to, 0, row);
        else std::memcpy(to, sp + (b * segments.count + s) * row, row);
      }
      begin = b * points + last;
    }
  });
  return out;
}

}  // namespace custom_ops

CUSTOM_OPS_CPU_KERNEL(voxel_bounds)
CUSTOM_OPS_CPU_KERNEL(segment_sum)
CUSTOM_OPS_CPU_KERNEL(segment_gather)
