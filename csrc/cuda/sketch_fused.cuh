// Y = Bᵀ(A V) and W = Aᵀ(B U) for bfloat16 A (T, n) and B (T, m) in one launch that loads A and B
// into shared memory once and uses them twice from there.
//
// A cluster of up to eight blocks has a range of tokens, each of its blocks some columns of A and
// of B: with T = 8192, n = 1280, m = 5120 and rank 32 a block has 160 and 640 columns, whose sums
// of Y and W (102 KB) stay in its registers, with the rows of the bases beside them. For 16 tokens
// at a time its warps multiply their columns with the bases, the blocks add up P and R for each
// other (8 KB a block through the cluster's shared memory, against 26 KB of A and B), and the warps
// multiply the same columns with them. The exchange takes two barriers of the cluster; while one is
// under way, the tokens before or after are worked on.
//
// sketch.cuh reads A and B from L2 a second time. Of memory both read 105 MB, 35 us at 3 TB/s; here
// as much goes through L2, and at the end 13 MB of sums of 16 clusters twice, 8 us; there 262 MB,
// of which half comes after memory, 24 us. Tensor cores: 29 us with two numbers for each
// (`numbers`), 17 with one, at the rate of mma.sync and spread over all warps. So about 46 us
// against 65. It pays where the sums of the clusters, about 13 MB whatever the shape, are small
// beside A and B (from 8 rank tokens for each cluster on), and the columns have to fit: (n + m)
// rank up to 229,000.
#pragma once

#include "pieces.cuh"

namespace molegrad::cuda {

struct FusedSide {    // A with V and the sums of W, or B with U and the sums of Y
  const uint16_t* x;  // (tokens, columns), rows at multiples of 16 bytes
  int64_t ld;
  int columns;
  int slice;          // columns of a block, a multiple of 16
  int warps;          // that work on them
  const void* basis;  // (columns, k) of any dtype
  int64_t row_stride, column_stride;
  int dtype, k;
  float* sums;  // (clusters, columns, rank)
};

struct FusedArgs {
  FusedSide side[2];
  int64_t tokens, tokens_per_cluster;  // the latter a multiple of kFusedTokens
};

// Where things lie in shared memory, in bytes. A row of a stage holds a block's columns of A, then
// of B; q is P and R in pieces, twice, because the next ones come while these are read.
template <int kRank, int kNumbers>
struct FusedShape {
  static constexpr int kTiles = fused_tiles(kRank);  // of 16 columns, at most, for a warp
  static constexpr int kPartRow = kRank + 8;         // float32, of the part of a warp
  static constexpr int kQRow = kNumbers * kRank + 8;
  static constexpr int64_t kReceived = fused_parts(kRank);
  static constexpr int64_t kQ = kReceived + fused_received(kRank);
  static constexpr int64_t kLow = kQ + fused_q(kRank, kNumbers);
  static constexpr int64_t kStages = kLow + fused_low(kRank, kNumbers);
};

// Rows 2 (lane % 4) and so on of a basis as operand B of the tensor cores has them, in pieces: the
// high ones stay in registers, the low ones in the thread's own shared memory.
template <int kRank, int kNumbers, typename T>
__device__ __forceinline__ void load_fused_basis(const FusedSide& side, const T* basis,
                                                 int first_column, uint32_t (&high)[kRank / 8][2],
                                                 uint4* low) {
  const int lane = threadIdx.x % 32;
  float x[kRank / 8][2][2];  // all under way at once
#pragma unroll
  for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_column + lane % 4 * 2 + i * 8 + r, column = j * 8 + lane / 4;
        const bool inside = row < side.columns && column < side.k;
        x[j][i][r] = inside ? static_cast<float>(
                                  widen(basis[row * side.row_stride + column * side.column_stride]))
                            : 0.0f;
      }
#pragma unroll
  for (int j = 0; j < kRank / 8; j += 2) {
    uint32_t rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair_of)[2] = x[j + i / 2][i % 2];
      const uint32_t pair = pack_bf16(pair_of[0], pair_of[1]);
      high[j + i / 2][i % 2] = pair;
      rest[i] = pack_bf16(pair_of[0] - low_of<false>(pair), pair_of[1] - high_of<false>(pair));
    }
    if constexpr (kNumbers == 2)
      low[j / 2 * kFusedThreads + threadIdx.x] = make_uint4(rest[0], rest[1], rest[2], rest[3]);
  }
}

