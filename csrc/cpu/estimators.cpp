#include "estimators.h"

#include <algorithm>

#include "products.h"

namespace molegrad::cpu {
namespace {

View read(const MutableView& x) { return {x.data, x.dtype, x.rows, x.cols, x.ld}; }

template <typename C>
MutableView columns_of(const MutableView& x, int64_t first, int64_t count) {
  return {static_cast<C*>(x.data) + first, x.dtype, x.rows, count, x.ld};
}

// dst = src, converted.
template <typename C>
void copy(const View& src, const MutableView& dst) {
  const KernelSet<C>& set = kernel_set<C>();
  Buffer<C> packed(Panels(set.lanes, src.rows, src.cols).size());
  set.pack(src, src.rows, 0, src.rows, packed.data());
  set.reduce(packed.data(), 0, 1, src.rows, false, dst, 0, src.rows);
}

template <typename C>
double sum_of_squares(const MutableView& x) {
  double sum = 0;
  for (int64_t r = 0; r < x.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) {
      const double value = static_cast<const C*>(x.data)[r * x.ld + c];
      sum += value * value;
    }
  return sum;
}

// out = xᵀ of a small square matrix.
template <typename C>
void transpose(const C* x, C* out, int64_t k) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) out[j * k + i] = x[i * k + j];
}

// out (n, k) = v rᵀ.
template <typename C>
void times_transposed(const View& v, const Buffer<C>& r, const MutableView& out) {
  const int64_t k = v.cols;
  Buffer<C> rt(k * k);
  transpose(r.data(), rt.data(), k);
  product_nn<C>(v, read(view_of(rt.data(), k, k)), out);
}

}  // namespace

template <typename C>
LowrankGrad<C> lowrank_grad(const View& a, const View& b, const View& v, int64_t power_iters,
                            const View& probes, double cond_max, const C* token_scale,
                            const MutableView& u, const MutableView& w) {
  const int64_t n = a.cols, m = b.cols, k = v.cols, r = probes.cols;
  Buffer<C> start(n * (k + r)), product(m * (k + r)), triangle(k * k);
  const MutableView start_view = view_of(start.data(), n, k + r);
  const MutableView basis = columns_of<C>(start_view, 0, k);
  copy<C>(v, basis);
  if (r > 0) copy<C>(probes, columns_of<C>(start_view, k, r));

  const MutableView all = view_of(product.data(), m, k + r);
  const MutableView y = columns_of<C>(all, 0, k), g_probes = columns_of<C>(all, k, r);
  sketch_left<C>(a, b, read(start_view), token_scale, all);

  double norm_sq = 0;
  if (r > 0) {  // Hutch++: ‖G‖² = ‖GV‖² + E ‖G (I − VVᵀ) ω‖²
    Buffer<C> overlap(k * r);
    const MutableView overlap_view = view_of(overlap.data(), k, r);
    product_tn<C>(read(basis), probes, overlap_view);
    product_nn<C>(read(y), read(overlap_view), g_probes, true);
    norm_sq = sum_of_squares<C>(y) + sum_of_squares<C>(g_probes) / static_cast<double>(r);
  }

  const MutableView triangle_view = view_of(triangle.data(), k, k);
  OrthStatus status = orthonormalize<C>(read(y), cond_max, u, triangle_view);
  if (power_iters == 0) times_transposed<C>(read(basis), triangle, w);
  for (int64_t i = 0; i < power_iters; ++i) {
    sketch_left<C>(b, a, read(u), token_scale, w);  // Aᵀ(B U)
    if (i + 1 == power_iters) break;
    orthonormalize<C>(read(w), cond_max, basis, triangle_view);
    sketch_left<C>(a, b, read(basis), token_scale, y);
    status = std::max(status, orthonormalize<C>(read(y), cond_max, u, triangle_view));
  }
  if (r == 0) norm_sq = sum_of_squares<C>(w);
  return {static_cast<C>(norm_sq), status};
}

template <typename C>
void tangent_factors(const View& u, const View& v, const View& y, const View& w, double cond_max,
                     const MutableView& left, const MutableView& right) {
  const int64_t k = u.cols;
  Buffer<C> triangle(k * k);
  copy<C>(u, columns_of<C>(left, 0, k));
  copy<C>(w, columns_of<C>(right, 0, k));
  orthonormalize_against<C>(u, y, cond_max, columns_of<C>(left, k, k),
                            view_of(triangle.data(), k, k));
  times_transposed<C>(v, triangle, columns_of<C>(right, k, k));
}

#define MOLEGRAD_INSTANTIATE(C)                                                                \
  template LowrankGrad<C> lowrank_grad<C>(const View&, const View&, const View&, int64_t,      \
                                          const View&, double, const C*, const MutableView&,   \
                                          const MutableView&);                                 \
  template void tangent_factors<C>(const View&, const View&, const View&, const View&, double, \
                                   const MutableView&, const MutableView&);
MOLEGRAD_INSTANTIATE(float)
MOLEGRAD_INSTANTIATE(double)

}  // namespace molegrad::cpu
