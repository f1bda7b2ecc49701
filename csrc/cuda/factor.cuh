// R and its inverse for a Gram matrix of columns of length one, by one block in shared memory.
//
// Cholesky and the inverse are one elimination of [G | I]: the multipliers' product L⁻¹ grows in
// the lower half of G as the upper half is eliminated, one barrier for each column. At k = 32 that
// is 32 steps of about 150 cycles, 3 us, and as long for any number of matrices up to that of the
// multiprocessors; one warp with the matrix in registers would take about as long, and only k
// <= 32.
#pragma once

#include "tall.cuh"

namespace molegrad::cuda {

// Sum over the block, the same for every thread; `partial` has room for one number a warp.
template <typename C>
__device__ C block_sum(C x, C* partial) {
  const int lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  C sum = 0;
  for (int i = 0; i < warps; ++i) sum += partial[i];
  return sum;
}

// fn(i, j) for every element of a (rows, cols) matrix, neighbours in a row by neighbouring lanes.
template <typename F>
__device__ __forceinline__ void for_elements(int64_t rows, int64_t cols, const F& fn) {
  const int64_t warps = blockDim.x / 32;
  for (int64_t i = threadIdx.x / 32; i < rows; i += warps)
    for (int64_t j = threadIdx.x % 32; j < cols; j += 32) fn(i, j);
}

// a (k, k): a Gram matrix's upper half G, row-major with rows of `ld` numbers.
template <typename C>
struct Square {
  C* data;
  int64_t ld;
  __device__ __forceinline__ C& operator()(int64_t i, int64_t j) const { return data[i * ld + j]; }
};

// a <- D^(1/2) R on and above the diagonal, D = diag(R)², and L⁻¹ with R⁻¹ = (L⁻¹)ᵀ D^(-1/2) below
// it, where zeros were; its diagonal of ones is not stored. False where a pivot is not positive.
template <typename C>
__device__ bool eliminate(const Square<C>& a, int k) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int i = 0; i < k; ++i) {
    __syncthreads();
    const C* pivot_row = &a(i, 0);
    const C pivot = pivot_row[i];
    if (!(pivot > 0)) return false;
    for (int l = i + 1 + warp; l < k; l += warps) {
      const C factor = pivot_row[l] / pivot;
      C* row = &a(l, 0);
      for (int c = lane; c < k; c += 32) {
        if (c == i)
          row[c] = -factor;
        else if (c < i || c >= l)
          row[c] -= factor * pivot_row[c];
      }
    }
  }
  __syncthreads();
  return true;
}

// Divides a Gram matrix by its columns' lengths, which go to `norms` (1 for a column of zeros), and
// clears what is below its diagonal.
template <typename C, typename N>
__device__ void normalise(const Square<C>& a, int k, N* norms) {
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    const N norm = static_cast<N>(root(a(j, j)));
    norms[j] = norm > 0 ? norm : N(1);
  }
  __syncthreads();
  for_elements(k, k, [&](int64_t i, int64_t j) {
    if (j < i)
      a(i, j) = 0;
    else
      a(i, j) /= static_cast<C>(norms[i]) * static_cast<C>(norms[j]);
  });
}

// ‖R⁻¹‖²_F after `eliminate`, and the smallest diagonal element of R.
template <typename C>
__device__ C inverse_norm_sq(const Square<C>& a, int k, C* partial) {
  C sum = 0;
  for_elements(k, k, [&](int64_t i, int64_t j) {
    if (j < i)
      sum += a(i, j) * a(i, j) / a(i, i);
    else if (j == i)
      sum += 1 / a(i, i);
  });
  return block_sum(sum, partial);
}

// Element (i, j), i <= j, of R⁻¹ for the columns that `normalise` has divided by `norms`.
template <typename C, typename N>
__device__ __forceinline__ C inverse_element(const Square<C>& a, const N* norms, int64_t i,
                                             int64_t j) {
  const C lower = i == j ? C(1) : a(j, i);
  return lower / root(a(j, j)) / static_cast<C>(norms[i]);
}

// And of R.
template <typename C, typename N>
__device__ __forceinline__ C factor_element(const Square<C>& a, const N* norms, int64_t i,
                                            int64_t j) {
  return a(i, j) / root(a(i, i)) * static_cast<C>(norms[j]);
}

}  // namespace molegrad::cuda
