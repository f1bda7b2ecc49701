// Householder QR of one matrix by one block, in global memory: for blocks that are numerically
// rank-deficient, where it completes Q by itself. Every reflection reads the matrix twice from L2:
// milliseconds for 3072 x 32, which such a block may take.
#pragma once

#include "factor.cuh"

namespace molegrad::cuda {

// What `molegrad_orthonormalize` says of a block.
constexpr int kSafe = 0, kIllConditioned = 1, kRankDeficient = 2, kNonFinite = 3;

template <typename C>
struct HouseholderBlock {
  C* z;     // (m, k) in: columns of length one; out: the reflections' vectors and R
  C* q;     // (m, k) out
  C* r;     // (k, k) out, for the columns times norms times 2 to the exponents
  C* work;  // (2, k)
  int64_t m, k;
  const C* norms;
  const int* exponents;
};

// t <- (I - scale v vᵀ) t for columns `first` on, v column j of z from row j on. shared: a number
// for each thread.
template <typename C>
__device__ void reflect(const C* z, C* t, int64_t m, int64_t k, int64_t j, int64_t first, C scale,
                        C* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t slab = first; slab < k; slab += 32) {
    const int64_t c = slab + lane;
    C sum = 0;
    if (c < k) {
#pragma unroll 8
      for (int64_t r = j + warp; r < m; r += warps) sum += z[r * k + j] * t[r * k + c];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared[w * 32 + lane];
    sum *= scale;
    if (c < k) {
#pragma unroll 8
      for (int64_t r = j + warp; r < m; r += warps) t[r * k + c] -= z[r * k + j] * sum;
    }
    __syncthreads();
  }
}

// Whether the block is rank-deficient: |R_jj| <= tolerance for some j.
template <typename C>
__device__ bool householder(const HouseholderBlock<C>& p, C tolerance, C* shared) {
  const int64_t m = p.m, k = p.k;
  C* scales = p.work;
  C* diagonal = p.work + k;
  bool deficient = false;
  // Of a column of length one this is nothing, and its square not yet 0.
  const C nothing = tolerance * tolerance;
  for (int64_t j = 0; j < k; ++j) {
    C sum = 0;
    for (int64_t r = j + 1 + threadIdx.x; r < m; r += blockDim.x) {
      const C x = p.z[r * k + j];
      sum += x * x;
    }
    sum = block_sum(sum, shared);
    const C head = p.z[j * k + j];
    const C norm = root(head * head + sum);
    const bool skip = !(norm > nothing);
    const C first = head < 0 ? head - norm : head + norm;
    const C scale = skip ? C(0) : 2 / (first * first + sum);
    __syncthreads();  // everybody has read the column's head
    if (threadIdx.x == 0) {
      if (!skip) p.z[j * k + j] = first;
      scales[j] = scale;
      diagonal[j] = skip ? C(0) : head < 0 ? norm : -norm;
    }
    deficient = deficient || skip || norm <= tolerance;
    __syncthreads();
    if (!skip) reflect(p.z, p.z, m, k, j, j + 1, scale, shared);
  }
  for_elements(m, k, [&](int64_t i, int64_t j) { p.q[i * k + j] = i == j ? C(1) : C(0); });
  __syncthreads();
  for (int64_t j = k - 1; j >= 0; --j)
    if (scales[j] != 0) reflect(p.z, p.q, m, k, j, j, scales[j], shared);
  // The diagonal of R is not negative.
  for_elements(m, k, [&](int64_t i, int64_t j) {
    if (diagonal[j] < 0) p.q[i * k + j] = -p.q[i * k + j];
  });
  for_elements(k, k, [&](int64_t i, int64_t j) {
    C value = 0;
    if (i == j) value = magnitude(diagonal[i]);
    if (i < j) value = diagonal[i] < 0 ? -p.z[i * k + j] : p.z[i * k + j];
    p.r[i * k + j] = times_power(value * p.norms[j], p.exponents[j]);
  });
  return deficient;
}

}  // namespace molegrad::cuda
