// The product of sampled_grad_, for sampled_kernels.cpp alone: rows of Z that a tile of features
// took, times their values. Included there, once per instruction set.
#pragma once

#include "elements.h"
#include "kernels.h"
#include "simd.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

// out (1, kVectors) += the values of the tokens of a mask times their rows of z.
template <typename C, int kVectors>
void gather(const C* __restrict values, uint64_t mask, const C* __restrict z, C* __restrict out) {
  using Vec = typename Simd<C>::Vec;
  Vec* sums = reinterpret_cast<Vec*>(out);
  Vec acc[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) acc[j] = sums[j];
  for (; mask != 0; mask &= mask - 1) {
    const Vec value = *values++ - Vec{};
    const Vec* row = reinterpret_cast<const Vec*>(z) + __builtin_ctzll(mask) * kVectors;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[j] += value * row[j];
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) sums[j] = acc[j];
}

// out (kRows, kVectors) += the same over `count` listed tokens.
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
    const Vec* row = reinterpret_cast<const Vec*>(z + tokens[i] * width);
    Vec x[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) x[j] = row[j];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec value = values[r * kValues + i] - Vec{};
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[r][j] += value * x[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) reinterpret_cast<Vec*>(out + r * width)[j] = acc[r][j];
}

// Sums that are needed next, asked for in steps between the tiles: they come from afar.
struct Ahead {
  const char *from, *end;

  Ahead(const void* from, int64_t bytes)
      : from(static_cast<const char*>(from)), end(this->from + bytes) {}
  void advance() {
    const char* stop = end - from > kStep ? from + kStep : end;
    for (; from < stop; from += 64) __builtin_prefetch(from, 1, 2);
  }
  static constexpr int64_t kStep = 1024;  // all within the fewest tiles, eight
};

// Groups whose tokens are in masks, against one panel: window by window of tokens, whose rows of Z
// stay in L1 while the sums pass by.
template <typename C, int kVectors>
void multiply_masked(const Sample<C>& sample, int64_t groups, const C* z, C* out) {
  constexpr int64_t kWidth = kVectors * Simd<C>::kLanes;
  for (int64_t s = 0; s < kMasks; ++s, z += kMaskTokens * kWidth)
    for (int64_t group = 0; group < groups; ++group) {
      if (sample.tile[group] != 1) continue;
      const uint64_t* masks = sample.masks + (group * kMasks + s) * kGroup;
      const int32_t* starts = sample.starts + (group * kMasks + s) * kGroup;
      const C* values = sample.values + group * kGroup * kValues;
      C* to = out + group * kGroup * kWidth;
      for (int f = 0; f < kGroup; ++f)
        if (masks[f] != 0)
          gather<C, kVectors>(values + f * kValues + starts[f], masks[f], z, to + f * kWidth);
    }
}

// A group whose tokens are listed, against one panel.
template <typename C, int kVectors, int kTile, int kRows, int kColumns>
void multiply_listed(const Sample<C>& sample, int64_t group, const C* z, C* out, Ahead ahead) {
  constexpr int64_t kLanes = Simd<C>::kLanes, kWidth = kVectors * kLanes;
  for (int f = 0; f < kGroup; f += kRows) {
    const C* values = sample.values + (group * kGroup + f) * kValues;
    const int32_t* tokens = sample.tokens + (group * kGroup / 2 + f / kTile) * kValues;
    const int64_t count = sample.counts[group * kGroup + f / kTile * kTile];
    for (int64_t j = 0; j < kVectors; j += kColumns) {
      ahead.advance();
      tile<C, kRows, kColumns>(values, tokens, count, z + j * kLanes, kWidth,
                               out + f * kWidth + j * kLanes);
    }
  }
}

template <typename C, int kVectors>
void multiply_panel(const Sample<C>& sample, int64_t groups, const C* z, C* out, const C* next) {
  constexpr int64_t kSize = kGroup * kVectors * Simd<C>::kLanes;
  multiply_masked<C, kVectors>(sample, groups, z, out);
  for (int64_t group = 0; group < groups; ++group) {
    constexpr bool kMany = kRegisters == 32;
    const C* next_sums = group + 1 < groups ? out + (group + 1) * kSize : next;
    const Ahead ahead(next_sums, kSize * static_cast<int64_t>(sizeof(C)));
    C* to = out + group * kSize;
    if (sample.tile[group] == 2)
      multiply_listed<C, kVectors, 2, 2, kMany ? kVectors : 4>(sample, group, z, to, ahead);
    else if (sample.tile[group] == 4)
      multiply_listed<C, kVectors, 4, 4, kMany ? 4 : 2>(sample, group, z, to, ahead);
    else if (sample.tile[group] == 8)
      multiply_listed<C, kVectors, 8, kMany ? 8 : 4, 2>(sample, group, z, to, ahead);
  }
}

template <typename C>
void multiply(const Sample<C>& sample, int64_t groups, const C* z, int64_t d, C* sums,
              int64_t sum_rows, int64_t row) {
  const WidePanels wide(Simd<C>::kLanes, d);
  for (int64_t p = 0; p < wide.count(); ++p) {
    const int64_t width = wide.panel_width(p), column = p * wide.width;
    const C* panel = z + column * kChunk;
    C* out = sums + column * sum_rows + row * width;
    const bool last = p + 1 == wide.count();
    const C* next = last ? out : sums + (column + width) * sum_rows + row * wide.panel_width(p + 1);
    if (width == wide.width)
      multiply_panel<C, kPanelVectors>(sample, groups, panel, out, next);
    else
      multiply_panel<C, kPanelVectors / 2>(sample, groups, panel, out, next);
  }
}

template <typename C>
void clear(C* sums, int64_t sum_rows, int64_t d, int64_t begin, int64_t end) {
  const WidePanels wide(Simd<C>::kLanes, d);
  for (int64_t p = 0; p < wide.count(); ++p) {
    const int64_t width = wide.panel_width(p);
    C* panel = sums + p * wide.width * sum_rows;
    for (int64_t i = begin * width; i < end * width; ++i) panel[i] = 0;
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
}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
