// The CUDA kernel of torch.ops.molegrad.rademacher.
#include "rademacher.h"
#include "tensors.h"

namespace molegrad::cuda {
namespace {

Tensor rademacher(int64_t rows, int64_t cols, Tensor counter, int64_t seed) {
  check_rademacher(rows, cols, counter);
  const Place place(counter);
  Tensor out = new_tensor(counter, {rows, cols}, ScalarType::Float);
  check_launch(
      "rademacher",
      molegrad_rademacher(static_cast<const int64_t*>(counter.const_data_ptr()), seed, rows * cols,
                          static_cast<float*>(out.mutable_data_ptr()), place.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) { m.impl("rademacher", TORCH_BOX(&rademacher)); }

}  // namespace molegrad::cuda
