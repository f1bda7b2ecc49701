#include "parts.h"
#include "pieces.cuh"
#include "products.cuh"
#include "products.h"

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
