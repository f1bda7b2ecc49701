// The arithmetic of every CPU op. CMake compiles this file once per instruction set, with
// MOLEGRAD_CAPABILITY naming the namespace and MOLEGRAD_VECTOR_BYTES the register width.
//
// A and B (tokens x features) are read from memory once: a block of kBlockColumns columns of a
// token chunk is copied into L1 (converted to the compute type on the way; a copy, because rows of
// a power-of-two width would all fall into the same cache sets), and register tiles then contract
// it over features (P += block * V) and over tokens (Y += blockᵀ * P).
#include "kernels.h"

#include "elements.h"
#include "simd.h"

namespace molegrad::cpu::MOLEGRAD_CAPABILITY {
namespace {

// Rows of a register tile that is NV vectors wide: accumulators + NV operands + 1 broadcast fit
// the register file, and the count divides kRowUnit.
template <int NV>
constexpr int tile_rows() {
  if (NV == 1) return 12;
  if (kRegisters == 32) return NV == 2 ? 12 : 8;
  return NV == 2 ? 6 : 4;
}

// out[r] += sum_i a[r * row + i * step] * s[i]: both contractions in one shape. Over features
// row = block stride, step = 1; over tokens row = 1, step = block stride. The sum starts at zero
// and joins `out` last: two-level summation, which keeps rounding near that of a blocked library
// GEMM.
template <typename C, int NV, bool kOverTokens>
inline __attribute__((always_inline)) void tile(const C* __restrict a, int64_t lda,
                                                const C* __restrict s, int64_t count,
                                                C* __restrict out) {
  using Vec = typename Simd<C>::Vec;
  constexpr int kRows = tile_rows<NV>();
  const int64_t row = kOverTokens ? 1 : lda, step = kOverTokens ? lda : 1;
  Vec* o = reinterpret_cast<Vec*>(out);
  const Vec* operand = reinterpret_cast<const Vec*>(s);
  Vec acc[kRows][NV];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec{};
  for (int64_t i = 0; i < count; ++i) {
    Vec x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = operand[i * NV + j];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = a[r * row + i * step] - Vec{};
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] += value * x[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) o[r * NV + j] += acc[r][j];
}

// out (rows, panel) += block (rows, count) * s (count, panel)
template <typename C, int NV>
void over_features(const C* block, int64_t lda, int64_t rows, const C* s, int64_t count, C* out) {
  constexpr int kRows = tile_rows<NV>();
  for (int64_t r = 0; r < rows; r += kRows)
    tile<C, NV, false>(block + r * lda, lda, s, count, out + r * NV * Simd<C>::kLanes);
}

// out (columns, panel) += block (count, columns)ᵀ * s (count, panel)
template <typename C, int NV>
void over_tokens(const C* block, int64_t lda, int64_t columns, const C* s, int64_t count, C* out) {
  constexpr int kRows = tile_rows<NV>();
  for (int64_t c = 0; c < columns; c += kRows)
    tile<C, NV, true>(block + c, lda, s, count, out + c * NV * Simd<C>::kLanes);
}

template <typename C>
void features(int64_t nv, const C* block, int64_t lda, int64_t rows, const C* s, int64_t count,
              C* out) {
  if (nv == 1) return over_features<C, 1>(block, lda, rows, s, count, out);
  if (nv == 2) return over_features<C, 2>(block, lda, rows, s, count, out);
  return over_features<C, 3>(block, lda, rows, s, count, out);
}

template <typename C>
void tokens(int64_t nv, const C* block, int64_t lda, int64_t columns, const C* s, int64_t count,
            C* out) {
  if (nv == 1) return over_tokens<C, 1>(block, lda, columns, s, count, out);
  if (nv == 2) return over_tokens<C, 2>(block, lda, columns, s, count, out);
  return over_tokens<C, 3>(block, lda, columns, s, count, out);
}

// Rows [row, row + rows) and columns [column, column + columns) of `src` into `dst` with stride
// kBlockColumns; the tile's padding (up to `padded_rows`, and up to a whole kRowUnit of columns)
// is zero, so that padding never computes on stale memory.
template <typename C>
void load_block(const View& src, int64_t row, int64_t rows, int64_t padded_rows, int64_t column,
                int64_t columns, C* dst) {
  const int64_t padded = round_up(columns, kRowUnit);
  with_factors(src.data, src.dtype, row * src.ld + column, [&](const auto* from) {
    for (int64_t r = 0; r < rows; ++r) {
      C* to = dst + r * kBlockColumns;
      if (columns == kBlockColumns) {
        load_row(from + r * src.ld, kBlockColumns, to);
      } else {
        load_row(from + r * src.ld, columns, to);
        for (int64_t c = columns; c < padded; ++c) to[c] = 0;
      }
    }
  });
  for (int64_t i = rows * kBlockColumns; i < padded_rows * kBlockColumns; ++i) dst[i] = 0;
}

// Ask for a block of the source before it is copied: the rows are far apart, which hardware
// prefetchers follow badly.
void prefetch_block(const View& src, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if (column >= src.cols) return;
  const int64_t size = element_size(src.dtype);
  const int64_t bytes = min64(columns, src.cols - column) * size;
  const char* base = static_cast<const char*>(src.data) + (row * src.ld + column) * size;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t byte = 0; byte < bytes; byte += 64)
      __builtin_prefetch(base + r * src.ld * size + byte, 0, 2);
}

template <typename C>
void pack(const View& src, int64_t rows, int64_t begin, int64_t end, C* dst) {
  const Panels panels(Simd<C>::kLanes, rows, src.cols);
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int64_t first = p * 2 * panels.lanes, width = panels.panel_vectors(p) * panels.lanes;
    const int64_t columns = min64(width, src.cols - first);
    with_inputs(src.data, src.dtype, first, [&](const auto* from) {
      for (int64_t r = begin; r < end; ++r) {
        C* to = dst + panels.offset(p) + r * width;
        load_row(from + r * src.ld, columns, to);
        for (int64_t c = columns; c < width; ++c) to[c] = 0;
      }
    });
  }
}

