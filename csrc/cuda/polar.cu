// P = W (WᵀW)^(-1/2) for batches: Gram matrices, their eigenvectors by one block each, and a
// product. Three launches.
//
// The eigenvectors: Cholesky with pivots, WᵀW = RᵀR with as many rows as WᵀW has digits for, and
// one-sided Jacobi on the rows of R (Veselić, Hari 1989), which converges in 7 to 10 sweeps. A
// sweep has a round for each row, in which pairs of rows that have none in common are turned by
// eight lanes each, so that reading and writing the rows is what a round costs: 512 cycles at k =
// 64, a quarter of that at 32. That is 150 us and 40 us for any number of matrices up to that of an
// H100's multiprocessors. All of it is float64: in float32, the rounding of some hundred turns of a
// row would cost P a digit. A GPU with a 64th of its rate in float64 takes 0.9 ms at k = 64.
#include "factor.cuh"
#include "tall.h"
#include "tensors.h"

namespace molegrad::cuda {

constexpr int kPolarThreads = 512, kMaxSweeps = 30;
constexpr int kPairLanes = 8;

struct PolarRoot {
  TallSums gram;
  int64_t k;
  void* inverse_root;  // (batch, k, k): (WᵀW)^(-1/2) of the scaled W
  int* exponents;      // (batch, k): all of a matrix are one
  int* route;          // (batch): 0, or 1 where W is not finite
  double* squares;     // (batch, k, k + row_ld(k)) where it does not fit in shared memory, or null
};

// Where the lower element index comes first: the upper half of a symmetric matrix in rows.
__device__ __forceinline__ int packed(int i, int j, int k) {
  return i <= j ? i * k - i * (i + 1) / 2 + j : j * k - j * (j + 1) / 2 + i;
}

// Below the rounding of W, or of its Gram matrix in float64, a mode has no direction.
template <typename C>
__device__ double mode_tolerance(int k) {
  const double tolerance = 8 * sqrt(static_cast<double>(k)) * rounding_of<C>();
  return tolerance > 1e-7 ? tolerance : 1e-7;
}

// Rows of R for g = RᵀR: pivot[s] is row s's, row s is g[pivot[s]] / sqrt(g[pivot[s], pivot[s]])
// in the columns whose order is s or larger. Returns the number of rows.
__device__ int pivoted_cholesky(double* g, int k, int* pivot, int* order, int* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  // Rounding of a Gram matrix leaves no more of a row that depends on the others.
  constexpr double kNothing = 1e-15;
  for (int j = threadIdx.x; j < k; j += blockDim.x) order[j] = k;
  double first = 0;
  for (int step = 0; step < k; ++step) {
    __syncthreads();
    if (warp == 0) {
      double largest = -1;
      int at = 0;
      for (int j = lane; j < k; j += 32) {
        const double x = order[j] == k ? g[packed(j, j, k)] : -1;
        if (x > largest) {
          largest = x;
          at = j;
        }
      }
      for (int offset = 16; offset > 0; offset /= 2) {
        const double other = __shfl_xor_sync(kWholeWarp, largest, offset);
        const int other_at = __shfl_xor_sync(kWholeWarp, at, offset);
        if (other > largest || (other == largest && other_at < at)) {
          largest = other;
          at = other_at;
        }
      }
      if (lane == 0) {
        *shared = at;
        pivot[step] = at;
        order[at] = step;
      }
    }
    __syncthreads();
    const int p = *shared;
    const double square = g[packed(p, p, k)];
    if (step == 0) first = square;
    if (!(square > kNothing * first)) {
      __syncthreads();
      if (threadIdx.x == 0) order[p] = k;
      __syncthreads();
      return step;
    }
    for (int i = warp; i < k; i += warps) {
      if (order[i] != k) continue;
      const double factor = g[packed(p, i, k)] / square;
      for (int j = i + lane; j < k; j += 32)
        if (order[j] == k) g[packed(i, j, k)] -= factor * g[packed(p, j, k)];
    }
  }
  __syncthreads();
  return k;
}

// Rows two of which lie in different banks for lanes 0 to 7 and 8 to 15.
__device__ __host__ constexpr int64_t row_ld(int64_t k) { return (k + 15) / 16 * 16 + 8; }

// Turns two rows into orthogonal ones; whether they were not, up to that cosine. Eight lanes, each
// with kEach numbers of a row in registers, or none where kEach is 0. Others of the warp that have
// no rows to turn come along.
template <int kEach>
__device__ bool turn_rows(double* x, double* y, int k, double cosine_max, bool has_rows) {
  const int lane = threadIdx.x % kPairLanes, count = has_rows ? k : 0;
  double xs[kEach + 1], ys[kEach + 1];
  double xx = 0, yy = 0, xy = 0;
  const auto add = [&](double a, double b) {
    xx += a * a;
    yy += b * b;
    xy += a * b;
  };
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = lane + i * kPairLanes;
    xs[i] = j < count ? x[j] : 0;
    ys[i] = j < count ? y[j] : 0;
    add(xs[i], ys[i]);
  }
  if (kEach == 0)
    for (int j = lane; j < count; j += kPairLanes) add(x[j], y[j]);
#pragma unroll
  for (int offset = kPairLanes / 2; offset > 0; offset /= 2) {
    xx += __shfl_xor_sync(kWholeWarp, xx, offset);
    yy += __shfl_xor_sync(kWholeWarp, yy, offset);
    xy += __shfl_xor_sync(kWholeWarp, xy, offset);
  }
  if (!(xy * xy > cosine_max * cosine_max * xx * yy)) return false;
  // The angle may be off in its seventh digit, its sine and cosine must belong together.
  const float zeta = static_cast<float>(yy - xx) / static_cast<float>(2 * xy);
  const float size = zeta < 0 ? -zeta : zeta;
  const float angle = (zeta < 0 ? -1.0f : 1.0f) / (size + sqrtf(1 + zeta * zeta));
  const double tangent = angle, cosine = rsqrt(1 + tangent * tangent), sine = cosine * tangent;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = lane + i * kPairLanes;
    if (j >= count) continue;
    x[j] = cosine * xs[i] - sine * ys[i];
    y[j] = sine * xs[i] + cosine * ys[i];
  }
  if (kEach == 0)
    for (int j = lane; j < count; j += kPairLanes) {
      const double a = x[j], b = y[j];
      x[j] = cosine * a - sine * b;
      y[j] = sine * a + cosine * b;
    }
  return true;
}

