// Launching kernels from host code; with tests/cuda/emulation.h the same calls run on the CPU. What
// is not compiled by nvcc, the ops and headers they include, finds the types of CUDA here.
#pragma once

#ifdef MOLEGRAD_EMULATED
#include "emulation.h"
#elif defined(__CUDACC_RTC__)
#include "device.cuh"

__host__ __device__ inline cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) {
  return cudaSuccess;
}

namespace molegrad::cuda {

// NVRTC launches nothing: this is only there so that it compiles every kernel that is launched.
template <typename... Parameters, typename... Arguments>
__host__ __device__ cudaError_t launch(void (*)(Parameters...), dim3, dim3, size_t, cudaStream_t,
                                       Arguments...) {
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
__host__ __device__ cudaError_t launch_early(void (*)(Parameters...), dim3, dim3, size_t,
                                             cudaStream_t, Arguments...) {
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
__host__ __device__ cudaError_t launch_clusters(int, void (*)(Parameters...), dim3, dim3, size_t,
                                                cudaStream_t, Arguments...) {
  return cudaSuccess;
}

}  // namespace molegrad::cuda
#elif !defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <utility>

namespace molegrad::cuda {

// Lets a kernel have all the dynamic shared memory there is, once for every kernel and device: a
// limit of what one call asks for could be lowered by another thread's before the launch.
inline cudaError_t allow_all_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > allowed;
  int device = 0, most = 0;
  cudaFuncAttributes own = {};
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return cudaSuccess;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&own, kernel);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(own.sharedSizeBytes));
  if (status == cudaSuccess) allowed.insert({kernel, device});
  return status;
}

template <typename... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), size_t shared) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared <= kWithoutAsking) return cudaSuccess;
  return allow_all_shared(reinterpret_cast<const void*>(kernel));
}

// kernel<<<grid, block, shared, stream>>>(args...), with as much shared memory as it asks for.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Arguments... args) {
  const cudaError_t status = allow_shared(kernel, shared);
  if (status != cudaSuccess) return status;
  // clang-format off
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(args)...);
  // clang-format on
  return cudaGetLastError();
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_with(cudaLaunchAttribute attribute, void (*kernel)(Parameters...), dim3 grid,
                        dim3 block, size_t shared, cudaStream_t stream, Arguments... args) {
  const cudaError_t status = allow_shared(kernel, shared);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...);
}

// A launch of a kernel that calls wait_for_launch_before: its blocks may start before the launch
// before it on the stream is done, as soon as that one lets them.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                         cudaStream_t stream, Arguments... args) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(early, kernel, grid, block, shared, stream, args...);
}

// A launch in clusters of `size` blocks, neighbours in x: 8 at most, and it divides the grid.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(int size, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t shared, cudaStream_t stream, Arguments... args) {
  cudaLaunchAttribute clusters = {};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim.x = size;
  clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
  return launch_with(clusters, kernel, grid, block, shared, stream, args...);
}

}  // namespace molegrad::cuda
#endif
