// Random signs. Four neighbours a thread, so that they are written by one instruction: the numbers
// take about 25 instructions each, which hides behind the 4 bytes that are written.
#pragma once

#include "elements.cuh"
#include "random.cuh"

namespace molegrad::cuda {

constexpr int kSignThreads = 256, kSignsPerThread = 4;

__global__ void __launch_bounds__(kSignThreads)
    rademacher_kernel(const int64_t* counter, int64_t seed, int64_t count, float* out) {
  const uint64_t stream = random_stream(*counter, seed);
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kSignThreads + threadIdx.x) * kSignsPerThread;
  Pack<float, kSignsPerThread> signs;
#pragma unroll
  for (int i = 0; i < kSignsPerThread; ++i)
    signs.at[i] = random_bits(stream, first + i) % 2 == 0 ? 1.0f : -1.0f;
  if (first + kSignsPerThread <= count) {
    store_pack(out + first, signs);
  } else {
    for (int i = 0; i < kSignsPerThread; ++i)
      if (first + i < count) out[first + i] = signs.at[i];
  }
}

}  // namespace molegrad::cuda
