// weight <- keep weight + alpha U Wᵀ on the GPU, in place; see molegrad/reference.py,
// lowrank_update_ and lowrank_update_many_. Matrices are row-major with rows of `ld` numbers; a
// transposed weight is passed as its transpose, with u and w exchanged. Codes of dtypes as in
// tensors.h; float64 is computed in float64, the others in float32.
#pragma once

#include <cstdint>

#include "launch.h"

// weight (rows, cols), u (rows, k), w (cols, k).
extern "C" int molegrad_lowrank_update(void* weight, int dtype, int64_t ld, const void* u,
                                       int u_dtype, int64_t u_ld, const void* w, int w_dtype,
                                       int64_t w_ld, int64_t rows, int64_t cols, int64_t k,
                                       double keep, double alpha, cudaStream_t stream);

// `count` weights at once; the arrays lie on the host. Weight i takes number layers[i] of u
// (layers, rows, k) and w (layers, cols, k), contiguous but for `ld`. `stochastic`, for bfloat16:
// rounded up or down at random, element (r, c) by the random number layers[i] rows cols + r
// row_step + c col_step; `counter` lies on the device.
extern "C" int molegrad_lowrank_update_many(
    void* const* weights, const int64_t* lds, const int64_t* layers, int64_t count, int dtype,
    const void* u, int u_dtype, int64_t u_ld, const void* w, int w_dtype, int64_t w_ld,
    int64_t rows, int64_t cols, int64_t k, double keep, double alpha, int stochastic,
    int64_t row_step, int64_t col_step, const int64_t* counter, int64_t seed, cudaStream_t stream);
