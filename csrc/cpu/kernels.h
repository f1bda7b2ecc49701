// Interface between the capability-independent drivers (products.cpp, sampled.cpp, quantized.cpp)
// and kernels.cpp, sampled_kernels.cpp and quantized_kernels.cpp, which are compiled once per
// instruction set. Only plain data crosses it: those three must not instantiate inline functions of
// other headers with their own machine flags (the linker keeps one copy of each).
#pragma once

#include <cstdint>

namespace molegrad::cpu {

// kFloat8 is e4m3fn; it and e5m2 are only ever read.
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kFloat8, kFloat8E5M2 };

// In bytes.
constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64   ? 8
         : dtype == DType::kFloat32 ? 4
         : dtype >= DType::kFloat8  ? 1
                                    : 2;
}

// A row-major matrix in the caller's memory: unit column stride, `ld` elements from row to row.
struct View {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0, ld = 0;
};

struct MutableView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0, ld = 0;
};

// Columns of A and B that are copied into L1 at a time, and the number every row tile divides.
constexpr int64_t kBlockColumns = 48;
constexpr int64_t kRowUnit = 24;

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Storage of a (rows, k) matrix as panels of two vectors: panel p holds columns
// [2 p lanes, 2 (p + 1) lanes) of all rows contiguously; an odd vector makes the last panel
// three (or, alone, one) wide. Columns beyond k are zero.
struct Panels {
  int64_t lanes, rows, vectors;
  Panels(int64_t lanes, int64_t rows, int64_t k)
      : lanes(lanes), rows(round_up(rows, kRowUnit)), vectors((k + lanes - 1) / lanes) {}
  int64_t count() const { return vectors == 0 ? 0 : vectors == 1 ? 1 : vectors / 2; }
  int64_t panel_vectors(int64_t p) const { return p + 1 < count() ? 2 : vectors - 2 * p; }
  int64_t offset(int64_t p) const { return p * 2 * lanes * rows; }
  int64_t size() const { return vectors * lanes * rows; }
};

// One pass over tokens [begin, end):
//   y += bᵀ P with P = a v          and, when `u` is set,   w += aᵀ R with R = b u;
// with `v` null, P is `p` itself (columns kv): y += bᵀ p. Row t of a v and of b u is multiplied by
// token_scale[t], where that is set: the scales of float8 operands.
// v, u, y, w are panel storage of the compute type; `scratch` holds scratch_size() elements.
template <typename C>
struct SketchJob {
  View a, b, p;
  const C *v = nullptr, *u = nullptr, *token_scale = nullptr;
  int64_t kv = 0, ku = 0;
  int64_t chunk = 0;  // tokens per chunk, a multiple of kRowUnit
};

// out = a s (store) or out -= a s (subtract); s is panel storage with k columns.
template <typename C>
struct ApplyJob {
  View a;
  const C* s = nullptr;
  int64_t k = 0;
  int64_t chunk = 0;
  MutableView out;
  bool subtract = false;
};

// weight = keep * weight + alpha * u wᵀ for weight rows [begin, end).
// wt: panel storage of wᵀ, i.e. (k, n) with the n columns in panels.
template <typename C>
struct UpdateJob {
  MutableView weight;
  View u;
  const C* wt = nullptr;
  int64_t k = 0;
  C keep = 1, alpha = 1;
};

// ---- sampled products X̃ᵀZ -----------------------------------------------------------------------

// Tokens are taken in chunks. The narrow operand Z (T, d), and sums as wide, are stored as panels
// of kPanelVectors vectors of columns, each panel with all its rows; the last one may be half as
// wide. The wide operand X (T, F) is worked on in slices of whole blocks of features.
constexpr int64_t kChunk = 512, kPanelVectors = 8;

struct WidePanels {
  int64_t width, cols;  // of a whole panel; cols is padded to half panels
  WidePanels(int64_t lanes, int64_t d)
      : width(kPanelVectors * lanes), cols(round_up(d, width / 2)) {}
  int64_t count() const { return (cols + width - 1) / width; }
  int64_t panel_width(int64_t p) const {
    return (p + 1) * width <= cols ? width : cols - p * width;
  }
};

