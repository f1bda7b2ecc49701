// Y = Q R for batches of tall blocks: CholeskyQR2 (Yamamoto et al. 2015), the way of each block
// decided on the device, as molegrad/ops defines it.
//
// Blocks too large for one multiprocessor go through eight launches: Gram matrix, its factor, both
// again in float64 for the blocks whose condition number is too large for float32, Q1 = Y R1⁻¹, the
// second round's Gram matrix and factor, Q = Q1 R2⁻¹. In the last one, one block of each matrix
// is there for Householder QR, which returns at once where it is not needed, as do the float64
// launches. Twelve blocks of 3072 x 32 move 4.7 MB seven times, all but the first time in L2: about
// 1 us each; launches and the two eliminations of 32 columns are what it costs, some 25 us.
#pragma once

#include "householder.cuh"

namespace molegrad::cuda {

// Which way a block goes.
constexpr int kQuick = 0, kIdentity = 1, kPrecise = 2, kHouseholder = 3;
constexpr int kFactorThreads = 1024;

// What |R_jj| of columns of length one tells from nothing.
template <typename C>
__device__ C rank_tolerance(int64_t k) {
  return 8 * rounding_of<C>() * root(static_cast<C>(k));
}

struct Verdict {
  int route, status;
};

// On the first round's elimination, for results of dtype Out. A Gram matrix in C has lost too many
// digits above its limit; float32's is the largest of which CholeskyQR2 is sure.
template <typename C, typename Out>
__device__ Verdict judge(bool positive, const Square<C>& a, int k, double cond_max, C* partial) {
  constexpr double kLimit = sizeof(C) == 4 ? 1e3 : sizeof(Out) == 4 ? 3e5 : 1e6;
  constexpr int kOtherwise = sizeof(C) == 4 ? kPrecise : kHouseholder;
  if (!positive) return {kOtherwise, kIllConditioned};
  const double cond = sqrt(static_cast<double>(inverse_norm_sq(a, k, partial)));
  const int status = cond <= cond_max ? kSafe : kIllConditioned;
  int weak = 0;
  for (int j = threadIdx.x; j < k; j += blockDim.x)
    weak += root(a(j, j)) <= static_cast<C>(rank_tolerance<Out>(k)) ? 1 : 0;
  weak = static_cast<int>(block_sum(static_cast<C>(weak), partial));
  return {cond <= kLimit && weak == 0 ? kQuick : kOtherwise, status};
}

// Q1 is orthonormal but for rounding, so its Gram matrix is near I; where it is not, the first
// round has mistaken rounding for a direction.
template <typename C, typename N>
__device__ bool near_identity(bool positive, const Square<C>& a, int k, const N* norms,
                              C* partial) {
  if (!positive) return false;
  int off = 0;
  for (int j = threadIdx.x; j < k; j += blockDim.x)
    off += norms[j] >= N(0.5) && norms[j] <= N(2) ? 0 : 1;
  off = static_cast<int>(block_sum(static_cast<C>(off), partial));
  return inverse_norm_sq(a, k, partial) <= static_cast<C>(64 * k) && off == 0;
}

struct OrthFactor {
  TallSums gram;
  int64_t k, ld;  // of the matrix that is eliminated
  double cond_max;
  void* squares;     // (batch, k, ld) for it, or null: in shared memory
  void* inverse;     // (batch, k, k): Y's scaled columns times it are Q1, and Q1 times it Q
  void* first_r;     // (batch, k, k): R1 of the scaled columns
  void* norms;       // (batch, k): of the scaled columns
  void* last_norms;  // (batch, k): of Q1's
  int* exponents;    // (batch, k): columns are scaled by 2 to minus them
  int* route;        // (batch)
  int wanted;        // first round: -1 for every block
  int32_t* status;   // (batch)
  void* r;           // (batch, k, k), the result
};

// The first round, for blocks of the wanted route: R1, its inverse, the condition number's estimate
// and what follows from it.
template <typename C, typename Out>
__global__ void __launch_bounds__(kFactorThreads) orth_first_kernel(OrthFactor p) {
  MOLEGRAD_SHARED(memory);
  in_sequence();
  const int64_t matrix = blockIdx.x, k = p.k;
  if (p.wanted >= 0 && p.route[matrix] != p.wanted) return;
  C* partial = reinterpret_cast<C*>(memory);  // 32
  C* squares = p.squares != nullptr ? static_cast<C*>(p.squares) + matrix * k * p.ld : partial + 32;
  const Square<C> a{squares, p.ld};
  int* exponents = p.exponents + matrix * k;
  Out* norms = static_cast<Out*>(p.norms) + matrix * k;
  Out* r = static_cast<Out*>(p.r) + matrix * k * k;
  int bad = 0;
  for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
    const int e = column_exponent(p.gram, matrix, j);
    bad += e == kNotFinite ? 1 : 0;
    exponents[j] = e == kEmpty ? 0 : e;
  }
  bad = static_cast<int>(block_sum(static_cast<C>(bad), partial));
  if (bad != 0) {
    for_elements(k, k, [&](int64_t i, int64_t j) {
      r[i * k + j] = static_cast<Out>(from_bits(0x7fc00000u));
    });
    if (threadIdx.x == 0) {
      p.route[matrix] = kIdentity;
      p.status[matrix] = kNonFinite;
    }
    return;
  }
  for_elements(k, k, [&](int64_t i, int64_t j) {
    if (i <= j) a(i, j) = sum_of_parts<C>(p.gram, matrix, i, j, exponents[i], exponents[j]);
  });
  __syncthreads();
  normalise(a, static_cast<int>(k), norms);
  const bool positive = eliminate(a, static_cast<int>(k));
  const Verdict verdict = judge<C, Out>(positive, a, static_cast<int>(k), p.cond_max, partial);
  if (threadIdx.x == 0) {
    p.route[matrix] = verdict.route;
    p.status[matrix] = verdict.status;
  }
  if (verdict.route != kQuick) return;
  Out* inverse = static_cast<Out*>(p.inverse) + matrix * k * k;
  Out* first_r = static_cast<Out*>(p.first_r) + matrix * k * k;
  for_elements(k, k, [&](int64_t i, int64_t j) {
    inverse[i * k + j] = i <= j ? static_cast<Out>(inverse_element(a, norms, i, j)) : Out(0);
    first_r[i * k + j] = i <= j ? static_cast<Out>(factor_element(a, norms, i, j)) : Out(0);
  });
}

