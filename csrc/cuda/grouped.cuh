// Y_i += B_iᵀ(A_i V_i) and W_i += A_iᵀ(B_i U_i) of several layers in 16 bits, in three launches for
// each chunk of tokens, and one before them: the blocks of sketch.cuh, with a table of layers among
// the kernels' parameters (nothing is copied to the device, so that a CUDA graph can hold it).
//
// A chunk is what stays in L2 of A and B, as for one layer, but of as many layers as fit. Alone, a
// layer of T = 1024, n = 768, m = 3072 and rank 32 in bfloat16 has 7.9 MB: 2.6 us from memory on an
// H100 in four launches, whose starts and ends cost as much again and whose 8 tiles of tokens fill
// 264 blocks only in many parts. Three layers make a chunk (28 MB may), so that 24 of them take 25
// launches instead of 96. The sums of a chunk's splits are added to Y and W before the next chunk,
// while they are in L2, so that scratch memory, 24 MB here, hardly grows with the layers.
#pragma once

#include "grouped_plan.h"
#include "sketch_gather.cuh"

namespace molegrad::cuda {

constexpr int64_t kUnit = 256;  // bytes that offsets into scratch memory count

struct TableHalf {
  const uint16_t* x;  // (tokens, columns)
  int64_t ld;
  float* out;  // (columns of the other half, k)
  int columns, aligned, k;
  unsigned basis, project_sums, gather_sums;
};

struct TablePiece {
  TableHalf half[2];  // X is A for Y = Bᵀ(A V) and B for W = Aᵀ(B U)
  int tokens, first_tile, first_project, first_gather;
};

struct Table {
  char* scratch;
  unsigned q, scale, tickets;
  int pieces, tiles, steps_per_part, tokens_per_split;
  TablePiece piece[kGroupedLayers];
};
static_assert(sizeof(Table) <= 4096, "what a kernel's parameters may hold");

struct TableBases {
  BasisHalf half[2 * kGroupedLayers];
  int rank, ticket_count;
  unsigned* tickets;
};
static_assert(sizeof(TableBases) <= 4096, "what a kernel's parameters may hold");

// blockIdx.y: a basis.
template <bool kFloat16>
__global__ void split_many_kernel(TableBases args) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  if (blockIdx.y == 0)
    for (int64_t i = thread; i < args.ticket_count; i += threads) args.tickets[i] = 0;
  split_basis<kFloat16>(args.half[blockIdx.y], args.rank, thread, threads);
}

