// The product of sampled_grad_, grad += alpha X̃ᵀ Z, group by group of the features of X: the rows
// of X̃ and Z of the tokens that a group has taken are gathered into shared memory and multiplied on
// tensor cores, or in plain arithmetic where numbers have more than 16 bits.
//
// A tile of kM features and kN columns reads (kM + kN) 2 bytes from L2 for 2 kM kN operations a
// token: 51 at 64 x 256, 85 at 128 x 256. At the 5.5 TB/s of an H100's L2 that is 280 and 470
// TFLOP/s, the limit of the first, while the second nears what mma.sync does there; a 5090 is bound
// by its tensor cores (209) either way. Groups are not wider than a block of the sample, as of two
// blocks hardly a token is taken by both.
#pragma once

#include "sampled.cuh"

namespace molegrad::cuda {

constexpr int kProductThreads = 256;
// Tokens that are listed at a time: 16 marks a thread.
constexpr int kListedTokens = 16 * kProductThreads;

struct ProductJob {
  const void *x, *z;
  int64_t x_row, x_group;  // distance, in elements, of tokens and of groups
  int64_t z_row;
  int64_t tokens, features, columns;  // features from the job's first on
  const uint32_t* marks;              // null: every token
  int64_t words;
  void* grad;
  int grad_dtype;
  int64_t feature_stride, column_stride;
  double alpha;
};

// Lists the marked ones of tokens first to first + kListedTokens, less `first`; returns how many
// they are. Nobody may still read the list.
__device__ __forceinline__ int list_tokens(const uint32_t* marks, int64_t first, int64_t tokens,
                                           uint16_t* list, int* scratch) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t mine = first + 16 * thread;
  uint32_t bits = 0;
  if (mine < tokens) {
    bits = marks != nullptr ? marks[mine / kWordTokens] >> mine % kWordTokens : 0xffffu;
    bits &= tokens - mine < 16 ? (1u << (tokens - mine)) - 1 : 0xffffu;
  }
  const int count = __popc(bits);
  int end = count;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kWholeWarp, end, offset);
    if (lane >= offset) end += before;
  }
  if (lane == 31) scratch[warp] = end;
  __syncthreads();
  int total = 0;
  for (int i = 0; i < kProductThreads / 32; ++i) {
    if (i < warp) end += scratch[i];
    total += scratch[i];
  }
  uint16_t* to = list + end - count;
  for (; bits != 0; bits &= bits - 1) *to++ = static_cast<uint16_t>(16 * thread + __ffs(bits) - 1);
  __syncthreads();
  return total;
}

// Elements of the gradient that one thread has under way at a time.
constexpr int kUnderWay = 8;

// grad += alpha times a tile (rows, kN) of sums in shared memory, whose rows are kN + 1 apart;
// neighbouring threads take neighbouring elements of the gradient.
template <typename T, typename C, int kN>
__device__ __forceinline__ void add_tile(const C* sums, int rows, int64_t first_feature,
                                         int64_t first_column, const ProductJob& job, T* grad) {
  const C alpha = static_cast<C>(job.alpha);
  const bool by_columns = job.column_stride <= job.feature_stride;
  for (int start = threadIdx.x; start < rows * kN; start += kUnderWay * kProductThreads) {
    T before[kUnderWay];
#pragma unroll
    for (int visit = 0; visit < 2; ++visit)
#pragma unroll
      for (int i = 0; i < kUnderWay; ++i) {
        const int at = start + i * kProductThreads;
        const int row = by_columns ? at / kN : at % rows, column = by_columns ? at % kN : at / rows;
        const int64_t f = first_feature + row, c = first_column + column;
        if (at >= rows * kN || f >= job.features || c >= job.columns) continue;
        T* to = grad + f * job.feature_stride + c * job.column_stride;
        if (visit == 0)
          before[i] = *to;
        else
          narrow(widen(before[i]) + alpha * sums[row * (kN + 1) + column], *to);
      }
  }
}

template <typename C, int kN>
__device__ __forceinline__ void add_tile(const C* sums, int rows, int64_t first_feature,
                                         int64_t first_column, const ProductJob& job) {
  switch (job.grad_dtype) {
    case 1:
      return add_tile<double, C, kN>(sums, rows, first_feature, first_column, job,
                                     static_cast<double*>(job.grad));
    case 2:
      return add_tile<BFloat16, C, kN>(sums, rows, first_feature, first_column, job,
                                       static_cast<BFloat16*>(job.grad));
    case 3:
      return add_tile<Float16, C, kN>(sums, rows, first_feature, first_column, job,
                                      static_cast<Float16*>(job.grad));
    default:
      return add_tile<float, C, kN>(sums, rows, first_feature, first_column, job,
                                    static_cast<float*>(job.grad));
  }
}

