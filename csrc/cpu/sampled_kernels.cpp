// The arithmetic of sampled_grad_: X̃ᵀZ, where X̃ is a sample of X. Compiled once per instruction
// set, like kernels.cpp.
//
// X̃ is mostly zeros: what was not taken, and zeros of X itself, of which activations such as relu²
// and their gradients have many. How they lie depends on the data and on the blocks of the sample,
// so every group of features chooses the tile with which it has least to do: one or two features,
// whose tokens are read from a bit mask, or four or eight, whose tokens are listed.
#include "elements.h"
#include "kernels.h"
#include "simd.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

// Cycles that a panel costs per token of a tile of 1, 2, 4, 8 features, and per tile of a mask.
constexpr double kTokenCost[] = {5.0, 8.5, 17.0, 33.0};
constexpr double kMaskCost[] = {30.0, 40.0};

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

template <typename C>
void load_scaled(const View& src, const C* scale, int64_t row, int64_t column, int64_t columns,
                 C* dst) {
  with_inputs(src.data, src.dtype, row * src.ld + column,
              [&](const auto* from) { load_row(from, columns, dst); });
  if (scale != nullptr) {
    const C factor = scale[row];
    for (int64_t c = 0; c < columns; ++c) dst[c] *= factor;
  }
}

template <typename C>
void pack_wide(const SampleRule<C>& rule, int64_t first, int64_t rows, int64_t capacity, int64_t to,
               bool only_finite, C* panels, C* out, C* scratch) {
  const int64_t d = rule.z.cols;
  const WidePanels wide(Simd<C>::kLanes, d);
  for (int64_t c = d; c < wide.cols; ++c) scratch[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    load_scaled(rule.z, rule.z_scale, first + r, 0, d, scratch);
    if (only_finite) {
      C probe = 0;
      for (int64_t c = 0; c < d; ++c) probe += scratch[c] * 0;
      out[r] = probe;
    } else {
      out[r] = sum_of_squares(scratch, d);
    }
    for (int64_t p = 0; p < wide.count(); ++p) {
      const int64_t width = wide.panel_width(p), column = p * wide.width;
      C* row = panels + column * capacity + (to + r) * width;
      for (int64_t c = 0; c < width; ++c) row[c] = scratch[column + c];
    }
  }
}

// out[β] = ‖x_β‖² of `blocks` blocks, the last of which may be short.
template <typename C, int kBlock>
void block_norms(const C* x, int64_t features, C* out) {
  const int64_t whole = features / kBlock;
  for (int64_t b = 0; b < whole; ++b) {
    C sum = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) sum += x[b * kBlock + i] * x[b * kBlock + i];
    out[b] = sum;
  }
  if (whole * kBlock < features)
    out[whole] = sum_of_squares(x + whole * kBlock, features - whole * kBlock);
}

template <typename C>
void block_norms(const C* x, int64_t features, int64_t block, C* out) {
  switch (block) {
    case 1:
      return block_norms<C, 1>(x, features, out);
    case 2:
      return block_norms<C, 2>(x, features, out);
    case 4:
      return block_norms<C, 4>(x, features, out);
    case 8:
      return block_norms<C, 8>(x, features, out);
    case 16:
      return block_norms<C, 16>(x, features, out);
    default:
      for (int64_t b = 0; b * block < features; ++b)
        out[b] = sum_of_squares(x + b * block, min64(block, features - b * block));
  }
}

int64_t aligned(int64_t count) { return round_up(count, kGroup); }

template <typename C>
int64_t scores_scratch(const SampleRule<C>& rule) {
  return aligned(rule.x.cols) + aligned(rule.z.cols);
}

