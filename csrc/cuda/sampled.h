// Sampled weight gradients on the GPU; see molegrad/reference.py, sampled_grad_.
#pragma once

#include <cstdint>

#include "launch.h"

extern "C" {

// dtypes are DType codes. Memory is the device's.
struct MolegradSampled {
  // The wider operand X (T, F) and the narrower Z (T, d), of `dtype`, that of the output gradients,
  // or float8; rows are `ld` elements apart. Scales (T), float64 for float64 and else float32, may
  // be null.
  int64_t tokens, dtype;
  const void* x;
  int64_t x_dtype, x_ld, features;
  const void* x_scale;
  const void* z;
  int64_t z_dtype, z_ld, columns;
  const void* z_scale;
  // The sample; block >= 1 features, share > 0.
  const int64_t* counter;
  int64_t seed, block;
  double share, alpha;
  // The gradient; its element of feature f of X and column c of Z lies at f feature_stride + c
  // column_stride.
  void* grad;
  int64_t grad_dtype, feature_stride, column_stride;
  // Bytes that X̃ may take: features are taken in as many parts as that needs.
  int64_t memory;
  // Columns of a block's tile where numbers have 16 bits, 128 or 256; 0 decides.
  int64_t tile;
};

// Bytes of scratch memory, 256-byte aligned, that the call with these arguments needs.
int64_t molegrad_sampled_scratch(const MolegradSampled* args);

// grad += alpha Ĝ; stats (2): the share taken and the relative noise. Sums have a fixed order.
int molegrad_sampled_grad(const MolegradSampled* args, float* stats, void* scratch,
                          cudaStream_t stream);
}
