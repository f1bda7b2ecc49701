// Y = Bᵀ(A V) and W = Aᵀ(B U) for A (T, n) and B (T, m) in 16 bits, in two launches for each chunk
// of tokens: `project` computes P = A V and R = B U, `gather` adds Bᵀ P and Aᵀ R to sums of their
// own.
//
// A chunk is small enough to stay in L2, where `gather` finds A and B. T = 8192, n = 1280, m = 5120
// and rank 32 in bfloat16 on an H100: 105 MB from memory, 35 us at 3 TB/s, beside them 26 MB of
// bases from L2 (410 KB in two pieces for 128 tokens of 1.6 MB); then 105 MB and 26 MB of P and R
// from L2, 24 us at 5.5 TB/s; 13 GFLOP, 22 us at the rate of mma.sync, behind either. A launch
// starts while the one before it ends and loads A and B before it waits for it, so that the ends of
// eight launches cost little. sketch_fused.cuh reads A and B once, where their columns fit.
//
// The reference keeps the bases, P and R in float32, so they are split into two 16-bit numbers each
// (kPieces): x = high + low. Against float64, emulated, T = 2048, rank 32, bfloat16: with one
// number each, as in torch's own products, the relative error is 1.6e-3 to 2.3e-3 (on data with
// strong modes all of it from the bases, whose rounding is the same for every token, while that of
// P averages out to 1.0e-4), with two 2e-6 to 4e-6; 1 - cosine 1e-6 against 1e-12, signed bias 2e-4
// against 6e-7. Memory and L2 have to be waited for anyway, so the second piece costs little.
// Float16 has too few exponents for P and R: each 128 tokens of them have a power of two of their
// own.
//
// A and B, or one of them, may be float8, half the bytes: 16-bit numbers hold all of theirs, which
// they become between shared memory and the tensor cores (two words of four a lane and 16 x 16
// numbers, ten instructions each in bfloat16, beside the eight mma of rank 32: tensor cores take
// longer), and the scales, one for each token, are multiplied into the rows of P and R in float32.
// So FP8 is what memory and L2 see: 52 MB and 26 MB, about 17 and 14 us; the products keep the
// accuracy of 16 bits. cuBLASLt's FP8 contracts along rows only (TN) on compute capability 8.9, 9.0
// and 12.x: Bᵀ P and Aᵀ R would need copies of A and B with tokens contiguous, 105 MB to read and
// write, twice what reading A and B takes, and P and R in 8 bits with errors of 2^-4.
//
// Every sum has one owner and a fixed order: the parts of a row of P are added by the block that
// comes last, those of Y and W by `add_parts_kernel`.
#pragma once

#include "parts.cuh"
#include "pieces.cuh"