template <typename C>
void scores(const SampleRule<C>& rule, int64_t first, int64_t step, int64_t rows, C* out,
            C* scratch) {
  const int64_t features = rule.x.cols, blocks = (features + rule.block - 1) / rule.block;
  C* z = scratch + aligned(features);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = first + r * step;
    load_scaled(rule.z, rule.z_scale, token, 0, rule.z.cols, z);
    const C z_sq = sum_of_squares(z, rule.z.cols);
    load_scaled(rule.x, rule.x_scale, token, 0, features, scratch);
    C* row = out + r * blocks;
    block_norms(scratch, features, rule.block, row);
    for (int64_t b = 0; b < blocks; ++b) row[b] = root(row[b] * z_sq);
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

// ---- the sample of a chunk ----------------------------------------------------------------------

// Uniform numbers in [0, 1) of the pairs index + 1, index + 2, …: 24 bits of the hash.
template <typename C>
void uniform_row(uint64_t stream, uint64_t index, int64_t n, C* out) {
  for (int64_t i = 0; i < n; ++i) {
    uint64_t x = stream + (index + static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    out[i] = static_cast<C>(static_cast<int32_t>(x >> 40)) * C(0x1p-24);
  }
}

// The weights of `blocks` blocks (a multiple of the vector's lanes) from their squared lengths.
template <typename C>
void weigh(const C* squares, const C* uniform, C token_weight, int64_t blocks, C* weight,
           SampleSums* sums) {
  using Vec = typename Simd<C>::Vec;
  using Loose = typename Simd<C>::Loose;
  constexpr int kLanes = Simd<C>::kLanes;
  for (int64_t b = 0; b < blocks; ++b) weight[b] = root(squares[b] * token_weight);
  const Vec one = Vec{} + C(1), zero = Vec{};
  Vec taken = {}, noise = {}, energy = {};
  for (int64_t b = 0; b < blocks; b += kLanes) {
    Loose* slot = reinterpret_cast<Loose*>(weight + b);
    const Vec ratio = *slot, number = *reinterpret_cast<const Loose*>(uniform + b);
    const auto sure = ratio >= one, take = number < ratio;
    taken += take ? one : zero;
    noise += sure ? zero : ratio - ratio * ratio;
    energy += ratio * ratio;
    // A score that is no number makes its block of the gradient NaN.
    *slot = sure ? one : take | (ratio != ratio) ? one / ratio : zero;
  }
  for (int l = 0; l < kLanes; ++l) {
    sums->taken += static_cast<double>(taken[l]);
    sums->noise += static_cast<double>(noise[l]);
    sums->energy += static_cast<double>(energy[l]);
  }
}

// out[f] = weight of the block of feature f.
template <typename C, int kBlock>
void spread(const C* weight, int64_t features, C* out) {
  const int64_t whole = features / kBlock;
  for (int64_t b = 0; b < whole; ++b)
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) out[b * kBlock + i] = weight[b];
  for (int64_t f = whole * kBlock; f < features; ++f) out[f] = weight[whole];
}

template <typename C>
void spread(const C* weight, int64_t features, int64_t block, C* out) {
  switch (block) {
    case 1:
      return spread<C, 1>(weight, features, out);
    case 2:
      return spread<C, 2>(weight, features, out);
    case 4:
      return spread<C, 4>(weight, features, out);
    case 8:
      return spread<C, 8>(weight, features, out);
    case 16:
      return spread<C, 16>(weight, features, out);
    default:
      for (int64_t f = 0; f < features; ++f) out[f] = weight[f / block];
  }
}

// Which values of a group at kMaskTokens tokens are not zero, feature by feature.
template <typename C>
void mask_group(const C* values, int64_t tokens, uint64_t* masks) {
  for (int f = 0; f < kGroup; ++f) masks[f] = 0;
  for (int64_t s = 0; s < tokens; ++s)
    for (int f = 0; f < kGroup; ++f)
      masks[f] |= static_cast<uint64_t>(values[s * kGroup + f] != 0) << s;
}

// The tile with which a group has least to do, and the tokens of its tiles.
template <typename C>
void arrange(const Sample<C>& sample, int64_t group, int64_t rows) {
  const int64_t masks_per_feature = sample.capacity / kMaskTokens;
  const C* values = sample.values + group * (sample.capacity + 1) * kGroup;
  uint64_t* masks = sample.masks + group * masks_per_feature * kGroup;
  int64_t counts[4] = {}, tiles[2] = {};
  for (int64_t s = 0; s < sample.capacity; s += kMaskTokens) {
    uint64_t* mask = masks + s / kMaskTokens * kGroup;
    mask_group(values + s * kGroup, min64(kMaskTokens, rows - s), mask);
    uint64_t eight[2] = {};
    for (int f = 0; f < kGroup; f += 4) {
      const uint64_t left = mask[f] | mask[f + 1], right = mask[f + 2] | mask[f + 3];
      for (int i = 0; i < 4; ++i) {
        counts[0] += __builtin_popcountll(mask[f + i]);
        tiles[0] += mask[f + i] != 0;
      }
      counts[1] += __builtin_popcountll(left) + __builtin_popcountll(right);
      tiles[1] += (left != 0) + (right != 0);
      counts[2] += __builtin_popcountll(left | right);
      eight[f / 8] |= left | right;
    }
    counts[3] += __builtin_popcountll(eight[0]) + __builtin_popcountll(eight[1]);
  }
  int best = 0;
  double least = 0;
  for (int i = 0; i < 4; ++i) {
    const double cost = kTokenCost[i] * static_cast<double>(counts[i]) +
                        (i < 2 ? kMaskCost[i] * static_cast<double>(tiles[i]) : 0);
    if (i == 0 || cost < least) {
      best = i;
      least = cost;
    }
  }
  const int features = 1 << best;
  sample.features[group] = features;
  for (int tile = 0; features >= 4 && tile < kGroup / features; ++tile) {
    int32_t* tokens = sample.tokens + (group * 4 + tile) * sample.capacity;
    int32_t count = 0;
    for (int64_t s = 0; s < rows; s += kMaskTokens) {
      uint64_t any = 0;
      for (int f = 0; f < features; ++f)
        any |= masks[s / kMaskTokens * kGroup + tile * features + f];
      for (; any != 0; any &= any - 1)
        tokens[count++] = static_cast<int32_t>(s + __builtin_ctzll(any));
    }
    sample.lengths[group * 4 + tile] = count;
  }
}

template <typename C>
int64_t scan_scratch(int64_t features, int64_t blocks) {
  return 2 * aligned(features) + 3 * aligned(blocks);
}

template <typename C>
void scan(const SampleRule<C>& rule, int64_t first, int64_t rows, const C* token_weight,
          int64_t block, int64_t blocks, const Sample<C>& sample, SampleSums* sums, C* scratch) {
  const int64_t feature = block * rule.block;
  const int64_t features = min64(rule.x.cols, (block + blocks) * rule.block) - feature;
  const int64_t padded = aligned(features);
  const int64_t pairs = (rule.x.cols + rule.block - 1) / rule.block;
  C* x = scratch;
  C* spread_weight = x + padded;
  C* weight = spread_weight + padded;
  C* uniform = weight + aligned(blocks);
  C* squares = uniform + aligned(blocks);
  for (int64_t f = features; f < padded; ++f) x[f] = spread_weight[f] = 0;
  for (int64_t b = blocks; b < aligned(blocks); ++b) squares[b] = uniform[b] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = first + r;
    load_scaled(rule.x, rule.x_scale, token, feature, features, x);
    if (rule.sampling) {
      block_norms(x, features, rule.block, squares);
      uniform_row(rule.stream, static_cast<uint64_t>(token * pairs + block), blocks, uniform);
      weigh(squares, uniform, token_weight[r], aligned(blocks), weight, sums);
    } else {
      for (int64_t b = 0; b < blocks; ++b) weight[b] = 1 + token_weight[r];
    }
    spread(weight, features, rule.block, spread_weight);
    C* to = sample.values + r * kGroup;
    for (int64_t f = 0; f < padded; f += kGroup, to += (sample.capacity + 1) * kGroup)
      for (int i = 0; i < kGroup; ++i) to[i] = x[f + i] * spread_weight[f + i];
  }
  for (int64_t group = 0; group < padded / kGroup; ++group) arrange(sample, group, rows);
}

