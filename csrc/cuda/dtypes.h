// From the DType code of a matrix to the type of its elements, for launchers.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace molegrad::cuda {

// fn(Type<element>()) for what is computed with: codes 0 to 3.
template <typename F>
auto with_dtype(int code, const F& fn) {
  switch (code) {
    case 1:
      return fn(Type<double>());
    case 2:
      return fn(Type<BFloat16>());
    case 3:
      return fn(Type<Float16>());
    default:
      return fn(Type<float>());
  }
}

// The same for what is only read: float8 too.
template <typename F>
auto with_input_dtype(int code, const F& fn) {
  if (code == 4) return fn(Type<Float8>());
  return with_dtype(code, fn);
}

// Rows that can be read in packs of 16 bytes.
template <typename T>
bool in_packs(const void* data, int64_t cols, int64_t ld) {
  constexpr int64_t kCount = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols % kCount == 0 && ld % kCount == 0;
}

// A number that is known when a kernel is compiled.
template <int kValue>
struct Width {
  static constexpr int value = kValue;
};

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace molegrad::cuda