// Everything a thread of the kernel below knows.
template <int kRank, int kNumbers>
struct Fused {
  using Shape = FusedShape<kRank, kNumbers>;

  const FusedArgs& args;
  int rank, size;  // of the cluster; its size is a power of two
  int token_bits;  // 2^token_bits of 16 tokens are added up by each block
  int warp, lane;
  int kind;               // 0: this warp works on columns of A, 1: on those of B
  int first_tile, tiles;  // of 16 columns, in a row of a stage
  int64_t begin, end;     // tokens of the cluster
  int stage_row;          // numbers
  float* parts;
  float4* received;
  uint16_t* q;
  uint4* low;
  uint16_t* stages;
  float sum[Shape::kTiles][kRank / 8][4];
  uint32_t high[Shape::kTiles][kRank / 8][2];

  __device__ __forceinline__ Fused(const FusedArgs& all, unsigned char* memory)
      : args(all),
        rank(cluster_rank()),
        size(cluster_size()),
        token_bits(size == 1   ? 4
                   : size == 2 ? 3
                   : size == 4 ? 2
                               : 1),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        parts(reinterpret_cast<float*>(memory)),
        received(reinterpret_cast<float4*>(memory + Shape::kReceived)),
        q(reinterpret_cast<uint16_t*>(memory + Shape::kQ)),
        low(reinterpret_cast<uint4*>(memory + Shape::kLow)),
        stages(reinterpret_cast<uint16_t*>(memory + Shape::kStages)) {
    kind = warp >= args.side[0].warps;
    const int of_a = args.side[0].slice / 16, of_b = args.side[1].slice / 16;
    const int mine = kind ? of_b : of_a, workers = args.side[kind].warps;
    const int worker = kind ? warp - args.side[0].warps : warp;
    const int each = (mine + workers - 1) / workers;
    first_tile = (kind ? of_a : 0) + worker * each;
    tiles = mine - worker * each < each ? mine - worker * each : each;
    stage_row = (of_a + of_b) * 16 + 8;
    begin = blockIdx.x / size * args.tokens_per_cluster;
    end = begin + args.tokens_per_cluster < args.tokens ? begin + args.tokens_per_cluster
                                                        : args.tokens;
#pragma unroll
    for (int t = 0; t < Shape::kTiles; ++t)
#pragma unroll
      for (int j = 0; j < kRank / 8; ++j)
        sum[t][j][0] = sum[t][j][1] = sum[t][j][2] = sum[t][j][3] = 0;
  }

  // Rows of the basis, once the first tokens are under way.
  __device__ __forceinline__ void load_bases() {
    const FusedSide& side = args.side[kind];
    const auto load_as = [&](const auto* basis) {
#pragma unroll
      for (int t = 0; t < Shape::kTiles; ++t)
        load_fused_basis<kRank, kNumbers>(side, basis, t < tiles ? column(t) : side.columns,
                                          high[t], low + t * (kRank / 16) * kFusedThreads);
    };
    switch (side.dtype) {
      case 0:
        return load_as(static_cast<const float*>(side.basis));
      case 1:
        return load_as(static_cast<const double*>(side.basis));
      case 2:
        return load_as(static_cast<const BFloat16*>(side.basis));
      default:
        return load_as(static_cast<const Float16*>(side.basis));
    }
  }

  // The first column of this warp's tile in A or B.
  __device__ __forceinline__ int column(int tile) const {
    const int before = kind ? args.side[0].slice / 16 : 0;
    return rank * args.side[kind].slice + (first_tile + tile - before) * 16;
  }
  __device__ __forceinline__ uint16_t* stage(int i) const {
    return stages + i % kFusedStages * kFusedTokens * stage_row;
  }
  __device__ __forceinline__ uint16_t* q_of(int i, int which) const {
    return q + (i % 2 * 2 + which) * kFusedTokens * Shape::kQRow;
  }

