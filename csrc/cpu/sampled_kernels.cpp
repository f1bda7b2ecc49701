// The arithmetic of sampled_grad_: X̃ᵀZ, where X̃ is a sample of X. Compiled once per instruction
// set, like kernels.cpp.
//
// X̃ is mostly zeros: what was not taken, and zeros of X itself, of which activations such as relu²
// and their gradients have many. How they lie depends on the data and on the blocks of the sample,
// so every group of features chooses the tile with which it has least to do: single features, whose
// tokens are read from bit masks, or two, four or eight, whose tokens are listed.
#include "elements.h"
#include "kernels.h"
#include "sampled_product.h"
#include "sampled_scores.h"
#include "simd.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

// Cycles that a panel costs per token of a tile of 1, 2, 4, 8 features, and per mask.
constexpr double kTokenCost[] = {5.0, 13.0, 20.0, 37.5}, kMaskCost = 29.0;

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

// Sums over many rows, lane by lane.
template <typename C>
struct LaneSums {
  typename Simd<C>::Vec taken = {}, noise = {}, energy = {};

  void flush(SampleSums* sums) {
    for (int l = 0; l < Simd<C>::kLanes; ++l) {
      sums->taken += static_cast<double>(taken[l]);
      sums->noise += static_cast<double>(noise[l]);
      sums->energy += static_cast<double>(energy[l]);
    }
    *this = {};
  }
};

// The weights of `blocks` blocks, a multiple of the vector's lanes, from (score / τ)².
template <typename C>
inline void weigh(const C* squares, const C* uniform, int64_t blocks, C* weight,
                  LaneSums<C>* sums) {
  using Vec = typename Simd<C>::Vec;
  using Loose = typename Simd<C>::Loose;
  constexpr int kLanes = Simd<C>::kLanes;
  const Vec one = Vec{} + C(1), zero = Vec{};
  for (int64_t b = 0; b < blocks; b += kLanes) {
    Vec ratio = *reinterpret_cast<const Loose*>(squares + b);
    for (int l = 0; l < kLanes; ++l) ratio[l] = root(ratio[l]);
    const Vec number = *reinterpret_cast<const Loose*>(uniform + b);
    const auto sure = ratio >= one, take = number < ratio;
    sums->taken += take ? one : zero;
    sums->noise += sure ? zero : ratio - ratio * ratio;
    sums->energy += ratio * ratio;
    // A score that is no number makes its block of the gradient NaN.
    *reinterpret_cast<Loose*>(weight + b) = sure                      ? one
                                            : take | (ratio != ratio) ? one / ratio
                                                                      : zero;
  }
}

// to = x times the weight of its block.
template <typename C, int kBlock>
void scale_blocks(const C* __restrict x, const C* __restrict weight, int64_t features,
                  C* __restrict to) {
  const int64_t whole = features / kBlock;
  for (int64_t b = 0; b < whole; ++b)
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) to[b * kBlock + i] = x[b * kBlock + i] * weight[b];
  for (int64_t f = whole * kBlock; f < features; ++f) to[f] = x[f] * weight[whole];
}

template <typename C>
void scale_blocks(const C* x, const C* weight, int64_t features, int64_t block, C* to) {
  switch (block) {
    case 1:
      return scale_blocks<C, 1>(x, weight, features, to);
    case 2:
      return scale_blocks<C, 2>(x, weight, features, to);
    case 4:
      return scale_blocks<C, 4>(x, weight, features, to);
    case 8:
      return scale_blocks<C, 8>(x, weight, features, to);
    case 16:
      return scale_blocks<C, 16>(x, weight, features, to);
    default:
      for (int64_t f = 0; f < features; ++f) to[f] = x[f] * weight[f / block];
  }
}

// ---- what is kept of it -------------------------------------------------------------------------

// kGroup rows of kGroup features, read by features.
template <typename C>
struct Square {
  C columns[kGroup][kGroup];

  Square(const C* rows, int64_t stride) {
    for (int i = 0; i < kGroup; ++i)
      for (int f = 0; f < kGroup; ++f) columns[f][i] = rows[i * stride + f];
  }
  uint32_t nonzero(int f) const {
    uint32_t mask = 0;
    for (int i = 0; i < kGroup; ++i) mask |= static_cast<uint32_t>(columns[f][i] != 0) << i;
    return mask;
  }
  // The values at the bits of a mask one after the other; up to kGroup are written.
  void compress(int f, uint32_t mask, C* to) const {
    for (int i = 0; i < kGroup; ++i) {
      *to = columns[f][i];
      to += mask >> i & 1;
    }
  }
};

