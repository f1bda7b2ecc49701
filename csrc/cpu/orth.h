// Orthonormal bases of tall matrices. k×k work and Gram matrices are float64.
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

}  // namespace molegrad::cpu
