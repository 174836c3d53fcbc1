// What the shared library itself provides: fresh memory and the signature table.
#include "common.h"

#include <algorithm>
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
  Shape strides(shape.size(), 1);
  for (size_t d = shape.size(); d > 1; --d) strides[d - 2] = strides[d - 1] * std::max<int64_t>(shape[d - 1], 1);
  // Not by new_empty of the stable ABI, which looks the operator up by name: of a small call that is a tenth.
  Tensor out = allocated(product(shape), [&] {
    AtenTensorHandle handle = nullptr;
    const auto code = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                               static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(),
                                               like.get_device_index(), &handle);
    if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("");
    return Tensor(handle);
  });
  advise_huge_pages(out.data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

void record_signature(const char* name, std::string signature) { signatures()[name] = std::move(signature); }

}  // namespace custom_ops

extern "C" __attribute__((visibility("default"))) const char* custom_ops_signature(const char* name) {
  const auto found = custom_ops::signatures().find(name);
  return found == custom_ops::signatures().end() ? "" : found->second.c_str();
}
