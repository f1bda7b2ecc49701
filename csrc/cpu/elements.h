// Elements of every dtype, read as and written from the compute type (float8 only read). For the
// files that are compiled once per instruction set: everything is local to the translation unit.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

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

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place and rescale by 2^112: exact, subnormals included.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
#endif
}

inline float widen(Float8 x) {
  // Exponent and mantissa into place, rescaled by 2^120: exact, subnormals included. No branch, so
  // that loops over it become vector code.
  const uint32_t magnitude = x.bits & 0x7fu;
  const uint32_t nan = static_cast<uint32_t>(-static_cast<int32_t>(magnitude == 0x7fu));
  const uint32_t bits = to_bits(from_bits(magnitude << 20) * 0x1p120f) | (nan & 0x7fc00000u);
  return from_bits(bits | static_cast<uint32_t>(x.bits & 0x80u) << 24);
}

inline float widen(Float8E5M2 x) {
  // As above, by 2^112; infinity and NaN keep their fraction and get a whole exponent.
  const uint32_t magnitude = x.bits & 0x7fu;
  const uint32_t special = static_cast<uint32_t>(-static_cast<int32_t>(magnitude >= 0x7cu));
  const uint32_t bits = to_bits(from_bits(magnitude << 21) * 0x1p112f) | (special & 0x7f800000u);
  return from_bits(bits | static_cast<uint32_t>(x.bits & 0x80u) << 24);
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, float& out) { out = static_cast<float>(x); }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, BFloat16& out) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    out.bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
  else
    out.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float x, Float16& out) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

template <typename C, typename S>
inline void load_row(const S* __restrict src, int64_t n, C* __restrict dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<C>(widen(src[i]));
}

#ifdef __F16C__
template <typename C>
inline void load_row(const Float16* __restrict src, int64_t n, C* __restrict dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    float values[8];
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    _mm256_storeu_ps(values, _mm256_cvtph_ps(half));
    for (int l = 0; l < 8; ++l) dst[i + l] = static_cast<C>(values[l]);
  }
  for (; i < n; ++i) dst[i] = static_cast<C>(widen(src[i]));
}
#endif

// fn(typed pointer to element `offset` of a view)
template <typename F>
inline void with_elements(const void* data, DType dtype, int64_t offset, const F& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(static_cast<const float*>(data) + offset);
    case DType::kFloat64:
      return fn(static_cast<const double*>(data) + offset);
    case DType::kBFloat16:
      return fn(static_cast<const BFloat16*>(data) + offset);
    case DType::kFloat16:
      return fn(static_cast<const Float16*>(data) + offset);
    case DType::kFloat8:
    case DType::kFloat8E5M2:
      return;  // never written: `with_inputs`, `with_factors`
  }
}

// The same for what is only read.
template <typename F>
inline void with_inputs(const void* data, DType dtype, int64_t offset, const F& fn) {
  if (dtype == DType::kFloat8) return fn(static_cast<const Float8*>(data) + offset);
  with_elements(data, dtype, offset, fn);
}

// The same for what is only read by products, which take e5m2 too.
template <typename F>
inline void with_factors(const void* data, DType dtype, int64_t offset, const F& fn) {
  if (dtype == DType::kFloat8E5M2) return fn(static_cast<const Float8E5M2*>(data) + offset);
  with_inputs(data, dtype, offset, fn);
}

template <typename T>
inline T* writable(const T* p) {
  return const_cast<T*>(p);
}

}  // namespace
}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