template <typename C>
void pack_transposed(const View& src, int64_t begin, int64_t end, C* dst) {
  const Panels panels(Simd<C>::kLanes, src.cols, src.rows);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * 2 * panels.lanes, width = panels.panel_vectors(p) * panels.lanes;
    const int64_t columns = min64(width, src.rows - first);
    C* to = dst + panels.offset(p);
    with_elements(src.data, src.dtype, first * src.ld, [&](const auto* from) {
      for (int64_t r = 0; r < columns; ++r)
        for (int64_t j = 0; j < src.cols; ++j)
          to[j * width + r] = static_cast<C>(widen(from[r * src.ld + j]));
    });
    for (int64_t j = 0; j < src.cols; ++j)
      for (int64_t r = columns; r < width; ++r) to[j * width + r] = 0;
  }
}

// ---- one-pass sketch ----------------------------------------------------------------------------

int64_t blocks(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

// Row r of panels of k columns, times scale[r].
template <typename C>
void scale_rows(const Panels& panels, const C* scale, int64_t rows, C* p) {
  for (int64_t q = 0; q < panels.count(); ++q) {
    const int64_t width = panels.panel_vectors(q) * panels.lanes;
    C* to = p + panels.offset(q);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < width; ++c) to[r * width + c] *= scale[r];
  }
}

template <typename C>
int64_t sketch_scratch(const SketchJob<C>& job) {
  constexpr int64_t kLanes = Simd<C>::kLanes;
  const int64_t kept = job.u != nullptr ? blocks(job.a.cols) : 1;
  return (kept + 1) * job.chunk * kBlockColumns + Panels(kLanes, job.chunk, job.kv).size() +
         Panels(kLanes, job.chunk, job.ku).size();
}

