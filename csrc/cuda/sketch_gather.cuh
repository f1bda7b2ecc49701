// The second launch of a sketch's chunk, see sketch.cuh: Bᵀ P and Aᵀ R added to sums of their own.
#pragma once

#include "sketch.cuh"

namespace molegrad::cuda {

// ---- Bᵀ P and Aᵀ R ------------------------------------------------------------------------------

template <int kRank, Stored kStored = Stored::k16Bits>
struct GatherShape {
  using Bits = typename StoredAs<kStored>::Bits;
  static constexpr int kStages = kRank <= 32 ? 4 : 3, kPack = 16 / sizeof(Bits);
  // Of 16-bit units, whatever is stored.
  static constexpr int kZRow = kGatherColumns * sizeof(Bits) / 2 + kSkew;
  static constexpr int kQRow = kPieces * kRank + kSkew;
  static constexpr int kZ = kGatherTokens * kZRow, kStage = kZ + kGatherTokens * kQRow;
  static constexpr int kBytes = kStages * kStage * 2;
  static_assert(kBytes <= kLeastShared, "more shared memory than the smallest of our GPUs has");
};

template <int kRank, Stored kStored>
__device__ __forceinline__ void load_z(const GatherHalf& half, uint16_t* stage, int tile,
                                       int64_t first_token, int64_t tokens) {
  using Shape = GatherShape<kRank, kStored>;
  constexpr int kOfZ = kGatherColumns / Shape::kPack;
  const auto* z = static_cast<const typename Shape::Bits*>(half.z);
#pragma unroll
  for (int i = threadIdx.x; i < kGatherTokens * kOfZ; i += kSketchThreads) {
    const int row = i / kOfZ, pack = i % kOfZ;
    const bool valid = first_token + row < tokens;
    load_pack_of_row(
        stage + row * Shape::kZRow + pack * 8, z + (valid ? first_token + row : 0) * half.ld,
        tile * kGatherColumns + pack * Shape::kPack, half.columns, valid, half.aligned);
  }
}

template <int kRank, Stored kStored>
__device__ __forceinline__ void load_q(const GatherHalf& half, uint16_t* stage, int64_t first_token,
                                       int64_t tokens) {
  using Shape = GatherShape<kRank, kStored>;
  constexpr int kOfQ = kPieces * kRank / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kGatherTokens * kOfQ; i += kSketchThreads) {
    const int row = i / kOfQ, column = i % kOfQ * 8;
    const bool valid = first_token + row < tokens;
    copy_async(stage + Shape::kZ + row * Shape::kQRow + column,
               half.q + (valid ? first_token + row : 0) * (kPieces * kRank) + column, valid);
  }
}

