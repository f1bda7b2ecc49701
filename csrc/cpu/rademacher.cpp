#include "rademacher.h"

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace molegrad::cpu {
namespace {

constexpr int64_t kSignsPerThread = 1 << 14;

// splitmix64's finaliser (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t random_stream(int64_t counter, int64_t seed) {
  const uint64_t step = 2862933555777941757u;
  return mix(static_cast<uint64_t>(counter) * step + static_cast<uint64_t>(seed));
}

void rademacher(int64_t counter, int64_t seed, int64_t count, float* out) {
  const uint64_t stream = random_stream(counter, seed);
  const auto signs = kernels().signs;
  torch::stable::parallel_for(0, count, kSignsPerThread,
                              [&](int64_t begin, int64_t end) { signs(stream, begin, end, out); });
}

}  // namespace molegrad::cpu
