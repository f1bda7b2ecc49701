// What the ops of a sketch on the GPU share, and what they tell of themselves, for Python.
#pragma once

#include <cstdint>

#include "product_paths.h"
#include "tensors.h"

namespace molegrad::cuda {

struct Gpu {
  int device, multiprocessors = 0, shared_memory = 0, l2 = 0;

  explicit Gpu(const Tensor& x) : device(x.get_device_index()) {
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  }
};

// What MOLEGRAD_SKETCH_PATH wants for a call; an error where it is malformed.
SketchPath wanted_sketch_path(const SketchCall& call);

// sketch_accumulate_ in the name of `op`, arguments checked.
void add_sketch(const char* op, const Tensor& y, const Tensor& w, const Tensor& a, const Tensor& b,
                const Tensor& u, const Tensor& v);

}  // namespace molegrad::cuda

extern "C" {

// The path, SketchPath of product_paths.h, that a sketch of A (tokens, n) and B (tokens, m) of a
// DType with bases of up to `rank` columns takes now: 1 for kernels of ours, 2 for cuBLASLt, 3 for
// the fused kernel. What 2 and 3 do not support takes path 1 all the same.
__attribute__((visibility("default"))) int molegrad_sketch_path(int dtype, int64_t n, int64_t m,
                                                                int64_t tokens, int64_t rank);
}
