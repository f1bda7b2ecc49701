// Batches of tall matrices in float32 or float64: XᵀX in parts, and X S row by row, for the k x k
// work of orth.cuh and polar.cu.
//
// Sums are float32 FMA, not tensor cores: at k = 32 and 12 matrices of 3072 rows XᵀX is 38 million
// FMA, 3 us on an H100, which is what launching costs anyway, and CholeskyQR needs all 24 bits. A
// thread keeps 4 x 4 sums, so that 8 numbers read from shared memory feed 16 FMA. Every sum has a
// fixed order: rows within a part, parts one after the other.
#pragma once

#include "elements.cuh"

namespace molegrad::cuda {

constexpr int kTallThreads = 256;
constexpr int kTile = 32;                                 // columns of a tile
constexpr int kPartRows = 64, kApplyRows = 128;           // rows of a tile
constexpr int kApplyLd = kTile + 4;                       // four rows side by side share no bank
constexpr int kEmpty = -(1 << 20), kNotFinite = 1 << 20;  // exponents of a column

// Row-major matrices of one shape, `stride` numbers from one to the next.
struct TallBatch {
  const void* data;
  int dtype;
  int64_t ld, stride;
};

// fn(pointer to the first element), with the element's type.
template <typename F>
__device__ __forceinline__ void with_elements(const TallBatch& x, const F& fn) {
  switch (x.dtype) {
    case 1:
      return fn(static_cast<const double*>(x.data));
    case 2:
      return fn(static_cast<const BFloat16*>(x.data));
    case 3:
      return fn(static_cast<const Float16*>(x.data));
    default:
      return fn(static_cast<const float*>(x.data));
  }
}

// First of all in kernels that are launched one after the other, with launch_early: the next one's
// blocks come as soon as all of this one's have passed here, and wait here until it is done.
__device__ __forceinline__ void in_sequence() {
  wait_for_launch_before();
  let_next_launch_start();
}

template <typename C>
__device__ __forceinline__ bool is_finite(C x) {
  return x - x == C(0);
}

template <typename C>
__device__ __forceinline__ C magnitude(C x) {
  return x < 0 ? -x : x;
}

// The e with 2^(e-1) <= x < 2^e.
__device__ __forceinline__ int exponent_above(float x) {
  int e;
  frexpf(x, &e);
  return e;
}
__device__ __forceinline__ int exponent_above(double x) {
  int e;
  frexp(x, &e);
  return e;
}

__device__ __forceinline__ float times_power(float x, int e) { return ldexpf(x, e); }
__device__ __forceinline__ double times_power(double x, int e) { return ldexp(x, e); }

// 2^e for e <= 0, 0 where it is nothing beside 1 even when squared.
__device__ __forceinline__ float small_power(int e) {
  return e < -126 ? 0.0f : from_bits(static_cast<uint32_t>(e + 127) << 23);
}

template <typename C>
__device__ __forceinline__ C root(C x) {
  if constexpr (sizeof(C) == 4)
    return sqrtf(x);
  else
    return sqrt(x);
}

// The distance from 1 to the next number.
template <typename C>
__device__ constexpr C rounding_of() {
  return sizeof(C) == 4 ? C(1.1920928955078125e-7) : C(2.220446049250313e-16);
}

// ---- XᵀX ----------------------------------------------------------------------------------------

struct TallProduct {
  TallBatch x;
  int64_t rows, k, part_rows;  // part_rows is a multiple of kPartRows
  int parts;
  void* sums;        // (batch, parts, k, k): only tiles that touch the upper triangle
  int* exponents;    // (batch, parts, k), of columns that are scaled to [0, 1); else null
  const int* route;  // (batch) or null: only matrices of route `wanted`
  int wanted;
};

// tile[r][c] = x[row + r][col + c], zero outside.
template <typename C, int kRows, int kLd>
__device__ __forceinline__ void load_tile(C* tile, const TallBatch& x, int64_t matrix, int64_t row,
                                          int64_t rows, int64_t col, int64_t cols) {
  constexpr int kStep = kTallThreads / kTile, kEach = kRows / kStep;
  const int c = threadIdx.x % kTile, first = threadIdx.x / kTile;
  with_elements(x, [&](const auto* data) {
    const auto* from = data + matrix * x.stride + row * x.ld + col + c;
    C values[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int r = first + i * kStep;
      const bool inside = row + r < rows && col + c < cols;
      values[i] = inside ? static_cast<C>(widen(from[r * x.ld])) : C(0);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) tile[(first + i * kStep) * kLd + c] = values[i];
  });
}

// What is known of the columns of both tiles so far.
template <typename C>
struct ColumnScales {
  C largest[4][2 * kTile];
  int exponent[2 * kTile], shift[2 * kTile];
};

// Divides the tiles by a power of two for each column, so that squares cannot overflow, and says by
// how much the columns' earlier sums shrink. `columns` is kTile where both tiles are one.
template <typename C>
__device__ void scale_tiles(C* tiles, ColumnScales<C>& scales, int columns, C (&sums)[4][4]) {
  const int thread = threadIdx.x, c = thread % (2 * kTile), group = thread / (2 * kTile);
  constexpr int kRows = kPartRows / 4;
  C* column = tiles + c / kTile * kPartRows * kTile + group * kRows * kTile + c % kTile;
  if (c < columns) {
    C largest = 0;
    bool finite = true;
    for (int r = 0; r < kRows; ++r) {
      const C size = magnitude(column[r * kTile]);
      finite = finite && is_finite(size);
      if (size > largest) largest = size;
    }
    scales.largest[group][c] = finite ? largest : C(-1);
  }
  __syncthreads();
  if (thread < columns) {
    bool finite = true;
    C largest = 0;
    for (int g = 0; g < 4; ++g) {
      const C size = scales.largest[g][c];
      finite = finite && size >= 0;
      if (size > largest) largest = size;
    }
    const int here = !finite ? kNotFinite : largest == 0 ? kEmpty : exponent_above(largest);
    const int before = scales.exponent[c], now = here > before ? here : before;
    scales.exponent[c] = now;
    scales.shift[c] = before == kEmpty ? 0 : before - now;
  }
  __syncthreads();
  if (c < columns) {
    const int e = scales.exponent[c];
    if (e != kEmpty && e != kNotFinite)
      for (int r = 0; r < kRows; ++r) column[r * kTile] = times_power(column[r * kTile], -e);
  }
  const int i = thread % 64 / 8 * 4, j = thread % 8 * 4 + (columns == kTile ? 0 : kTile);
  for (int p = 0; p < 4; ++p)
    for (int q = 0; q < 4; ++q)
      sums[p][q] *= static_cast<C>(small_power(scales.shift[i + p])) *
                    static_cast<C>(small_power(scales.shift[j + q]));
  __syncthreads();
}

// One tile (kTile, kTile) of one part's sum. 64 threads cover the tile, four groups share the rows.
template <typename C, bool kScaled>
__global__ void __launch_bounds__(kTallThreads) tall_product_kernel(TallProduct p) {
  MOLEGRAD_SHARED(memory);
  in_sequence();
  C* left = reinterpret_cast<C*>(memory);
  C* right = left + kPartRows * kTile;
  auto& scales = *reinterpret_cast<ColumnScales<C>*>(right + kPartRows * kTile);
  const int64_t wide = (p.k + kTile - 1) / kTile, tiles = wide * (wide + 1) / 2;
  const int64_t part = blockIdx.x % p.parts, matrix = blockIdx.x / p.parts / tiles;
  if (p.route != nullptr && p.route[matrix] != p.wanted) return;
  int64_t tile = blockIdx.x / p.parts % tiles, row_tile = 0;
  for (; tile >= wide - row_tile; ++row_tile) tile -= wide - row_tile;
  tile += row_tile;
  const int64_t first_i = row_tile * kTile, first_j = tile * kTile;
  const bool same = first_i == first_j;
  if (same) right = left;
  const int thread = threadIdx.x, group = thread / 64;
  const int i = thread % 64 / 8 * 4, j = thread % 8 * 4;
  if (kScaled && thread < 2 * kTile) scales.exponent[thread] = kEmpty;
  C sums[4][4] = {};
  int64_t end = (part + 1) * p.part_rows;
  if (end > p.rows) end = p.rows;
  for (int64_t row = part * p.part_rows; row < end; row += kPartRows) {
    load_tile<C, kPartRows, kTile>(left, p.x, matrix, row, end, first_i, p.k);
    if (!same) load_tile<C, kPartRows, kTile>(right, p.x, matrix, row, end, first_j, p.k);
    __syncthreads();
    if constexpr (kScaled) scale_tiles(left, scales, same ? kTile : 2 * kTile, sums);
#pragma unroll 4
    for (int r = group; r < kPartRows; r += 4) {
      const Pack<C, 4> a = load_pack<4>(left + r * kTile + i),
                       b = load_pack<4>(right + r * kTile + j);
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int t = 0; t < 4; ++t) sums[s][t] += a.at[s] * b.at[t];
    }
    __syncthreads();
  }
  C* groups = left;  // [group][4 s + t][thread of the group]
#pragma unroll
  for (int s = 0; s < 4; ++s)
#pragma unroll
    for (int t = 0; t < 4; ++t) groups[(group * 16 + s * 4 + t) * 64 + thread % 64] = sums[s][t];
  __syncthreads();
  C* out = static_cast<C*>(p.sums) + (matrix * p.parts + part) * p.k * p.k;
  for (int e = thread; e < kTile * kTile; e += kTallThreads) {
    const int r = e / kTile, c = e % kTile;
    if (first_i + r >= p.k || first_j + c >= p.k) continue;
    const C* from = groups + (r % 4 * 4 + c % 4) * 64 + r / 4 * 8 + c / 4;
    out[(first_i + r) * p.k + first_j + c] =
        (from[0] + from[16 * 64]) + (from[32 * 64] + from[48 * 64]);
  }
  if (kScaled && same && thread < kTile && first_i + thread < p.k)
    p.exponents[(matrix * p.parts + part) * p.k + first_i + thread] = scales.exponent[thread];
}

