#include "orth.cuh"
#include "orth.h"
#include "orth_block.cuh"
#include "tall.h"

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
  OrthScratch(void* memory, int64_t batch, int64_t m, int64_t k) : scratch(memory), parts(m, k, k) {
    sums = scratch.take<double>(batch * parts.count * k * k);
    part_exponents = scratch.take<int>(batch * parts.count * k);
    const int64_t combined = k > kCombineAbove ? batch * k : 0;
    gram = scratch.take<double>(combined * k);
    gram_exponents = scratch.take<int>(combined);
    const bool fits = factor_shared<double>(k) <= kSharedBytes;
    squares = scratch.take<double>(fits ? 0 : batch * k * square_ld(k));
    if (fits) squares = nullptr;
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
                        x,
                        m,
                        k,
                        k,
                        s.parts.rows,
                        static_cast<int>(s.parts.count),
                        true,
                        s.sums,
                        kScaled ? s.part_exponents : nullptr,
                        route,
                        wanted};
    MOLEGRAD_TRY((launch_product<G, kScaled>(p, batch, route == nullptr, stream)));
    sums = {s.sums, p.exponents, k, k, p.parts};
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
    return {x,         m,    k,     k,     exponents,
            s.inverse, k,    k * k, false, true,
            false,     out,  k,     m * k, packs_of_four<C>(out, k, m * k),
            s.route,   false};
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

// ---- the tangent estimate -----------------------------------------------------------------------

// left <- [U, (I - UUᵀ)² Y], made orthonormal with triangle R; right <- [W, V] Rᵀ.
template <typename C>
struct TangentScratch {
  Scratch scratch;
  TallParts parts;
  C *block, *sides, *sums, *inner, *r;
  int32_t* status;
  void* orth;
  TangentScratch(void* memory, int64_t m, int64_t n, int64_t k, bool in_block)
      : scratch(memory), parts(m, k, k) {
    block = scratch.take<C>(m * 2 * k);
    sides = scratch.take<C>(n * 2 * k);
    sums = scratch.take<C>(parts.count * k * k);
    inner = scratch.take<C>(k * k);
    r = scratch.take<C>(4 * k * k);
    status = scratch.take<int32_t>(1);
    orth = scratch.take<char>(orthonormalize_scratch<C>(1, m, 2 * k, in_block));
  }
};

template <typename C>
cudaError_t tangent_factors(const TallBatch& u, const TallBatch& v, const TallBatch& y,
                            const TallBatch& w, int64_t m, int64_t n, int64_t k, double cond_max,
                            bool in_block, C* left, C* right, void* scratch, cudaStream_t stream) {
  const TangentScratch<C> s(scratch, m, n, k, in_block);
  const int code = sizeof(C) == 4 ? 0 : 1;
  const TallBatch block{s.block, code, 2 * k, 0}, rest{s.block + k, code, 2 * k, 0};
  const SideBySide pairs{{u, w}, {y, v}, {s.block, s.sides}, {m, n}, k};
  MOLEGRAD_TRY(launch(side_by_side_kernel<C>, grid_of(ceil_div((m + n) * 2 * k, kTallThreads)),
                      dim3(kTallThreads), 0, stream, pairs));
  for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan, Parlett)
    const TallProduct product{
        u,     rest,   m,       k,       k, s.parts.rows, static_cast<int>(s.parts.count),
        false, s.sums, nullptr, nullptr, 0};
    MOLEGRAD_TRY((launch_product<C, false>(product, 1, false, stream)));
    TallSums sums{s.sums, nullptr, k, k, product.parts};
    MOLEGRAD_TRY(launch_combine<C>(sums, s.inner, nullptr, 1, nullptr, 0, stream));
    const TallApply subtract{u,    m,           k,     k, nullptr, s.inner, k,    0, false, false,
                             true, s.block + k, 2 * k, 0, false,   nullptr, false};
    MOLEGRAD_TRY(launch_apply<C>(subtract, 1, stream));
  }
  MOLEGRAD_TRY(orthonormalize<C>(block, 1, m, 2 * k, cond_max, in_block, left, s.r, s.status,
                                 s.orth, stream));
  const TallApply last{{s.sides, code, 2 * k, 0},
                       n,
                       2 * k,
                       2 * k,
                       nullptr,
                       s.r,
                       2 * k,
                       0,
                       true,
                       false,
                       false,
                       right,
                       2 * k,
                       0,
                       packs_of_four<C>(right, 2 * k, 0),
                       nullptr,
                       false};
  return launch_apply<C>(last, 1, stream);
}

}  // namespace

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

extern "C" int64_t molegrad_tangent_factors_scratch(int64_t m, int64_t n, int64_t k, int dtype) {
  const bool in_block = molegrad_orthonormalize_in_block(m, 2 * k, dtype) != 0;
  return dtype == 1 ? TangentScratch<double>(nullptr, m, n, k, in_block).scratch.used
                    : TangentScratch<float>(nullptr, m, n, k, in_block).scratch.used;
}

extern "C" int molegrad_tangent_factors(const void* u, int64_t u_ld, const void* v, int64_t v_ld,
                                        const void* y, int64_t y_ld, const void* w, int64_t w_ld,
                                        int dtype, int64_t m, int64_t n, int64_t k, double cond_max,
                                        void* left, void* right, void* scratch,
                                        cudaStream_t stream) {
  const bool in_block = molegrad_orthonormalize_in_block(m, 2 * k, dtype) != 0;
  const TallBatch u_in{u, dtype, u_ld, 0}, v_in{v, dtype, v_ld, 0}, y_in{y, dtype, y_ld, 0},
      w_in{w, dtype, w_ld, 0};
  if (dtype == 1)
    return tangent_factors<double>(u_in, v_in, y_in, w_in, m, n, k, cond_max, in_block,
                                   static_cast<double*>(left), static_cast<double*>(right), scratch,
                                   stream);
  return tangent_factors<float>(u_in, v_in, y_in, w_in, m, n, k, cond_max, in_block,
                                static_cast<float*>(left), static_cast<float*>(right), scratch,
                                stream);
}