  // 16 tokens of this block's columns; a warp copies rows.
  __device__ __forceinline__ void load(int i) const {
    const int64_t first = begin + int64_t{i} * kFusedTokens;
    for (int row = warp; row < kFusedTokens; row += kFusedWarps) {
      const bool valid = first + row < end;
      uint16_t* to = stage(i) + row * stage_row;
      for (const FusedSide& side : args.side) {
        const uint16_t* from = side.x + (valid ? first + row : 0) * side.ld;
        for (int c = lane * 8; c < side.slice; c += 32 * 8) {
          const int at = rank * side.slice + c;
          const bool inside = valid && at < side.columns;
          copy_async(to + c, inside ? from + at : from, inside);
        }
        to += side.slice;
      }
    }
  }

  // This warp's part of P or R.
  __device__ __forceinline__ void project(int i) {
    float part[kRank / 8][4] = {};
    const uint16_t* x = stage(i) + lane % 16 * stage_row + first_tile * 16 + lane / 16 * 8;
#pragma unroll
    for (int t = 0; t < Shape::kTiles; ++t) {
      if (t >= tiles) break;
      uint32_t a[4];
      load_matrices(a, x + t * 16);
#pragma unroll
      for (int j = 0; j < kRank / 8; ++j)
        mma_16bit<false>(part[j], a, high[t][j][0], high[t][j][1]);
      if constexpr (kNumbers == 2) {
#pragma unroll
        for (int j = 0; j < kRank / 8; j += 2) {
          const uint4 b = low[(t * (kRank / 16) + j / 2) * kFusedThreads + threadIdx.x];
          mma_16bit<false>(part[j], a, b.x, b.y);
          mma_16bit<false>(part[j + 1], a, b.z, b.w);
        }
      }
    }
    float* to = parts + (warp * kFusedTokens + lane / 4) * Shape::kPartRow + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
      *reinterpret_cast<float2*>(to + j * 8) = make_float2(part[j][0], part[j][1]);
      *reinterpret_cast<float2*>(to + 8 * Shape::kPartRow + j * 8) =
          make_float2(part[j][2], part[j][3]);
    }
  }

  // The sums of this block's warps to the blocks that add up these tokens: 16 / size tokens each.
  __device__ __forceinline__ void send() const {
    constexpr int kFours = kRank / 4;
    for (int at = threadIdx.x; at < 2 * kFusedTokens * kFours; at += kFusedThreads) {
      const int which = at / (kFusedTokens * kFours), token = at / kFours % kFusedTokens;
      const int first = which ? args.side[0].warps : 0;
      float4 total = make_float4(0, 0, 0, 0);
      for (int w = first; w < first + args.side[which].warps; ++w) {
        const float4 x = *reinterpret_cast<const float4*>(
            parts + (w * kFusedTokens + token) * Shape::kPartRow + at % kFours * 4);
        total.x += x.x;
        total.y += x.y;
        total.z += x.z;
        total.w += x.w;
      }
      const int to = token >> token_bits, token_there = token - (to << token_bits);
      const int row = ((rank * 2 + which) << token_bits) + token_there;
      store_to_block(received + row * kFours + at % kFours, to, total);
    }
  }

  // This block's tokens of P and R, from and to all blocks.
  __device__ __forceinline__ void add_up(int i) const {
    constexpr int kPairs = kRank / 2;
    const int pairs = 2 * kPairs << token_bits;  // a power of two, as the rank is
    const float2* from = reinterpret_cast<const float2*>(received);
    for (int at = threadIdx.x; at < pairs * size; at += kFusedThreads) {
      const int pair = at & (pairs - 1), row = pair / kPairs;
      float2 total = make_float2(0, 0);
      for (int block = 0; block < size; ++block) {
        const float2 x = from[block * pairs + pair];
        total.x += x.x;
        total.y += x.y;
      }
      const int which = row >> token_bits,
                token = (rank << token_bits) + row - (which << token_bits);
      const int to = at / (kPairs * 2) >> token_bits;
      uint16_t* place = q_of(i, which) + token * Shape::kQRow + pair % kPairs * 2;
      const uint32_t bits = pack_bf16(total.x, total.y);
      store_to_block(reinterpret_cast<uint32_t*>(place), to, bits);
      if constexpr (kNumbers == 2)
        store_to_block(reinterpret_cast<uint32_t*>(place + kRank), to,
                       pack_bf16(total.x - low_of<false>(bits), total.y - high_of<false>(bits)));
    }
  }

  // Aᵀ R or Bᵀ P for this warp's columns.
  __device__ __forceinline__ void gather(int i) {
    const uint16_t* from = q_of(i, 1 - kind) + lane % 16 * Shape::kQRow + lane / 16 * 8;
    const uint16_t* x =
        stage(i) + (lane / 16 * 8 + lane % 8) * stage_row + first_tile * 16 + lane / 8 % 2 * 8;
    uint32_t b[kNumbers * kRank / 16][4];
#pragma unroll
    for (int j = 0; j < kNumbers * kRank / 16; ++j) load_matrices_transposed(b[j], from + j * 16);
#pragma unroll
    for (int t = 0; t < Shape::kTiles; ++t) {
      if (t >= tiles) break;
      uint32_t a[4];
      load_matrices_transposed(a, x + t * 16);
#pragma unroll
      for (int j = 0; j < kNumbers * kRank / 16; ++j) {
        mma_16bit<false>(sum[t][j % (kRank / 16) * 2], a, b[j][0], b[j][1]);
        mma_16bit<false>(sum[t][j % (kRank / 16) * 2 + 1], a, b[j][2], b[j][3]);
      }
    }
  }

  __device__ __forceinline__ void store() const {
    const FusedSide& side = args.side[kind];
#pragma unroll
    for (int t = 0; t < Shape::kTiles; ++t) {
      if (t >= tiles) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = column(t) + lane / 4 + i * 8;
        if (row >= side.columns) continue;
        float* to =
            side.sums + (int64_t{blockIdx.x / size} * side.columns + row) * kRank + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kRank / 8; ++j)
          *reinterpret_cast<float2*>(to + j * 8) =
              make_float2(sum[t][j][2 * i], sum[t][j][2 * i + 1]);
      }
    }
  }
};