// X̃ of one chunk and one slice, without most of its zeros. Features are in groups of kGroup, and
// every group is in tiles of 1, 2, 4 or 8 features: of each feature are listed the values at all
// tokens at which not all of its tile are zero. Tiles of one have masks of these tokens, others
// lists.
constexpr int64_t kGroup = 16, kMaskTokens = 64, kMasks = kChunk / kMaskTokens;
constexpr int64_t kValues = kChunk + kGroup;  // per feature; the rest may be written past the end

template <typename C>
struct Sample {
  C* values = nullptr;        // (groups, kGroup, kValues)
  int32_t* counts = nullptr;  // (groups, kGroup): values per feature
  uint64_t* masks = nullptr;  // (groups, kMasks, kGroup)
  int32_t* starts = nullptr;  // (groups, kMasks, kGroup): where the values of a mask begin
  int32_t* tokens = nullptr;  // (groups, kGroup / 2, kValues): the lists
  int32_t* tile = nullptr;    // (groups): features of a tile
};

// The rule of the sample. The pair (t, β) is taken where uniform(t, β)² < ‖x_tβ‖² weight[t], with
// weight = ‖z_t‖² / τ², and then weighted by 1 / min(1, ‖x_tβ‖ √weight); without `sampling` all
// are, and weight is zero, or NaN where z is not finite.
template <typename C>
struct SampleRule {
  View x, z;
  const C *x_scale = nullptr, *z_scale = nullptr;  // per token, may be null
  int64_t block = 1;                               // features per block
  bool sampling = true;
  uint64_t stream = 0;  // of the random numbers
};

// Pairs taken, Σ score² (1 / inclusion − 1) / τ², Σ score² / τ².
struct SampleSums {
  double taken = 0, noise = 0, energy = 0;
};

// target[offset + r * row_stride + c * column_stride] += alpha * sums[r, c]
template <typename C>
struct AddJob {
  const C* sums = nullptr;  // wide panels
  int64_t rows = 0, d = 0;  // of sums
  C alpha = 1;
  void* target = nullptr;
  DType dtype = DType::kFloat32;
  int64_t offset = 0, row_stride = 0, column_stride = 0;
};

template <typename C>
struct SampledKernels {
  // scores (rows, blocks) = ‖x_tβ‖ ‖z_t‖ of tokens first, first + step, …
  int64_t (*scores_scratch)(const SampleRule<C>& rule);
  void (*scores)(const SampleRule<C>& rule, int64_t first, int64_t step, int64_t rows, C* out,
                 C* scratch);
  // Σ min(score, limit), NaN where a score is.
  double (*clipped_sum)(const C* scores, int64_t count, C limit);
  // Tokens [first, first + rows) of Z into rows `to` … of the wide panels of a chunk; out (rows)
  // becomes ‖z_t‖², or where there is no sampling 0, and NaN where z is not finite.
  void (*pack_wide)(const SampleRule<C>& rule, int64_t first, int64_t rows, int64_t to, C* panels,
                    C* out, C* scratch);
  // The sample of tokens [first, first + rows) and blocks [block, block + blocks).
  int64_t (*scan_scratch)(int64_t features);
  void (*scan)(const SampleRule<C>& rule, int64_t first, int64_t rows, const C* weight,
               int64_t block, int64_t blocks, const Sample<C>& sample, SampleSums* sums,
               C* scratch);
  // sums rows [row, row + groups * kGroup) of sum_rows += X̃ᵀ Z; both in wide panels.
  void (*multiply)(const Sample<C>& sample, int64_t groups, const C* z, int64_t d, C* sums,
                   int64_t sum_rows, int64_t row);
  // Rows [begin, end) of sums become zero.
  void (*clear)(C* sums, int64_t sum_rows, int64_t d, int64_t begin, int64_t end);
  // Of rows [begin, end).
  void (*add)(const AddJob<C>& job, int64_t begin, int64_t end);
};