// The numbers of the bits of a mask, plus `first`; up to kGroup are written.
inline void compress_numbers(int32_t first, uint32_t mask, int32_t* to) {
#ifdef __AVX512F__
  const __m512i numbers =
      _mm512_add_epi32(_mm512_set1_epi32(first),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), numbers));
#else
  for (int i = 0; i < kGroup; ++i) {
    *to = first + i;
    to += mask >> i & 1;
  }
#endif
}

#ifdef __AVX512F__
template <>
struct Square<float> {
  __m512 columns[kGroup];

  Square(const float* rows, int64_t stride) {
    __m512 x[16], y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(rows + i * stride);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 16
      for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(y[i + j]), high = _mm512_castps_pd(y[i + j + 2]);
        x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j) {
        y[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0x88);
        y[i + j + 4] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0xdd);
      }
#pragma GCC unroll 16
    for (int j = 0; j < 8; ++j) {
      columns[j] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0x88);
      columns[j + 8] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0xdd);
    }
  }
  uint32_t nonzero(int f) const {
    return _mm512_cmp_ps_mask(columns[f], _mm512_setzero_ps(), _CMP_NEQ_UQ);
  }
  void compress(int f, uint32_t mask, float* to) const {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), columns[f]));
  }
};
#endif

// The tile with which a group has least to do, judged by `rows` of its rows.
template <typename C>
int choose_tile(const C* dense, int64_t stride, int64_t rows) {
  uint64_t masks[kGroup] = {};
  for (int64_t s = 0; s < rows; s += kGroup) {
    const Square<C> square(dense + s * stride, stride);
#pragma GCC unroll 16
    for (int f = 0; f < kGroup; ++f) masks[f] |= static_cast<uint64_t>(square.nonzero(f)) << s;
  }
  int best = 0;
  double least = 0;
  for (int i = 0; i < 4; ++i) {
    double cost = 0;
    for (int f = 0; f < kGroup; f += 1 << i) {
      uint64_t any = 0;
      for (int j = 0; j < 1 << i; ++j) any |= masks[f + j];
      cost += kTokenCost[i] * __builtin_popcountll(any) + (i == 0 && any != 0 ? kMaskCost : 0.0);
    }
    if (i == 0 || cost < least) {
      best = i;
      least = cost;
    }
  }
  return 1 << best;
}

// Adds `rows` <= kMaskTokens rows of a group, from token `first` of the chunk on, to a sample;
// rows up to a whole kGroup are zero.
template <typename C, int kTile>
void pack_tiles(const C* dense, int64_t stride, int64_t rows, int64_t first, int64_t group,
                const Sample<C>& sample) {
  C* values = sample.values + group * kGroup * kValues;
  int32_t* tokens = sample.tokens + group * kGroup / 2 * kValues;
  int32_t* counts = sample.counts + group * kGroup;
  const int64_t window = (group * kMasks + first / kMaskTokens) * kGroup;
  uint64_t* masks = sample.masks + window;
  for (int f = 0; f < kGroup && kTile == 1; ++f) sample.starts[window + f] = counts[f];
  for (int64_t s = 0; s < rows; s += kGroup) {
    const Square<C> square(dense + s * stride, stride);
#pragma GCC unroll 16
    for (int f = 0; f < kGroup; f += kTile) {
      uint32_t mask = 0;
#pragma GCC unroll 16
      for (int j = f; j < f + kTile; ++j) mask |= square.nonzero(j);
      const int32_t count = counts[f];
#pragma GCC unroll 16
      for (int j = f; j < f + kTile; ++j) square.compress(j, mask, values + j * kValues + count);
      if (kTile > 1)
        compress_numbers(static_cast<int32_t>(first + s), mask,
                         tokens + f / kTile * kValues + count);
      else
        masks[f] |= static_cast<uint64_t>(mask) << s;
      counts[f] = count + __builtin_popcount(mask);
    }
  }
}

