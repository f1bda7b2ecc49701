// Random signs as a pure function of seed, counter and position: molegrad/ops/random.py.
#include "tensors.h"

namespace molegrad::cpu {
namespace {

// splitmix64's finaliser (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Tensor rademacher(int64_t rows, int64_t cols, Tensor counter, int64_t seed) {
  constexpr int64_t kSignsPerThread = 1 << 14;
  check_rademacher(rows, cols, counter);
  const Tensor out = new_tensor(counter, {rows, cols}, ScalarType::Float);
  const uint64_t stream = random_stream(*read_memory_of<int64_t>(counter), seed);
  const auto signs = kernels().signs;
  torch::stable::parallel_for(0, rows * cols, kSignsPerThread, [&](int64_t begin, int64_t end) {
    signs(stream, begin, end, memory_of<float>(out));
  });
  return out;
}

}  // namespace

uint64_t random_stream(int64_t counter, int64_t seed) {
  const uint64_t step = 2862933555777941757u;
  return mix(static_cast<uint64_t>(counter) * step + static_cast<uint64_t>(seed));
}

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) { m.impl("rademacher", TORCH_BOX(&rademacher)); }

}  // namespace molegrad::cpu
