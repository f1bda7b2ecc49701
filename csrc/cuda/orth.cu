// Orthonormal bases, as molegrad/ops/orth.py has them. Matrices are row-major, `ld` numbers from
// row to row, those of a batch below one another; what is computed is float64 for float64, else
// float32. Scratch memory is 256-byte aligned.
#include "orth.cuh"
#include "orth_block.cuh"
#include "tall.h"
#include "tensors.h"

using namespace molegrad::cuda;

namespace {

// A warp for each column.
int factor_threads(int64_t k, int most) {
  return k * 32 >= most ? most : k >= 4 ? static_cast<int>(k * 32) : 128;
}
int block_threads(int64_t k) { return factor_threads(k, kBlockThreads); }

// Rows of the matrix that is eliminated start in different banks.
int64_t square_ld(int64_t k) { return k | 1; }

template <typename C>
int64_t factor_shared(int64_t k) {
  return (32 + k * square_ld(k)) * static_cast<int64_t>(sizeof(C));
}

// What orthonormalising by several launches keeps between them.
template <typename C>
struct OrthScratch {
  Scratch scratch;
  TallParts parts;
  double *sums, *gram, *squares;
  C *q1, *inverse, *first_r, *norms, *last_norms, *work;
  int *part_exponents, *gram_exponents, *exponents, *route;
  OrthScratch(void* memory, int64_t batch, int64_t m, int64_t k) : scratch(memory), parts(m, k) {
    sums = scratch.take<double>(batch * parts.count * k * k);
    part_exponents = scratch.take<int>(batch * parts.count * k);
    const int64_t combined = k > kCombineAbove ? batch * k : 0;
    gram = scratch.take<double>(combined * k);
    gram_exponents = scratch.take<int>(combined);
    const bool fits = factor_shared<double>(k) <= kSharedBytes;
    squares = scratch.take<double>(fits ? 0 : batch * k * square_ld(k));
    q1 = scratch.take<C>(batch * m * k);
    inverse = scratch.take<C>(batch * k * k);
    first_r = scratch.take<C>(batch * k * k);
    norms = scratch.take<C>(batch * k);
    last_norms = scratch.take<C>(batch * k);
    work = scratch.take<C>(batch * 2 * k);
    exponents = scratch.take<int>(batch * k);
    route = scratch.take<int>(batch);
  }
};

template <typename C>
struct OrthJob {
  TallBatch y;
  int64_t batch, m, k;
  double cond_max;
  C *q, *r;
  int32_t* status;
  OrthScratch<C> s;
  cudaStream_t stream;

  // The Gram matrix in G of the blocks of a route.
  template <typename G, bool kScaled>
  cudaError_t gram(const TallBatch& x, const int* route, int wanted, TallSums& sums) {
    const TallProduct p{x,
                        m,
                        k,
                        s.parts.rows,
                        static_cast<int>(s.parts.count),
                        s.sums,
                        kScaled ? s.part_exponents : nullptr,
                        route,
                        wanted};
    MOLEGRAD_TRY((launch_product<G, kScaled>(p, batch, route == nullptr, stream)));
    sums = {s.sums, p.exponents, k, p.parts};
    if (k <= kCombineAbove) return cudaSuccess;
    return launch_combine<G>(sums, s.gram, kScaled ? s.gram_exponents : nullptr, batch, route,
                             wanted, stream);
  }

  OrthFactor factor(const TallSums& sums, int wanted, bool in_shared) const {
    return {sums,
            k,
            square_ld(k),
            cond_max,
            in_shared ? nullptr : s.squares,
            s.inverse,
            s.first_r,
            s.norms,
            s.last_norms,
            s.exponents,
            s.route,
            wanted,
            status,
            r};
  }

  template <typename G>
  cudaError_t first_round(const int* route, int wanted) {
    TallSums sums;
    MOLEGRAD_TRY((gram<G, true>(y, route, wanted, sums)));
    const bool in_shared = factor_shared<G>(k) <= kSharedBytes;
    return launch_early(
        orth_first_kernel<G, C>, grid_of(batch), dim3(factor_threads(k, kFactorThreads)),
        in_shared ? factor_shared<G>(k) : 32 * sizeof(G), stream, factor(sums, wanted, in_shared));
  }

  TallApply apply(const TallBatch& x, const int* exponents, C* out) const {
    return {x,       m,    k, exponents, s.inverse, true, out, packs_of_four<C>(out, k, m * k),
            s.route, false};
  }

