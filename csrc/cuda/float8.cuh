// Float8 rows and int8 sums, in float32 whatever the input, each number rounded as torch rounds it.
//
// Both are bound by memory (bf16, 8192 x 1280: 31 MB, 10 us at 3 TB/s; 20 instructions a number, 7
// us on an H100), so a row is read once, 16 bytes a thread, and held in registers between its
// largest magnitude and its rounding, by a warp where its registers hold a row (2048 numbers in
// bf16), else by 256 threads (16384), beyond which the rest is read again, from L2. Largest
// magnitudes are compared as bit patterns, where NaN is above infinity and so is not lost.
#pragma once

#include "elements.cuh"

namespace molegrad::cuda {

constexpr int kQuantizedThreads = 256, kColumnRows = 64;
// Packs that a thread holds; two rows and their sum take more registers.
constexpr int kHeldPacks = 8, kHeldSums = 4;
constexpr float kE4M3Max = 448.0f, kE5M2Max = 57344.0f, kInt8Max = 127.0f;

__device__ __forceinline__ uint32_t magnitude(float x) { return to_bits(x) & 0x7fffffffu; }

// The largest of the values of kThreads neighbouring threads, 32 or the whole block.
template <int kThreads>
__device__ __forceinline__ uint32_t largest(uint32_t x) {
  for (int offset = 16; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(kWholeWarp, x, offset));
  if (kThreads == 32) return x;
  __shared__ uint32_t of_warps[kThreads / 32];
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warps[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) x = max(x, of_warps[i]);
  return x;
}

// Packs of a row: the first kHeld of every thread stay in registers, others are read by each
// of the two visits.
template <typename T, int kCount, int kThreads, int kHeld>
struct Row {
  const T* from;
  int64_t packs;
  int thread;
  Pack<T, kCount> held[kHeld];

  __device__ __forceinline__ Row(const T* from, int64_t packs, int thread)
      : from(from), packs(packs), thread(thread) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (thread + i * kThreads < packs)
        held[i] = load_pack<kCount>(from + (thread + i * kThreads) * kCount);
  }
  // fn(number of the pack, pack)
  template <typename F>
  __device__ __forceinline__ void each(const F& fn) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (thread + i * kThreads < packs) fn(thread + i * kThreads, held[i]);
    for (int64_t p = thread + kHeld * kThreads; p < packs; p += kThreads)
      fn(p, load_pack<kCount>(from + p * kCount));
  }
};

// ---- float8 rows --------------------------------------------------------------------------------

template <bool kE5M2>
__device__ __forceinline__ float float8_scale(uint32_t peak) {
  const float scale = __fdiv_rn(from_bits(peak), kE5M2 ? kE5M2Max : kE4M3Max);
  return scale >= 0x1p-126f ? scale : 1.0f;  // subnormal ones are too coarse; NaN too
}

template <bool kE5M2, typename T, int kCount>
__device__ __forceinline__ Pack<uint8_t, kCount> to_float8(const Pack<T, kCount>& pack,
                                                           float scale) {
  Pack<uint8_t, kCount> codes;
  const auto value = [&](int i) {
    return i < kCount ? __fdiv_rn(static_cast<float>(widen(pack.at[i])), scale) : 0.0f;
  };
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint16_t pair =
        kE5M2 ? pack_e5m2(value(i), value(i + 1)) : pack_e4m3(value(i), value(i + 1));
    codes.at[i] = static_cast<uint8_t>(pair);
    if (i + 1 < kCount) codes.at[i + 1] = static_cast<uint8_t>(pair >> 8);
  }
  return codes;
}

template <typename T, int kCount>
__device__ __forceinline__ uint32_t peak_of(const Pack<T, kCount>& pack) {
  uint32_t peak = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    peak = max(peak, magnitude(static_cast<float>(widen(pack.at[i]))));
  return peak;
}

