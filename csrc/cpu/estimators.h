// The two gradient estimators on plain memory; see molegrad/reference.py for the formulas.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "orth.h"

namespace molegrad::cpu {

template <typename C>
struct LowrankGrad {
  C norm_sq;
  OrthStatus status;
};

// U (m, k) and W = GᵀU (n, k) by `power_iters` power iterations from V; `probes` (n, r) has no
// columns where no norm estimate is wanted; `token_scale` as in products.h.
template <typename C>
LowrankGrad<C> lowrank_grad(const View& a, const View& b, const View& v, int64_t power_iters,
                            const View& probes, double cond_max, const C* token_scale,
                            const MutableView& u, const MutableView& w);

// left (m, 2k) = [U, Q] and right (n, 2k) = [W, V Rᵀ] with Q R = (I − UUᵀ) Y.
template <typename C>
void tangent_factors(const View& u, const View& v, const View& y, const View& w, double cond_max,
                     const MutableView& left, const MutableView& right);

}  // namespace molegrad::cpu
