#include "tall.h"
#include "update.cuh"
#include "update.h"

using namespace molegrad::cuda;

namespace {

cudaError_t launch_update(const Update& p, const Weights& weights, int count, int dtype,
                          bool stochastic, cudaStream_t stream) {
  const auto grid = [&](int64_t rows, int64_t cols) {
    return grid_of(count * ceil_div(p.rows, rows) * ceil_div(p.cols, cols));
  };
  const dim3 block(kTallThreads), tiles = grid(kUpdateRows, kUpdateCols);
  if (stochastic)
    return launch(update_kernel<BFloat16, true>, tiles, block, kUpdateShared, stream, p, weights);
  switch (dtype) {
    case 1:
      return launch(update_double_kernel, grid(kTile, kTile), block, 0, stream, p, weights);
    case 2:
      return launch(update_kernel<BFloat16, false>, tiles, block, kUpdateShared, stream, p,
                    weights);
    case 3:
      return launch(update_kernel<Float16, false>, tiles, block, kUpdateShared, stream, p, weights);
    default:
      return launch(update_kernel<float, false>, tiles, block, kUpdateShared, stream, p, weights);
  }
}

}  // namespace

extern "C" int molegrad_lowrank_update_many(
    void* const* weights, const int64_t* lds, const int64_t* layers, int64_t count, int dtype,
    const void* u, int u_dtype, int64_t u_ld, const void* w, int w_dtype, int64_t w_ld,
    int64_t rows, int64_t cols, int64_t k, double keep, double alpha, int stochastic,
    int64_t row_step, int64_t col_step, const int64_t* counter, int64_t seed, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const Update p{{u, u_dtype, u_ld, rows * u_ld},
                 {w, w_dtype, w_ld, cols * w_ld},
                 rows,
                 cols,
                 k,
                 keep,
                 alpha,
                 rows * cols,
                 row_step,
                 col_step,
                 counter,
                 seed};
  for (int64_t first = 0; first < count; first += kMany) {
    const int some = static_cast<int>(count - first < kMany ? count - first : kMany);
    Weights batch = {};
    for (int i = 0; i < some; ++i) {
      batch.data[i] = weights[first + i];
      batch.ld[i] = lds[first + i];
      batch.layer[i] = static_cast<int>(layers[first + i]);
    }
    const cudaError_t status = launch_update(p, batch, some, dtype, stochastic != 0, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

extern "C" int molegrad_lowrank_update(void* weight, int dtype, int64_t ld, const void* u,
                                       int u_dtype, int64_t u_ld, const void* w, int w_dtype,
                                       int64_t w_ld, int64_t rows, int64_t cols, int64_t k,
                                       double keep, double alpha, cudaStream_t stream) {
  const int64_t first = 0;
  return molegrad_lowrank_update_many(&weight, &ld, &first, 1, dtype, u, u_dtype, u_ld, w, w_dtype,
                                      w_ld, rows, cols, k, keep, alpha, 0, 0, 0, nullptr, 0,
                                      stream);
}
