#include "polar.cuh"
#include "polar.h"
#include "tall.h"

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
  PolarScratch(void* memory, int64_t batch, int64_t n, int64_t k)
      : scratch(memory), parts(n, k, k) {
    sums = scratch.take<double>(batch * parts.count * k * k);
    part_exponents = scratch.take<int>(batch * parts.count * k);
    const int64_t combined = k > kCombineAbove ? batch * k : 0;
    gram = scratch.take<double>(combined * k);
    gram_exponents = scratch.take<int>(combined);
    squares = scratch.take<double>(root_fits(k) ? 0 : batch * k * (k + row_ld(k)));
    if (root_fits(k)) squares = nullptr;
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
  const TallProduct product{
      w, w, n, k, k, s.parts.rows, parts, true, s.sums, s.part_exponents, nullptr, 0};
  MOLEGRAD_TRY((launch_product<double, true>(product, batch, true, stream)));
  TallSums sums{s.sums, s.part_exponents, k, k, parts};
  if (k > kCombineAbove)
    MOLEGRAD_TRY(launch_combine<double>(sums, s.gram, s.gram_exponents, batch, nullptr, 0, stream));
  const PolarRoot root{sums, k, s.inverse_root, s.exponents, s.route, s.squares};
  const PolarLayout layout(k, s.squares == nullptr);
  MOLEGRAD_TRY(launch_early(polar_root_kernel<C>, grid_of(batch),
                            dim3(static_cast<unsigned>(root_threads(k))),
                            static_cast<size_t>(layout.size), stream, root));
  return launch_apply<C>({w, n, k, k, s.exponents, s.inverse_root, k, k * k, false, false, false,
                          out, k, n * k, packs_of_four<C>(out, k, n * k), s.route, true},
                         batch, stream);
}

}  // namespace

extern "C" int64_t molegrad_polar_factor_scratch(int64_t batch, int64_t n, int64_t k, int dtype) {
  return dtype == 1 ? PolarScratch<double>(nullptr, batch, n, k).scratch.used
                    : PolarScratch<float>(nullptr, batch, n, k).scratch.used;
}

extern "C" int molegrad_polar_factor(const void* w, int dtype, int64_t ld, int64_t batch, int64_t n,
                                     int64_t k, void* p, void* scratch, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const TallBatch matrices{w, dtype, ld, n * ld};
  if (dtype == 1)
    return polar_factor<double>(matrices, batch, n, k, static_cast<double*>(p), scratch, stream);
  return polar_factor<float>(matrices, batch, n, k, static_cast<float*>(p), scratch, stream);
}