// ---- 16 bits, on tensor cores -------------------------------------------------------------------

__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], BFloat16) {
  mma_bf16(d, a, b);
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], Float16) {
  mma_f16(d, a, b);
}

template <int kM, int kN>
struct SampledTile {
  static constexpr int kDepth = 32;  // tokens of a stage
  static constexpr int kStages = kM + kN > 320 ? 3 : 4;
  static constexpr int kStageBytes = kDepth * (kM + kN) * 2;
  static constexpr int kListBytes = kListedTokens * 2 + 128;
  static constexpr int kBytes = kListBytes + kStages * kStageBytes;
  static constexpr int kSlab = 64;  // features whose sums fit into the stages
  static_assert(kSlab * (kN + 1) * 4 <= kStages * kStageBytes, "sums do not fit");
};

// A row of kWidth 16-bit numbers in shared memory, in chunks of 8 that are permuted so that equal
// chunks of 8 rows lie in different banks.
template <int kWidth>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kWidth + (chunk ^ (row & 7)) * 8;
}

// Copies rows of the listed tokens, `width` columns of each, zeros where there is nothing.
template <int kWidth, int kDepth>
__device__ __forceinline__ void gather_rows(const uint16_t* from, int64_t stride, int64_t columns,
                                            const uint16_t* list, int begin, int count,
                                            uint16_t* to) {
  constexpr int kChunks = kWidth / 8;
#pragma unroll
  for (int i = 0; i < kDepth * kChunks / kProductThreads; ++i) {
    const int number = i * kProductThreads + threadIdx.x;
    const int row = number / kChunks, chunk = number % kChunks;
    const bool valid = begin + row < count && chunk * 8 < columns;
    const int64_t token = valid ? list[begin + row] : 0;
    copy_async(to + chunk_offset<kWidth>(row, chunk),
               from + token * stride + (valid ? chunk * 8 : 0), valid);
  }
}

// A block a tile: groups one after the other, each with its tiles of columns. Warps stand two by
// four on the tile.
template <typename V, int kM, int kN>
__global__ void __launch_bounds__(kProductThreads, kM == 64 ? 2 : 1)
    sampled_product_kernel(ProductJob job) {
  using Tile = SampledTile<kM, kN>;
  constexpr int kDepth = Tile::kDepth, kStages = Tile::kStages;
  constexpr int kRows = kM / 2, kColumns = kN / 4;  // of a warp
  constexpr int kRowTiles = kRows / 16, kColumnTiles = kColumns / 8;
  MOLEGRAD_SHARED(shared);
  auto* scratch = reinterpret_cast<int*>(shared);
  auto* list = reinterpret_cast<uint16_t*>(shared + 128);
  auto* stages = reinterpret_cast<uint16_t*>(shared + Tile::kListBytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 4 * kRows, warp_column = warp % 4 * kColumns;
  const int tiles = static_cast<int>((job.columns + kN - 1) / kN);
  const int64_t group = blockIdx.x / tiles, column = static_cast<int64_t>(blockIdx.x % tiles) * kN;
  const auto* x = static_cast<const uint16_t*>(job.x) + group * job.x_group;
  const auto* z = static_cast<const uint16_t*>(job.z) + column;
  const uint32_t* marks = job.marks != nullptr ? job.marks + group * job.words : nullptr;
  // Rows of X̃ are whole groups, or rows of X that end with the features.
  const int64_t x_columns = job.marks != nullptr ? kM : job.features - group * kM;
  const int64_t z_columns = job.columns - column;

  float sums[kRowTiles][kColumnTiles][4] = {};
  bool any = false;
  for (int64_t first = 0; first < job.tokens; first += kListedTokens) {
    const int count = list_tokens(marks, first, job.tokens, list, scratch);
    const int steps = (count + kDepth - 1) / kDepth;
    any = any || count > 0;
    const auto load = [&](int step) {
      if (step < steps) {
        uint16_t* to = stages + step % kStages * (Tile::kStageBytes / 2);
        gather_rows<kM, kDepth>(x + first * job.x_row, job.x_row, x_columns, list, step * kDepth,
                                count, to);
        gather_rows<kN, kDepth>(z + first * job.z_row, job.z_row, z_columns, list, step * kDepth,
                                count, to + kDepth * kM);
      }
      copies_commit();
    };
    for (int step = 0; step < kStages - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      copies_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);  // into the stage that everybody has left
      const uint16_t* x_tile = stages + step % kStages * (Tile::kStageBytes / 2);
      const uint16_t* z_tile = x_tile + kDepth * kM;
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
          load_matrices_transposed(a[i],
                                   x_tile + chunk_offset<kM>(k + lane % 8 + lane / 16 * 8,
                                                             warp_row / 8 + i * 2 + lane / 8 % 2));
#pragma unroll
        for (int j = 0; j < kColumnTiles / 2; ++j)
          load_matrices_transposed(b[j],
                                   z_tile + chunk_offset<kN>(k + lane % 8 + lane / 8 % 2 * 8,
                                                             warp_column / 8 + j * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) {
            const uint32_t right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
            multiply_add(sums[i][j], a[i], right, V());
          }
      }
    }
    copies_wait<0>();
    __syncthreads();  // the list and the stages are free
  }
  if (!any) return;
  auto* tile = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int slab = 0; slab < kM; slab += Tile::kSlab) {
    if (slab > 0) __syncthreads();
    if (warp_row / Tile::kSlab * Tile::kSlab == slab) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = warp_row - slab + i * 16 + lane / 4 + e / 2 * 8;
            tile[row * (kN + 1) + warp_column + j * 8 + lane % 4 * 2 + e % 2] = sums[i][j][e];
          }
    }
    __syncthreads();
    add_tile<float, kN>(tile, Tile::kSlab, group * kM + slab, column, job);
  }
}

