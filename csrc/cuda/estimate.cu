#include "estimate.cuh"
#include "estimate.h"
#include "sketch_plan.h"

namespace molegrad::cuda {
namespace {

template <typename C>
int norm(const NormArgs& args, cudaStream_t stream) {
  const int status =
      launch(squares_kernel<C>, dim3(args.blocks), dim3(kNormThreads), 0, stream, args);
  if (status != cudaSuccess) return status;
  return launch(sum_of_squares_kernel<C>, dim3(1), dim3(32), 0, stream, args);
}

}  // namespace
}  // namespace molegrad::cuda

using namespace molegrad::cuda;

extern "C" int64_t molegrad_norm_scratch() { return kNormBlocks * sizeof(double); }

extern "C" int molegrad_norm(int dtype, const void* y, int64_t ld, int64_t rows, int64_t k,
                             int64_t r, const void* overlap, void* norm_sq, void* scratch,
                             cudaStream_t stream) {
  NormArgs args = {y,
                   ld,
                   rows,
                   static_cast<int>(k),
                   static_cast<int>(r),
                   overlap,
                   static_cast<double*>(scratch),
                   0,
                   norm_sq};
  const int64_t blocks = divide_up(rows, kNormThreads / 32);
  args.blocks = static_cast<int>(smaller(larger(blocks, 1), kNormBlocks));
  return dtype == 1 ? norm<double>(args, stream) : norm<float>(args, stream);
}

extern "C" int molegrad_worse(int* status, const int* other, cudaStream_t stream) {
  return launch(worse_of_kernel, dim3(1), dim3(1), 0, stream, status, other);
}
