// The code that every kernel file shares: types, checks, dtype dispatch, fresh outputs, and the tables of C++
// signatures and enums. Python compares these with each op's schema and with its own enums when it loads the library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

// The library must load on glibc 2.28. From 2.29 on these functions have new versions, which differ only in how they
// report errors.
#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#ifdef __x86_64__
#define CUSTOM_OPS_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define CUSTOM_OPS_FIRST_GLIBC "GLIBC_2.17"
#endif
__asm__(".symver exp, exp@" CUSTOM_OPS_FIRST_GLIBC);
__asm__(".symver exp2, exp2@" CUSTOM_OPS_FIRST_GLIBC);
__asm__(".symver log, log@" CUSTOM_OPS_FIRST_GLIBC);
__asm__(".symver log2, log2@" CUSTOM_OPS_FIRST_GLIBC);
__asm__(".symver pow, pow@" CUSTOM_OPS_FIRST_GLIBC);
#endif

namespace custom_ops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// A part of a message. It doesn't outlive the expression that makes it.
struct Part {
  enum { kText, kInteger, kReal } kind;
  union {
    const char* text;
    int64_t integer;
    double real;
  };

  Part(const char* text) : kind(kText), text(text) {}
  Part(const std::string& text) : Part(text.c_str()) {}
  Part(double real) : kind(kReal), real(real) {}
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
  Part(Integer integer) : kind(kInteger),
                          integer(static_cast<int64_t>(integer)) {}
};

[[noreturn]] void fail(std::initializer_list<Part> message);

// Raises a Python RuntimeError with just this message. (STD_TORCH_CHECK would put a file and a line before it.)
template <class... Parts>
void check(bool ok, const Parts&... message) {
  if (!ok) fail({message...});
}

// ---------------------------------------------------------------- tensors

// Returns what `make` returns. `make` can fail only for want of memory, but the stable ABI doesn't give the reason.
template <class F>
Tensor allocated(int64_t elements, const F& make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    check(false, "out of memory: a tensor of ", elements, " elements is needed");
    throw;
  }
}

inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  return allocated(t.numel(), [&] { return torch::stable::contiguous(t); });
}

inline int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (int64_t s : shape) n *= s;
  return n;
}

// Returns the sizes of the dimensions [begin, end).
inline Shape sizes(const Tensor& t, int64_t begin, int64_t end) {
  Shape out;
  for (int64_t d = begin; d < end; ++d) out.push_back(t.size(d));
  return out;
}
inline Shape sizes(const Tensor& t) { return sizes(t, 0, t.dim()); }

inline Shape append(Shape shape, std::initializer_list<int64_t> tail) {
  shape.insert(shape.end(), tail);
  return shape;
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Asks for huge pages if the memory is large: filling fresh memory in 4 KiB pages takes longer than most kernels here.
void advise_huge_pages(void* data, size_t bytes);

// Returns a fresh, contiguous, uninitialised output, in huge pages if it is large.
Tensor fresh(const Tensor& like, const Shape& shape, ScalarType dtype);
inline Tensor fresh(const Tensor& like, const Shape& shape) { return fresh(like, shape, like.scalar_type()); }

// ---------------------------------------------------------------- dtypes

template <class T>
struct Type {
  using type = T;
};

// The type of sums: float for 16-bit types, else the type itself.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<T, int64_t>, T, float>;

template <class F>
void dispatch_floating(const Tensor& t, const char* argument, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    case ScalarType::Half: return f(Type<Half>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    default:
      check(false, argument, ": expected float16, bfloat16, float32 or float64, got ",
            torch::headeronly::toString(t.scalar_type()));
  }
}

template <class F>
void dispatch_index(const Tensor& t, const char* argument, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Int: return f(Type<int32_t>{});
    case ScalarType::Long: return f(Type<int64_t>{});
    default: check(false, argument, ": expected int32 or int64, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

// ---------------------------------------------------------------- enums

bool record_enum(const char* name, const char* enumerators);

constexpr int64_t count_names(const char* enumerators) {
  int64_t count = 1;
  for (; *enumerators; ++enumerators) count += *enumerators == ',';
  return count;
}

// An op receives an enum as the integer that it has in custom_ops/_enums.py. Every registered kernel checks its
// arguments with this function.
template <class T>
void check_enum(const T& argument) {
  if constexpr (std::is_enum_v<T>) {
    constexpr int64_t count = count_names(enumerators_of(T{}));
    const int64_t value = static_cast<int64_t>(argument);
    check(value >= 0 && value < count, name_of(T{}), ": expected 0 to ", count - 1, ", got ", value);
  }
}

template <auto fn>
struct Checked;
template <class R, class... A, R (*fn)(A...)>
struct Checked<fn> {
  static R run(A... arguments) {
    (check_enum(arguments), ...);
    return fn(static_cast<A>(arguments)...);
  }
};

// ---------------------------------------------------------------- signatures

// The name of a C++ type in a schema.
struct TypeName {
  const char* name;
  bool optional = false;
};
constexpr TypeName type_name(Type<Tensor>) { return {"Tensor"}; }
constexpr TypeName type_name(Type<int64_t>) { return {"int"}; }
constexpr TypeName type_name(Type<double>) { return {"float"}; }
constexpr TypeName type_name(Type<bool>) { return {"bool"}; }
template <class T, class = std::enable_if_t<std::is_enum_v<T>>>
constexpr TypeName type_name(Type<T>) {
  return {"int"};
}
template <class T>
constexpr TypeName type_name(Type<std::optional<T>>) {
  return {type_name(Type<T>{}).name, true};
}

void record_signature(const char* op, std::initializer_list<TypeName> arguments,
                      std::initializer_list<TypeName> results);

template <class... R, class... A>
void record_signature(const char* op, std::tuple<R...> (*)(A...)) {
  record_signature(op, {type_name(Type<std::decay_t<A>>{})...}, {type_name(Type<R>{})...});
}
template <class R, class... A>
void record_signature(const char* op, R (*)(A...)) {
  record_signature(op, {type_name(Type<std::decay_t<A>>{})...}, {type_name(Type<R>{})});
}

}  // namespace custom_ops

// Defines an enum of namespace custom_ops whose enumerators count from 0. Python has an enum with the same name and the
// same enumerators.
#define CUSTOM_OPS_ENUM(Name, ...)                                    \
  enum class Name : int64_t { __VA_ARGS__ };                          \
  constexpr const char* name_of(Name) { return #Name; }               \
  constexpr const char* enumerators_of(Name) { return #__VA_ARGS__; } \
  [[maybe_unused]] const bool recorded_##Name = record_enum(#Name, #__VA_ARGS__);

// Registers `fn` as the CPU kernel of the op `name`.
#define CUSTOM_OPS_CPU_KERNEL_OF(name, fn)                     \
  STABLE_TORCH_LIBRARY_IMPL(custom_ops, CPU, m) {              \
    m.impl(#name, TORCH_BOX(&custom_ops::Checked<(fn)>::run)); \
    custom_ops::record_signature(#name, fn);                   \
  }

// Registers `fn` as the CPU kernel of the op of the same name.
#define CUSTOM_OPS_CPU_KERNEL(fn) CUSTOM_OPS_CPU_KERNEL_OF(fn, &custom_ops::fn)
