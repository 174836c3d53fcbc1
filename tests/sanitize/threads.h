// With a thread sanitizer this is included first. It runs parallel loops on threads that the sanitizer knows; it
// wouldn't see the barriers of torch's OpenMP runtime, which isn't instrumented.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

// There are as many threads as chunks, at most four. Threads take chunks in turns, so neighbouring chunks run at once.
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
