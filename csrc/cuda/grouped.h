// The sketches of several layers on the GPU in a few launches, for A and B in 16 bits.
#pragma once

#include <cstdint>

#include "grouped_plan.h"
#include "launch.h"

extern "C" {

// Bytes of scratch memory that molegrad_sketch_many needs for the same arguments, aligned to 256.
int64_t molegrad_sketch_many_scratch(const molegrad::cuda::GroupedLayer* layers, int64_t count,
                                     int64_t rank, int64_t chunk_bytes, int multiprocessors,
                                     int64_t shared_memory);

// The sketches of `count` layers, an array on the host, of one `dtype`, bfloat16 or float16, and
// one padded rank (padded_rank of sketch_plan.h) are added to what is there. No two layers may
// share their y or w. `chunk_bytes`: of A and B that stay in L2. `shared_memory`: bytes of a
// multiprocessor.
int molegrad_sketch_many(int dtype, const molegrad::cuda::GroupedLayer* layers, int64_t count,
                         int64_t rank, int64_t chunk_bytes, int multiprocessors,
                         int64_t shared_memory, void* scratch, cudaStream_t stream);
}
