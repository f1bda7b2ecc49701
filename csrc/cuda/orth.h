// Orthonormal bases and the tangent estimate's factors on the GPU; see molegrad/reference.py.
// Matrices are row-major, `ld` numbers from row to row, those of a batch below one another; what is
// computed is float64 for float64, else float32. Scratch memory is 256-byte aligned.
#pragma once

#include <cstdint>

#include "launch.h"

// Whether one block can do a matrix on its own.
extern "C" int molegrad_orthonormalize_in_block(int64_t m, int64_t k, int dtype);

extern "C" int64_t molegrad_orthonormalize_scratch(int64_t batch, int64_t m, int64_t k, int dtype,
                                                   int in_block);

// y (batch, m, k), 1 <= k <= m; q (batch, m, k), r (batch, k, k), status (batch).
extern "C" int molegrad_orthonormalize(const void* y, int dtype, int64_t ld, int64_t batch,
                                       int64_t m, int64_t k, double cond_max, int in_block, void* q,
                                       void* r, int32_t* status, void* scratch,
                                       cudaStream_t stream);

extern "C" int64_t molegrad_tangent_factors_scratch(int64_t m, int64_t n, int64_t k, int dtype);

// u, y (m, k), v, w (n, k) of one dtype, 2k <= m; left (m, 2k), right (n, 2k).
extern "C" int molegrad_tangent_factors(const void* u, int64_t u_ld, const void* v, int64_t v_ld,
                                        const void* y, int64_t y_ld, const void* w, int64_t w_ld,
                                        int dtype, int64_t m, int64_t n, int64_t k, double cond_max,
                                        void* left, void* right, void* scratch,
                                        cudaStream_t stream);
