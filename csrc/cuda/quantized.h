// Float8 rows and int8 sums on the GPU; see molegrad/reference.py, quantize_rows, add_quantized_.
#pragma once

#include <cstdint>

#include "launch.h"

extern "C" {

// data (rows, cols) float8 and scales (rows) of x (rows, cols), whose rows are `ld` elements apart.
int molegrad_quantize_rows(int dtype, const void* x, int64_t rows, int64_t cols, int64_t ld,
                           int e5m2, void* data, float* scales, cudaStream_t stream);

// The same with one scale. Scratch of 4 bytes.
int molegrad_quantize_tensor(int dtype, const void* x, int64_t rows, int64_t cols, int64_t ld,
                             int e5m2, void* data, float* scale, void* scratch,
                             cudaStream_t stream);

// out (rows, cols), of any dtype but float8, is x, float8, times scales: one a row, or with stride
// 0 the first.
int molegrad_dequantize(int dtype, const void* x, int64_t rows, int64_t cols, int64_t ld,
                        const float* scales, int64_t stride, int out_dtype, void* out,
                        cudaStream_t stream);

// data (rows, cols) times scales, (rows) or by_column (cols), += x. Scratch of 8 cols bytes is
// needed by column only.
int molegrad_add_quantized(int dtype, const void* x, int64_t rows, int64_t cols, int64_t ld,
                           int8_t* data, float* scales, int by_column, void* scratch,
                           cudaStream_t stream);
}