// Rows of x (rows, k) <- orthogonal ones, by turns of two that together change no xᵀx. Rounds of a
// tournament: every row meets every other one in a sweep, and a round's pairs share none.
template <int kEach>
__device__ void orthogonal_rows(double* x, int rows, int k, double cosine_max, int* shared) {
  const int players = rows + rows % 2, pairs = players / 2, last = players - 1;
  const int64_t ld = row_ld(k);
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    __syncthreads();
    if (threadIdx.x == 0) *shared = 0;
    __syncthreads();
    for (int round = 0; round < last; ++round) {
      for (int first = threadIdx.x / 32 * 4; first < pairs; first += blockDim.x / 32 * 4) {
        const int pair = first + threadIdx.x % 32 / kPairLanes;
        const int a = pair == 0 ? last : (round + pair) % last;
        const int b = pair == 0 ? round : (round + last - pair) % last;
        const bool has_rows = pair < pairs && a < rows && b < rows;
        if (turn_rows<kEach>(x + (has_rows ? a : 0) * ld, x + (has_rows ? b : 0) * ld, k,
                             cosine_max, has_rows))
          *shared = 1;
      }
      __syncthreads();
    }
    if (*shared == 0) break;
  }
  __syncthreads();
}

// Where things lie in shared memory; squares and rows do, too, where they fit.
struct PolarLayout {
  int64_t word, pivot, order, sigma, squares, rows, size;
  __device__ __host__ constexpr PolarLayout(int64_t k, bool fits)
      : word(0),
        pivot(16),
        order(pivot + k * 4),
        sigma(order + k * 4),
        squares(sigma + k * 8),
        rows(squares + (fits ? k * (k + 1) / 2 * 8 : 0)),
        size(rows + (fits ? k * row_ld(k) * 8 : 0)) {}
};

