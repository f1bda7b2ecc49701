// Sampled weight gradients on plain memory; see molegrad/reference.py, sampled_grad_.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace molegrad::cpu {

struct SampledGrad {
  View x, z;              // (T, F) and (T, d), the wider and the narrower operand
  View x_scale, z_scale;  // (T, 1), the factor of each row; no data: 1
  View basis;             // (d, k), no columns: none
  int64_t counter = 0, seed = 0, block = 1;
  double share = 1, alpha = 1;
  // The gradient: its element of feature f of X and column c of Z.
  void* grad = nullptr;
  DType grad_dtype = DType::kFloat32;
  int64_t feature_stride = 0, column_stride = 0;
};

// grad += alpha Ĝ; moments (d, k) of type C; stats (2): the share kept, E‖Ĝ − G‖²_F.
// What it computes does not depend on the number of threads, but for the last bits of the modes
// along the basis and of the moments.
template <typename C>
void sampled_grad(const SampledGrad& args, const MutableView& moments, float* stats);

}  // namespace molegrad::cpu