template <typename C>
void sketch(const SketchJob<C>& job, int64_t begin, int64_t end, C* y, C* w, C* scratch) {
  constexpr int64_t kLanes = Simd<C>::kLanes;
  const bool two_sided = job.u != nullptr;
  const int64_t n = job.a.cols, m = job.b.cols, block_size = job.chunk * kBlockColumns;
  const Panels p_panels(kLanes, job.chunk, job.kv), r_panels(kLanes, job.chunk, job.ku);
  const Panels v_panels(kLanes, n, job.kv), u_panels(kLanes, m, job.ku);
  const Panels y_panels(kLanes, m, job.kv), w_panels(kLanes, n, job.ku);
  C* p = scratch;
  C* r = p + p_panels.size();
  C* b_block = r + r_panels.size();
  C* a_blocks = b_block + block_size;

  // Even chunks rather than full ones and a short rest.
  const int64_t count = (end - begin + job.chunk - 1) / job.chunk;
  for (int64_t chunk = 0; chunk < count; ++chunk) {
    const int64_t first = begin + (end - begin) * chunk / count;
    const int64_t rows = begin + (end - begin) * (chunk + 1) / count - first;
    const int64_t padded = round_up(rows, kRowUnit);

    if (job.v == nullptr) {
      View part = job.p;
      part.data = static_cast<const char*>(part.data) + first * part.ld * element_size(part.dtype);
      pack<C>(part, job.chunk, 0, rows, p);
    } else {
      for (int64_t i = 0; i < p_panels.size(); ++i) p[i] = 0;
      for (int64_t c = 0; c < n; c += kBlockColumns) {
        const int64_t columns = min64(kBlockColumns, n - c);
        C* block = two_sided ? a_blocks + c / kBlockColumns * block_size : a_blocks;
        load_block<C>(job.a, first, rows, padded, c, columns, block);
        prefetch_block(job.a, first, rows, c + kBlockColumns, kBlockColumns);
        for (int64_t q = 0; q < p_panels.count(); ++q) {
          const int64_t nv = p_panels.panel_vectors(q);
          features<C>(nv, block, kBlockColumns, padded,
                      job.v + v_panels.offset(q) + c * nv * kLanes, columns,
                      p + p_panels.offset(q));
        }
      }
      if (job.token_scale != nullptr) scale_rows<C>(p_panels, job.token_scale + first, rows, p);
    }
    if (two_sided)
      for (int64_t i = 0; i < r_panels.size(); ++i) r[i] = 0;
    for (int64_t c = 0; c < m; c += kBlockColumns) {
      const int64_t columns = min64(kBlockColumns, m - c);
      load_block<C>(job.b, first, rows, padded, c, columns, b_block);
      prefetch_block(job.b, first, rows, c + kBlockColumns, kBlockColumns);
      if (two_sided)
        for (int64_t q = 0; q < r_panels.count(); ++q) {
          const int64_t nv = r_panels.panel_vectors(q);
          features<C>(nv, b_block, kBlockColumns, padded,
                      job.u + u_panels.offset(q) + c * nv * kLanes, columns,
                      r + r_panels.offset(q));
        }
      for (int64_t q = 0; q < p_panels.count(); ++q) {
        const int64_t nv = p_panels.panel_vectors(q);
        tokens<C>(nv, b_block, kBlockColumns, columns, p + p_panels.offset(q), rows,
                  y + y_panels.offset(q) + c * nv * kLanes);
      }
    }
    if (two_sided && job.token_scale != nullptr)
      scale_rows<C>(r_panels, job.token_scale + first, rows, r);
    if (two_sided)
      for (int64_t c = 0; c < n; c += kBlockColumns)
        for (int64_t q = 0; q < r_panels.count(); ++q) {
          const int64_t nv = r_panels.panel_vectors(q);
          tokens<C>(nv, a_blocks + c / kBlockColumns * block_size, kBlockColumns,
                    min64(kBlockColumns, n - c), r + r_panels.offset(q), rows,
                    w + w_panels.offset(q) + c * nv * kLanes);
        }
  }
}

// ---- tall matrix times small matrix -------------------------------------------------------------

template <typename C>
int64_t apply_scratch(const ApplyJob<C>& job) {
  return job.chunk * kBlockColumns + Panels(Simd<C>::kLanes, job.chunk, job.k).size();
}