// Rows in float8, and sums in int8; `scratch` holds a row of float32.
struct QuantizedKernels {
  // Rows [begin, end): data = float8(x / scale) with scale = max |x| / the largest float8 number,
  // or 1 if that is subnormal.
  void (*rows)(const View& x, int64_t begin, int64_t end, bool e5m2, uint8_t* data, float* scales,
               float* scratch);
  // The same with one scale: bits of the largest magnitude in rows [begin, end), the scale that
  // follows, and the numbers under it.
  uint32_t (*peak)(const View& x, int64_t begin, int64_t end, float* scratch);
  float (*scale)(uint32_t peak, bool e5m2);
  void (*scaled)(const View& x, int64_t begin, int64_t end, bool e5m2, float scale, uint8_t* data,
                 float* scratch);
  // Rows [begin, end): data · scale += x, with a new scale for each row.
  void (*add_by_row)(int8_t* data, float* scales, const View& x, int64_t begin, int64_t end,
                     float* scratch);
  // The same with one for each column: bits of the largest magnitude of the sums in rows
  // [begin, end), the scale that follows, and the sums under it.
  void (*column_peaks)(const int8_t* data, const float* scales, const View& x, int64_t begin,
                       int64_t end, uint32_t* peaks, float* scratch);
  void (*scales)(const uint32_t* peaks, int64_t count, float* out);
  void (*add_by_column)(int8_t* data, const float* old_scales, const float* scales, const View& x,
                        int64_t begin, int64_t end, float* scratch);
};

template <typename C>
struct KernelSet {
  int64_t lanes;  // elements of C per vector
  int64_t (*sketch_scratch)(const SketchJob<C>&);
  void (*sketch)(const SketchJob<C>&, int64_t begin, int64_t end, C* y, C* w, C* scratch);
  int64_t (*apply_scratch)(const ApplyJob<C>&);
  void (*apply)(const ApplyJob<C>&, int64_t begin, int64_t end, C* scratch);
  int64_t (*update_scratch)(const UpdateJob<C>&);
  void (*update)(const UpdateJob<C>&, int64_t begin, int64_t end, C* scratch);
  // Rows [begin, end) of `src` into panel storage laid out for `rows` rows.
  void (*pack)(const View& src, int64_t rows, int64_t begin, int64_t end, C* dst);
  // Panels [begin, end) of srcᵀ, which has src.rows columns.
  void (*pack_transposed)(const View& src, int64_t begin, int64_t end, C* dst);
  // dst rows [begin, end) = (add ? dst : 0) + sum over `parts` panel storages `stride` apart.
  void (*reduce)(const C* src, int64_t stride, int64_t parts, int64_t rows, bool add,
                 const MutableView& dst, int64_t begin, int64_t end);
  SampledKernels<C> sampled;
};

struct KernelTable {
  const char* name;
  double (*dot)(const double* x, const double* y, int64_t n);
  // y += alpha x
  void (*axpy)(double alpha, const double* x, double* y, int64_t n);
  // Rotates x and y into orthogonal vectors, and p and q with them, unless their cosine is below
  // `tolerance`; whether it did. xx and yy are the squared norms, kept up to date.
  bool (*jacobi_rotate)(double* x, double* y, double* p, double* q, int64_t n, double tolerance,
                        double* xx, double* yy);
  // out[i] = ±1 from the hash of position i + 1 in `stream`, for i in [begin, end).
  void (*signs)(uint64_t stream, int64_t begin, int64_t end, float* out);
  QuantizedKernels quantized;
  KernelSet<float> f32;
  KernelSet<double> f64;
};

namespace baseline {
const KernelTable& table();
}
#ifdef MOLEGRAD_X86_VARIANTS
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
#endif

// The widest set this processor runs, or the one the environment variable MOLEGRAD_CPU_CAPABILITY
// (baseline, avx2, avx512) asks for.
const KernelTable& kernels();

template <typename C>
const KernelSet<C>& kernel_set();
template <>
inline const KernelSet<float>& kernel_set<float>() {
  return kernels().f32;
}
template <>
inline const KernelSet<double>& kernel_set<double>() {
  return kernels().f64;
}

}  // namespace molegrad::cpu
