// One fault of each kind; a sanitizer that doesn't report its fault isn't working.
#include <thread>

extern "C" int overflow(int n) {
  const int* const p = new int[n]();
  const volatile int beyond = p[n];
  delete[] p;
  return beyond;
}

extern "C" int undefined(int n) {
  const volatile double large = 1e300 * n;
  return static_cast<int>(large);
}

extern "C" int race(int n) {
  int count = 0;
  const auto work = [&] {
    for (int i = 0; i < n; ++i) ++count;
  };
  std::thread a(work), b(work);
  a.join(), b.join();
  return count;
}
