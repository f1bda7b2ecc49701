// Versions and capabilities of the CUDA side, for molegrad.build_info().
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <cstring>

#include "info.h"

namespace {

// torch has loaded its own cuBLASLt before this module; asking that copy, rather than linking one,
// reports the library that will really be used.
int loaded_cublaslt_version() {
  using GetVersion = size_t (*)();
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const auto get = reinterpret_cast<GetVersion>(dlsym(library, "cublasLtGetVersion"));
    const int version = get != nullptr ? static_cast<int>(get()) : 0;
    dlclose(library);
    return version;
  }
  return 0;
}

}  // namespace

extern "C" void molegrad_cuda_info(int device, MolegradCudaInfo* info) {
  std::memset(info, 0, sizeof *info);
  info->toolkit = CUDART_VERSION;
  cudaRuntimeGetVersion(&info->runtime);
  cudaDriverGetVersion(&info->driver);
  info->cublaslt = loaded_cublaslt_version();
  cudaError_t status = cudaGetDeviceCount(&info->device_count);
  cudaDeviceProp properties;
  if (status == cudaSuccess && info->device_count > 0)
    status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess || info->device_count == 0) {
    std::snprintf(info->error, sizeof info->error, "%s",
                  status != cudaSuccess ? cudaGetErrorString(status) : "no CUDA device");
    cudaGetLastError();  // the failed query must not surface in a later call of torch's
    info->device_count = 0;
    return;
  }
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->memory = static_cast<long long>(properties.totalGlobalMem);
  std::snprintf(info->name, sizeof info->name, "%s", properties.name);
}
