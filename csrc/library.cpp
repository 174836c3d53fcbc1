// What the shared library itself provides: fresh memory and the signature table.
#include "common.h"

#include <map>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace custom_ops {

namespace {

void advise_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kThreshold = size_t{2} << 20;   // smaller blocks mostly reuse mapped memory
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;  // the advice covers the huge pages that the block lies in
  if (bytes < kThreshold) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kHuge - 1) & ~(kHuge - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a failure changes nothing
#else
  (void)data, (void)bytes;
#endif
}

std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> table;
  return table;
}

}  // namespace

Tensor fresh(const Tensor& like, const Shape& shape, ScalarType dtype) {
  Tensor out = allocated(product(shape), [&] { return torch::stable::new_empty(like, shape, dtype); });
  advise_huge_pages(out.data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

void record_signature(const char* name, std::string signature) { signatures()[name] = std::move(signature); }

}  // namespace custom_ops

extern "C" __attribute__((visibility("default"))) const char* custom_ops_signature(const char* name) {
  const auto found = custom_ops::signatures().find(name);
  return found == custom_ops::signatures().end() ? "" : found->second.c_str();
}