// ---- the parts' sum -----------------------------------------------------------------------------

struct TallSums {
  const void* sums;      // (batch, parts, k, k)
  const int* exponents;  // (batch, parts, k) or null
  int64_t k;
  int parts;
};

// The largest exponent of a column; kEmpty for a column of zeros.
__device__ __forceinline__ int column_exponent(const TallSums& p, int64_t matrix, int64_t column) {
  const int* exponents = p.exponents + matrix * p.parts * p.k + column;
  int largest = kEmpty;
#pragma unroll 8
  for (int part = 0; part < p.parts; ++part) {
    const int e = exponents[part * p.k];
    largest = e > largest ? e : largest;
  }
  return largest;
}

// Element (i, j) of XᵀX, its columns divided by 2 to their exponents.
template <typename C>
__device__ __forceinline__ C sum_of_parts(const TallSums& p, int64_t matrix, int64_t i, int64_t j,
                                          int exponent_i, int exponent_j) {
  const C* sums = static_cast<const C*>(p.sums) + matrix * p.parts * p.k * p.k + i * p.k + j;
  C sum = 0;
  if (p.exponents == nullptr) {
#pragma unroll 8
    for (int part = 0; part < p.parts; ++part) sum += sums[part * p.k * p.k];
    return sum;
  }
  const int* exponents = p.exponents + matrix * p.parts * p.k;
#pragma unroll 8
  for (int part = 0; part < p.parts; ++part)
    sum += sums[part * p.k * p.k] *
           (static_cast<C>(small_power(exponents[part * p.k + i] - exponent_i)) *
            static_cast<C>(small_power(exponents[part * p.k + j] - exponent_j)));
  return sum;
}

