// The parts of the library that aren't kernels: fresh memory, the choice of an instruction set, and the tables of
// signatures and enums.
#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <sstream>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace custom_ops {

namespace {

using Table = std::map<std::string, std::string>;

Table& signatures() {
  static Table table;
  return table;
}

Table& enums() {
  static Table table;
  return table;
}

const char* find(const Table& table, const char* name) {
  const auto found = table.find(name);
  return found == table.end() ? "" : found->second.c_str();
}

}  // namespace

void fail(std::initializer_list<Part> message) {
  std::ostringstream out;
  for (const Part& part : message) {
    if (part.kind == Part::kText) out << part.text;
    else if (part.kind == Part::kInteger) out << part.integer;
    else out << part.real;
  }
  throw std::runtime_error(out.str());
}

#ifdef CUSTOM_OPS_AVX2
bool use_avx2 = false, use_avx512 = false;
#endif

namespace {

// Returns the instruction sets of this processor, from the least to the best.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> out{"portable"};
#ifdef CUSTOM_OPS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    out.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      out.push_back("avx512");
  }
#endif
  return out;
}

std::string chosen, refusal;

// Selects the named instruction set, or the best for an empty name. Returns why it can't be selected, else "".
const std::string& choose(const char* name) {
  const std::vector<std::string> all = instruction_sets();
  const std::string wanted = name == nullptr || *name == 0 ? all.back() : name;
  const bool possible = std::find(all.begin(), all.end(), wanted) != all.end();
  refusal.clear();
  if (!possible) {
    for (const std::string& each : all) refusal += (refusal.empty() ? "" : " or ") + each;
    refusal = "CUSTOM_OPS_ISA: expected " + refusal + " on this processor, got '" + wanted + "'";
    return refusal;
  }
  chosen = wanted;
#ifdef CUSTOM_OPS_AVX2
  use_avx512 = chosen == "avx512";
  use_avx2 = use_avx512 || chosen == "avx2";
#endif
  return refusal;
}

[[maybe_unused]] const std::string& at_load = choose(std::getenv("CUSTOM_OPS_ISA"));

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kThreshold = size_t{2} << 20;   // smaller blocks mostly reuse mapped memory
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;  // the advice covers all huge pages that overlap the block
  if (bytes < kThreshold) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kHuge - 1) & ~(kHuge - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: a failure changes nothing
#else
  (void)data, (void)bytes;
#endif
}

Tensor fresh(const Tensor& like, const Shape& shape, ScalarType dtype) {
  check(refusal.empty(), refusal);  // every op calls `fresh` first, so a program without Python gets the error here
  Shape strides(shape.size(), 1);
  for (size_t d = shape.size(); d > 1; --d) strides[d - 2] = strides[d - 1] * std::max<int64_t>(shape[d - 1], 1);
  // The stable ABI's new_empty looks the operator up by name, which takes a tenth of a small call.
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

void record_signature(const char* op, std::initializer_list<TypeName> arguments,
                      std::initializer_list<TypeName> results) {
  std::string& signature = signatures()[op];
  const auto add = [&](std::initializer_list<TypeName> types) {
    const char* before = "";
    for (const TypeName& type : types) {
      signature.append(before).append(type.name).append(type.optional ? "?" : "");
      before = ", ";
    }
  };
  signature.clear();
  add(arguments);
  signature += " -> ";
  add(results);
}

bool record_enum(const char* name, const char* enumerators) {
  enums()[name] = enumerators;
  return true;
}

}  // namespace custom_ops

extern "C" __attribute__((visibility("default"))) const char* custom_ops_signature(const char* name) {
  return custom_ops::find(custom_ops::signatures(), name);
}

extern "C" __attribute__((visibility("default"))) const char* custom_ops_enum(const char* name) {
  return custom_ops::find(custom_ops::enums(), name);
}

extern "C" __attribute__((visibility("default"))) const char* custom_ops_choose_isa(const char* name) {
  return custom_ops::choose(name).c_str();
}

extern "C" __attribute__((visibility("default"))) const char* custom_ops_isa() { return custom_ops::chosen.c_str(); }

extern "C" __attribute__((visibility("default"))) const char* custom_ops_isas() {
  static const std::string names = [] {
    std::string out;
    for (const std::string& each : custom_ops::instruction_sets()) out += (out.empty() ? "" : " ") + each;
    return out;
  }();
  return names.c_str();
}
