// The products of a sketch in float32 and float64 by plain multiply-adds: as exact as the
// reference, and fast enough for what they are for (6.7 GFLOP are 0.1 ms of an H100's float32 rate,
// the two readings of 210 MB in float32 0.13 ms). One kernel does both products: sums over r of
// L(r, i) Q(r, j), where L is A or B read along its rows or across them.
#include "parts.h"
#include "pieces.cuh"
#include "products.h"

namespace molegrad::cuda {

constexpr int kWideThreads = 256;
constexpr int kWideGap = 4;  // numbers after each row of shared memory: 16 bytes in float32

struct WideArgs {
  const void* left;  // L(r, i), (length, rows), any strides
  int64_t left_r, left_i;
  const void* right;  // Q(r, j), (length, k), any strides
  int64_t right_r, right_j;
  void* sums;  // (parts, rows, k)
  int64_t rows, length, length_per_part;
  int k;
};

// blockIdx.x: 128 rows i, blockIdx.y: 32 columns j, blockIdx.z: a part of r. A thread has four rows
// and four columns.
template <typename C>
__global__ void __launch_bounds__(kWideThreads) wide_product_kernel(WideArgs args) {
  constexpr int kRow = kWideRows + kWideGap;
  MOLEGRAD_SHARED(memory);
  C* left = reinterpret_cast<C*>(memory);  // (kWideSteps, kRow)
  C* right = left + kWideSteps * kRow;     // (kWideSteps, kWideColumns)
  const C* from_left = static_cast<const C*>(args.left);
  const C* from_right = static_cast<const C*>(args.right);
  const int64_t first_row = int64_t{blockIdx.x} * kWideRows;
  const int first_column = blockIdx.y * kWideColumns;
  const int64_t begin = blockIdx.z * args.length_per_part;
  const int64_t end =
      begin + args.length_per_part < args.length ? begin + args.length_per_part : args.length;
  const int row = threadIdx.x % 32 * 4, column = threadIdx.x / 32 * 4;
  const bool across = args.left_i == 1;  // neighbours in memory go to neighbouring threads
  C sum[4][4] = {};
  for (int64_t r = begin; r < end; r += kWideSteps) {
    __syncthreads();
    for (int i = threadIdx.x; i < kWideSteps * kWideRows; i += kWideThreads) {
      const int step = across ? i / kWideRows : i % kWideSteps;
      const int at = across ? i % kWideRows : i / kWideSteps;
      const bool inside = r + step < end && first_row + at < args.rows;
      left[step * kRow + at] =
          inside ? from_left[(r + step) * args.left_r + (first_row + at) * args.left_i] : C(0);
    }
    for (int i = threadIdx.x; i < kWideSteps * kWideColumns; i += kWideThreads) {
      const int step = i / kWideColumns, at = i % kWideColumns;
      const bool inside = r + step < end && first_column + at < args.k;
      right[i] = inside ? from_right[(r + step) * args.right_r + (first_column + at) * args.right_j]
                        : C(0);
    }
    __syncthreads();
#pragma unroll 8
    for (int step = 0; step < kWideSteps; ++step) {
      C l[4], s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) l[i] = left[step * kRow + row + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[j] = right[step * kWideColumns + column + j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += l[i] * s[j];
    }
  }
  C* sums = static_cast<C*>(args.sums) + blockIdx.z * args.rows * args.k;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (first_row + row + i < args.rows && first_column + column + j < args.k)
        sums[(first_row + row + i) * args.k + first_column + column + j] = sum[i][j];
}

}  // namespace molegrad::cuda

namespace molegrad::cuda {
namespace {

int product_parts(int64_t rows, int64_t length, int64_t k, int multiprocessors) {
  constexpr int64_t kMostParts = 32, kOverhead = 2, kBlocksOfEach = 4;
  const int64_t tiles = divide_up(rows, kWideRows) * divide_up(k, kWideColumns);
  return best_parts(tiles, divide_up(length, kWideSteps), kOverhead,
                    kBlocksOfEach * multiprocessors, kMostParts);
}

template <typename C>
int product(WideArgs args, void* out, int64_t ld, int add, int multiprocessors, void* scratch,
            cudaStream_t stream) {
  const int parts = product_parts(args.rows, args.length, args.k, multiprocessors);
  const bool direct = parts == 1 && add == 0 && ld == args.k;
  args.sums = direct ? out : scratch;
  args.length_per_part = round_up_to(larger(divide_up(args.length, parts), 1), kWideSteps);
  const dim3 grid(static_cast<unsigned>(divide_up(args.rows, kWideRows)),
                  static_cast<unsigned>(divide_up(args.k, kWideColumns)), parts);
  constexpr size_t kBytes = (kWideRows + kWideGap + kWideColumns) * kWideSteps * sizeof(C);
  MOLEGRAD_TRY(launch(wide_product_kernel<C>, grid, dim3(kWideThreads), kBytes, stream, args));
  if (direct) return cudaSuccess;
  SumArgs sums = {};
  sums.half[0] = {scratch, args.rows * args.k, args.k, out, ld, args.rows, args.k};
  sums.parts = parts;
  sums.add = add;
  return add_sums<C>(sums, stream);
}

}  // namespace
}  // namespace molegrad::cuda

using namespace molegrad::cuda;

extern "C" int64_t molegrad_product_scratch(int dtype, int64_t rows, int64_t length, int64_t k,
                                            int multiprocessors) {
  return product_parts(rows, length, k, multiprocessors) * rows * k * (dtype == 1 ? 8 : 4);
}

extern "C" int molegrad_product(int dtype, int64_t rows, int64_t length, int64_t k,
                                const void* left, int64_t left_r, int64_t left_i, const void* right,
                                int64_t right_r, int64_t right_j, void* out, int64_t ld, int add,
                                int multiprocessors, void* scratch, cudaStream_t stream) {
  if (rows == 0 || k == 0) return cudaSuccess;
  const WideArgs args = {
      left, left_r, left_i, right, right_r, right_j, nullptr, rows, length, 0, static_cast<int>(k)};
  return dtype == 1 ? product<double>(args, out, ld, add, multiprocessors, scratch, stream)
                    : product<float>(args, out, ld, add, multiprocessors, scratch, stream);
}

extern "C" int molegrad_split(int dtype, const void* from, int64_t row_stride,
                              int64_t column_stride, int64_t rows, int64_t k, int rank,
                              uint16_t* out, cudaStream_t stream) {
  BasisArgs args = {};
  args.half[0] = {from, row_stride, column_stride, dtype, static_cast<int>(k), rows, rows, out};
  args.rank = rank;
  return launch(split_bases_kernel<false>, dim3(grid_for(rows * (rank / 2))), dim3(kThreads), 0,
                stream, args);
}

extern "C" int molegrad_join(const float* p, int64_t tokens, int rank, uint16_t* out,
                             cudaStream_t stream) {
  return launch(join_pieces_kernel<false>, dim3(grid_for(tokens * (rank / 2))), dim3(kThreads), 0,
                stream, p, out, tokens, rank);
}

extern "C" int molegrad_add_pieces(const float* sums, int64_t rows, int64_t k, int rank, float* out,
                                   int64_t ld, int add, cudaStream_t stream) {
  SumArgs args = {};
  args.half[0] = {sums, rank, int64_t{kPieces} * rank, out, ld, rows, static_cast<int>(k)};
  args.parts = kPieces;
  args.add = add;
  return add_sums<float>(args, stream);
}
