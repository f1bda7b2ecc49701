// Y = Q R for blocks that fit into the shared memory of one multiprocessor, one launch for a batch:
// the cores of the factored optimizers (2k x k) and the bases of narrow layers. Everything orth.cuh
// does in eight launches, between barriers. 64 x 32 takes two eliminations (orth.cuh) and 130 000
// FMA at two reads of shared memory each: about 12 us.
#pragma once

#include "orth.cuh"

namespace molegrad::cuda {

constexpr int kBlockThreads = 512;
constexpr int kBlockColumns = 128;       // at most
constexpr int64_t kBlockWork = 1 << 18;  // m k² at most: what one multiprocessor does in 10 us

struct OrthBlock {
  TallBatch y;
  int64_t m, k, ld;  // ld: of the matrix that is eliminated
  double cond_max;
  void *q, *r;        // (batch, m, k), (batch, k, k)
  int32_t* status;    // (batch)
  void* reflections;  // (batch, m, k), for Householder QR
  void* work;         // (batch, 2, k)
};

__device__ __host__ constexpr int64_t align_to(int64_t bytes, int64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Where things lie in shared memory.
struct OrthBlockLayout {
  int64_t exponents, norms, last_norms, y, inverse, first_r, squares, size;
  __device__ __host__ constexpr OrthBlockLayout(int64_t m, int64_t k, int64_t ld, int64_t threads,
                                                int64_t number)
      : exponents(32 * sizeof(double)),
        norms(align_to(exponents + k * static_cast<int64_t>(sizeof(int)), 16)),
        last_norms(norms + k * number),
        y(last_norms + k * number),
        inverse(y + m * k * number),
        first_r(inverse + k * k * number),
        squares(align_to(first_r + k * k * number, 16)),
        size(squares + (k * ld * 8 > threads * number ? k * ld * 8 : threads * number)) {}
};

// Upper half of yᵀy in G.
template <typename G, typename C>
__device__ void gram_of(const C* y, int64_t m, int64_t k, const Square<G>& a) {
  for_elements(k, k, [&](int64_t i, int64_t j) {
    if (j < i) return;
    G sums[4] = {};
    int64_t r = 0;
    for (; r + 4 <= m; r += 4)
#pragma unroll
      for (int u = 0; u < 4; ++u)
        sums[u] += static_cast<G>(y[(r + u) * k + i]) * static_cast<G>(y[(r + u) * k + j]);
    for (; r < m; ++r) sums[0] += static_cast<G>(y[r * k + i]) * static_cast<G>(y[r * k + j]);
    a(i, j) = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  });
  __syncthreads();
}

// y <- y s, s upper triangular; a warp takes a row at a time.
template <typename C>
__device__ void multiply_rows(C* y, int64_t m, int64_t k, const C* s) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t r = threadIdx.x / 32; r < m; r += warps) {
    C sums[kBlockColumns / 32] = {};
    for (int64_t l = 0; l < k; ++l) {
      const C value = y[r * k + l];
#pragma unroll
      for (int u = 0; u < kBlockColumns / 32; ++u) {
        const int64_t c = lane + 32 * u;
        if (l <= c && c < k) sums[u] += value * s[l * k + c];
      }
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kBlockColumns / 32; ++u)
      if (lane + 32 * u < k) y[r * k + lane + 32 * u] = sums[u];
  }
  __syncthreads();
}

// The first round in G, as orth_first_kernel.
template <typename G, typename C>
__device__ Verdict first_round(const C* y, int64_t m, int64_t k, const Square<G>& a,
                               double cond_max, C* norms, C* inverse, C* first_r, G* partial) {
  gram_of(y, m, k, a);
  normalise(a, static_cast<int>(k), norms);
  const bool positive = eliminate(a, static_cast<int>(k));
  const Verdict verdict = judge<G, C>(positive, a, static_cast<int>(k), cond_max, partial);
  if (verdict.route == kQuick) {
    for_elements(k, k, [&](int64_t i, int64_t j) {
      inverse[i * k + j] = i <= j ? static_cast<C>(inverse_element(a, norms, i, j)) : C(0);
      first_r[i * k + j] = i <= j ? static_cast<C>(factor_element(a, norms, i, j)) : C(0);
    });
  }
  __syncthreads();
  return verdict;
}

