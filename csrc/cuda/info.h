// What molegrad.build_info() says about CUDA: plain C types, so that neither torch headers nor a
// CUDA toolkit is needed to read it.
#pragma once

extern "C" {

struct MolegradCudaInfo {
  int toolkit;       // CUDART_VERSION of the headers this was compiled with, e.g. 13000
  int runtime;       // of the loaded libcudart
  int driver;        // newest CUDA version the driver supports; 0 without a driver
  int cublaslt;      // of the loaded libcublasLt, e.g. 130200; 0 where torch has loaded none
  int device_count;  // 0 without a usable GPU
  int major, minor;  // compute capability of `device`
  int multiprocessors;
  long long memory;  // bytes
  char name[256];    // of the device
  char error[256];   // why there is no device, or empty
};

// Fills `info` for a device; never fails, `info->error` says what could not be found out.
void molegrad_cuda_info(int device, struct MolegradCudaInfo* info);
}