// ---- the product --------------------------------------------------------------------------------

// out (kRows, kVectors) += the values of the tokens of a mask times their rows of z.
template <typename C, int kRows, int kVectors>
void gather(const C* __restrict values, uint64_t mask, const C* __restrict z, int64_t width,
            C* __restrict out) {
  using Vec = typename Simd<C>::Vec;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[r][j] = reinterpret_cast<Vec*>(out + r * width)[j];
  for (; mask != 0; mask &= mask - 1) {
    const int64_t s = __builtin_ctzll(mask);
    const Vec* row = reinterpret_cast<const Vec*>(z + s * width);
    Vec value[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) value[r] = values[s * kGroup + r] - Vec{};
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const Vec x = row[j];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][j] += value[r] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) reinterpret_cast<Vec*>(out + r * width)[j] = acc[r][j];
}

// The same over `count` listed tokens.
template <typename C, int kRows, int kVectors>
void tile(const C* __restrict values, const int32_t* __restrict tokens, int64_t count,
          const C* __restrict z, int64_t width, C* __restrict out) {
  using Vec = typename Simd<C>::Vec;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[r][j] = reinterpret_cast<Vec*>(out + r * width)[j];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t s = tokens[i];
    const Vec* row = reinterpret_cast<const Vec*>(z + s * width);
    Vec x[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) x[j] = row[j];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec value = values[s * kGroup + r] - Vec{};
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[r][j] += value * x[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) reinterpret_cast<Vec*>(out + r * width)[j] = acc[r][j];
}