struct TallCombine {
  TallSums from;
  int64_t count;       // of all matrices' elements
  void* sum;           // (batch, k, k)
  int* sum_exponents;  // (batch, k) or null, as from.exponents is
  const int* route;    // as in TallProduct
  int wanted;
};

// Where one block for each matrix would take too long to add the parts.
template <typename C>
__global__ void __launch_bounds__(kTallThreads) tall_combine_kernel(TallCombine p) {
  in_sequence();
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kTallThreads + threadIdx.x;
  const int64_t k = p.from.k, matrix = e / (k * k);
  if (e >= p.count || (p.route != nullptr && p.route[matrix] != p.wanted)) return;
  const int64_t i = e / k % k, j = e % k;
  int exponent_i = 0, exponent_j = 0;
  if (p.sum_exponents != nullptr) {
    if (j < i) return;  // a symmetric product
    exponent_i = column_exponent(p.from, matrix, i);
    exponent_j = column_exponent(p.from, matrix, j);
    if (i == j) p.sum_exponents[matrix * k + i] = exponent_i;
  }
  static_cast<C*>(p.sum)[e] = sum_of_parts<C>(p.from, matrix, i, j, exponent_i, exponent_j);
}

// ---- X S ----------------------------------------------------------------------------------------

struct TallApply {
  TallBatch x;
  int64_t rows, k;
  const int* exponents;  // (batch, k): columns of x are divided by 2 to them first; or null
  const void* s;         // (batch, k, k)
  bool upper;            // s is triangular
  void* out;             // (batch, rows, k)
  bool in_packs;         // out can be written four numbers at a time
  const int* route;  // (batch) or null: matrices of another route than 0 are left alone, or become
  bool nan;          // NaN
};

