// Products by cuBLASLt: a thin wrapper over the copy of the library that torch has loaded.
#pragma once

#include <cstdint>

#include "launch.h"

namespace molegrad::cuda {

// out (rows, cols) = or += alpha left right, all by rows: left (rows, depth), or (depth, rows) if
// transposed, right (depth, cols). Inputs are of DType 0, 1 or 2; the result and the sums are
// float64 for float64 and float32 for the others (never TF32).
struct LtProduct {
  int dtype;
  bool transposed;
  int64_t rows, cols, depth;
  const void* left;
  int64_t left_ld;
  const void* right;
  int64_t right_ld;
  void* out;
  int64_t out_ld;
  bool add;
  double alpha = 1;
};

enum class LtStatus {
  kDone,
  kNotSupported,  // nothing was done: there is no such library, or it has no algorithm for this, or
                  // it would have to look for one while a CUDA graph is being captured
  kFailed,        // the library failed where it should not
};

// Bytes of workspace that is enough for every algorithm worth having; 256-byte aligned.
constexpr int64_t kLtWorkspace = 32 << 20;

// The library's cublasLtGetVersion(); 0 where torch has loaded none that this build understands.
int64_t lt_version();

LtStatus lt_product(const LtProduct& product, void* workspace, int64_t bytes, int device,
                    int multiprocessors, cudaStream_t stream);

}  // namespace molegrad::cuda
