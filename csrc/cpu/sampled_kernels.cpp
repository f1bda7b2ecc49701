// The arithmetic of sampled_grad_: X̃ᵀZ, where of every block of features of X a sample of tokens is
// kept. Compiled once per instruction set, like kernels.cpp.
//
// The sample decides which rows of Z a register tile reads; within it zeros of X, of which
// activations such as relu² have many, are skipped one by one where they are many enough.
#include "elements.h"
#include "kernels.h"
#include "simd.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

constexpr int64_t kSegment = 64;  // tokens per mask
// A tile of features times vectors of columns, and tokens whose rows of Z then stay in L1.
constexpr int kTileRows = kRegisters == 32 ? 8 : 4, kTileVectors = 2;
constexpr int64_t kTileTokens = 256;
// Zeros are skipped where less than this share of a block is not zero: the rate at which single
// values are multiplied over that of whole tiles.
constexpr double kSkipBelow = 0.55;

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
void load_rows(const View& src, const C* scale, int64_t first, int64_t step, int64_t rows, C* dst,
               C* norms) {
  for (int64_t r = 0; r < rows; ++r) {
    C* row = dst + r * src.cols;
    load_scaled(src, scale, first + r * step, 0, src.cols, row);
    if (norms != nullptr) norms[r] = sum_of_squares(row, src.cols);
  }
}

template <typename C>
void pack_wide(const C* src, int64_t rows, int64_t d, int64_t capacity, int64_t first, C* panels) {
  const WidePanels wide(Simd<C>::kLanes, d);
  for (int64_t p = 0; p < wide.count(); ++p) {
    const int64_t width = wide.panel_width(p), column = p * wide.width;
    const int64_t columns = min64(width, d - column);
    C* panel = panels + column * capacity + first * width;
    for (int64_t r = 0; r < rows; ++r) {
      const C* from = src + r * d + column;
      for (int64_t c = 0; c < columns; ++c) panel[r * width + c] = from[c];
      for (int64_t c = columns; c < width; ++c) panel[r * width + c] = 0;
    }
  }
}

// out[β] = ‖x_β‖² for the blocks of a row of `features` numbers.
template <typename C>
void block_norms(const C* row, int64_t features, int64_t block, C* out) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  typedef C LooseFour __attribute__((vector_size(4 * sizeof(C)), aligned(sizeof(C))));
  const int64_t whole = features / block;
  if (block % 4 == 0) {
    for (int64_t b = 0; b < whole; ++b) {
      Four sum = {};
      for (int64_t i = 0; i < block; i += 4) {
        const Four v = *reinterpret_cast<const LooseFour*>(row + b * block + i);
        sum += v * v;
      }
      out[b] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  } else {
    for (int64_t b = 0; b < whole; ++b) {
      C sum = 0;
      for (int64_t i = 0; i < block; ++i) sum += row[b * block + i] * row[b * block + i];
      out[b] = sum;
    }
  }
  if (whole * block < features)
    out[whole] = sum_of_squares(row + whole * block, features - whole * block);
}

template <typename C>
void scores(const ScanJob<C>& job, int64_t first, int64_t step, int64_t rows, const C* z_sq, C* out,
            C* scratch) {
  const int64_t blocks = (job.x.cols + job.block - 1) / job.block;
  for (int64_t r = 0; r < rows; ++r) {
    C* row = out + r * blocks;
    load_scaled(job.x, job.scale, first + r * step, 0, job.x.cols, scratch);
    block_norms(scratch, job.x.cols, job.block, row);
    for (int64_t b = 0; b < blocks; ++b) row[b] = root(row[b] * z_sq[r]);
  }
}