template <typename C>
struct ApplyTiles {
  alignas(32) C x[kApplyRows][kApplyLd];
  alignas(32) C s[kTile][kApplyLd];
};

__device__ __forceinline__ int64_t apply_tiles(int64_t rows, int64_t cols) {
  return (rows + kApplyRows - 1) / kApplyRows * ((cols + kTile - 1) / kTile);
}

// Tile number `tile` of x s of a matrix: four rows and four columns for each thread.
template <typename C>
__device__ __forceinline__ void apply_tile(const TallApply& p, int64_t matrix, int64_t tile,
                                           ApplyTiles<C>& tiles) {
  const int64_t wide = (p.k + kTile - 1) / kTile;
  const int64_t row = tile / wide * kApplyRows, col = tile % wide * kTile;
  const int thread = threadIdx.x, ty = thread / 8, tx = thread % 8 * 4;
  const C* s = static_cast<const C*>(p.s) + matrix * p.k * p.k;
  C sums[4][4] = {};
  for (int64_t slab = 0; slab < p.k; slab += kTile) {
    if (p.upper && slab >= col + kTile) break;
    load_tile<C, kApplyRows, kApplyLd>(&tiles.x[0][0], p.x, matrix, row, p.rows, slab, p.k);
    if (p.exponents != nullptr && slab + thread % kTile < p.k) {
      // A thread scales what it has loaded.
      const int e = p.exponents[matrix * p.k + slab + thread % kTile];
      if (e != 0)
        for (int r = thread / kTile; r < kApplyRows; r += kTallThreads / kTile)
          tiles.x[r][thread % kTile] = times_power(tiles.x[r][thread % kTile], -e);
    }
    for (int e = thread; e < kTile * kTile; e += kTallThreads) {
      const int l = e / kTile, c = e % kTile;
      const bool inside = slab + l < p.k && col + c < p.k;
      tiles.s[l][c] = inside ? s[(slab + l) * p.k + col + c] : C(0);
    }
    __syncthreads();
#pragma unroll 2
    for (int l = 0; l < kTile; l += 4) {
      Pack<C, 4> a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = load_pack<4>(&tiles.x[ty + 32 * i][l]);
        b[i] = load_pack<4>(&tiles.s[l + i][tx]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] += a[i].at[q] * b[q].at[j];
    }
    __syncthreads();
  }
  C* out = static_cast<C*>(p.out) + matrix * p.rows * p.k;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row + ty + 32 * i >= p.rows) continue;
    C* to = out + (row + ty + 32 * i) * p.k + col + tx;
    if (p.in_packs && col + tx + 4 <= p.k) {
      Pack<C, 4> pack;
#pragma unroll
      for (int j = 0; j < 4; ++j) pack.at[j] = sums[i][j];
      store_pack(to, pack);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (col + tx + j < p.k) to[j] = sums[i][j];
  }
}

// out = value, for one tile.
template <typename C, typename F>
__device__ __forceinline__ void fill_tile(const TallApply& p, int64_t matrix, int64_t tile,
                                          const F& value) {
  const int64_t wide = (p.k + kTile - 1) / kTile;
  const int64_t row = tile / wide * kApplyRows, col = tile % wide * kTile;
  C* out = static_cast<C*>(p.out) + matrix * p.rows * p.k;
  const int64_t c = col + threadIdx.x % kTile;
  for (int r = threadIdx.x / kTile; r < kApplyRows; r += kTallThreads / kTile)
    if (row + r < p.rows && c < p.k) out[(row + r) * p.k + c] = value(row + r, c);
}

template <typename C>
__global__ void __launch_bounds__(kTallThreads) tall_apply_kernel(TallApply p) {
  MOLEGRAD_SHARED(memory);
  in_sequence();
  const int64_t tiles = apply_tiles(p.rows, p.k);
  const int64_t matrix = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  if (p.route == nullptr || p.route[matrix] == 0) {
    apply_tile(p, matrix, tile, *reinterpret_cast<ApplyTiles<C>*>(memory));
  } else if (p.nan) {
    fill_tile<C>(p, matrix, tile,
                 [](int64_t, int64_t) { return static_cast<C>(from_bits(0x7fc00000u)); });
  }
}

}  // namespace molegrad::cuda