  cudaError_t run() {
    MOLEGRAD_TRY(first_round<C>(nullptr, -1));
    if constexpr (sizeof(C) == 4) MOLEGRAD_TRY(first_round<double>(s.route, kPrecise));
    MOLEGRAD_TRY(launch_apply<C>(apply(y, s.exponents, s.q1), batch, stream));
    const TallBatch q1{s.q1, sizeof(C) == 4 ? 0 : 1, k, m * k};
    TallSums sums;
    MOLEGRAD_TRY((gram<C, false>(q1, s.route, kQuick, sums)));
    const bool in_shared = factor_shared<C>(k) <= kSharedBytes;
    MOLEGRAD_TRY(launch_early(
        orth_second_kernel<C>, grid_of(batch), dim3(factor_threads(k, kFactorThreads)),
        in_shared ? factor_shared<C>(k) : 32 * sizeof(C), stream, factor(sums, kQuick, in_shared)));
    const OrthFinish finish{
        y, apply(q1, nullptr, q), m, k, s.q1, s.norms, s.exponents, s.work, s.route, status, r};
    return launch_early(orth_finish_kernel<C>, grid_of(batch * (count_apply_tiles(m, k) + 1)),
                        dim3(kTallThreads), sizeof(ApplyTiles<C>), stream, finish);
  }
};

template <typename C>
cudaError_t orthonormalize_in_block(const TallBatch& y, int64_t batch, int64_t m, int64_t k,
                                    double cond_max, C* q, C* r, int32_t* status, void* memory,
                                    cudaStream_t stream) {
  Scratch scratch(memory);
  C* reflections = scratch.take<C>(batch * m * k);
  C* work = scratch.take<C>(batch * 2 * k);
  const int threads = block_threads(k);
  const OrthBlockLayout layout(m, k, square_ld(k), threads, sizeof(C));
  const OrthBlock p{y, m, k, square_ld(k), cond_max, q, r, status, reflections, work};
  return launch(orth_block_kernel<C>, grid_of(batch), dim3(threads),
                static_cast<size_t>(layout.size), stream, p);
}

template <typename C>
cudaError_t orthonormalize(const TallBatch& y, int64_t batch, int64_t m, int64_t k, double cond_max,
                           bool in_block, C* q, C* r, int32_t* status, void* scratch,
                           cudaStream_t stream) {
  if (in_block)
    return orthonormalize_in_block(y, batch, m, k, cond_max, q, r, status, scratch, stream);
  OrthJob<C> job{y, batch, m, k, cond_max, q, r, status, {scratch, batch, m, k}, stream};
  return job.run();
}

template <typename C>
int64_t orthonormalize_scratch(int64_t batch, int64_t m, int64_t k, bool in_block) {
  if (!in_block) return OrthScratch<C>(nullptr, batch, m, k).scratch.used;
  Scratch scratch(nullptr);
  scratch.take<C>(batch * m * k);
  scratch.take<C>(batch * 2 * k);
  return scratch.used;
}

}  // namespace

// Whether one block can do a matrix on its own.
extern "C" int molegrad_orthonormalize_in_block(int64_t m, int64_t k, int dtype) {
  if (k > kBlockColumns || m * k * k > kBlockWork) return 0;
  const int64_t number = dtype == 1 ? 8 : 4;
  return OrthBlockLayout(m, k, square_ld(k), block_threads(k), number).size <= kSharedBytes;
}

extern "C" int64_t molegrad_orthonormalize_scratch(int64_t batch, int64_t m, int64_t k, int dtype,
                                                   int in_block) {
  return dtype == 1 ? orthonormalize_scratch<double>(batch, m, k, in_block != 0)
                    : orthonormalize_scratch<float>(batch, m, k, in_block != 0);
}

// y (batch, m, k), 1 <= k <= m; q (batch, m, k), r (batch, k, k), status (batch).
extern "C" int molegrad_orthonormalize(const void* y, int dtype, int64_t ld, int64_t batch,
                                       int64_t m, int64_t k, double cond_max, int in_block, void* q,
                                       void* r, int32_t* status, void* scratch,
                                       cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const TallBatch block{y, dtype, ld, m * ld};
  if (dtype == 1)
    return orthonormalize<double>(block, batch, m, k, cond_max, in_block != 0,
                                  static_cast<double*>(q), static_cast<double*>(r), status, scratch,
                                  stream);
  return orthonormalize<float>(block, batch, m, k, cond_max, in_block != 0, static_cast<float*>(q),
                               static_cast<float*>(r), status, scratch, stream);
}

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
namespace molegrad::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> orthonormalize_op(Tensor y, double cond_max) {
  check_block("orthonormalize", y);
  const Place place(y);
  const Matrix from(y);
  const int64_t m = y.size(y.dim() - 2), k = y.size(y.dim() - 1), batch = from.rows / m;
  Tensor q = new_tensor(y, other_last_sizes(y, 0, {}), acc_dtype(y));
  Tensor r = new_tensor(y, other_last_sizes(y, 2, {k, k}), acc_dtype(y));
  Tensor status = new_tensor(y, other_last_sizes(y, 2, {}), ScalarType::Int);
  const int in_block = molegrad_orthonormalize_in_block(m, k, from.dtype);
  const Tensor scratch =
      new_scratch(y, molegrad_orthonormalize_scratch(batch, m, k, from.dtype, in_block));
  check_launch("orthonormalize",
               molegrad_orthonormalize(from.data, from.dtype, from.ld, batch, m, k, cond_max,
                                       in_block, q.mutable_data_ptr(), r.mutable_data_ptr(),
                                       memory_of<int32_t>(status), scratch.mutable_data_ptr(),
                                       place.stream()));
  return {q, r, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) {
  m.impl("orthonormalize", TORCH_BOX(&orthonormalize_op));
}

}  // namespace molegrad::cuda
#endif