// A grid of clusters; kNumbers 16-bit numbers for each number of the bases, P and R.
template <int kRank, int kNumbers>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_sketch_kernel(FusedArgs args) {
  MOLEGRAD_SHARED(memory);
  Fused<kRank, kNumbers> fused(args, memory);
  const int count =
      fused.end > fused.begin
          ? static_cast<int>((fused.end - fused.begin + kFusedTokens - 1) / kFusedTokens)
          : 0;
  constexpr int kAhead = kFusedStages - 2;  // one stage is read, one of them for the second time
  for (int i = 0; i < kAhead; ++i) {
    if (i < count) fused.load(i);
    copies_commit();
  }
  fused.load_bases();
  cluster_arrive();  // until every block is there to be written to
  cluster_wait();
  for (int i = 0; i <= count; ++i) {
    const bool more = i < count;
    if (more) {
      copies_wait<kAhead - 1>();
      __syncthreads();
      if (i + kAhead < count) fused.load(i + kAhead);
      copies_commit();
      fused.project(i);
      __syncthreads();
    }
    if (i > 0) cluster_wait();  // P and R of the tokens before are there
    if (more) {
      fused.send();
      cluster_arrive();
    }
    if (i > 0) fused.gather(i - 1);
    if (more) {
      cluster_wait();  // the other blocks' parts are there
      fused.add_up(i);
      cluster_arrive();
    }
  }
  copies_wait<0>();
  fused.store();
}

}  // namespace molegrad::cuda
