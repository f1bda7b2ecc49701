#include "rademacher.h"

namespace molegrad::cpu {
namespace {

// splitmix64 (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

void rademacher(int64_t counter, int64_t seed, int64_t count, float* out) {
  const uint64_t step = 2862933555777941757u, weyl = 0x9e3779b97f4a7c15u;
  const uint64_t stream = mix(static_cast<uint64_t>(counter) * step + static_cast<uint64_t>(seed));
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bit = mix(stream + static_cast<uint64_t>(i + 1) * weyl) >> 40 & 1;
    out[i] = bit ? -1.0f : 1.0f;
  }
}

}  // namespace molegrad::cpu
