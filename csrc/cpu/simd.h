// Vectors of one instruction set, for the files that are compiled once per set; like elements.h,
// everything but the declaration at the end is local to the translation unit.
#pragma once

#include "kernels.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

#if MOLEGRAD_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <typename C>
struct Simd {
  typedef C Vec __attribute__((vector_size(MOLEGRAD_VECTOR_BYTES)));
  // The same, loadable from any address.
  typedef C Loose __attribute__((vector_size(MOLEGRAD_VECTOR_BYTES), aligned(sizeof(C))));
  static constexpr int kLanes = MOLEGRAD_VECTOR_BYTES / sizeof(C);
};

inline const Simd<double>::Loose* loose(const double* p) {
  return reinterpret_cast<const Simd<double>::Loose*>(p);
}
inline Simd<double>::Loose* loose(double* p) { return reinterpret_cast<Simd<double>::Loose*>(p); }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

// The kernels of sampled_kernels.cpp and quantized_kernels.cpp, for the table of kernels.cpp.
template <typename C>
SampledKernels<C> sampled_kernels();
QuantizedKernels quantized_kernels();

}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
