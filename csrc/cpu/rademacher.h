// Random signs as a pure function of (seed, counter, position): molegrad/reference.py, rademacher.
#pragma once

#include <cstdint>

namespace molegrad::cpu {

// Where the stream of `counter` and `seed` begins.
uint64_t random_stream(int64_t counter, int64_t seed);

// out (count): ±1 for the positions 1 .. count of the stream of `counter` and `seed`.
void rademacher(int64_t counter, int64_t seed, int64_t count, float* out);

}  // namespace molegrad::cpu