// Σ min(1, s / threshold), NaN where a score is; in pieces, so that float sums stay exact enough.
template <typename C>
double clipped_sum(const C* s, int64_t n, C threshold) {
  using Vec = typename Simd<C>::Vec;
  using Loose = typename Simd<C>::Loose;
  constexpr int kLanes = Simd<C>::kLanes;
  constexpr int64_t kPiece = 64 * kLanes;
  const Vec one = Vec{} + C(1);
  double total = 0;
  int64_t i = 0;
  for (; i + kLanes <= n;) {
    const int64_t end = min64(n - kLanes + 1, i + kPiece);
    Vec sum = {};
    for (; i < end; i += kLanes) {
      const Vec ratio = *reinterpret_cast<const Loose*>(s + i) / threshold;
      sum += ratio > one ? one : ratio;
    }
    for (int l = 0; l < kLanes; ++l) total += sum[l];
  }
  for (; i < n; ++i) {
    const C ratio = s[i] / threshold;
    total += ratio > 1 ? C(1) : ratio;
  }
  return total;
}

template <typename C>
C threshold(const C* s, int64_t n, double share, int64_t steps) {
  const C tiny = static_cast<C>(sizeof(C) == 8 ? 2.2250738585072014e-308 : 1.17549435e-38);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += s[i];
  C tau = static_cast<C>(sum / static_cast<double>(n)) + tiny;
  for (int64_t step = 0; step < steps; ++step) {
    const C expected = static_cast<C>(clipped_sum(s, n, tau) / static_cast<double>(n));
    C ratio = expected / static_cast<C>(share);
    ratio = ratio < C(0.1) ? C(0.1) : ratio > C(10) ? C(10) : ratio;
    tau *= ratio;
  }
  return tau < tiny ? tiny : tau;
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

int64_t aligned(int64_t count) { return round_up(count, 16); }

template <typename C>
int64_t scan_scratch(int64_t features, int64_t blocks) {
  return aligned(features) + 4 * aligned(blocks);
}

// Copies a block times its weight, padded with zeros to `ld`.
template <typename C>
inline void keep(const C* from, int64_t n, int64_t ld, C weight, C* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * weight;
  for (int64_t i = n; i < ld; ++i) to[i] = 0;
}

template <typename C>
void scan(const ScanJob<C>& job, int64_t begin, int64_t end, int64_t first, int64_t last,
          C* scratch) {
  const Kept<C>& kept = job.kept;
  const int64_t block = job.block, blocks = last - first, feature = first * block;
  const int64_t features = min64(job.x.cols, last * block) - feature;
  const int64_t pairs = (job.x.cols + block - 1) / block, offset = first - job.range;
  const bool direct =
      job.scale == nullptr && job.x.dtype == (sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32);
  C* buffer = scratch;
  C* squares = buffer + aligned(features);
  C* uniform = squares + aligned(blocks);
  C* weight = uniform + aligned(blocks);
  int32_t* taken = reinterpret_cast<int32_t*>(weight + aligned(blocks));
  double* noise = job.noise + first;
  int64_t* chosen = job.chosen + first;
  int32_t* counts = kept.counts + offset;

  int64_t taken_count = blocks;
  for (int64_t b = 0; b < blocks; ++b) taken[b] = static_cast<int32_t>(b);
  for (int64_t t = begin; t < end; ++t) {
    const C* row = buffer;
    if (direct)
      row = static_cast<const C*>(job.x.data) + t * job.x.ld + feature;
    else
      load_scaled(job.x, job.scale, t, feature, features, buffer);
    const C z_sq = job.z_sq[t - job.chunk];
    if (!job.sampling) {
      const C all = z_sq != z_sq ? z_sq : C(1);
      for (int64_t b = 0; b < blocks; ++b) weight[b] = all;
    } else {
      block_norms(row, features, block, squares);
      if (job.x_sq != nullptr && t % job.stride == 0) {
        C sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += squares[b];
        job.x_sq[(t - job.chunk) / job.stride] += sum;
      }
      uniform_row(job.stream, static_cast<uint64_t>(t * pairs + first), blocks, uniform);
      const C tau = job.threshold;
      for (int64_t b = 0; b < blocks; ++b) {
        const C score = root(squares[b] * z_sq);
        const C ratio = score / tau, inclusion = ratio > 1 ? C(1) : ratio;  // NaN stays
        const C inverse = 1 / inclusion;
        const bool take = uniform[b] < inclusion;
        chosen[b] += take;
        noise[b] += inclusion > 0 ? score * score * (inverse - 1) : C(0);
        // A score that is no number makes its block of the gradient NaN.
        weight[b] = take || inclusion != inclusion ? inverse : C(0);
      }
      taken_count = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        taken[taken_count] = static_cast<int32_t>(b);
        taken_count += weight[b] != 0;
      }
    }
    for (int64_t i = 0; i < taken_count; ++i) {
      const int64_t b = taken[i], slot = (offset + b) * kept.capacity + counts[b]++;
      kept.tokens[slot] = static_cast<int32_t>(t - job.chunk);
      keep(row + b * block, min64(block, features - b * block), kept.ld, weight[b],
           kept.values + slot * kept.ld);
    }
  }
}