// r <- R2 R1 with the columns' scales; `last_norms` are those of Q1.
template <typename C>
__device__ void store_product(const Square<C>& a, const C* last_norms, const C* first_r,
                              const int* exponents, int64_t k, C* r) {
  for_elements(k, k, [&](int64_t i, int64_t j) {
    C sum = 0;
    for (int64_t l = i; l <= j; ++l) sum += a(i, l) * last_norms[l] * first_r[l * k + j];
    r[i * k + j] = i <= j ? times_power(sum / root(a(i, i)), exponents[j]) : C(0);
  });
}

// The second round, for blocks of the quick route.
template <typename C>
__global__ void __launch_bounds__(kFactorThreads) orth_second_kernel(OrthFactor p) {
  MOLEGRAD_SHARED(memory);
  in_sequence();
  const int64_t matrix = blockIdx.x, k = p.k;
  if (p.route[matrix] != kQuick) return;
  C* partial = reinterpret_cast<C*>(memory);
  C* squares = p.squares != nullptr ? static_cast<C*>(p.squares) + matrix * k * p.ld : partial + 32;
  const Square<C> a{squares, p.ld};
  C* norms = static_cast<C*>(p.last_norms) + matrix * k;
  for_elements(k, k, [&](int64_t i, int64_t j) {
    if (i <= j) a(i, j) = sum_of_parts<C>(p.gram, matrix, i, j, 0, 0);
  });
  __syncthreads();
  normalise(a, static_cast<int>(k), norms);
  const bool positive = eliminate(a, static_cast<int>(k));
  if (!near_identity(positive, a, static_cast<int>(k), norms, partial)) {
    if (threadIdx.x == 0) p.route[matrix] = kHouseholder;
    return;
  }
  C* inverse = static_cast<C*>(p.inverse) + matrix * k * k;
  for_elements(k, k, [&](int64_t i, int64_t j) {
    inverse[i * k + j] = i <= j ? inverse_element(a, norms, i, j) : C(0);
  });
  store_product(a, norms, static_cast<const C*>(p.first_r) + matrix * k * k,
                p.exponents + matrix * k, k, static_cast<C*>(p.r) + matrix * k * k);
}

struct OrthFinish {
  TallBatch y;
  TallApply last;  // Q = Q1 R2⁻¹; its x becomes the reflections' vectors
  int64_t m, k;
  void* q1;     // (batch, m, k), what last.x is
  void* norms;  // as in OrthFactor
  int* exponents;
  void* work;  // (batch, 2, k)
  const int* route;
  int32_t* status;
  void* r;
};

// Y with its columns scaled to length one, in z.
template <typename C>
__device__ void scaled_block(const TallBatch& y, int64_t matrix, int64_t m, int64_t k,
                             const C* norms, const int* exponents, C* z) {
  with_elements(y, [&](const auto* data) {
    const auto* from = data + matrix * y.stride;
    for_elements(m, k, [&](int64_t i, int64_t j) {
      z[i * k + j] =
          times_power(static_cast<C>(widen(from[i * y.ld + j])), -exponents[j]) / norms[j];
    });
  });
}

template <typename C>
__device__ void finish_by_householder(const OrthFinish& p, int64_t matrix, C* shared) {
  const int64_t m = p.m, k = p.k;
  HouseholderBlock<C> block{static_cast<C*>(p.q1) + matrix * m * k,
                            static_cast<C*>(p.last.out) + matrix * m * k,
                            static_cast<C*>(p.r) + matrix * k * k,
                            static_cast<C*>(p.work) + matrix * 2 * k,
                            m,
                            k,
                            static_cast<const C*>(p.norms) + matrix * k,
                            p.exponents + matrix * k};
  scaled_block(p.y, matrix, m, k, block.norms, block.exponents, block.z);
  __syncthreads();
  const bool deficient = householder(block, rank_tolerance<C>(k), shared);
  if (deficient && threadIdx.x == 0) p.status[matrix] = kRankDeficient;
}

template <typename C>
__global__ void __launch_bounds__(kTallThreads, sizeof(C) == 8 ? 2 : 3)
    orth_finish_kernel(OrthFinish p) {
  MOLEGRAD_SHARED(memory);
  in_sequence();
  const int64_t pieces = apply_tiles(p.m, p.k) + 1;
  const int64_t matrix = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int route = p.route[matrix];
  if (piece == 0) {
    if (route == kHouseholder) finish_by_householder<C>(p, matrix, reinterpret_cast<C*>(memory));
  } else if (route == kQuick) {
    apply_tile(p.last, matrix, piece - 1, *reinterpret_cast<ApplyTiles<C>*>(memory));
  } else if (route == kIdentity) {
    fill_tile<C>(p.last, matrix, piece - 1,
                 [](int64_t i, int64_t j) { return i == j ? C(1) : C(0); });
  }
}

}  // namespace molegrad::cuda
