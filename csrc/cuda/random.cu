// Random signs, bit for bit as molegrad/ops/random.py has them. Four neighbours a thread, so that
// they are written by one instruction: the numbers take about 25 instructions each, which hides
// behind the 4 bytes that are written.
#include "dtypes.h"
#include "random.cuh"
#include "tensors.h"

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

using namespace molegrad::cuda;

extern "C" int molegrad_rademacher(const int64_t* counter, int64_t seed, int64_t count, float* out,
                                   cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kSignThreads * kSignsPerThread));
  return launch(rademacher_kernel, dim3(blocks), dim3(kSignThreads), 0, stream, counter, seed,
                count, out);
}

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
namespace molegrad::cuda {
namespace {

Tensor rademacher(int64_t rows, int64_t cols, Tensor counter, int64_t seed) {
  check_rademacher(rows, cols, counter);
  const Place place(counter);
  Tensor out = new_tensor(counter, {rows, cols}, ScalarType::Float);
  check_launch("rademacher",
               molegrad_rademacher(read_memory_of<int64_t>(counter), seed, rows * cols,
                                   memory_of<float>(out), place.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) { m.impl("rademacher", TORCH_BOX(&rademacher)); }

}  // namespace molegrad::cuda
#endif