// y in [0, 1) by powers of two, which go to `exponents`; false where y is not finite. `shared`: a
// number for each thread.
template <typename C>
__device__ bool scale_columns(C* y, int64_t m, int64_t k, int* exponents, C* shared, C* partial) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int bad = 0;
  for (int64_t slab = 0; slab < k; slab += 32) {
    const int64_t c = slab + lane;
    C largest = 0;
    if (c < k)
      for (int64_t r = threadIdx.x / 32; r < m; r += warps) {
        const C size = magnitude(y[r * k + c]);
        bad += is_finite(size) ? 0 : 1;
        if (size > largest) largest = size;
      }
    shared[threadIdx.x] = largest;
    __syncthreads();
    for (int w = 0; w < warps; ++w)
      if (shared[w * 32 + lane] > largest) largest = shared[w * 32 + lane];
    const int e = largest == 0 || !is_finite(largest) ? 0 : exponent_above(largest);
    if (c < k)
      for (int64_t r = threadIdx.x / 32; r < m; r += warps)
        y[r * k + c] = times_power(y[r * k + c], -e);
    if (c < k && threadIdx.x < 32) exponents[c] = e;
    __syncthreads();
  }
  return block_sum(static_cast<C>(bad), partial) == 0;
}

template <typename C>
__global__ void __launch_bounds__(kBlockThreads) orth_block_kernel(OrthBlock p) {
  MOLEGRAD_SHARED(memory);
  in_sequence();
  const int64_t matrix = blockIdx.x, m = p.m, k = p.k;
  const OrthBlockLayout at(m, k, p.ld, blockDim.x, sizeof(C));
  C* partial = reinterpret_cast<C*>(memory);
  int* exponents = reinterpret_cast<int*>(memory + at.exponents);
  C* norms = reinterpret_cast<C*>(memory + at.norms);
  C* last_norms = reinterpret_cast<C*>(memory + at.last_norms);
  C* y = reinterpret_cast<C*>(memory + at.y);
  C* inverse = reinterpret_cast<C*>(memory + at.inverse);
  C* first_r = reinterpret_cast<C*>(memory + at.first_r);
  const Square<C> a{reinterpret_cast<C*>(memory + at.squares), p.ld};
  C* q = static_cast<C*>(p.q) + matrix * m * k;
  C* r = static_cast<C*>(p.r) + matrix * k * k;

  with_elements(p.y, [&](const auto* data) {
    const auto* from = data + matrix * p.y.stride;
    for_elements(m, k, [&](int64_t i, int64_t j) {
      y[i * k + j] = static_cast<C>(widen(from[i * p.y.ld + j]));
    });
  });
  __syncthreads();
  if (!scale_columns(y, m, k, exponents, a.data, partial)) {
    for_elements(m, k, [&](int64_t i, int64_t j) { q[i * k + j] = i == j ? C(1) : C(0); });
    for_elements(
        k, k, [&](int64_t i, int64_t j) { r[i * k + j] = static_cast<C>(from_bits(0x7fc00000u)); });
    if (threadIdx.x == 0) p.status[matrix] = kNonFinite;
    return;
  }
  Verdict verdict = first_round(y, m, k, a, p.cond_max, norms, inverse, first_r, partial);
  if constexpr (sizeof(C) == 4) {
    if (verdict.route == kPrecise) {
      const Square<double> precise{reinterpret_cast<double*>(memory + at.squares), p.ld};
      verdict = first_round(y, m, k, precise, p.cond_max, norms, inverse, first_r,
                            reinterpret_cast<double*>(memory));
    }
  }
  if (verdict.route == kQuick) {
    multiply_rows(y, m, k, inverse);
    gram_of(y, m, k, a);
    normalise(a, static_cast<int>(k), last_norms);
    const bool positive = eliminate(a, static_cast<int>(k));
    if (!near_identity(positive, a, static_cast<int>(k), last_norms, partial))
      verdict.route = kHouseholder;
  }
  if (verdict.route == kQuick) {
    for_elements(k, k, [&](int64_t i, int64_t j) {
      inverse[i * k + j] = i <= j ? inverse_element(a, last_norms, i, j) : C(0);
    });
    store_product(a, last_norms, first_r, exponents, k, r);
    __syncthreads();
    multiply_rows(y, m, k, inverse);
    for_elements(m, k, [&](int64_t i, int64_t j) { q[i * k + j] = y[i * k + j]; });
  } else {
    HouseholderBlock<C> block{static_cast<C*>(p.reflections) + matrix * m * k,
                              q,
                              r,
                              static_cast<C*>(p.work) + matrix * 2 * k,
                              m,
                              k,
                              norms,
                              exponents};
    scaled_block(p.y, matrix, m, k, norms, exponents, block.z);
    __syncthreads();
    if (householder(block, rank_tolerance<C>(k), a.data)) verdict.status = kRankDeficient;
  }
  if (threadIdx.x == 0) p.status[matrix] = verdict.status;
}

}  // namespace molegrad::cuda
