// Products in float32 and float64, of any shape and strides, what surrounds those of cuBLASLt
// (products.cu), and float8 operands made wider (float8.cu).
#pragma once

#include <cstdint>

#include "launch.h"

extern "C" {

// Bytes of scratch memory that molegrad_product needs for the same arguments, aligned to 256.
int64_t molegrad_product_scratch(int dtype, int64_t rows, int64_t length, int64_t k,
                                 int multiprocessors);

// out(i, j) = or += the sum over r of left(r, i) right(r, j), for `rows` i, `k` j and `length` r:
// left(r, i) is left[r * left_r + i * left_i] and so on. All in float32 (`dtype` 0) or float64 (1).
int molegrad_product(int dtype, int64_t rows, int64_t length, int64_t k, const void* left,
                     int64_t left_r, int64_t left_i, const void* right, int64_t right_r,
                     int64_t right_j, void* out, int64_t ld, int add, int multiprocessors,
                     void* scratch, cudaStream_t stream);

// The matrix (rows, k) of any DType but float8, any strides, as two bfloat16 numbers each: out
// (rows, 2 rank), first the one numbers and then the others; rank is even and at least k.
int molegrad_split(int dtype, const void* from, int64_t row_stride, int64_t column_stride,
                   int64_t rows, int64_t k, int rank, uint16_t* out, cudaStream_t stream);

// P (tokens, 2 rank), the products with either piece of a basis, to the pieces of their sum.
int molegrad_join(const float* p, int64_t tokens, int rank, uint16_t* out, cudaStream_t stream);

// out (rows, k) = or += the first `rank` columns of sums (rows, 2 rank) plus the others.
int molegrad_add_pieces(const float* sums, int64_t rows, int64_t k, int rank, float* out,
                        int64_t ld, int add, cudaStream_t stream);

// out (rows, cols), of any dtype but float8, is x, float8, times scales: one a row, or with stride
// 0 the first.
int molegrad_dequantize(int dtype, const void* x, int64_t rows, int64_t cols, int64_t ld,
                        const float* scales, int64_t stride, int out_dtype, void* out,
                        cudaStream_t stream);
}
