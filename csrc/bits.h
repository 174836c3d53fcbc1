// Bit masks: one bit per element, eight elements to a byte, lowest bit first, each example of a
// batch starting on a byte. Padding bits are 0.
#pragma once

#include "isa.h"

#include <algorithm>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace custom_ops {

// Whether a fresh output is written past the caches. A large one is: they would fetch each line only to have it
// overwritten, and push it out again before anyone reads it. Then `flush` before the thread says that it is done.
class Streaming {
 public:
  static constexpr int64_t kLarge = 8 << 20, kLine = 64;

  explicit Streaming([[maybe_unused]] const Tensor& out) {
#ifdef __SSE2__
    on_ = out.numel() * static_cast<int64_t>(out.element_size()) >= kLarge;
#endif
  }

  // Whether lines from `p` on are. One that is written in part must be fetched in any case.
  bool at(const void* p) const { return on_ && reinterpret_cast<uintptr_t>(p) % kLine == 0; }

  void flush() const {
#ifdef __SSE2__
    if (on_) _mm_sfence();
#endif
  }

 private:
  bool on_ = false;
};

// The masks of a batch: `examples` masks of `elements` bits each, for the elements of `x` beyond its
// first `batch_dims` dimensions.
struct MaskLayout {
  Shape batch;
  int64_t examples, elements, bytes;

  MaskLayout(const Tensor& x, int64_t batch_dims) {
    custom_ops::check(batch_dims >= 0 && batch_dims <= x.dim(), "batch_dims: expected 0 to ", x.dim(), ", got ",
                      batch_dims);
    batch = sizes(x, 0, batch_dims);
    examples = product(batch);
    elements = product(sizes(x, batch_dims, x.dim()));
    bytes = (elements + 7) / 8;
  }

  static MaskLayout of_mask(const Tensor& mask, const Tensor& x) {
    const MaskLayout layout(x, mask.dim() - 1);
    custom_ops::check(mask.scalar_type() == ScalarType::Byte && sizes(mask) == append(layout.batch, {layout.bytes}),
                      "mask: expected ", layout.bytes, " bytes for each of ", layout.examples, " examples");
    return layout;
  }

  // Calls f(example, begin, end) over spans of at most `span` elements that together cover the
  // batch; begin is a multiple of 8. The spans don't depend on the number of threads.
  template <class F>
  void parallel_spans(int64_t span, const F& f) const {
    const int64_t per_example = (elements + span - 1) / span;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::min(span, std::max<int64_t>(elements, 1)));
    torch::stable::parallel_for(0, examples * per_example, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % per_example * span;
        f(i / per_example, begin, std::min(begin + span, elements));
      }
    });
  }
};

}  // namespace custom_ops