template <typename C>
void apply(const ApplyJob<C>& job, int64_t begin, int64_t end, C* scratch) {
  constexpr int64_t kLanes = Simd<C>::kLanes;
  const Panels panels(kLanes, job.chunk, job.k), s_panels(kLanes, job.a.cols, job.k);
  C* p = scratch;
  C* block = p + panels.size();
  for (int64_t first = begin; first < end; first += job.chunk) {
    const int64_t rows = min64(job.chunk, end - first), padded = round_up(rows, kRowUnit);
    for (int64_t i = 0; i < panels.size(); ++i) p[i] = 0;
    for (int64_t c = 0; c < job.a.cols; c += kBlockColumns) {
      const int64_t columns = min64(kBlockColumns, job.a.cols - c);
      load_block<C>(job.a, first, rows, padded, c, columns, block);
      for (int64_t q = 0; q < panels.count(); ++q) {
        const int64_t nv = panels.panel_vectors(q);
        features<C>(nv, block, kBlockColumns, padded, job.s + s_panels.offset(q) + c * nv * kLanes,
                    columns, p + panels.offset(q));
      }
    }
    for (int64_t q = 0; q < panels.count(); ++q) {
      const int64_t column = q * 2 * kLanes, width = panels.panel_vectors(q) * kLanes;
      const int64_t columns = min64(width, job.k - column);
      with_elements(job.out.data, job.out.dtype, first * job.out.ld + column, [&](const auto* o) {
        auto* out = writable(o);
        for (int64_t r = 0; r < rows; ++r) {
          const C* from = p + panels.offset(q) + r * width;
          for (int64_t c = 0; c < columns; ++c) {
            auto& slot = out[r * job.out.ld + c];
            narrow(job.subtract ? widen(slot) - from[c] : from[c], slot);
          }
        }
      });
    }
  }
}

template <typename C>
void reduce(const C* src, int64_t stride, int64_t parts, int64_t rows, bool add,
            const MutableView& dst, int64_t begin, int64_t end) {
  const Panels panels(Simd<C>::kLanes, rows, dst.cols);
  for (int64_t q = 0; q < panels.count(); ++q) {
    const int64_t column = q * 2 * panels.lanes, width = panels.panel_vectors(q) * panels.lanes;
    const int64_t columns = min64(width, dst.cols - column);
    for (int64_t r = begin; r < end; ++r) {
      const C* from = src + panels.offset(q) + r * width;
      C* to = static_cast<C*>(dst.data) + r * dst.ld + column;
      for (int64_t c = 0; c < columns; ++c) {
        C sum = from[c];
        for (int64_t part = 1; part < parts; ++part) sum += from[part * stride + c];
        to[c] = add ? to[c] + sum : sum;
      }
    }
  }
}

// ---- rank-k update of a weight ------------------------------------------------------------------

constexpr int64_t kUpdateRows = 48;
// Bytes of the next panel of a row of the weight, asked for while this one is written.
constexpr int64_t kAhead = 128;

template <typename C>
int64_t update_scratch(const UpdateJob<C>& job) {
  return kUpdateRows * round_up(job.k, Simd<C>::kLanes) + kUpdateRows * 3 * Simd<C>::kLanes;
}