template <bool kE5M2, typename T, int kCount, int kThreads>
__global__ void __launch_bounds__(kQuantizedThreads)
    quantize_rows_kernel(const T* x, int64_t rows, int64_t cols, int64_t ld, uint8_t* data,
                         float* scales) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kQuantizedThreads / kThreads) + threadIdx.x / kThreads;
  if (row >= rows) return;
  const int thread = threadIdx.x % kThreads;
  const Row<T, kCount, kThreads, kHeldPacks> from(x + row * ld, cols / kCount, thread);
  uint32_t peak = 0;
  from.each([&](int64_t, const Pack<T, kCount>& pack) { peak = max(peak, peak_of(pack)); });
  peak = largest<kThreads>(peak);
  const float scale = float8_scale<kE5M2>(peak);
  if (thread == 0) scales[row] = scale;
  uint8_t* to = data + row * cols;
  from.each([&](int64_t p, const Pack<T, kCount>& pack) {
    store_pack(to + p * kCount, to_float8<kE5M2>(pack, scale));
  });
}

// ---- float8 with one scale: a kernel for the peak, which is the same in whatever order blocks
// come, and one that rounds, from L2 where x fits it.

// Where pack `i` of all rows lies; a division less where there is one.
template <int kCount>
__device__ __forceinline__ int64_t pack_at(int64_t i, int64_t rows, int64_t of_row, int64_t ld) {
  return rows == 1 ? i * kCount : i / of_row * ld + i % of_row * kCount;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kQuantizedThreads)
    peak_kernel(const T* x, int64_t rows, int64_t cols, int64_t ld, uint32_t* peak) {
  const int64_t of_row = cols / kCount, packs = rows * of_row;
  uint32_t mine = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < packs;
       i += int64_t{gridDim.x} * blockDim.x)
    mine = max(mine, peak_of(load_pack<kCount>(x + pack_at<kCount>(i, rows, of_row, ld))));
  mine = largest<kQuantizedThreads>(mine);
  if (threadIdx.x == 0) atomicMax(peak, mine);
}

template <bool kE5M2, typename T, int kCount>
__global__ void __launch_bounds__(kQuantizedThreads)
    quantize_tensor_kernel(const T* x, int64_t rows, int64_t cols, int64_t ld, const uint32_t* peak,
                           uint8_t* data, float* scale_out) {
  const int64_t of_row = cols / kCount, packs = rows * of_row;
  const float scale = float8_scale<kE5M2>(*peak);
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale_out = scale;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < packs;
       i += int64_t{gridDim.x} * blockDim.x)
    store_pack(
        data + i * kCount,
        to_float8<kE5M2>(load_pack<kCount>(x + pack_at<kCount>(i, rows, of_row, ld)), scale));
}

// out (rows, cols) = x times the scale of its row (stride 1) or of all (stride 0), rounded once.
template <typename T, typename Out, int kCount>
__global__ void __launch_bounds__(kQuantizedThreads)
    dequantize_kernel(const T* x, int64_t rows, int64_t cols, int64_t ld, const float* scales,
                      int64_t stride, Out* out) {
  using Wide = decltype(widen(Out()));
  const int64_t of_row = cols / kCount, packs = rows * of_row;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < packs;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / of_row;
    const auto codes = load_pack<kCount>(x + row * ld + i % of_row * kCount);
    const auto scale = static_cast<Wide>(scales[row * stride]);
    Pack<Out, kCount> numbers;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      narrow(static_cast<Wide>(widen(codes.at[j])) * scale, numbers.at[j]);
    store_pack(out + i * kCount, numbers);
  }
}

// ---- int8 sums ----------------------------------------------------------------------------------

__device__ __forceinline__ float int8_scale(uint32_t peak) {
  const float scale = __fdiv_rn(from_bits(peak), kInt8Max);
  return scale == 0 ? 1.0f : scale;
}

// NaN becomes 0; its scale tells.
__device__ __forceinline__ int8_t narrow_int8(float x) {
  return static_cast<int8_t>(__float2int_rn(x));
}

// The product rounds before the sum, as torch has it.
template <typename T>
__device__ __forceinline__ float new_value(int8_t old, float scale, T x) {
  return __fadd_rn(__fmul_rn(static_cast<float>(old), scale), static_cast<float>(widen(x)));
}

