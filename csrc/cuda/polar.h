// Polar factors on the GPU; see molegrad/reference.py, polar_factor.
#pragma once

#include <cstdint>

#include "launch.h"

extern "C" int64_t molegrad_polar_factor_scratch(int64_t batch, int64_t n, int64_t k, int dtype);

// w (batch, n, k), rows of `ld` numbers, matrices below one another; p (batch, n, k) in float64 for
// float64, else float32; scratch 256-byte aligned.
extern "C" int molegrad_polar_factor(const void* w, int dtype, int64_t ld, int64_t batch, int64_t n,
                                     int64_t k, void* p, void* scratch, cudaStream_t stream);
