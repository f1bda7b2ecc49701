// What the drivers share: scratch memory, parts of matrices, loops over threads.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace molegrad::cpu {

constexpr int64_t kAlignment = 64;

// Uninitialised, 64-byte aligned memory that lives for one call.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), kAlignment);
    void* memory = std::aligned_alloc(kAlignment, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    data_.reset(static_cast<T*>(memory));
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

template <typename C>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::kFloat64;
}

template <typename C>
View view_of(const C* data, int64_t rows, int64_t cols) {
  return {data, dtype_of<C>(), rows, cols, cols};
}
template <typename C>
MutableView view_of(C* data, int64_t rows, int64_t cols) {
  return {data, dtype_of<C>(), rows, cols, cols};
}

inline View part_of(const View& x, int64_t row, int64_t rows, int64_t column, int64_t cols) {
  const char* data =
      static_cast<const char*>(x.data) + (row * x.ld + column) * element_size(x.dtype);
  return {data, x.dtype, rows, cols, x.ld};
}

// Parts of so many tokens, one a thread: fewer than these do not pay for accumulators of their own.
inline int64_t part_count(int64_t tokens) {
  constexpr int64_t kTokensPerPart = 64;
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(tokens / kTokensPerPart, 1, std::max<int64_t>(threads, 1));
}

// fn(part) for every part, each on one thread; nothing in `fn` may throw.
template <typename F>
void for_parts(int64_t parts, const F& fn) {
  if (parts == 1) return fn(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) fn(part);
  });
}

// fn(part, i) for i in [0, count), each on whichever of `parts` threads is free.
template <typename F>
void for_each(int64_t parts, int64_t count, const F& fn) {
  std::atomic<int64_t> next{0};
  for_parts(std::clamp<int64_t>(count, 1, parts), [&](int64_t part) {
    for (int64_t i = next++; i < count; i = next++) fn(part, i);
  });
}

// Where the stream of random numbers of a counter and a seed begins: molegrad/ops/random.py.
uint64_t random_stream(int64_t counter, int64_t seed);

}  // namespace molegrad::cpu
