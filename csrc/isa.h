// The instruction sets that kernels are compiled for. CUSTOM_OPS_ISA selects one at run time; the default is the best.
#pragma once

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CUSTOM_OPS_AVX2 1
#define TARGET_AVX2 __attribute__((target("avx2,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512")))
#endif

#define ALWAYS_INLINE __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // all functions that pass vectors are inlined
#endif

namespace custom_ops {

// The size of the vector registers that a copy of a loop is compiled for. Longer vectors work, but their code is as
// many times as long.
template <int kBytes>
struct Registers {
  static constexpr int bytes = kBytes;
};

template <class R, class Body>
ALWAYS_INLINE inline void call(const Body& body) {
  if constexpr (std::is_invocable_v<const Body&, R>) body(R{});
  else body();
}

#ifdef CUSTOM_OPS_AVX2
extern bool use_avx2, use_avx512;  // set in library.cpp; with AVX512 both are

template <class Body>
TARGET_AVX2 void run_avx2(const Body& body) {
  call<Registers<32>>(body);
}
template <class Body>
TARGET_AVX512 void run_avx512(const Body& body) {
  call<Registers<64>>(body);
}
// Few processors run this copy where there are others, so the compiler spends less time on it.
#ifdef __clang__
#define QUICKLY_COMPILED
#else
#define QUICKLY_COMPILED __attribute__((optimize("O1")))
#endif
template <class Body>
QUICKLY_COMPILED void run_portable(const Body& body) {
  call<Registers<16>>(body);
}
#endif

// Compiles `body` twice, for AVX2 and portably, and runs the selected copy. `body` must be a lambda marked
// ALWAYS_INLINE, so that each copy is vectorised for its own instruction set. It may take the `Registers` of its copy.
template <class Body>
void multiversion(const Body& body) {
#ifdef CUSTOM_OPS_AVX2
  if (use_avx2) return run_avx2(body);
  run_portable(body);
#else
  call<Registers<16>>(body);
#endif
}

// Compiles a third copy, for AVX512. It is for loops that compute much for each number, such as exponentials: the
// others would gain less than what the copy costs in size.
template <class Body>
void multiversion_wide(const Body& body) {
#ifdef CUSTOM_OPS_AVX2
  if (use_avx512) return run_avx512(body);
#endif
  multiversion(body);
}

// Stores out[i] = f(i) for n elements; `f` must be marked ALWAYS_INLINE, as in `multiversion`.
template <class T, class F>
void each_element(T* out, int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 32768, [&](int64_t begin, int64_t end) {
    multiversion([=]() ALWAYS_INLINE {  // captured by copy, as a reference could alias the output
      for (int64_t i = begin; i < end; ++i) out[i] = f(i);
    });
  });
}

}  // namespace custom_ops
