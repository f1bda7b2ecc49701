// What stands in for cuBLASLt where ops are emulated.
#include "cuda/cublaslt.h"

namespace molegrad::cuda {
namespace {

double number(const void* data, int dtype, int64_t i) {
  if (dtype == 0) return static_cast<const float*>(data)[i];
  if (dtype == 1) return static_cast<const double*>(data)[i];
  return from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
}

}  // namespace

int64_t lt_version() { return 1; }

// A library that knows every product but those with an odd number of rows.
LtStatus lt_product(const LtProduct& p, void*, int64_t, int, int, cudaStream_t) {
  if (p.rows % 2 == 1 || p.depth == 0) return LtStatus::kNotSupported;
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.cols; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < p.depth; ++r)
        sum += number(p.left, p.dtype, p.transposed ? r * p.left_ld + i : i * p.left_ld + r) *
               number(p.right, p.dtype, r * p.right_ld + j);
      const int64_t at = i * p.out_ld + j;
      if (p.dtype == 1) {
        double& out = static_cast<double*>(p.out)[at];
        out = (p.add ? out : 0) + p.alpha * sum;
      } else {
        float& out = static_cast<float*>(p.out)[at];
        out = (p.add ? out : 0) + static_cast<float>(p.alpha * sum);
      }
    }
  return LtStatus::kDone;
}

}  // namespace molegrad::cuda