namespace molegrad::cuda {

constexpr int kSketchThreads = 256, kSketchWarps = 8;
constexpr int kLeastShared = 99 << 10;  // bytes that a block may have, of an RTX 5090 the least
constexpr int kSkew = 8;  // numbers after each row of shared memory: rows start in other banks

struct ProjectHalf {
  const void* x;  // (tokens, columns)
  int64_t ld;     // numbers from row to row
  Stored stored;
  int columns;
  int aligned;            // rows start at multiples of 16 bytes and hold whole 16 bytes
  const uint16_t* basis;  // (steps * project_columns, kPieces * rank)
  uint16_t* q;            // (tokens, kPieces * rank)
  float* scale;           // of each 128 tokens of q; float16 only
  float4* sums;           // of each part, as the threads hold them
  unsigned* tickets;      // of each 128 tokens, 0 before and after
  int first_step, steps, first_part, parts;
};

// Of float8 A and B: factors of their rows, of all of them where the stride is 0.
struct TokenScales {
  const float* of[2];
  int stride[2];
};

struct ProjectArgs {
  ProjectHalf half[2];
  TokenScales token_scales;
  int64_t tokens;
  int steps_per_part;
};

struct GatherHalf {
  const void* z;  // (tokens, columns)
  int64_t ld;
  Stored stored;
  int columns;
  int aligned;
  const uint16_t* q;
  const float* scale;
  float* sums;  // (splits, columns, rank)
  int first_tile, tiles;
};

struct GatherArgs {
  GatherHalf half[2];
  int64_t tokens, tokens_per_split;
  int accumulate;  // to the sums of the chunks before
};

// ---- P = A V and R = B U
// -------------------------------------------------------------------------

template <int kRank, Stored kStored = Stored::k16Bits>
struct ProjectShape {
  using Bits = typename StoredAs<kStored>::Bits;
  static constexpr int kColumns = project_columns(kRank), kStages = kRank <= 32   ? 3
                                                                    : kRank <= 64 ? 4
                                                                                  : 3;
  static constexpr int kPack = 16 / sizeof(Bits);  // numbers in 16 bytes
  // Of 16-bit units, whatever is stored.
  static constexpr int kXRow = kColumns * sizeof(Bits) / 2 + kSkew;
  static constexpr int kBasisRow = kPieces * kRank + kSkew;
  static constexpr int kX = kProjectTokens * kXRow, kStage = kX + kColumns * kBasisRow;
  static constexpr int kBytes = kStages * kStage * 2;
  static_assert(kBytes <= kLeastShared, "more shared memory than the smallest of our GPUs has");
};

template <int kRank, Stored kStored>
__device__ __forceinline__ void load_project(const ProjectHalf& half, uint16_t* stage,
                                             int64_t first_token, int64_t tokens, int step) {
  using Shape = ProjectShape<kRank, kStored>;
  constexpr int kOfX = Shape::kColumns / Shape::kPack, kOfBasis = kPieces * kRank / 8;
  const auto* x = static_cast<const typename Shape::Bits*>(half.x);
#pragma unroll
  for (int n = 0; n < kProjectTokens * kOfX / kSketchThreads; ++n) {
    const int i = n * kSketchThreads + threadIdx.x, row = i / kOfX, pack = i % kOfX;
    const bool valid = first_token + row < tokens;
    load_pack_of_row(
        stage + row * Shape::kXRow + pack * 8, x + (valid ? first_token + row : 0) * half.ld,
        step * Shape::kColumns + pack * Shape::kPack, half.columns, valid, half.aligned);
  }
  const uint16_t* basis = half.basis + int64_t{step} * Shape::kColumns * (kPieces * kRank);
#pragma unroll
  for (int n = 0; n < (Shape::kColumns * kOfBasis + kSketchThreads - 1) / kSketchThreads; ++n) {
    const int i = n * kSketchThreads + threadIdx.x, row = i / kOfBasis, column = i % kOfBasis * 8;
    if (Shape::kColumns * kOfBasis % kSketchThreads != 0 && i >= Shape::kColumns * kOfBasis) break;
    copy_async(stage + Shape::kX + row * Shape::kBasisRow + column,
               basis + row * (kPieces * kRank) + column, true);
  }
}

template <bool kFloat16, int kRank, Stored kStored>
__device__ __forceinline__ void project_step(float (&sum)[kRank / 8][4], const uint16_t* stage) {
  using Shape = ProjectShape<kRank, kStored>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint16_t* x = stage + (warp * 16 + lane % 16) * Shape::kXRow + lane / 16 * 8;
  const uint16_t* basis = stage + Shape::kX + lane % 16 * Shape::kBasisRow + lane / 16 * 8;
  uint32_t words[4];  // of float8: rows 0 to 7 and 8 to 15 of 16 columns, then of the next 16
#pragma unroll
  for (int c = 0; c < Shape::kColumns; c += 16) {
    uint32_t a[4];
    if constexpr (kStored == Stored::k16Bits) {
      load_matrices(a, x + c);
    } else {
      if (c % 32 == 0) load_matrices(words, x + c / 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[i] = two_of<kFloat16, kStored, 0, 1>(words[c % 32 / 8 + i]);
        a[i + 2] = two_of<kFloat16, kStored, 2, 3>(words[c % 32 / 8 + i]);
      }
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
      for (int j = 0; j < kRank; j += 16) {
        uint32_t b[4];
        load_matrices_transposed(b, basis + c * Shape::kBasisRow + piece * kRank + j);
        mma_16bit<kFloat16>(sum[j / 8], a, b[0], b[1]);
        mma_16bit<kFloat16>(sum[j / 8 + 1], a, b[2], b[3]);
      }
  }
}

// The parts of these 128 tokens in their order, once all are there: true in the block that is last.
template <int kRank>
__device__ __forceinline__ bool add_to_parts(const ProjectHalf& half, int token_tile, int part,
                                             float (&sum)[kRank / 8][4]) {
  __shared__ int last;
  constexpr int kPart = kRank / 8 * kSketchThreads;
  float4* tile = half.sums + int64_t{token_tile} * half.parts * kPart;
  float4* mine = tile + int64_t{part - half.first_part} * kPart + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kRank / 8; ++j)
    mine[j * kSketchThreads] = make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* ticket = half.tickets + token_tile;
    last = atomicAdd(ticket, 1u) + 1 == static_cast<unsigned>(half.parts);
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  // All loads of a round are under way at once; every sum keeps the order of the parts.
  constexpr int kAtOnce = kRank / 8 < 4 ? kRank / 8 : 4;
#pragma unroll
  for (int first = 0; first < kRank / 8; first += kAtOnce) {
#pragma unroll
    for (int j = first; j < first + kAtOnce; ++j) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0;
#pragma unroll 2
    for (int p = 0; p < half.parts; ++p) {
      float4 x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        x[j] = __ldcg(tile + int64_t{p} * kPart + (first + j) * kSketchThreads + threadIdx.x);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        sum[first + j][0] += x[j].x;
        sum[first + j][1] += x[j].y;
        sum[first + j][2] += x[j].z;
        sum[first + j][3] += x[j].w;
      }
    }
  }
  return true;
}