// ---- more bits, in plain arithmetic -------------------------------------------------------------

constexpr int kPlainTile = 64, kPlainDepth = 16;

template <typename C>
constexpr int plain_product_bytes() {
  return kListedTokens * 2 + 128 + kPlainTile * (kPlainTile + 1) * static_cast<int>(sizeof(C));
}

// Each thread four by four of a tile of 64 by 64.
template <typename C>
__global__ void __launch_bounds__(kProductThreads) plain_product_kernel(ProductJob job) {
  MOLEGRAD_SHARED(shared);
  auto* scratch = reinterpret_cast<int*>(shared);
  auto* list = reinterpret_cast<uint16_t*>(shared + 128);
  auto* x_tile = reinterpret_cast<C*>(shared + kListedTokens * 2 + 128);  // (depth, tile)
  C* z_tile = x_tile + kPlainDepth * kPlainTile;
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;  // in quarters of the tile
  const int tiles = static_cast<int>((job.columns + kPlainTile - 1) / kPlainTile);
  const int64_t group = blockIdx.x / tiles;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % tiles) * kPlainTile;
  const C* x = static_cast<const C*>(job.x) + group * job.x_group;
  const C* z = static_cast<const C*>(job.z) + first_column;
  const uint32_t* marks = job.marks != nullptr ? job.marks + group * job.words : nullptr;
  const int64_t x_columns = job.marks != nullptr ? kPlainTile : job.features - group * kPlainTile;
  const int64_t z_columns = job.columns - first_column;

  C sums[4][4] = {};
  bool any = false;
  for (int64_t first = 0; first < job.tokens; first += kListedTokens) {
    const int count = list_tokens(marks, first, job.tokens, list, scratch);
    any = any || count > 0;
    for (int begin = 0; begin < count; begin += kPlainDepth) {
#pragma unroll
      for (int i = 0; i < kPlainDepth * kPlainTile / kProductThreads; ++i) {
        const int number = i * kProductThreads + threadIdx.x;
        const int k = number / kPlainTile, c = number % kPlainTile;
        const int64_t token = begin + k < count ? first + list[begin + k] : -1;
        x_tile[number] = token >= 0 && c < x_columns ? x[token * job.x_row + c] : C(0);
        z_tile[number] = token >= 0 && c < z_columns ? z[token * job.z_row + c] : C(0);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kPlainDepth; ++k) {
        C left[4], right[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          left[i] = x_tile[k * kPlainTile + row * 4 + i];
          right[i] = z_tile[k * kPlainTile + column * 4 + i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] += left[i] * right[j];
      }
      __syncthreads();
    }
  }
  if (!any) return;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x_tile[(row * 4 + i) * (kPlainTile + 1) + column * 4 + j] = sums[i][j];
  __syncthreads();
  add_tile<C, kPlainTile>(x_tile, kPlainTile, group * kPlainTile, first_column, job);
}

}  // namespace molegrad::cuda
