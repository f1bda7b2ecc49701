// Random numbers that are a pure function of seed, counter and position: splitmix64 (Steele, Lea,
// Flood 2014), bit for bit as molegrad/ops has them.
#pragma once

#include "device.cuh"

namespace molegrad::cuda {

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

__device__ __forceinline__ uint64_t random_stream(int64_t counter, int64_t seed) {
  return mix(static_cast<uint64_t>(counter) * 2862933555777941757u + static_cast<uint64_t>(seed));
}

// 24 bits of the number `index`, which counts from 0.
__device__ __forceinline__ uint32_t random_bits(uint64_t stream, int64_t index) {
  const uint64_t position = static_cast<uint64_t>(index) + 1;
  return static_cast<uint32_t>(mix(stream + position * 0x9e3779b97f4a7c15u) >> 40);
}

}  // namespace molegrad::cuda
