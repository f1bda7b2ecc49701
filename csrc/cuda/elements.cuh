// Elements of every dtype as kernels read and write them, one or several at a time.
#pragma once

#include "device.cuh"

namespace molegrad::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {  // e4m3fn: four bits of exponent, three of mantissa, no infinity
  uint8_t bits;
};
struct Float8E5M2 {  // the upper half of a Float16
  uint8_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return bf16_to_float(x.bits); }
__device__ __forceinline__ float widen(Float16 x) { return f16_to_float(x.bits); }
__device__ __forceinline__ float widen(Float8 x) {
  return f16_to_float(static_cast<uint16_t>(e4m3_to_f16(x.bits)));
}
__device__ __forceinline__ float widen(Float8E5M2 x) {
  return f16_to_float(static_cast<uint16_t>(e5m2_to_f16(x.bits)));
}

// To nearest, ties to even; float8 is only read.
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, float& out) { out = static_cast<float>(x); }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, BFloat16& out) {
  out.bits = static_cast<uint16_t>(pack_bf16(x, 0.0f));
}
__device__ __forceinline__ void narrow(float x, Float16& out) {
  out.bits = static_cast<uint16_t>(pack_f16(x, 0.0f));
}
__device__ __forceinline__ void narrow(double x, BFloat16& out) {
  narrow(static_cast<float>(x), out);
}
__device__ __forceinline__ void narrow(double x, Float16& out) {
  narrow(static_cast<float>(x), out);
}

// Neighbours that are read or written by one instruction: 16 bytes at most, aligned to their size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}
template <int kCount, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

template <typename T>
struct Type {
  using Element = T;
};

}  // namespace molegrad::cuda