template <typename C>
__global__ void __launch_bounds__(kPolarThreads) polar_root_kernel(PolarRoot p) {
  MOLEGRAD_SHARED(memory);
  in_sequence();
  const int64_t matrix = blockIdx.x;
  const int k = static_cast<int>(p.k), thread = threadIdx.x, threads = blockDim.x;
  const int64_t ld = row_ld(k);
  const PolarLayout at(k, p.squares == nullptr);
  int* word = reinterpret_cast<int*>(memory + at.word);
  int* pivot = reinterpret_cast<int*>(memory + at.pivot);
  int* order = reinterpret_cast<int*>(memory + at.order);
  double* sigma = reinterpret_cast<double*>(memory + at.sigma);
  double* g = reinterpret_cast<double*>(memory + at.squares);
  double* x = reinterpret_cast<double*>(memory + at.rows);
  if (p.squares != nullptr) {
    g = p.squares + matrix * k * (k + row_ld(k));
    x = g + static_cast<int64_t>(k) * k;
  }

  for (int j = thread; j < k; j += threads) pivot[j] = column_exponent(p.gram, matrix, j);
  __syncthreads();
  int largest = kEmpty;
  for (int j = 0; j < k; ++j) largest = pivot[j] > largest ? pivot[j] : largest;
  const bool finite = largest != kNotFinite;
  for (int j = thread; j < k; j += threads)
    p.exponents[matrix * k + j] = finite && largest != kEmpty ? largest : 0;
  if (thread == 0) p.route[matrix] = finite ? 0 : 1;
  if (!finite) return;
  for_elements(k, k, [&](int64_t i, int64_t j) {
    if (i <= j) g[packed(i, j, k)] = sum_of_parts<double>(p.gram, matrix, i, j, largest, largest);
  });
  __syncthreads();
  const int rows = pivoted_cholesky(g, k, pivot, order, word);
  for_elements(rows, k, [&](int64_t s, int64_t j) {
    const int row = pivot[s];
    const double value = order[j] < s ? 0.0 : g[packed(row, j, k)];
    x[s * ld + j] = value / sqrt(g[packed(row, row, k)]);
  });
  // As far from orthogonal as leaves the result its rounding, also of modes that are barely kept.
  const double cosine_max = sizeof(C) == 4 ? 1e-10 : 1e-15;
  if (k <= 32)
    orthogonal_rows<4>(x, rows, k, cosine_max, word);
  else if (k <= 64)
    orthogonal_rows<8>(x, rows, k, cosine_max, word);
  else if (k <= 128)
    orthogonal_rows<16>(x, rows, k, cosine_max, word);
  else
    orthogonal_rows<0>(x, rows, k, cosine_max, word);

  // Row i is sigma_i v_iᵀ now; (WᵀW)^(-1/2) is the sum of v_i v_iᵀ / sigma_i.
  for (int i = thread / 32; i < rows; i += threads / 32) {
    double sum = 0;
    for (int j = thread % 32; j < k; j += 32) sum += x[i * ld + j] * x[i * ld + j];
    sum = sqrt(warp_sum(sum));
    if (thread % 32 == 0) sigma[i] = sum;
  }
  __syncthreads();
  double sigma_max = 0;
  for (int i = 0; i < rows; ++i) sigma_max = sigma[i] > sigma_max ? sigma[i] : sigma_max;
  const double least = mode_tolerance<C>(k) * sigma_max;
  for (int i = thread / 32; i < rows; i += threads / 32)
    for (int j = thread % 32; j < k; j += 32) {
      const double power = sigma[i] * sqrt(sigma[i]);
      x[i * ld + j] = sigma[i] > least ? x[i * ld + j] / power : 0.0;
    }
  __syncthreads();
  C* out = static_cast<C*>(p.inverse_root) + matrix * k * k;
  for_elements(k, k, [&](int64_t a, int64_t b) {
    double sum = 0;
    for (int i = 0; i < rows; ++i) sum += x[i * ld + a] * x[i * ld + b];
    out[a * k + b] = static_cast<C>(sum);
  });
}

}  // namespace molegrad::cuda

using namespace molegrad::cuda;

