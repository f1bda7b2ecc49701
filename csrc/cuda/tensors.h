// What the CUDA ops share on the host: the current stream, errors, scratch memory. Device passes of
// nvcc and NVRTC read none of it: torch's headers would take them as long as the kernels.
#pragma once

#include "launch.h"

#if !defined(__CUDA_ARCH__) && !defined(__CUDACC_RTC__)
#define MOLEGRAD_HOST

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"

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

struct Gpu {
  int device, multiprocessors = 0, shared_memory = 0, l2 = 0;

  explicit Gpu(const Tensor& x) : device(x.get_device_index()) {
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  }
};

}  // namespace molegrad::cuda
#endif