// One group against one panel, kVectors wide.
template <typename C, int kVectors>
void multiply_group(const Sample<C>& sample, int64_t group, const C* z, C* out) {
  constexpr int64_t kLanes = Simd<C>::kLanes, kWidth = kVectors * kLanes;
  constexpr bool kManyRegisters = kRegisters == 32;
  const C* values = sample.values + group * (sample.capacity + 1) * kGroup;
  const int features = sample.features[group];
  if (features <= 2) {
    constexpr int kPair = kManyRegisters ? kVectors : 4;  // vectors at a time of two features
    const int64_t segments = sample.capacity / kMaskTokens;
    const uint64_t* masks = sample.masks + group * segments * kGroup;
    for (int64_t s = 0; s < segments;
         ++s, masks += kGroup, values += kMaskTokens * kGroup, z += kMaskTokens * kWidth)
      for (int f = 0; f < kGroup; f += features) {
        if (features == 1) {
          if (masks[f] != 0)
            gather<C, 1, kVectors>(values + f, masks[f], z, kWidth, out + f * kWidth);
        } else if (const uint64_t mask = masks[f] | masks[f + 1]; mask != 0) {
          for (int64_t j = 0; j < kVectors; j += kPair)
            gather<C, 2, kPair>(values + f, mask, z + j * kLanes, kWidth,
                                out + f * kWidth + j * kLanes);
        }
      }
    return;
  }
  constexpr int kFour = kManyRegisters ? 4 : 2, kEight = kManyRegisters ? 8 : 4;
  for (int i = 0; i < kGroup / features; ++i) {
    const int32_t* tokens = sample.tokens + (group * 4 + i) * sample.capacity;
    const int64_t count = sample.lengths[group * 4 + i];
    for (int f = i * features; f < (i + 1) * features; f += features == 4 ? 4 : kEight)
      if (features == 4)
        for (int64_t j = 0; j < kVectors; j += kFour)
          tile<C, 4, kFour>(values + f, tokens, count, z + j * kLanes, kWidth,
                            out + f * kWidth + j * kLanes);
      else
        for (int64_t j = 0; j < kVectors; j += 2)
          tile<C, kEight, 2>(values + f, tokens, count, z + j * kLanes, kWidth,
                             out + f * kWidth + j * kLanes);
  }
}

template <typename C>
void multiply(const Sample<C>& sample, int64_t groups, const C* z, int64_t d, C* sums,
              int64_t sum_rows, int64_t row) {
  const WidePanels wide(Simd<C>::kLanes, d);
  for (int64_t p = 0; p < wide.count(); ++p) {
    const int64_t width = wide.panel_width(p), column = p * wide.width;
    const C* panel = z + column * sample.capacity;
    C* out = sums + column * sum_rows + row * width;
    for (int64_t group = 0; group < groups; ++group, out += kGroup * width)
      if (width == wide.width)
        multiply_group<C, kPanelVectors>(sample, group, panel, out);
      else
        multiply_group<C, kPanelVectors / 2>(sample, group, panel, out);
  }
}

template <typename C>
void add(const AddJob<C>& job, int64_t begin, int64_t end) {
  const WidePanels wide(Simd<C>::kLanes, job.d);
  const int64_t rs = job.row_stride, cs = job.column_stride;
  for (int64_t p = 0; p < wide.count(); ++p) {
    const int64_t width = wide.panel_width(p), column = p * wide.width;
    const int64_t columns = min64(width, job.d - column);
    const C* sums = job.sums + column * job.rows;
    // By groups of rows, so that the lines of a transposed target are written whole.
    for (int64_t first = begin; first < end; first += kGroup) {
      const int64_t last = min64(end, first + kGroup);
      with_elements(job.target, job.dtype, job.offset + column * cs, [&](const auto* o) {
        auto* out = writable(o);
        if (cs == 1) {
          for (int64_t r = first; r < last; ++r)
            for (int64_t c = 0; c < columns; ++c) {
              auto& slot = out[r * rs + c];
              narrow(widen(slot) + job.alpha * sums[r * width + c], slot);
            }
        } else {
          for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = first; r < last; ++r) {
              auto& slot = out[r * rs + c * cs];
              narrow(widen(slot) + job.alpha * sums[r * width + c], slot);
            }
        }
      });
    }
  }
}

}  // namespace

template <typename C>
SampledKernels<C> sampled_kernels() {
  return {scores_scratch<C>, scores<C>, clipped_sum<C>, pack_wide<C>,
          scan_scratch<C>,   scan<C>,   multiply<C>,    add<C>};
}
template SampledKernels<float> sampled_kernels<float>();
template SampledKernels<double> sampled_kernels<double>();

}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
