#include "dtypes.h"
#include "rademacher.cuh"
#include "rademacher.h"

using namespace molegrad::cuda;

extern "C" int molegrad_rademacher(const int64_t* counter, int64_t seed, int64_t count, float* out,
                                   cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kSignThreads * kSignsPerThread));
  return launch(rademacher_kernel, dim3(blocks), dim3(kSignThreads), 0, stream, counter, seed,
                count, out);
}