// The factor that these 128 tokens are divided by before they become float16.
template <int kRank>
__device__ __forceinline__ float tile_scale(const float (&sum)[kRank / 8][4]) {
  __shared__ float sizes[kSketchWarps];
  float size = 0;
#pragma unroll
  for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) size = fmaxf(size, fabsf(sum[j][i]));
  for (int offset = 16; offset > 0; offset /= 2)
    size = fmaxf(size, __shfl_xor_sync(kWholeWarp, size, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) sizes[threadIdx.x / 32] = size;
  __syncthreads();
  for (int i = 0; i < kSketchWarps; ++i) size = fmaxf(size, sizes[i]);
  return power_of_two(scale_exponent(size));
}

template <bool kFloat16, int kRank>
__device__ __forceinline__ void store_projected(const ProjectHalf& half, int64_t tokens,
                                                int token_tile, float (&sum)[kRank / 8][4]) {
  float factor = 1;
  if constexpr (kFloat16) {
    const float scale = tile_scale<kRank>(sum);
    if (threadIdx.x == 0) half.scale[token_tile] = scale;
    factor = 1 / scale;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = int64_t{token_tile} * kProjectTokens + warp * 16 + lane / 4 + i * 8;
    if (token >= tokens) continue;
    uint16_t* row = half.q + token * (kPieces * kRank) + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j)
      store_pieces<kFloat16>(row + j * 8, kRank, sum[j][2 * i] * factor,
                             sum[j][2 * i + 1] * factor);
  }
}

// Rows of P or R times the scales of their tokens.
template <int kRank>
__device__ __forceinline__ void scale_tokens(const TokenScales& scales, int64_t tokens,
                                             int token_tile, float (&sum)[kRank / 8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t token = int64_t{token_tile} * kProjectTokens + warp * 16 + lane / 4 + i * 8;
    float factor = 1;
    for (int s = 0; s < 2; ++s)
      if (scales.of[s] != nullptr && token < tokens)
        factor *= __ldg(scales.of[s] + token * scales.stride[s]);
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
      sum[j][2 * i] *= factor;
      sum[j][2 * i + 1] *= factor;
    }
  }
}

// `steps` from `first` on of one half, which are its part `part`, for 128 tokens.
template <bool kFloat16, int kRank, Stored kStored, bool kScaled>
__device__ __forceinline__ void project_half(const ProjectHalf& half, const TokenScales& scales,
                                             int64_t tokens, int token_tile, int part, int first,
                                             int steps, uint16_t* stages) {
  using Shape = ProjectShape<kRank, kStored>;
  const int64_t first_token = int64_t{token_tile} * kProjectTokens;
  const auto load = [&](int i) {
    if (i < steps)
      load_project<kRank, kStored>(half, stages + i % Shape::kStages * Shape::kStage, first_token,
                                   tokens, first + i);
    copies_commit();
  };
  float sum[kRank / 8][4] = {};
  for (int i = 0; i < Shape::kStages - 1; ++i) load(i);
  for (int i = 0; i < steps; ++i) {
    copies_wait<Shape::kStages - 2>();
    __syncthreads();
    load(i + Shape::kStages - 1);
    project_step<kFloat16, kRank, kStored>(sum, stages + i % Shape::kStages * Shape::kStage);
  }
  copies_wait<0>();
  __syncthreads();  // the next half loads into what others may still read
  wait_for_launch_before();
  let_next_launch_start();
  if (half.parts > 1 && !add_to_parts<kRank>(half, token_tile, part, sum)) return;
  if constexpr (kScaled) scale_tokens<kRank>(scales, tokens, token_tile, sum);
  store_projected<kFloat16, kRank>(half, tokens, token_tile, sum);
}

// blockIdx.x: 128 tokens; blockIdx.y: a range of the steps over the columns of A and then of B.
template <bool kFloat16, int kRank, bool kFloat8>
__global__ void __launch_bounds__(kSketchThreads, kRank <= 64 ? 2 : 1)
    project_kernel(ProjectArgs args) {
  MOLEGRAD_SHARED(memory);
  uint16_t* stages = reinterpret_cast<uint16_t*>(memory);
  const int begin = blockIdx.y * args.steps_per_part, end = begin + args.steps_per_part;
  for (int h = 0; h < 2; ++h) {
    const ProjectHalf& half = args.half[h];
    const int first = begin > half.first_step ? begin - half.first_step : 0;
    const int past = end - half.first_step < half.steps ? end - half.first_step : half.steps;
    const int steps = past - first;
    if (steps <= 0) continue;
    const TokenScales& scales = args.token_scales;
    const int tile = blockIdx.x, part = blockIdx.y;
    if (!kFloat8 || half.stored == Stored::k16Bits)
      project_half<kFloat16, kRank, Stored::k16Bits, kFloat8>(half, scales, args.tokens, tile, part,
                                                              first, steps, stages);
    else if constexpr (kFloat8) {
      if (half.stored == Stored::kE4M3)
        project_half<kFloat16, kRank, Stored::kE4M3, true>(half, scales, args.tokens, tile, part,
                                                           first, steps, stages);
      else
        project_half<kFloat16, kRank, Stored::kE5M2, true>(half, scales, args.tokens, tile, part,
                                                           first, steps, stages);
    }
  }
}

}  // namespace molegrad::cuda
