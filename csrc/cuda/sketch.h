// The products of a sketch on the GPU, Y = Bᵀ(A V) and W = Aᵀ(B U), for A and B in 16 bits or in
// float8; see products.h for wider ones.
#pragma once

#include <cstdint>

#include "launch.h"

extern "C" {

// Tokens to work on at a time, so that A and B of these stay in an L2 of `l2` bytes.
int64_t molegrad_sketch_chunk(int64_t tokens, int64_t n, int64_t m, int64_t l2);

// Bytes of scratch memory that molegrad_sketch needs for the same arguments, aligned to 256.
int64_t molegrad_sketch_scratch(int64_t tokens, int64_t n, int64_t m, int64_t kv, int64_t ku,
                                int64_t chunk, int multiprocessors, int64_t shared_memory);

// Y (m, kv) and W (n, ku), rows `ld` numbers apart, are set to the sketch of A (tokens, n) and
// B (tokens, m), or it is added to them. A and B: bfloat16 or float16, the columns of a row
// contiguous. V (n, kv) and U (m, ku): float16 to float64, any strides, numbers within the range of
// `dtype`. kv = 0 leaves out Y, ku = 0 W. `shared_memory`: bytes of a multiprocessor.
int molegrad_sketch(int dtype, const void* a, int64_t lda, const void* b, int64_t ldb,
                    int64_t tokens, int64_t n, int64_t m, int v_dtype, const void* v, int64_t v_row,
                    int64_t v_column, int64_t kv, int u_dtype, const void* u, int64_t u_row,
                    int64_t u_column, int64_t ku, float* y, int64_t ldy, float* w, int64_t ldw,
                    int add, int64_t chunk, int multiprocessors, int64_t shared_memory,
                    void* scratch, cudaStream_t stream);

// The same where A, B or both are float8 (dtypes 4, e4m3fn, and 5, e5m2), the other in 16 bits;
// products of 16-bit numbers, float16 where one of the two is. a_scale and b_scale: factors of the
// rows of A and B, one for each token (stride 1) or for all (stride 0), or null.
int molegrad_sketch_scaled(int a_dtype, const void* a, int64_t lda, const float* a_scale,
                           int a_scale_stride, int b_dtype, const void* b, int64_t ldb,
                           const float* b_scale, int b_scale_stride, int64_t tokens, int64_t n,
                           int64_t m, int v_dtype, const void* v, int64_t v_row, int64_t v_column,
                           int64_t kv, int u_dtype, const void* u, int64_t u_row, int64_t u_column,
                           int64_t ku, float* y, int64_t ldy, float* w, int64_t ldw, int add,
                           int64_t chunk, int multiprocessors, int64_t shared_memory, void* scratch,
                           cudaStream_t stream);
}
