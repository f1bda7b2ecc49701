// Norms and scores of sampled_grad_, for sampled_kernels.cpp alone. Included there, once per
// instruction set.
#pragma once

#include "elements.h"
#include "kernels.h"
#include "simd.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

template <typename C>
C sum_of_squares(const C* x, int64_t n) {
  using Loose = typename Simd<C>::Loose;
  constexpr int kLanes = Simd<C>::kLanes;
  typename Simd<C>::Vec sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int j = 0; j < 2; ++j) {
      const Loose v = *reinterpret_cast<const Loose*>(x + i + j * kLanes);
      sums[j] += v * v;
    }
  C total = 0;
  for (; i < n; ++i) total += x[i] * x[i];
  for (int j = 0; j < kLanes; ++j) total += sums[0][j] + sums[1][j];
  return total;
}

// Columns [column, column + columns) of a row, times its scale: in place where nothing is to be
// done to them, else in `buffer`.
template <typename C>
const C* load_scaled(const View& src, const C* scale, int64_t row, int64_t column, int64_t columns,
                     C* buffer) {
  const int64_t offset = row * src.ld + column;
  if (scale == nullptr && src.dtype == (sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32))
    return static_cast<const C*>(src.data) + offset;
  with_inputs(src.data, src.dtype, offset,
              [&](const auto* from) { load_row(from, columns, buffer); });
  if (scale != nullptr) {
    const C factor = scale[row];
    for (int64_t c = 0; c < columns; ++c) buffer[c] *= factor;
  }
  return buffer;
}

// Asks for columns of a row that is needed soon: rows are far apart, which no prefetcher foresees.
inline void ask_for(const View& src, int64_t row, int64_t column, int64_t columns) {
  if (row >= src.rows) return;
  const int64_t size = element_size(src.dtype);
  const char* from = static_cast<const char*>(src.data) + (row * src.ld + column) * size;
  for (int64_t byte = 0; byte < columns * size; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

template <typename C>
void pack_wide(const SampleRule<C>& rule, int64_t first, int64_t rows, int64_t to, C* panels,
               C* out, C* scratch) {
  const int64_t d = rule.z.cols;
  const WidePanels wide(Simd<C>::kLanes, d);
  for (int64_t r = 0; r < rows; ++r) {
    const C* z = load_scaled(rule.z, rule.z_scale, first + r, 0, d, scratch);
    if (rule.sampling) {
      out[r] = sum_of_squares(z, d);
    } else {
      C probe = 0;
      for (int64_t c = 0; c < d; ++c) probe += z[c] * 0;
      out[r] = probe;
    }
    for (int64_t p = 0; p < wide.count(); ++p) {
      const int64_t width = wide.panel_width(p), column = p * wide.width;
      const int64_t columns = min64(width, d - column);
      C* row = panels + column * kChunk + (to + r) * width;
      for (int64_t c = 0; c < columns; ++c) row[c] = z[column + c];
      for (int64_t c = columns; c < width; ++c) row[c] = 0;
    }
  }
}

// out[β] = ‖x_β‖² of the blocks of `features` numbers, the last of which may be short; what follows
// them in `out`, up to `features` numbers, is overwritten.
template <typename C, int kBlock>
void block_norms(const C* __restrict x, int64_t features, C* __restrict out) {
  const int64_t whole = features / kBlock;
  for (int64_t b = 0; b < whole; ++b) {
    C sum = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i) sum += x[b * kBlock + i] * x[b * kBlock + i];
    out[b] = sum;
  }
  if (whole * kBlock < features)
    out[whole] = sum_of_squares(x + whole * kBlock, features - whole * kBlock);
}

// Sums of neighbours, in place; a last one without a neighbour stays.
template <typename C>
int64_t add_pairs(C* x, int64_t n) {
  for (int64_t i = 0; i < n / 2; ++i) x[i] = x[2 * i] + x[2 * i + 1];
  if (n % 2 != 0) x[n / 2] = x[n - 1];
  return (n + 1) / 2;
}

template <typename C>
void block_norms(const C* x, int64_t features, int64_t block, C* out) {
  if (block == 1) return block_norms<C, 1>(x, features, out);
  if (block == 2) return block_norms<C, 2>(x, features, out);
  if (block == 4 || block == 8 || block == 16) {
    block_norms<C, 4>(x, features, out);
    int64_t n = (features + 3) / 4;
    for (int64_t size = 4; size < block; size *= 2) n = add_pairs(out, n);
    return;
  }
  for (int64_t b = 0; b * block < features; ++b)
    out[b] = sum_of_squares(x + b * block, min64(block, features - b * block));
}

int64_t aligned(int64_t count) { return round_up(count, kGroup); }

template <typename C>
int64_t scores_scratch(const SampleRule<C>& rule) {
  return 2 * aligned(rule.x.cols);
}

template <typename C>
void scores(const SampleRule<C>& rule, int64_t first, int64_t step, int64_t rows, C* out,
            C* scratch) {
  const int64_t features = rule.x.cols, blocks = (features + rule.block - 1) / rule.block;
  C* squares = scratch;
  C* buffer = squares + aligned(features);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = first + r * step;
    const C z_sq = sum_of_squares(load_scaled(rule.z, rule.z_scale, token, 0, rule.z.cols, buffer),
                                  rule.z.cols);
    block_norms(load_scaled(rule.x, rule.x_scale, token, 0, features, buffer), features, rule.block,
                squares);
    for (int64_t b = 0; b < blocks; ++b) out[r * blocks + b] = root(squares[b] * z_sq);
  }
}

// In pieces, so that sums in the compute type stay exact enough.
template <typename C>
double clipped_sum(const C* s, int64_t n, C limit) {
  using Vec = typename Simd<C>::Vec;
  using Loose = typename Simd<C>::Loose;
  constexpr int kLanes = Simd<C>::kLanes;
  constexpr int64_t kPiece = 64 * kLanes;
  const Vec most = Vec{} + limit;
  double total = 0;
  int64_t i = 0;
  while (i + kLanes <= n) {
    const int64_t end = min64(n - kLanes + 1, i + kPiece);
    Vec sum = {};
    for (; i < end; i += kLanes) {
      const Vec score = *reinterpret_cast<const Loose*>(s + i);
      sum += score > most ? most : score;
    }
    for (int l = 0; l < kLanes; ++l) total += static_cast<double>(sum[l]);
  }
  for (; i < n; ++i) total += static_cast<double>(s[i] > limit ? limit : s[i]);
  return total;
}

}  // namespace
}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
