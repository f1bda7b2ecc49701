// A sketch of bfloat16 A and B in one launch of clusters of blocks; see sketch_fused.cuh.
#pragma once

#include <cstdint>

#include "launch.h"

extern "C" {

// Bytes of scratch memory that molegrad_sketch_fused needs for the same arguments, aligned to 256;
// 0 where it does not take them: the columns of A and B have to fit the registers and the shared
// memory of a cluster's blocks.
int64_t molegrad_fused_scratch(int64_t tokens, int64_t n, int64_t m, int64_t kv, int64_t ku,
                               int numbers, int multiprocessors, int64_t shared_memory);

// As molegrad_sketch, for bfloat16 and both halves at once; A and B start at multiples of 16 bytes,
// n, m and their rows' distances are multiples of 8. `numbers`: 1 rounds the bases, P and R to
// bfloat16, 2 takes two bfloat16 numbers for each of theirs.
int molegrad_sketch_fused(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t tokens,
                          int64_t n, int64_t m, int v_dtype, const void* v, int64_t v_row,
                          int64_t v_column, int64_t kv, int u_dtype, const void* u, int64_t u_row,
                          int64_t u_column, int64_t ku, float* y, int64_t ldy, float* w,
                          int64_t ldw, int add, int numbers, int multiprocessors,
                          int64_t shared_memory, void* scratch, cudaStream_t stream);
}
