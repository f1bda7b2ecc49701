// What the CUDA ops share on the host: tensors as plain memory, the current stream, errors. Through
// LibTorch's stable ABI only, as csrc/ops.cpp.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "checks.h"
#include "launch.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.10 and 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#ifndef MOLEGRAD_CUDA_ARCHITECTURES
#define MOLEGRAD_CUDA_ARCHITECTURES "none"
#endif

namespace molegrad::cuda {

#ifdef MOLEGRAD_EMULATED
struct Place {
  explicit Place(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
#else
// The device of a tensor is the current one while this lives; its stream is what torch works on.
// Needed before anything is launched or allocated.
class Place {
 public:
  explicit Place(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#endif

// For what a launcher returns. A failed launch is told here and not once more by whoever asks next.
inline void check_launch(const char* op, int status) {
  const auto error = static_cast<cudaError_t>(status);
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const bool no_code = error == cudaErrorNoKernelImageForDevice ||
                       error == cudaErrorInvalidDeviceFunction ||
                       error == cudaErrorUnsupportedPtxVersion;
  require(false, op, "CUDA error ", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
          no_code ? ". The native kernels were built for " MOLEGRAD_CUDA_ARCHITECTURES
                    " and not for this GPU. For compute capability 9.0 and newer: "
                    "MOLEGRAD_CUDA_ARCHITECTURES=native pip install -e . builds them for it; for "
                    "an older one there are none: MOLEGRAD_BUILD=0 runs the ops on plain torch"
                  : "");
}

// As kernels know it: DType of csrc/cpu/kernels.h.
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

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}
// Memory of torch's allocator, at least 256-byte aligned; it may be reused, in the order of the
// stream, once the tensor is gone.
inline Tensor new_scratch(const Tensor& like, int64_t bytes) {
  return new_tensor(like, {bytes}, ScalarType::Byte);
}

// Where `x`, a number, lies on another device than `like`: a copy.
inline Tensor beside(const Tensor& x, const Tensor& like) {
  if (x.device() == like.device()) return x;
  Tensor copy = torch::stable::new_empty(like, x.sizes(), x.scalar_type());
  torch::stable::copy_(copy, x);
  return copy;
}

// A tensor read as a matrix of its last dimension's vectors; copied only where those are not
// contiguous or the leading dimensions do not collapse. Nothing is said about alignment.
struct Matrix {
  Tensor tensor;
  const void* data;
  int dtype;
  int64_t rows, cols, ld;

  explicit Matrix(const Tensor& x) : tensor(x), dtype(dtype_code(x)), rows(1) {
    cols = x.size(x.dim() - 1);
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    if (x.dim() != 2) tensor = torch::stable::reshape(tensor, std::vector<int64_t>{rows, cols});
    if (cols > 1 && tensor.stride(1) != 1) tensor = torch::stable::contiguous(tensor);
    data = tensor.const_data_ptr();
    ld = rows > 1 ? tensor.stride(0) : cols;
  }
};

}  // namespace molegrad::cuda