template <typename T, int kCount, int kThreads>
__global__ void __launch_bounds__(kQuantizedThreads)
    add_by_row_kernel(const T* x, int64_t rows, int64_t cols, int64_t ld, int8_t* data,
                      float* scales) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kQuantizedThreads / kThreads) + threadIdx.x / kThreads;
  if (row >= rows) return;
  const int thread = threadIdx.x % kThreads;
  int8_t* to = data + row * cols;
  const Row<T, kCount, kThreads, kHeldSums> from(x + row * ld, cols / kCount, thread);
  const Row<int8_t, kCount, kThreads, kHeldSums> old(to, cols / kCount, thread);
  const float old_scale = scales[row];
  // fn(number of the pack, new values) with the held part of both rows, then the rest.
  const auto each = [&](const auto& fn) {
    const auto add = [&](int64_t p, const Pack<int8_t, kCount>& olds, const Pack<T, kCount>& xs) {
      Pack<float, kCount> values;
#pragma unroll
      for (int i = 0; i < kCount; ++i) values.at[i] = new_value(olds.at[i], old_scale, xs.at[i]);
      fn(p, values);
    };
#pragma unroll
    for (int i = 0; i < kHeldSums; ++i)
      if (thread + i * kThreads < from.packs) add(thread + i * kThreads, old.held[i], from.held[i]);
    for (int64_t p = thread + kHeldSums * kThreads; p < from.packs; p += kThreads)
      add(p, load_pack<kCount>(old.from + p * kCount), load_pack<kCount>(from.from + p * kCount));
  };
  uint32_t peak = 0;
  each([&](int64_t, const Pack<float, kCount>& values) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) peak = max(peak, magnitude(values.at[i]));
  });
  peak = largest<kThreads>(peak);
  const float scale = int8_scale(peak);
  each([&](int64_t p, const Pack<float, kCount>& values) {
    Pack<int8_t, kCount> codes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) codes.at[i] = narrow_int8(__fdiv_rn(values.at[i], scale));
    store_pack(to + p * kCount, codes);
  });
  if (thread == 0) scales[row] = scale;  // every thread has read the old one: `largest` saw to it
}

// Scales of columns need all rows first: one kernel for the peaks, where the largest is the same in
// whatever order blocks come, and one that rounds. Blocks of kColumnRows rows and 32 packs; a warp
// takes every eighth row.
template <typename T, int kCount>
__global__ void __launch_bounds__(kQuantizedThreads)
    column_peaks_kernel(const T* x, int64_t rows, int64_t cols, int64_t ld, const int8_t* data,
                        const float* scales, uint32_t* peaks, float* old_scales) {
  constexpr int kWarps = kQuantizedThreads / 32, kColumns = 32 * kCount;
  __shared__ uint32_t of_warps[kWarps][kColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kColumns, column = first + lane * kCount;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kColumnRows;
  const int64_t end = min(rows, begin + kColumnRows);
  uint32_t mine[kCount] = {};
  if (column < cols) {
    float old[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) old[i] = scales[column + i];
#pragma unroll 4
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      const auto xs = load_pack<kCount>(x + row * ld + column);
      const auto olds = load_pack<kCount>(data + row * cols + column);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        mine[i] = max(mine[i], magnitude(new_value(olds.at[i], old[i], xs.at[i])));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) of_warps[warp][lane * kCount + i] = mine[i];
  __syncthreads();
  for (int c = threadIdx.x; c < kColumns && first + c < cols; c += kQuantizedThreads) {
    uint32_t peak = of_warps[0][c];
    for (int w = 1; w < kWarps; ++w) peak = max(peak, of_warps[w][c]);
    atomicMax(peaks + first + c, peak);
    if (blockIdx.x == 0) old_scales[first + c] = scales[first + c];
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kQuantizedThreads)
    add_by_column_kernel(const T* x, int64_t rows, int64_t cols, int64_t ld, int8_t* data,
                         float* scales, const uint32_t* peaks, const float* old_scales) {
  constexpr int kWarps = kQuantizedThreads / 32, kColumns = 32 * kCount;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumns + lane * kCount;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kColumnRows;
  const int64_t end = min(rows, begin + kColumnRows);
  if (column >= cols) return;
  float old[kCount], scale[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    old[i] = old_scales[column + i];
    scale[i] = int8_scale(peaks[column + i]);
    if (begin == 0 && warp == 0) scales[column + i] = scale[i];
  }
#pragma unroll 4
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const auto xs = load_pack<kCount>(x + row * ld + column);
    const auto olds = load_pack<kCount>(data + row * cols + column);
    Pack<int8_t, kCount> codes;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      codes.at[i] = narrow_int8(__fdiv_rn(new_value(olds.at[i], old[i], xs.at[i]), scale[i]));
    store_pack(data + row * cols + column, codes);
  }
}

}  // namespace molegrad::cuda
