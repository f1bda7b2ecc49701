// Numbers of 16 bits as the products of a sketch use them: in pairs, and two of them for one number
// of float32, x = high + low.
#pragma once

#include "elements.cuh"
#include "sketch_plan.h"

namespace molegrad::cuda {

// Number `i` of memory of a DType.
template <typename C>
__device__ __forceinline__ C read_number(const void* data, int dtype, int64_t i) {
  switch (dtype) {
    case 0:
      return static_cast<C>(static_cast<const float*>(data)[i]);
    case 1:
      return static_cast<C>(static_cast<const double*>(data)[i]);
    case 2:
      return static_cast<C>(widen(static_cast<const BFloat16*>(data)[i]));
    default:
      return static_cast<C>(widen(static_cast<const Float16*>(data)[i]));
  }
}

template <bool kFloat16>
__device__ __forceinline__ uint32_t pack_16(float low, float high) {
  if constexpr (kFloat16)
    return pack_f16(low, high);
  else
    return pack_bf16(low, high);
}
template <bool kFloat16>
__device__ __forceinline__ float low_of(uint32_t pair) {
  if constexpr (kFloat16)
    return f16_to_float(static_cast<uint16_t>(pair));
  else
    return from_bits(pair << 16);
}
template <bool kFloat16>
__device__ __forceinline__ float high_of(uint32_t pair) {
  if constexpr (kFloat16)
    return f16_to_float(static_cast<uint16_t>(pair >> 16));
  else
    return from_bits(pair & 0xffff0000u);
}
template <bool kFloat16>
__device__ __forceinline__ void mma_16bit(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (kFloat16)
    mma_f16(d, a, b);
  else
    mma_bf16(d, a, b);
}

// Two neighbours as two pieces each, the second ones `rank` numbers further on.
template <bool kFloat16>
__device__ __forceinline__ void store_pieces(uint16_t* to, int rank, float x, float y) {
  const uint32_t high = pack_16<kFloat16>(x, y);
  const uint32_t low = pack_16<kFloat16>(x - low_of<kFloat16>(high), y - high_of<kFloat16>(high));
  *reinterpret_cast<uint32_t*>(to) = high;
  *reinterpret_cast<uint32_t*>(to + rank) = low;
}

// Powers of two: 2^exponent, and the exponent that brings numbers of this size to 2^14, within what
// keeps sums of a quotient of two of them far from overflow.
__device__ __forceinline__ float power_of_two(int exponent) {
  return from_bits(static_cast<uint32_t>(exponent + 127) << 23);
}
__device__ __forceinline__ int scale_exponent(float size) {
  const int exponent = static_cast<int>(to_bits(size) >> 23 & 255u) - 127 - 14;
  return exponent < -64 ? -64 : exponent > 24 ? 24 : exponent;
}

// 16 bytes of a row of numbers of type T into shared memory; zeros beyond its columns or where
// there is no row.
template <typename T>
__device__ __forceinline__ void load_pack_of_row(uint16_t* to, const T* row, int column,
                                                 int columns, bool valid, int aligned) {
  if (aligned != 0) {
    const bool inside = valid && column < columns;
    copy_async(to, inside ? row + column : row, inside);
    return;
  }
  constexpr int kOfWord = 4 / sizeof(T), kBits = 8 * sizeof(T);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 4 * kOfWord; ++i) {
    const int at = column + i;
    const uint32_t x = valid && at < columns ? row[at] : 0;
    words[i / kOfWord] |= x << i % kOfWord * kBits;
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// How the numbers of A or B are stored. Float8 ones become 16-bit ones, which hold all of them,
// between shared memory and the tensor cores.
enum class Stored : int { k16Bits, kE4M3, kE5M2 };

template <Stored kStored>
struct StoredAs {
  using Bits = uint8_t;
};
template <>
struct StoredAs<Stored::k16Bits> {
  using Bits = uint16_t;
};

// Two of the four float8 numbers in a word, the `kFirst`th and the `kSecond`th, in 16 bits each.
template <bool kFloat16, Stored kStored, int kFirst, int kSecond>
__device__ __forceinline__ uint32_t two_of(uint32_t word) {
  const auto pair = static_cast<uint16_t>(__byte_perm(word, 0, 0x4400 | kSecond << 4 | kFirst));
  const uint32_t half = kStored == Stored::kE5M2 ? e5m2_to_f16(pair) : e4m3_to_f16(pair);
  if constexpr (kFloat16) return half;
  return pack_bf16(low_of<true>(half), high_of<true>(half));
}

struct BasisHalf {
  const void* basis;  // (rows, k) of any dtype
  int64_t row_stride, column_stride;
  int dtype, k;
  int64_t rows, padded_rows;
  uint16_t* out;  // (padded_rows, kPieces * rank)
  int shuffled;   // rows as float8 numbers come out of shared memory: `shuffled_row`
};

struct BasisArgs {
  BasisHalf half[2];
  int rank;  // even
  unsigned* tickets;
  int ticket_count;
};

// Words of four float8 numbers are what a lane gets of 16 columns, where it would get numbers
// 2 (lane % 4), 2 (lane % 4) + 1 and those 8 further on if they had 16 bits. A product's sum may be
// in any order, so the rows of the basis are put into that one.
__device__ __forceinline__ int64_t shuffled_row(int64_t row) {
  const int64_t r = row % 16;
  return row - r + r % 8 / 2 * 4 + r / 8 * 2 + r % 2;
}

// Two columns of a row to a thread. Rows and columns that the basis does not have are zero.
template <bool kFloat16>
__device__ __forceinline__ void split_basis(const BasisHalf& half, int rank, int64_t thread,
                                            int64_t threads) {
  const int pairs = rank / 2;
  for (int64_t i = thread; i < half.padded_rows * pairs; i += threads) {
    const int64_t to = i / pairs, row = half.shuffled != 0 ? shuffled_row(to) : to;
    const int column = static_cast<int>(i % pairs) * 2;
    float x[2] = {0, 0};
    for (int j = 0; j < 2; ++j)
      if (row < half.rows && column + j < half.k)
        x[j] = read_number<float>(half.basis, half.dtype,
                                  row * half.row_stride + (column + j) * half.column_stride);
    store_pieces<kFloat16>(half.out + to * (kPieces * rank) + column, rank, x[0], x[1]);
  }
}

// blockIdx.y: a half.
template <bool kFloat16>
__global__ void split_bases_kernel(BasisArgs args) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  if (blockIdx.y == 0)
    for (int64_t i = thread; i < args.ticket_count; i += threads) args.tickets[i] = 0;
  const BasisHalf half = blockIdx.y == 0 ? args.half[0] : args.half[1];
  split_basis<kFloat16>(half, args.rank, thread, threads);
}

// P and R from what cuBLASLt makes of bases in pieces.
template <bool kFloat16>
__global__ void join_pieces_kernel(const float* sums, uint16_t* out, int64_t tokens, int rank) {
  const int pairs = rank / 2;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < tokens * pairs;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = i / pairs * (kPieces * rank) + i % pairs * 2;
    float x[2] = {0, 0};
    for (int piece = 0; piece < kPieces; ++piece)
      for (int j = 0; j < 2; ++j) x[j] += sums[at + piece * rank + j];
    store_pieces<kFloat16>(out + at, rank, x[0], x[1]);
  }
}

}  // namespace molegrad::cuda
