// Which CUDA paths a GPU and a cuBLASLt version allow. Separate from info.cu so that the rules are
// compiled, exposed as molegrad._C.cuda_paths and tested where there is no GPU.
#pragma once

#include <string>

namespace molegrad::cuda {

struct Path {
  bool supported;
  std::string reason;  // why not, or which kind
};

// Products of float8 operands, sketch.cuh. `capability` is 10 * major + minor; 0 means no device.
inline Path fp8_path(int capability) {
  if (capability == 0) return {false, "no CUDA device"};
  if (capability < 89) return {false, "FP8 needs compute capability 8.9 or newer"};
  return {true, "kernels of ours, any layout, one scale or one for each token"};
}

// cuBLASLt's grouped products. `cublaslt` is cublasLtGetVersion(), e.g. 130200 for 13.2.0.
inline Path grouped_path(int capability, int cublaslt) {
  if (capability == 0) return {false, "no CUDA device"};
  const bool hopper = capability == 90;
  const bool blackwell_server = capability >= 100 && capability < 120;
  if (!hopper && !blackwell_server)
    return {false, "cuBLASLt groups products on compute capability 9.0, 10.x and 11.0 only"};
  const int needed = hopper ? 130400 : 130200;
  if (cublaslt < needed)
    return {false, std::string("needs cuBLASLt ") + (hopper ? "13.4" : "13.2") + " or newer"};
  return {true, "cuBLASLt grouped layouts"};
}

}  // namespace molegrad::cuda