template <typename C>
void update(const UpdateJob<C>& job, int64_t begin, int64_t end, C* scratch) {
  constexpr int64_t kLanes = Simd<C>::kLanes;
  const int64_t n = job.weight.cols, lda = round_up(job.k, kLanes);
  const Panels panels(kLanes, job.k, n);
  C* product = scratch;
  C* u = product + kUpdateRows * 3 * kLanes;
  for (int64_t first = begin; first < end; first += kUpdateRows) {
    const int64_t rows = min64(kUpdateRows, end - first), padded = round_up(rows, kRowUnit);
    with_elements(job.u.data, job.u.dtype, first * job.u.ld, [&](const auto* from) {
      for (int64_t r = 0; r < rows; ++r) load_row(from + r * job.u.ld, job.k, u + r * lda);
    });
    for (int64_t i = rows * lda; i < padded * lda; ++i) u[i] = 0;
    for (int64_t q = 0; q < panels.count(); ++q) {
      const int64_t nv = panels.panel_vectors(q), width = nv * kLanes, column = q * 2 * kLanes;
      const int64_t columns = min64(width, n - column);
      for (int64_t i = 0; i < padded * width; ++i) product[i] = 0;
      features<C>(nv, u, lda, padded, job.wt + panels.offset(q), job.k, product);
      with_elements(job.weight.data, job.weight.dtype, first * job.weight.ld + column,
                    [&](const auto* o) {
                      auto* weight = writable(o);
                      for (int64_t r = 0; r < rows; ++r) {
                        auto* row = weight + r * job.weight.ld;
                        for (int64_t byte = 0; byte < kAhead; byte += 64)
                          __builtin_prefetch(reinterpret_cast<const char*>(row) + kAhead + byte, 1);
                        for (int64_t c = 0; c < columns; ++c) {
                          auto& slot = row[c];
                          const C value = static_cast<C>(widen(slot));
                          narrow(job.keep * value + job.alpha * product[r * width + c], slot);
                        }
                      }
                    });
    }
  }
}

// ---- vectors of the small dense algebra ---------------------------------------------------------

double dot(const double* x, const double* y, int64_t n) {
  constexpr int kLanes = Simd<double>::kLanes;
  Simd<double>::Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += *loose(x + i + j * kLanes) * *loose(y + i + j * kLanes);
  const Simd<double>::Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += sum[l];
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

void axpy(double alpha, const double* x, double* y, int64_t n) {
  constexpr int kLanes = Simd<double>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) *loose(y + i) += alpha * *loose(x + i);
  for (; i < n; ++i) y[i] += alpha * x[i];
}

void rotate(double c, double s, double* x, double* y, int64_t n) {
  constexpr int kLanes = Simd<double>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Simd<double>::Vec a = *loose(x + i), b = *loose(y + i);
    *loose(x + i) = c * a - s * b;
    *loose(y + i) = s * a + c * b;
  }
  for (; i < n; ++i) {
    const double a = x[i], b = y[i];
    x[i] = c * a - s * b;
    y[i] = s * a + c * b;
  }
}

// One step of the one-sided Jacobi method (Hestenes 1958).
bool jacobi_rotate(double* x, double* y, double* p, double* q, int64_t n, double tolerance,
                   double* xx, double* yy) {
  const double xy = dot(x, y, n);
  if (!(xy * xy > tolerance * tolerance * *xx * *yy)) return false;
  const double zeta = (*yy - *xx) / (2 * xy);
  const double root = __builtin_fabs(zeta) + __builtin_sqrt(1 + zeta * zeta);
  const double t = (zeta < 0 ? -1 : 1) / root;
  const double c = 1 / __builtin_sqrt(1 + t * t);
  rotate(c, c * t, x, y, n);
  rotate(c, c * t, p, q, n);
  *xx -= t * xy;
  *yy += t * xy;
  return true;
}

void signs(uint64_t stream, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) {
    uint64_t x = stream + static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    out[i] = static_cast<float>(1 - 2 * static_cast<int64_t>(x >> 40 & 1));
  }
}

template <typename C>
KernelSet<C> make_set() {
  return {Simd<C>::kLanes,    sketch_scratch<C>, sketch<C>,           apply_scratch<C>,
          apply<C>,           update_scratch<C>, update<C>,           pack<C>,
          pack_transposed<C>, reduce<C>,         sampled_kernels<C>()};
}

#define MOLEGRAD_STRING_(x) #x
#define MOLEGRAD_STRING(x) MOLEGRAD_STRING_(x)

}  // namespace

const KernelTable& table() {
  static const KernelTable instance = {MOLEGRAD_STRING(MOLEGRAD_CAPABILITY),
                                       dot,
                                       axpy,
                                       jacobi_rotate,
                                       signs,
                                       quantized_kernels(),
                                       make_set<float>(),
                                       make_set<double>()};
  return instance;
}

}  // namespace molegrad::cpu::MOLEGRAD_CAPABILITY
