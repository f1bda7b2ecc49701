// Rows in float8 with a scale each, and sums kept in int8 with a scale for each row or column.
#pragma once

#include "kernels.h"

namespace molegrad::cpu {

// data (rows, cols), contiguous, float8_e4m3fn or e5m2, and scale (rows) with x ≈ data · scale.
void quantize_rows(const View& x, bool e5m2, void* data, float* scale);

// The same with one scale, which is returned.
float quantize_tensor(const View& x, bool e5m2, void* data);

// data · scale += x with new scales: one for each row, or with `by_column` one for each column.
// data (rows, cols) and scale are contiguous.
void add_quantized(int8_t* data, float* scale, const View& x, bool by_column);

}  // namespace molegrad::cpu
