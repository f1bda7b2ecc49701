// What the products of a sketch on the GPU tell of themselves, for Python.
#pragma once

#include <cstdint>

extern "C" {

// The path, SketchPath of product_paths.h, that a sketch of inputs of a DType with bases of up to
// `rank` columns takes now: 1 for kernels of ours, 2 for cuBLASLt, 3 for the fused kernel. What 2
// and 3 do not support takes path 1 all the same.
__attribute__((visibility("default"))) int molegrad_sketch_path(int dtype, int64_t rank);
}
