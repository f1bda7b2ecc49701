// What the CPU ops share: tensors as views, the compute type, scales of tokens.
#pragma once

#include "../tensors.h"
#include "memory.h"

namespace molegrad::cpu {

inline View view_of(const Matrix& x) {
  return {x.data, static_cast<DType>(x.dtype), x.rows, x.cols, x.ld};
}
// Of a contiguous matrix.
inline MutableView output(const Tensor& x) {
  return {x.mutable_data_ptr(), static_cast<DType>(dtype_code(x)), x.size(0), x.size(1), x.size(1)};
}

// fn(C) with C the compute type of a dtype.
template <typename F>
auto with_compute_type(ScalarType dtype, const F& fn) {
  return dtype == ScalarType::Double ? fn(double{}) : fn(float{});
}

// The scales of A and B, multiplied: one number for each token, none without scales.
template <typename C>
std::vector<C> token_scale(int64_t tokens, const std::optional<Tensor>& a_scale,
                           const std::optional<Tensor>& b_scale) {
  std::vector<C> product(a_scale.has_value() || b_scale.has_value() ? tokens : 0, C(1));
  for (const auto* scale : {&a_scale, &b_scale}) {
    if (!scale->has_value()) continue;
    const Tensor x = torch::stable::contiguous(**scale);
    const auto* from = read_memory_of<float>(x);
    for (int64_t t = 0; t < tokens; ++t) product[t] *= from[x.dim() == 0 ? 0 : t];
  }
  return product;
}

}  // namespace molegrad::cpu
