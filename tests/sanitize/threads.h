// Included before all else where a thread sanitizer watches: parallel loops run on threads that it knows, since the
// OpenMP runtime that torch brings isn't instrumented, so that its barriers would go unseen.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

// As many threads as there is work for, four at most; chunks are taken in turns, so that neighbours meet.
template <class F>
void parallel_for_on_threads(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t step = std::max<int64_t>(grain, 1), chunks = end > begin ? (end - begin + step - 1) / step : 0;
  const int64_t count = std::min<int64_t>(4, chunks);
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < count; ++t) {
    threads.emplace_back([=, &f] {
      for (int64_t c = t; c < chunks; c += count) f(begin + c * step, std::min(end, begin + (c + 1) * step));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define parallel_for parallel_for_on_threads
