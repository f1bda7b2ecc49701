// Small sums of lowrank_grad: norms, and the worst of two statuses.
#pragma once

#include "device.cuh"

namespace molegrad::cuda {

constexpr int kNormThreads = 256, kNormBlocks = 128;

struct NormArgs {
  const void* y;  // (rows, k), then the probes' r columns of G Ω; rows `ld` numbers apart
  int64_t ld, rows;
  int k, r;
  const void* overlap;  // (k, r), VᵀΩ
  double* sums;         // of each block
  int blocks;
  void* norm_sq;
};

// ‖Y‖² + ‖G Ω − Y VᵀΩ‖² / r, in float64: the sum of the blocks' sums, in their order.
template <typename C>
__global__ void __launch_bounds__(kNormThreads) squares_kernel(NormArgs args) {
  __shared__ double sums[kNormThreads / 32];
  const C* y = static_cast<const C*>(args.y);
  const C* overlap = static_cast<const C*>(args.overlap);
  constexpr int kWarps = kNormThreads / 32;
  double sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; i < args.rows;
       i += int64_t{gridDim.x} * kWarps) {  // a warp to a row
    const C* row = y + i * args.ld;
    for (int j = threadIdx.x % 32; j < args.k; j += 32) sum += static_cast<double>(row[j]) * row[j];
    for (int j = threadIdx.x % 32; j < args.r; j += 32) {
      double x = row[args.k + j];
      for (int l = 0; l < args.k; ++l) x -= static_cast<double>(row[l]) * overlap[l * args.r + j];
      sum += x * x / args.r;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kNormThreads / 32; ++i) sum += sums[i];
  args.sums[blockIdx.x] = sum;
}

template <typename C>
__global__ void sum_of_squares_kernel(NormArgs args) {
  double sum = 0;
  for (int i = threadIdx.x; i < args.blocks; i += 32) sum += args.sums[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) *static_cast<C*>(args.norm_sq) = static_cast<C>(sum);
}

__global__ void worse_of_kernel(int* status, const int* other) {
  if (*other > *status) *status = *other;
}

}  // namespace molegrad::cuda
