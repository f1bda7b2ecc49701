// Launching what works on the products' parts, for launchers.
#pragma once

#include "dtypes.h"
#include "launch.h"
#include "parts.cuh"
#include "sketch_plan.h"

namespace molegrad::cuda {

constexpr int kThreads = 256;

// For kernels that go through all items, however many threads there are.
inline unsigned grid_for(int64_t items) {
  return static_cast<unsigned>(smaller(larger(divide_up(items, kThreads), 1), 4096));
}

template <typename C>
int add_sums(const SumArgs& args, cudaStream_t stream) {
  const int64_t items =
      larger(args.half[0].rows * args.half[0].k, args.half[1].rows * args.half[1].k);
  if (items == 0) return cudaSuccess;
  return launch(add_parts_kernel<C>, dim3(grid_for(items), 2), dim3(kThreads), 0, stream, args);
}

}  // namespace molegrad::cuda
