// Orthonormal bases and polar factors of tall matrices. k×k work and Gram matrices are float64.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace molegrad::cpu {

// The status codes of molegrad::orthonormalize, ordered by severity.
enum OrthStatus : int32_t { kSafe = 0, kIllConditioned = 1, kRankDeficient = 2, kNonFinite = 3 };

// Y (m, k) = Q R with QᵀQ = I for every Y. `q` (m, k) and `r` (k, k) have dtype C, the dtype whose
// rounding decides what counts as rank-deficient.
template <typename C>
OrthStatus orthonormalize(const View& y, double cond_max, const MutableView& q,
                          const MutableView& r);

// Orthonormal Q (m, k) with (I − UUᵀ) Y = Q R and UᵀQ = 0, also where Y lies in span(U).
template <typename C>
OrthStatus orthonormalize_against(const View& u, const View& y, double cond_max,
                                  const MutableView& q, const MutableView& r);

// P = W (WᵀW)^(-1/2) (n, k); modes below the rounding of W are zero. NaN throughout for a W with
// NaN or Inf.
template <typename C>
void polar_factor(const View& w, const MutableView& p);

}  // namespace molegrad::cpu
