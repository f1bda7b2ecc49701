// Sampled weight gradients on plain memory; see molegrad/reference.py, sampled_grad_.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace molegrad::cpu {

template <typename C>
struct SampledGrad {
  View x, z;  // (T, F), (T, d): the wider, the narrower operand
  const C *x_scale = nullptr, *z_scale = nullptr;  // (T), the factor of each row; null is 1
  int64_t counter = 0, seed = 0, block = 1;
  double share = 1, alpha = 1;
  // The gradient: its element of feature f of X and column c of Z.
  void* grad = nullptr;
  DType grad_dtype = DType::kFloat32;
  int64_t feature_stride = 0, column_stride = 0;
};

// grad += alpha Ĝ; stats (2): the share taken and the relative noise. The number of threads has no
// influence on the result. A score that is NaN makes its block of the gradient NaN.
template <typename C>
void sampled_grad(const SampledGrad<C>& args, float* stats);

}  // namespace molegrad::cpu
