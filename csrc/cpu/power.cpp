// The block power estimate, by the formulas of molegrad/ops/power.py.
#include <algorithm>

#include "orth.h"
#include "products.h"
#include "tensors.h"

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

// out (n, k) = v rᵀ.
template <typename C>
void times_transposed(const View& v, const Buffer<C>& r, const MutableView& out) {
  const int64_t k = v.cols;
  Buffer<C> rt(k * k);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) rt.data()[j * k + i] = r.data()[i * k + j];
  product_nn<C>(v, read(view_of(rt.data(), k, k)), out);
}

template <typename C>
struct LowrankGrad {
  C norm_sq;
  OrthStatus status;
};

// U (m, k) and W = GᵀU (n, k) by `power_iters` power iterations from V; `probes` (n, r) has no
// columns where no norm estimate is wanted; `token_scale` as in products.h.
template <typename C>
LowrankGrad<C> estimate(const View& a, const View& b, const View& v, int64_t power_iters,
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

std::tuple<Tensor, Tensor, Tensor, Tensor> lowrank_grad(
    Tensor a, Tensor b, Tensor v, int64_t power_iters, std::optional<Tensor> probes,
    double cond_max, std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_lowrank_grad(a, b, v, probes, a_scale, b_scale);
  const Matrix a_in(a), b_in(b), v_in(v);
  std::optional<Matrix> probes_in;
  if (probes.has_value()) probes_in.emplace(*probes);
  const int64_t k = v_in.cols;
  const ScalarType dtype = acc_dtype(a, b);
  Tensor u = new_tensor(a, {b_in.cols, k}, dtype), w = new_tensor(a, {a_in.cols, k}, dtype);
  Tensor norm_sq = new_tensor(a, {}, dtype), status = new_tensor(a, {}, ScalarType::Int);
  with_compute_type(dtype, [&](auto zero) {
    using C = decltype(zero);
    const std::vector<C> scale = token_scale<C>(a_in.rows, a_scale, b_scale);
    const auto result = estimate<C>(view_of(a_in), view_of(b_in), view_of(v_in), power_iters,
                                    probes_in.has_value() ? view_of(*probes_in) : View{}, cond_max,
                                    scale.empty() ? nullptr : scale.data(), output(u), output(w));
    *memory_of<C>(norm_sq) = result.norm_sq;
    *memory_of<int32_t>(status) = result.status;
  });
  return {u, w, norm_sq, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) { m.impl("lowrank_grad", TORCH_BOX(&lowrank_grad)); }

}  // namespace molegrad::cpu
