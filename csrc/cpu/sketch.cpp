// The ops of the one-pass sketch; products.cpp computes it.
#include "products.h"
#include "tensors.h"

namespace molegrad::cpu {
namespace {

void run_sketch(const Tensor& a, const Tensor& b, const Tensor& u, const Tensor& v,
                const std::optional<Tensor>& a_scale, const std::optional<Tensor>& b_scale,
                const Tensor& y, const Tensor& w, bool add) {
  const Matrix a_in(a), b_in(b), u_in(u), v_in(v);
  with_compute_type(acc_dtype(a, b), [&](auto zero) {
    using C = decltype(zero);
    const std::vector<C> scale = token_scale<C>(a_in.rows, a_scale, b_scale);
    sketch<C>(view_of(a_in), view_of(b_in), view_of(v_in), view_of(u_in),
              scale.empty() ? nullptr : scale.data(), output(y), output(w), add);
  });
}

std::tuple<Tensor, Tensor> sketch_op(Tensor a, Tensor b, Tensor u, Tensor v,
                                     std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_sketch("sketch", a, b, u, v, a_scale, b_scale);
  const ScalarType dtype = acc_dtype(a, b);
  Tensor y = new_tensor(a, {u.size(0), v.size(1)}, dtype);
  Tensor w = new_tensor(a, {v.size(0), u.size(1)}, dtype);
  run_sketch(a, b, u, v, a_scale, b_scale, y, w, false);
  return {y, w};
}

void sketch_accumulate_(Tensor y, Tensor w, Tensor a, Tensor b, Tensor u, Tensor v,
                        std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_sketch_accumulate(y, w, a, b, u, v, a_scale, b_scale);
  run_sketch(a, b, u, v, a_scale, b_scale, y, w, true);
}

void sketch_accumulate_many_(std::vector<Tensor> y, std::vector<Tensor> w, std::vector<Tensor> a,
                             std::vector<Tensor> b, std::vector<Tensor> u, std::vector<Tensor> v) {
  check_sketch_accumulate_many(y, w, a, b, u, v);
  // Layers on threads, measured, gain a few percent where they are tiny and nothing where not.
  for (size_t i = 0; i < y.size(); ++i)
    run_sketch(a[i], b[i], u[i], v[i], std::nullopt, std::nullopt, y[i], w[i], true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) {
  m.impl("sketch", TORCH_BOX(&sketch_op));
  m.impl("sketch_accumulate_", TORCH_BOX(&sketch_accumulate_));
  m.impl("sketch_accumulate_many_", TORCH_BOX(&sketch_accumulate_many_));
}

}  // namespace molegrad::cpu
