// The products of a sketch in float32 and float64 by plain multiply-adds: as exact as the
// reference, and fast enough for what they are for (6.7 GFLOP are 0.1 ms of an H100's float32 rate,
// the two readings of 210 MB in float32 0.13 ms). One kernel does both products: sums over r of
// L(r, i) Q(r, j), where L is A or B read along its rows or across them.
#pragma once

#include "device.cuh"
#include "sketch_plan.h"

namespace molegrad::cuda {

constexpr int kWideThreads = 256;
constexpr int kWideGap = 4;  // numbers after each row of shared memory: 16 bytes in float32

struct WideArgs {
  const void* left;  // L(r, i), (length, rows), any strides
  int64_t left_r, left_i;
  const void* right;  // Q(r, j), (length, k), any strides
  int64_t right_r, right_j;
  void* sums;  // (parts, rows, k)
  int64_t rows, length, length_per_part;
  int k;
};

// blockIdx.x: 128 rows i, blockIdx.y: 32 columns j, blockIdx.z: a part of r. A thread has four rows
// and four columns.
template <typename C>
__global__ void __launch_bounds__(kWideThreads) wide_product_kernel(WideArgs args) {
  constexpr int kRow = kWideRows + kWideGap;
  MOLEGRAD_SHARED(memory);
  C* left = reinterpret_cast<C*>(memory);  // (kWideSteps, kRow)
  C* right = left + kWideSteps * kRow;     // (kWideSteps, kWideColumns)
  const C* from_left = static_cast<const C*>(args.left);
  const C* from_right = static_cast<const C*>(args.right);
  const int64_t first_row = int64_t{blockIdx.x} * kWideRows;
  const int first_column = blockIdx.y * kWideColumns;
  const int64_t begin = blockIdx.z * args.length_per_part;
  const int64_t end =
      begin + args.length_per_part < args.length ? begin + args.length_per_part : args.length;
  const int row = threadIdx.x % 32 * 4, column = threadIdx.x / 32 * 4;
  const bool across = args.left_i == 1;  // neighbours in memory go to neighbouring threads
  C sum[4][4] = {};
  for (int64_t r = begin; r < end; r += kWideSteps) {
    __syncthreads();
    for (int i = threadIdx.x; i < kWideSteps * kWideRows; i += kWideThreads) {
      const int step = across ? i / kWideRows : i % kWideSteps;
      const int at = across ? i % kWideRows : i / kWideSteps;
      const bool inside = r + step < end && first_row + at < args.rows;
      left[step * kRow + at] =
          inside ? from_left[(r + step) * args.left_r + (first_row + at) * args.left_i] : C(0);
    }
    for (int i = threadIdx.x; i < kWideSteps * kWideColumns; i += kWideThreads) {
      const int step = i / kWideColumns, at = i % kWideColumns;
      const bool inside = r + step < end && first_column + at < args.k;
      right[i] = inside ? from_right[(r + step) * args.right_r + (first_column + at) * args.right_j]
                        : C(0);
    }
    __syncthreads();
#pragma unroll 8
    for (int step = 0; step < kWideSteps; ++step) {
      C l[4], s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) l[i] = left[step * kRow + row + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[j] = right[step * kWideColumns + column + j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += l[i] * s[j];
    }
  }
  C* sums = static_cast<C*>(args.sums) + blockIdx.z * args.rows * args.k;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (first_row + row + i < args.rows && first_column + column + j < args.k)
        sums[(first_row + row + i) * args.k + first_column + column + j] = sum[i][j];
}

}  // namespace molegrad::cuda