namespace {

// Eight lanes for each pair of rows, and some warps for the elimination.
int64_t root_threads(int64_t k) { return k >= 32 ? kPolarThreads : 128; }

bool root_fits(int64_t k) { return PolarLayout(k, true).size <= shared_bytes(); }

template <typename C>
struct PolarScratch {
  Scratch scratch;
  TallParts parts;
  double *sums, *gram, *squares;
  C* inverse_root;
  int *part_exponents, *gram_exponents, *exponents, *route;
  PolarScratch(void* memory, int64_t batch, int64_t n, int64_t k) : scratch(memory), parts(n, k) {
    sums = scratch.take<double>(batch * parts.count * k * k);
    part_exponents = scratch.take<int>(batch * parts.count * k);
    const int64_t combined = k > kCombineAbove ? batch * k : 0;
    gram = scratch.take<double>(combined * k);
    gram_exponents = scratch.take<int>(combined);
    squares = scratch.take<double>(root_fits(k) ? 0 : batch * k * (k + row_ld(k)));
    inverse_root = scratch.take<C>(batch * k * k);
    exponents = scratch.take<int>(batch * k);
    route = scratch.take<int>(batch);
  }
};

template <typename C>
cudaError_t polar_factor(const TallBatch& w, int64_t batch, int64_t n, int64_t k, C* out,
                         void* memory, cudaStream_t stream) {
  const PolarScratch<C> s(memory, batch, n, k);
  const int parts = static_cast<int>(s.parts.count);
  const TallProduct product{w, n, k, s.parts.rows, parts, s.sums, s.part_exponents, nullptr, 0};
  MOLEGRAD_TRY((launch_product<double, true>(product, batch, true, stream)));
  TallSums sums{s.sums, s.part_exponents, k, parts};
  if (k > kCombineAbove)
    MOLEGRAD_TRY(launch_combine<double>(sums, s.gram, s.gram_exponents, batch, nullptr, 0, stream));
  const PolarRoot root{sums, k, s.inverse_root, s.exponents, s.route, s.squares};
  const PolarLayout layout(k, s.squares == nullptr);
  MOLEGRAD_TRY(launch_early(polar_root_kernel<C>, grid_of(batch),
                            dim3(static_cast<unsigned>(root_threads(k))),
                            static_cast<size_t>(layout.size), stream, root));
  return launch_apply<C>({w, n, k, s.exponents, s.inverse_root, false, out,
                          packs_of_four<C>(out, k, n * k), s.route, true},
                         batch, stream);
}

}  // namespace

extern "C" int64_t molegrad_polar_factor_scratch(int64_t batch, int64_t n, int64_t k, int dtype) {
  return dtype == 1 ? PolarScratch<double>(nullptr, batch, n, k).scratch.used
                    : PolarScratch<float>(nullptr, batch, n, k).scratch.used;
}

// w (batch, n, k), rows of `ld` numbers, matrices below one another; p (batch, n, k) in float64 for
// float64, else float32; scratch 256-byte aligned.
extern "C" int molegrad_polar_factor(const void* w, int dtype, int64_t ld, int64_t batch, int64_t n,
                                     int64_t k, void* p, void* scratch, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const TallBatch matrices{w, dtype, ld, n * ld};
  if (dtype == 1)
    return polar_factor<double>(matrices, batch, n, k, static_cast<double*>(p), scratch, stream);
  return polar_factor<float>(matrices, batch, n, k, static_cast<float*>(p), scratch, stream);
}

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
namespace molegrad::cuda {
namespace {

Tensor polar_factor_op(Tensor w) {
  check_block("polar_factor", w);
  const Place place(w);
  const Matrix from(w);
  const int64_t n = w.size(w.dim() - 2), k = w.size(w.dim() - 1), batch = from.rows / n;
  Tensor p = new_tensor(w, other_last_sizes(w, 0, {}), acc_dtype(w));
  const Tensor scratch = new_scratch(w, molegrad_polar_factor_scratch(batch, n, k, from.dtype));
  check_launch("polar_factor", molegrad_polar_factor(from.data, from.dtype, from.ld, batch, n, k,
                                                     p.mutable_data_ptr(),
                                                     scratch.mutable_data_ptr(), place.stream()));
  return p;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) {
  m.impl("polar_factor", TORCH_BOX(&polar_factor_op));
}

}  // namespace molegrad::cuda
#endif
