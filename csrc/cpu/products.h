// Threaded products of tall matrices: the shared ground of every CPU op.
//
// Tokens are split into one contiguous part per thread, each with accumulators of its own that are
// summed in a fixed order, so results depend on the number of threads and on nothing else.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "memory.h"

namespace molegrad::cpu {

// y (m, kv) = Bᵀ (A V) and w (n, ku) = Aᵀ (B U), added to y and w when `add`. A (T, n) and
// B (T, m) are read once. y and w have dtype C. `token_scale` (T), unless null, is what the rows of
// float8 A and B are to be multiplied by, both factors in one.
template <typename C>
void sketch(const View& a, const View& b, const View& v, const View& u, const C* token_scale,
            const MutableView& y, const MutableView& w, bool add);

// y (m, k) = Bᵀ (A V): one side of the sketch.
template <typename C>
void sketch_left(const View& a, const View& b, const View& v, const C* token_scale,
                 const MutableView& y);

// g (m, k) = bᵀ p.
template <typename C>
void product_tn(const View& b, const View& p, const MutableView& g);

// out (T, k) = a s, or out -= a s when `subtract`.
template <typename C>
void product_nn(const View& a, const View& s, const MutableView& out, bool subtract = false);

}  // namespace molegrad::cpu
