// Launching the kernels of tall.cuh; for the launchers of orth.cu and polar.cu.
#pragma once

#include "dtypes.h"
#include "launch.h"
#include "tall.cuh"

namespace molegrad::cuda {

// What every GPU from compute capability 9.0 on has for a block: 12.0 the least.
constexpr int64_t kSharedBytes = 99 << 10;

// And what the current device has.
inline int64_t shared_bytes() {
#if defined(MOLEGRAD_EMULATED) || defined(__CUDACC_RTC__)
  return kSharedBytes;
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess)
    return kSharedBytes;
  return bytes;
#endif
}
// Above this many columns, blocks of their own add a product's parts.
constexpr int64_t kCombineAbove = 64;

// Parts follow from the shape alone, so that results do, too.
struct TallParts {
  int64_t rows, count;
  TallParts(int64_t m, int64_t k) {
    const int64_t room = (int64_t{1} << 22) / (k * k);
    const int64_t most = room < 1 ? 1 : room > 32 ? 32 : room;
    rows = ceil_div(ceil_div(m, kPartRows), most) * kPartRows;
    count = m > 0 ? ceil_div(m, rows) : 1;
  }
};

inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

// `first`: of several launches.
template <typename C, bool kScaled>
cudaError_t launch_product(const TallProduct& p, int64_t batch, bool first, cudaStream_t stream) {
  const int64_t wide = ceil_div(p.k, kTile), tiles = wide * (wide + 1) / 2;
  const size_t shared = 2 * kPartRows * kTile * sizeof(C) + sizeof(ColumnScales<C>);
  const dim3 grid = grid_of(batch * tiles * p.parts), block(kTallThreads);
  return first ? launch(tall_product_kernel<C, kScaled>, grid, block, shared, stream, p)
               : launch_early(tall_product_kernel<C, kScaled>, grid, block, shared, stream, p);
}

// The parts' sum, and what stands for it: one part.
template <typename C>
cudaError_t launch_combine(TallSums& sums, void* sum, int* exponents, int64_t batch,
                           const int* route, int wanted, cudaStream_t stream) {
  const TallCombine p{sums, batch * sums.k * sums.k, sum, exponents, route, wanted};
  sums.sums = sum;
  sums.exponents = exponents;
  sums.parts = 1;
  return launch_early(tall_combine_kernel<C>, grid_of(ceil_div(p.count, kTallThreads)),
                      dim3(kTallThreads), 0, stream, p);
}

template <typename C>
bool packs_of_four(const void* data, int64_t ld, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % (4 * sizeof(C)) == 0 && ld % 4 == 0 && stride % 4 == 0;
}

inline int64_t count_apply_tiles(int64_t rows, int64_t cols) {
  return ceil_div(rows, kApplyRows) * ceil_div(cols, kTile);
}

template <typename C>
cudaError_t launch_apply(const TallApply& p, int64_t batch, cudaStream_t stream) {
  if (batch * count_apply_tiles(p.rows, p.k) == 0) return cudaSuccess;
  return launch_early(tall_apply_kernel<C>, grid_of(batch * count_apply_tiles(p.rows, p.k)),
                      dim3(kTallThreads), sizeof(ApplyTiles<C>), stream, p);
}

}  // namespace molegrad::cuda
