// Launching kernels from host code; with tests/cuda/emulation.h the same calls run on the CPU.
#pragma once

#ifdef MOLEGRAD_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <cstddef>

namespace molegrad::cuda {

// kernel<<<grid, block, shared, stream>>>(args...), with as much shared memory as it asks for.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Arguments... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(args)...);
  return cudaGetLastError();
}

}  // namespace molegrad::cuda
#endif
