// What launchers share: from the DType code of a matrix to the type of its elements, scratch
// memory.
#pragma once

#include <cstdint>

#include "elements.cuh"

// One launch after the other, up to the first that fails.
#define MOLEGRAD_TRY(call)                      \
  do {                                          \
    const auto status_ = (call);                \
    if (status_ != cudaSuccess) return status_; \
  } while (false)

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
inline int64_t round_up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

// Pieces of the caller's scratch memory, 256-byte aligned; without memory it only adds up, and what
// has no numbers is null.
struct Scratch {
  char* base;
  int64_t used = 0;
  explicit Scratch(void* memory) : base(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return base == nullptr || count == 0 ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

}  // namespace molegrad::cuda