template <typename C>
void pack_group(const C* dense, int64_t stride, int64_t rows, int64_t first, int64_t group,
                const Sample<C>& sample) {
  if (first == 0) sample.tile[group] = choose_tile(dense, stride, rows);
  switch (sample.tile[group]) {
    case 1:
      return pack_tiles<C, 1>(dense, stride, rows, first, group, sample);
    case 2:
      return pack_tiles<C, 2>(dense, stride, rows, first, group, sample);
    case 4:
      return pack_tiles<C, 4>(dense, stride, rows, first, group, sample);
    default:
      return pack_tiles<C, 8>(dense, stride, rows, first, group, sample);
  }
}

// Rows that are sampled in steps: what one step has stored is then out of the way of the next one,
// which would else wait for it.
constexpr int64_t kSteps = 16;

template <typename C>
int64_t scan_scratch(int64_t features) {
  return (kMaskTokens + 4 * kSteps) * aligned(features);
}

template <typename C>
void scan(const SampleRule<C>& rule, int64_t first, int64_t rows, const C* token_weight,
          int64_t block, int64_t blocks, const Sample<C>& sample, SampleSums* sums, C* scratch) {
  const int64_t feature = block * rule.block;
  const int64_t features = min64(rule.x.cols, (block + blocks) * rule.block) - feature;
  const int64_t padded = aligned(features), groups = padded / kGroup;
  const int64_t pairs = (rule.x.cols + rule.block - 1) / rule.block, size = aligned(blocks);
  C* dense = scratch;  // (kMaskTokens, padded)
  C* buffer = dense + kMaskTokens * padded;
  C* squares = buffer + kSteps * padded;
  C* uniform = squares + kSteps * padded;
  C* weight = uniform + kSteps * padded;
  LaneSums<C> lanes;
  for (int64_t i = 0; i < groups * kGroup; ++i) sample.counts[i] = 0;
  for (int64_t i = 0; i < groups * kMasks * kGroup; ++i) sample.masks[i] = 0;
  for (int64_t s = 0; s < rows; s += kMaskTokens) {
    const int64_t window = min64(kMaskTokens, rows - s);
    for (int64_t q = 0; q < window; q += kSteps) {
      const int64_t count = min64(kSteps, window - q), token = first + s + q;
      const C* x[kSteps];
      for (int64_t r = 0; r < count; ++r) {
        ask_for(rule.x, token + r + kSteps, feature, features);
        x[r] = load_scaled(rule.x, rule.x_scale, token + r, feature, features, buffer + r * padded);
        const C z_weight = token_weight[s + q + r];
        if (rule.sampling) {
          block_norms(x[r], features, rule.block, squares + r * padded);
          for (int64_t b = blocks; b < size; ++b) squares[r * padded + b] = 0;
          for (int64_t b = 0; b < blocks; ++b) squares[r * padded + b] *= z_weight;
        } else {
          for (int64_t b = 0; b < blocks; ++b) weight[r * padded + b] = 1 + z_weight;
        }
      }
      for (int64_t r = 0; r < count && rule.sampling; ++r)
        uniform_row(rule.stream, static_cast<uint64_t>((token + r) * pairs + block), size,
                    uniform + r * padded);
      for (int64_t r = 0; r < count && rule.sampling; ++r)
        weigh(squares + r * padded, uniform + r * padded, size, weight + r * padded, &lanes);
      for (int64_t r = 0; r < count; ++r) {
        C* row = dense + (q + r) * padded;
        scale_blocks(x[r], weight + r * padded, features, rule.block, row);
        for (int64_t f = features; f < padded; ++f) row[f] = 0;
      }
    }
    lanes.flush(sums);
    for (int64_t i = window * padded; i < round_up(window, kGroup) * padded; ++i) dense[i] = 0;
    for (int64_t g = 0; g < groups; ++g)
      pack_group(dense + g * kGroup, padded, window, s, g, sample);
  }
}

}  // namespace

template <typename C>
SampledKernels<C> sampled_kernels() {
  return {scores_scratch<C>, scores<C>,   clipped_sum<C>, pack_wide<C>, scan_scratch<C>,
          scan<C>,           multiply<C>, clear<C>,       add<C>};
}
template SampledKernels<float> sampled_kernels<float>();
template SampledKernels<double> sampled_kernels<double>();

}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
