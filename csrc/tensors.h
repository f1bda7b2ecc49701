// Tensors as plain memory, for the ops of every device: through LibTorch's stable ABI only, so that
// one build loads in every torch from 2.10 on. Schemas, fake kernels and autograd are Python's
// (molegrad/ops).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace molegrad {

// As kernels know it: DType of cpu/kernels.h.
inline int dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Half:
      return 3;
    case ScalarType::Float8_e4m3fn:
      return 4;
    case ScalarType::Float8_e5m2:
      return 5;
    default:
      return 0;
  }
}
inline int dtype_code(const Tensor& x) { return dtype_code(x.scalar_type()); }

inline ScalarType float8_dtype(bool e5m2) {
  return e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The sizes of x without its last `count`, then others.
inline std::vector<int64_t> other_last_sizes(const Tensor& x, int64_t count,
                                             const std::vector<int64_t>& others) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - count);
  sizes.insert(sizes.end(), others.begin(), others.end());
  return sizes;
}

// A tensor read as a matrix of its last dimension's vectors; copied only where those are not
// contiguous or the leading dimensions do not collapse. Nothing is said about alignment.
struct Matrix {
  Tensor tensor;
  const void* data;
  int dtype;
  int64_t rows, cols, ld;

  explicit Matrix(const Tensor& x) : tensor(x), dtype(dtype_code(x)), rows(1) {
    cols = last_size(x);
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    if (x.dim() != 2) tensor = torch::stable::reshape(tensor, std::vector<int64_t>{rows, cols});
    if (cols > 1 && tensor.stride(1) != 1) tensor = torch::stable::contiguous(tensor);
    data = tensor.const_data_ptr();
    ld = rows > 1 ? tensor.stride(0) : cols;
  }
};

// Whether rows lie one after the other, their numbers side by side.
inline bool in_rows(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  return (cols <= 1 || col_stride == 1) && (rows <= 1 || row_stride >= cols);
}

template <typename T>
T* memory_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
template <typename T>
const T* read_memory_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

}  // namespace molegrad
