// Small sums of lowrank_grad on the GPU.
#pragma once

#include <cstdint>

#include "launch.h"

extern "C" {

// Bytes of scratch memory of molegrad_norm.
int64_t molegrad_norm_scratch();

// The Hutch++ estimate of ‖G‖² from Y = G V and G Ω, which lies after Y in the same rows (k and r
// columns, rows `ld` numbers apart), and overlap = VᵀΩ (k, r): reference.hutch_norm_sq. Without
// probes, r = 0, it is ‖Y‖². float32 (`dtype` 0) or float64 (1).
int molegrad_norm(int dtype, const void* y, int64_t ld, int64_t rows, int64_t k, int64_t r,
                  const void* overlap, void* norm_sq, void* scratch, cudaStream_t stream);

// *status = max(*status, *other), on the device.
int molegrad_worse(int* status, const int* other, cudaStream_t stream);
}