// A warp has 32 of the tile's columns. Of float8 a lane gets words of two columns and two tokens:
// even columns are rows 0 to 7 of a product, odd ones 8 to 15.
template <bool kFloat16, int kRank, Stored kStored>
__device__ __forceinline__ void gather_step(float (&sum)[2][kRank / 8][4], const uint16_t* stage) {
  using Shape = GatherShape<kRank, kStored>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint16_t* z = stage + (lane / 16 * 8 + lane % 8) * Shape::kZRow +
                      warp * 32 * static_cast<int>(sizeof(typename Shape::Bits)) / 2 +
                      lane / 8 % 2 * 8;
  const uint16_t* q = stage + Shape::kZ + lane % 16 * Shape::kQRow + lane / 16 * 8;
#pragma unroll
  for (int t = 0; t < kGatherTokens; t += 16) {
    uint32_t a[2][4];
    if constexpr (kStored == Stored::k16Bits) {
      load_matrices_transposed(a[0], z + t * Shape::kZRow);
      load_matrices_transposed(a[1], z + t * Shape::kZRow + 16);
    } else {
      uint32_t words[4];  // tokens 0 to 7 of 16 columns and of the next 16, then tokens 8 to 15
      load_matrices_transposed(words, z + t * Shape::kZRow);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i % 2][i / 2 * 2] = two_of<kFloat16, kStored, 0, 2>(words[i]);
        a[i % 2][i / 2 * 2 + 1] = two_of<kFloat16, kStored, 1, 3>(words[i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kPieces * kRank; j += 16) {
      uint32_t b[4];
      load_matrices_transposed(b, q + t * Shape::kQRow + j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_16bit<kFloat16>(sum[i][j % kRank / 8], a[i], b[0], b[1]);
        mma_16bit<kFloat16>(sum[i][j % kRank / 8 + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// fn(float2 in memory, the two numbers of the sum that belong there) for every such pair.
template <int kRank, Stored kStored, typename F>
__device__ __forceinline__ void for_sums(const GatherHalf& half, int tile, int split,
                                         float (&sum)[2][kRank / 8][4], const F& fn) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int in_warp =
        kStored == Stored::k16Bits ? i * 8 + lane / 4 : i / 2 * 16 + lane / 4 * 2 + i % 2;
    const int column = tile * kGatherColumns + warp * 32 + in_warp;
    if (column >= half.columns) continue;
    float* row = half.sums + (int64_t{split} * half.columns + column) * kRank + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j)
      fn(reinterpret_cast<float2*>(row + j * 8), sum[i / 2][j][i % 2 * 2],
         sum[i / 2][j][i % 2 * 2 + 1]);
  }
}

// 256 columns of B or A and a range of tokens, last ones first, because these are the likelier to
// be in L2 still; `accumulate` to the sums of the chunks before.
template <bool kFloat16, int kRank, Stored kStored>
__device__ __forceinline__ void gather_half(const GatherHalf& half, int tile, int split,
                                            int64_t tokens, int64_t tokens_per_split,
                                            int accumulate, uint16_t* stages) {
  using Shape = GatherShape<kRank, kStored>;
  const int64_t begin = split * tokens_per_split;
  const int64_t end = begin + tokens_per_split < tokens ? begin + tokens_per_split : tokens;
  const int count =
      end > begin ? static_cast<int>((end - begin + kGatherTokens - 1) / kGatherTokens) : 0;
  const auto first_token = [&](int i) { return begin + int64_t{count - 1 - i} * kGatherTokens; };
  const auto stage = [&](int i) { return stages + i % Shape::kStages * Shape::kStage; };
  const auto load_wide = [&](int i) {
    if (i < count) load_z<kRank, kStored>(half, stage(i), tile, first_token(i), end);
  };
  const auto load_narrow = [&](int i) {
    if (i < count) load_q<kRank, kStored>(half, stage(i), first_token(i), end);
    copies_commit();
  };
  // A and B are there before P and R are.
  for (int i = 0; i < Shape::kStages - 1; ++i) load_wide(i);
  wait_for_launch_before();
  let_next_launch_start();
  for (int i = 0; i < Shape::kStages - 1; ++i) load_narrow(i);

  float sum[2][kRank / 8][4] = {};
  float scale = 1;      // of the sums, float16 only
  int64_t scaled = -1;  // the tile of tokens that it is the scale of
  const auto rescale = [&](float to) {
    if (to == scale) return;
    const float factor = scale / to;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[i][j][r] *= factor;
    scale = to;
  };
  for (int i = 0; i < count; ++i) {
    copies_wait<Shape::kStages - 2>();
    __syncthreads();
    load_wide(i + Shape::kStages - 1);
    load_narrow(i + Shape::kStages - 1);
    if constexpr (kFloat16) {
      const int64_t now = first_token(i) / kProjectTokens;
      if (now != scaled) rescale(__ldcg(half.scale + now));
      scaled = now;
    }
    gather_step<kFloat16, kRank, kStored>(sum, stage(i));
  }
  copies_wait<0>();
  if constexpr (kFloat16) rescale(1);
  // To the chunks before by additions that round to nearest: tensor cores cut off.
  if (accumulate != 0)
    for_sums<kRank, kStored>(half, tile, split, sum, [](const float2* p, float& x, float& y) {
      const float2 before = __ldcg(p);
      x += before.x;
      y += before.y;
    });
  for_sums<kRank, kStored>(half, tile, split, sum,
                           [](float2* p, float x, float y) { *p = make_float2(x, y); });
}

// blockIdx.x: 256 columns of B or A; blockIdx.y: a range of tokens.
template <bool kFloat16, int kRank, bool kFloat8>
__global__ void __launch_bounds__(kSketchThreads, kRank <= (kFloat16 && kFloat8 ? 32 : 64) ? 2 : 1)
    gather_kernel(GatherArgs args) {
  MOLEGRAD_SHARED(memory);
  uint16_t* stages = reinterpret_cast<uint16_t*>(memory);
  const int h = static_cast<int>(blockIdx.x) >= args.half[1].first_tile && args.half[1].tiles > 0;
  const GatherHalf& half = args.half[h];
  const int tile = blockIdx.x - half.first_tile, split = blockIdx.y;
  if (!kFloat8 || half.stored == Stored::k16Bits)
    gather_half<kFloat16, kRank, Stored::k16Bits>(half, tile, split, args.tokens,
                                                  args.tokens_per_split, args.accumulate, stages);
  else if constexpr (kFloat8) {
    if (half.stored == Stored::kE4M3)
      gather_half<kFloat16, kRank, Stored::kE4M3>(half, tile, split, args.tokens,
                                                  args.tokens_per_split, args.accumulate, stages);
    else
      gather_half<kFloat16, kRank, Stored::kE5M2>(half, tile, split, args.tokens,
                                                  args.tokens_per_split, args.accumulate, stages);
  }
}

}  // namespace molegrad::cuda