// Masks of one segment of a block's values; the number of values that are not zero.
template <typename C>
int64_t mask_segment(const C* values, int64_t count, int64_t ld, int64_t features,
                     uint64_t* masks) {
  for (int64_t f = 0; f < features; ++f) masks[f] = 0;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t f = 0; f < features; ++f)
      masks[f] |= static_cast<uint64_t>(values[s * ld + f] != 0) << s;
  int64_t total = 0;
  for (int64_t f = 0; f < features; ++f) total += __builtin_popcountll(masks[f]);
  return total;
}

// One segment decides for all of a block.
template <typename C>
void classify(const Kept<C>& kept, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t count = kept.counts[b];
    const C* values = kept.values + b * kept.capacity * kept.ld;
    uint64_t* masks = kept.masks + b * (kept.capacity / kSegment) * kept.features;
    kept.dense[b] = false;
    for (int64_t s = 0; s < count && !kept.dense[b]; s += kSegment) {
      const int64_t n = min64(kSegment, count - s);
      const int64_t values_set = mask_segment(values + s * kept.ld, n, kept.ld, kept.features,
                                              masks + s / kSegment * kept.features);
      if (s == 0)
        kept.dense[b] =
            static_cast<double>(values_set) > kSkipBelow * static_cast<double>(n * kept.ld);
    }
  }
}

// ---- the product --------------------------------------------------------------------------------

// out (kRows, kTileVectors) += valuesᵀ z over `count` kept tokens.
template <typename C, int kRows>
void tile(const C* __restrict values, int64_t ld, const int32_t* __restrict tokens, int64_t count,
          const C* __restrict z, int64_t width, C* __restrict out) {
  using Vec = typename Simd<C>::Vec;
  Vec acc[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j)
      acc[r][j] = reinterpret_cast<const Vec*>(out + r * width)[j];
  for (int64_t s = 0; s < count; ++s) {
    const Vec* row = reinterpret_cast<const Vec*>(z + tokens[s] * width);
    Vec x[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) x[j] = row[j];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec value = values[s * ld + r] - Vec{};
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) acc[r][j] += value * x[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) reinterpret_cast<Vec*>(out + r * width)[j] = acc[r][j];
}

