// The arithmetic of quantize_rows and add_quantized_, in float32 whatever the input. Compiled once
// per instruction set, like kernels.cpp. Largest magnitudes are compared as bit patterns, where
// NaN is above infinity and so is not lost. Lengths are copied to locals: bytes that are written
// might else be those of a View, and no loop over them would become vector code.
#include "elements.h"
#include "kernels.h"
#include "simd.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

constexpr float kE4M3Max = 448.0f, kE5M2Max = 57344.0f, kInt8Max = 127.0f;
constexpr uint32_t kMagnitude = 0x7fffffffu;

inline uint32_t mask(bool all) { return static_cast<uint32_t>(-static_cast<int32_t>(all)); }
inline uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }

// A row in float32: in place where it is, else in `buffer`.
inline const float* load(const View& x, int64_t row, float* buffer) {
  if (x.dtype == DType::kFloat32) return static_cast<const float*>(x.data) + row * x.ld;
  with_elements(x.data, x.dtype, row * x.ld,
                [&](const auto* from) { load_row(from, x.cols, buffer); });
  return buffer;
}

inline uint32_t peak_of(const float* __restrict x, int64_t n) {
  uint32_t peak = 0;
  for (int64_t i = 0; i < n; ++i) peak = larger(peak, to_bits(x[i]) & kMagnitude);
  return peak;
}

// To nearest, ties to even; what would round above the largest becomes NaN. No branch, so that
// loops over it become vector code.
inline uint8_t narrow_e4m3(float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & kMagnitude;
  // Below 2^-6 the adder rounds at 2^-9, the step of subnormals.
  const uint32_t small = to_bits(from_bits(magnitude) + 0x1p14f) - to_bits(0x1p14f);
  const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const uint32_t is_small = mask(magnitude < 121u << 23), is_nan = mask(magnitude >= 1087u << 20);
  const uint32_t result = (small & is_small) | (normal & ~is_small) | is_nan;
  return static_cast<uint8_t>((result & 0x7fu) | (bits >> 24 & 0x80u));
}

// The same; what would round above the largest becomes infinity.
inline uint8_t narrow_e5m2(float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & kMagnitude;
  // Below 2^-14 the adder rounds at 2^-16, the step of subnormals.
  const uint32_t small = to_bits(from_bits(magnitude) + 0x1p7f) - to_bits(0x1p7f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffffu + (magnitude >> 21 & 1u)) >> 21;
  const uint32_t is_small = mask(magnitude < 113u << 23), is_large = mask(magnitude >= 1143u << 20);
  const uint32_t is_nan = mask(magnitude > 255u << 23);
  const uint32_t result =
      (small & is_small) | (normal & ~is_small & ~is_large) | (0x7cu & is_large) | (0x7fu & is_nan);
  return static_cast<uint8_t>(result | (bits >> 24 & 0x80u));
}

inline void narrow_row(const float* __restrict x, int64_t n, bool e5m2, float scale,
                       uint8_t* __restrict to) {
  if (e5m2)
    for (int64_t i = 0; i < n; ++i) to[i] = narrow_e5m2(x[i] / scale);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = narrow_e4m3(x[i] / scale);
}

float float8_scale(uint32_t peak, bool e5m2) {
  const float scale = from_bits(peak) / (e5m2 ? kE5M2Max : kE4M3Max);
  return scale >= 0x1p-126f ? scale : 1.0f;  // subnormal ones are too coarse; NaN too
}

void rows(const View& x, int64_t begin, int64_t end, bool e5m2, uint8_t* data, float* scales,
          float* scratch) {
  for (int64_t r = begin; r < end; ++r) {
    const float* from = load(x, r, scratch);
    scales[r] = float8_scale(peak_of(from, x.cols), e5m2);
    narrow_row(from, x.cols, e5m2, scales[r], data + r * x.cols);
  }
}

uint32_t peak(const View& x, int64_t begin, int64_t end, float* scratch) {
  uint32_t most = 0;
  for (int64_t r = begin; r < end; ++r) most = larger(most, peak_of(load(x, r, scratch), x.cols));
  return most;
}

void scaled(const View& x, int64_t begin, int64_t end, bool e5m2, float scale, uint8_t* data,
            float* scratch) {
  for (int64_t r = begin; r < end; ++r)
    narrow_row(load(x, r, scratch), x.cols, e5m2, scale, data + r * x.cols);
}

inline float int8_scale(uint32_t peak) {
  const float scale = from_bits(peak) / kInt8Max;
  return scale == 0 ? 1.0f : scale;
}

// To nearest, ties to even: the adder rounds to whole numbers. NaN becomes 0; its scale tells.
inline int8_t narrow_int8(float x) { return static_cast<int8_t>(to_bits(x + 0x1.8p23f) & 0xffu); }

void add_by_row(int8_t* data, float* scales, const View& x, int64_t begin, int64_t end,
                float* scratch) {
  const int64_t n = x.cols;
  for (int64_t r = begin; r < end; ++r) {
    const float* from = load(x, r, scratch);
    int8_t* __restrict to = data + r * n;
    const float old = scales[r];
    uint32_t peak = 0;
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = static_cast<float>(to[i]) * old + from[i];
      peak = larger(peak, to_bits(scratch[i]) & kMagnitude);
    }
    const float scale = int8_scale(peak);
    scales[r] = scale;
    for (int64_t i = 0; i < n; ++i) to[i] = narrow_int8(scratch[i] / scale);
  }
}

void column_peaks(const int8_t* data, const float* scales, const View& x, int64_t begin,
                  int64_t end, uint32_t* __restrict peaks, float* scratch) {
  const int64_t n = x.cols;
  for (int64_t i = 0; i < n; ++i) peaks[i] = 0;
  for (int64_t r = begin; r < end; ++r) {
    const float* __restrict from = load(x, r, scratch);
    const int8_t* __restrict old = data + r * n;
    for (int64_t i = 0; i < n; ++i)
      peaks[i] =
          larger(peaks[i], to_bits(static_cast<float>(old[i]) * scales[i] + from[i]) & kMagnitude);
  }
}

void scales(const uint32_t* peaks, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = int8_scale(peaks[i]);
}

void add_by_column(int8_t* data, const float* __restrict old, const float* __restrict scales,
                   const View& x, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = x.cols;
  for (int64_t r = begin; r < end; ++r) {
    const float* __restrict from = load(x, r, scratch);
    int8_t* __restrict to = data + r * n;
    for (int64_t i = 0; i < n; ++i)
      to[i] = narrow_int8((static_cast<float>(to[i]) * old[i] + from[i]) / scales[i]);
  }
}

}  // namespace

QuantizedKernels quantized_kernels() {
  return {rows, peak, float8_scale, scaled, add_by_row, column_peaks, scales, add_by_column};
}

}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