// The piece that a block belongs to: the last whose first block is not after it.
template <typename First>
__device__ __forceinline__ int piece_of(int pieces, int block, const First& first) {
  int low = 0, high = pieces;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first(middle) <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Of half `h`: where its P or R lies, and the scales of it.
template <int kRank>
__device__ __forceinline__ uint16_t* q_of(const Table& args, const TablePiece& piece, int h) {
  return reinterpret_cast<uint16_t*>(args.scratch + args.q * kUnit) +
         (int64_t{h} * args.tiles + piece.first_tile) * (kProjectTokens * kPieces * kRank);
}
__device__ __forceinline__ float* scale_of(const Table& args, const TablePiece& piece, int h) {
  return reinterpret_cast<float*>(args.scratch + args.scale * kUnit) + h * args.tiles +
         piece.first_tile;
}

// Blocks of a piece: its tiles of 128 tokens, for each range of the steps over the columns of A and
// then of B.
template <bool kFloat16, int kRank>
__global__ void __launch_bounds__(kSketchThreads, 2) project_many_kernel(Table args) {
  MOLEGRAD_SHARED(memory);
  constexpr int kColumns = ProjectShape<kRank>::kColumns;
  const int block = blockIdx.x;
  const TablePiece& piece =
      args.piece[piece_of(args.pieces, block, [&](int i) { return args.piece[i].first_project; })];
  const int tiles = (piece.tokens + kProjectTokens - 1) / kProjectTokens;
  const int tile = (block - piece.first_project) % tiles;
  const int part = (block - piece.first_project) / tiles;
  const int begin = part * args.steps_per_part, end = begin + args.steps_per_part;
  int first_step = 0;
  for (int h = 0; h < 2; ++h) {
    const TableHalf& from = piece.half[h];
    ProjectHalf half = {};
    half.x = from.x;
    half.ld = from.ld;
    half.columns = from.columns;
    half.aligned = from.aligned;
    half.basis = reinterpret_cast<const uint16_t*>(args.scratch + from.basis * kUnit);
    half.q = q_of<kRank>(args, piece, h);
    half.scale = scale_of(args, piece, h);
    half.sums = reinterpret_cast<float4*>(args.scratch + from.project_sums * kUnit);
    half.tickets = reinterpret_cast<unsigned*>(args.scratch + args.tickets * kUnit) +
                   h * args.tiles + piece.first_tile;
    half.steps = (from.columns + kColumns - 1) / kColumns;
    half.first_step = first_step;
    half.first_part = first_step / args.steps_per_part;
    first_step += half.steps;
    half.parts = (first_step - 1) / args.steps_per_part - half.first_part + 1;
    const int first = begin > half.first_step ? begin - half.first_step : 0;
    const int past = end - half.first_step < half.steps ? end - half.first_step : half.steps;
    if (past > first)
      project_half<kFloat16, kRank, Stored::k16Bits, false>(half, TokenScales{}, piece.tokens, tile,
                                                            part, first, past - first,
                                                            reinterpret_cast<uint16_t*>(memory));
  }
}

// Blocks of a piece: 256 columns of B and then of A, for each range of its tokens.
template <bool kFloat16, int kRank>
__global__ void __launch_bounds__(kSketchThreads) gather_many_kernel(Table args) {
  MOLEGRAD_SHARED(memory);
  const int block = blockIdx.x;
  const TablePiece& piece =
      args.piece[piece_of(args.pieces, block, [&](int i) { return args.piece[i].first_gather; })];
  const int of_b = (piece.half[1].columns + kGatherColumns - 1) / kGatherColumns;
  const int tiles = of_b + (piece.half[0].columns + kGatherColumns - 1) / kGatherColumns;
  const int tile = (block - piece.first_gather) % tiles;
  const int split = (block - piece.first_gather) / tiles;
  const int h = tile >= of_b;
  const TableHalf& from = piece.half[1 - h];  // Z is B for Y and A for W
  GatherHalf half = {};
  half.z = from.x;
  half.ld = from.ld;
  half.columns = from.columns;
  half.aligned = from.aligned;
  half.q = q_of<kRank>(args, piece, h);
  half.scale = scale_of(args, piece, h);
  half.sums = reinterpret_cast<float*>(args.scratch + piece.half[h].gather_sums * kUnit);
  gather_half<kFloat16, kRank, Stored::k16Bits>(half, h == 0 ? tile : tile - of_b, split,
                                                piece.tokens, args.tokens_per_split, 0,
                                                reinterpret_cast<uint16_t*>(memory));
}

// Y and W, added to, in the order of the splits; blockIdx.y: a half of a piece.
template <int kRank>
__global__ void add_many_kernel(Table args) {
  wait_for_launch_before();
  let_next_launch_start();
  const TablePiece& piece = args.piece[blockIdx.y / 2];
  const int h = blockIdx.y % 2, k = piece.half[h].k;
  const int splits = (piece.tokens + args.tokens_per_split - 1) / args.tokens_per_split;
  const int64_t count = int64_t{piece.half[1 - h].columns} * kRank;
  const float* sums =
      reinterpret_cast<const float*>(args.scratch + piece.half[h].gather_sums * kUnit);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int column = static_cast<int>(i % kRank);
    if (column >= k) continue;
    float* to = piece.half[h].out + i / kRank * k + column;
    float sum = *to;
    for (int s = 0; s < splits; ++s) sum += __ldcg(sums + s * count + i);
    *to = sum;
  }
}

}  // namespace molegrad::cuda