// out (one feature, a panel of kVectors) += the values of a mask times their rows of z.
template <typename C, int kVectors>
void gather(const C* __restrict values, int64_t ld, const int32_t* __restrict tokens, uint64_t mask,
            const C* __restrict z, C* __restrict out) {
  using Vec = typename Simd<C>::Vec;
  constexpr int64_t kWidth = kVectors * Simd<C>::kLanes;
  Vec* o = reinterpret_cast<Vec*>(out);
  Vec acc[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) acc[j] = o[j];
  for (; mask != 0; mask &= mask - 1) {
    const int s = __builtin_ctzll(mask);
    const Vec value = values[s * ld] - Vec{};
    const Vec* row = reinterpret_cast<const Vec*>(z + tokens[s] * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[j] += value * row[j];
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) o[j] = acc[j];
}

template <typename C, int kVectors>
void multiply_block(const MultiplyJob<C>& job, int64_t b, const C* z, C* out) {
  constexpr int64_t kLanes = Simd<C>::kLanes, kWidth = kVectors * kLanes;
  const Kept<C>& kept = job.kept;
  const int64_t count = kept.counts[b], ld = kept.ld;
  const C* values = kept.values + b * kept.capacity * ld;
  const int32_t* tokens = kept.tokens + b * kept.capacity;
  if (kept.dense[b]) {
    for (int64_t s = 0; s < count; s += kTileTokens) {
      const int64_t n = min64(kTileTokens, count - s);
      for (int64_t column = 0; column < kWidth; column += kTileVectors * kLanes) {
        int64_t r = 0;
        for (; r + kTileRows <= ld; r += kTileRows)
          tile<C, kTileRows>(values + s * ld + r, ld, tokens + s, n, z + column, kWidth,
                             out + r * kWidth + column);
        for (; r < ld; r += 4)
          tile<C, 4>(values + s * ld + r, ld, tokens + s, n, z + column, kWidth,
                     out + r * kWidth + column);
      }
    }
    return;
  }
  const uint64_t* masks = kept.masks + b * (kept.capacity / kSegment) * kept.features;
  for (int64_t s = 0; s < count; s += kSegment)
    for (int64_t f = 0; f < kept.features; ++f)
      gather<C, kVectors>(values + s * ld + f, ld, tokens + s,
                          masks[s / kSegment * kept.features + f], z, out + f * kWidth);
}

template <typename C>
void multiply(const MultiplyJob<C>& job, int64_t first, int64_t last) {
  const WidePanels wide(Simd<C>::kLanes, job.d);
  const int64_t sum_rows = job.blocks * job.kept.ld;
  for (int64_t p = 0; p < wide.count(); ++p) {
    const int64_t width = wide.panel_width(p);
    const C* z = job.z + p * wide.width * job.rows;
    C* sums = job.sums + p * wide.width * sum_rows;
    for (int64_t b = first; b < last; ++b) {
      C* out = sums + b * job.kept.ld * width;
      if (width == wide.width)
        multiply_block<C, kPanelVectors>(job, b, z, out);
      else
        multiply_block<C, kPanelVectors / 2>(job, b, z, out);
    }
  }
}

template <typename C>
void add(const AddJob<C>& job, int64_t first, int64_t last) {
  const WidePanels wide(Simd<C>::kLanes, job.d);
  const int64_t fs = job.feature_stride, cs = job.column_stride;
  const C alpha = static_cast<C>(job.alpha);
  for (int64_t p = 0; p < wide.count(); ++p) {
    const int64_t width = wide.panel_width(p), column = p * wide.width;
    const int64_t columns = min64(width, job.d - column);
    const C* panel = job.sums + column * job.blocks * job.ld;
    for (int64_t b = first; b < last; ++b) {
      const C* sums = panel + b * job.ld * width;
      const int64_t rows = min64(job.block, job.features - b * job.block);
      const int64_t begin = (job.feature + b * job.block) * fs + column * cs;
      with_elements(job.target, job.dtype, begin, [&](const auto* o) {
        auto* out = writable(o);
        if (cs == 1)
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {
              auto& slot = out[r * fs + c];
              narrow(widen(slot) + alpha * sums[r * width + c], slot);
            }
        else if (fs == 1)
          for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = 0; r < rows; ++r) {
              auto& slot = out[c * cs + r];
              narrow(widen(slot) + alpha * sums[r * width + c], slot);
            }
        else
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {
              auto& slot = out[r * fs + c * cs];
              narrow(widen(slot) + alpha * sums[r * width + c], slot);
            }
      });
    }
  }
}

}  // namespace

template <typename C>
SampledKernels<C> sampled_kernels() {
  return {load_rows<C>, pack_wide<C>, scores<C>,   threshold<C>, scan_scratch<C>,
          scan<C>,      classify<C>,  multiply<C>, add<C>};
}
template SampledKernels<float> sampled_kernels<float>();
template SampledKernels<double> sampled_kernels<double>();

}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
