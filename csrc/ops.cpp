// Registers the CPU kernels of torch.ops.molegrad. Schemas, fake kernels and autograd are defined
// in molegrad/registry.py; this file turns tensors into plain memory for csrc/cpu, through
// LibTorch's stable ABI only, so that one build loads in every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/estimators.h"
#include "cpu/kernels.h"
#include "cpu/orth.h"
#include "cpu/products.h"
#include "cpu/quantized.h"
#include "cpu/rademacher.h"
#include "cpu/sampled.h"

namespace molegrad {
namespace {

using cpu::DType;
using cpu::MutableView;
using cpu::View;

DType view_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8;
    case ScalarType::Float8_e5m2:
      return DType::kFloat8E5M2;
    default:
      return DType::kFloat32;
  }
}

Tensor new_matrix(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor new_like(const Tensor& x, ScalarType dtype) {
  return torch::stable::new_empty(x, x.sizes(), dtype);
}

// A tensor read as a matrix of its last dimension's vectors; copied only where those are not
// contiguous or the leading dimensions do not collapse.
struct Operand {
  Tensor tensor;
  View view;

  explicit Operand(const Tensor& x) : tensor(x) {
    const int64_t cols = x.size(x.dim() - 1);
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    if (x.dim() != 2) tensor = torch::stable::reshape(tensor, std::vector<int64_t>{rows, cols});
    if (cols > 1 && tensor.stride(1) != 1) tensor = torch::stable::contiguous(tensor);
    view = {tensor.const_data_ptr(), view_dtype(tensor), rows, cols,
            rows > 1 ? tensor.stride(0) : cols};
  }
};

MutableView output(const Tensor& x) {
  return {x.mutable_data_ptr(), view_dtype(x), x.size(0), x.size(1), x.size(1)};
}

// fn(C) with C the compute type of a dtype, or the one that belongs to `x`.
template <typename F>
auto with_compute_type(ScalarType dtype, const F& fn) {
  return dtype == ScalarType::Double ? fn(double{}) : fn(float{});
}
template <typename F>
auto with_compute_type(const Tensor& x, const F& fn) {
  return with_compute_type(acc_dtype(x), fn);
}

// The scales of A and B, multiplied: one number for each token, none without scales.
template <typename C>
std::vector<C> token_scale(int64_t tokens, const std::optional<Tensor>& a_scale,
                           const std::optional<Tensor>& b_scale) {
  std::vector<C> product(a_scale.has_value() || b_scale.has_value() ? tokens : 0, C(1));
  for (const auto* scale : {&a_scale, &b_scale}) {
    if (!scale->has_value()) continue;
    const Tensor x = torch::stable::contiguous(**scale);
    const auto* from = static_cast<const float*>(x.const_data_ptr());
    for (int64_t t = 0; t < tokens; ++t) product[t] *= from[x.dim() == 0 ? 0 : t];
  }
  return product;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lowrank_grad(
    Tensor a, Tensor b, Tensor v, int64_t power_iters, std::optional<Tensor> probes,
    double cond_max, std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_lowrank_grad(a, b, v, power_iters, probes, cond_max, a_scale, b_scale);
  const Operand a_in(a), b_in(b), v_in(v);
  std::optional<Operand> probes_in;
  if (probes.has_value()) probes_in.emplace(*probes);
  const int64_t k = v_in.view.cols;
  const ScalarType dtype = acc_dtype(a, b);
  Tensor u = new_matrix(a, {b_in.view.cols, k}, dtype),
         w = new_matrix(a, {a_in.view.cols, k}, dtype);
  Tensor norm_sq = new_matrix(a, {}, dtype), status = new_matrix(a, {}, ScalarType::Int);
  with_compute_type(dtype, [&](auto zero) {
    using C = decltype(zero);
    const std::vector<C> scale = token_scale<C>(a_in.view.rows, a_scale, b_scale);
    const auto result =
        cpu::lowrank_grad<C>(a_in.view, b_in.view, v_in.view, power_iters,
                             probes_in.has_value() ? probes_in->view : View{}, cond_max,
                             scale.empty() ? nullptr : scale.data(), output(u), output(w));
    *static_cast<C*>(norm_sq.mutable_data_ptr()) = result.norm_sq;
    *static_cast<int32_t*>(status.mutable_data_ptr()) = result.status;
  });
  return {u, w, norm_sq, status};
}

void run_sketch(const Tensor& a, const Tensor& b, const Tensor& u, const Tensor& v,
                const std::optional<Tensor>& a_scale, const std::optional<Tensor>& b_scale,
                const Tensor& y, const Tensor& w, bool add) {
  const Operand a_in(a), b_in(b), u_in(u), v_in(v);
  with_compute_type(acc_dtype(a, b), [&](auto zero) {
    using C = decltype(zero);
    const std::vector<C> scale = token_scale<C>(a_in.view.rows, a_scale, b_scale);
    cpu::sketch<C>(a_in.view, b_in.view, v_in.view, u_in.view,
                   scale.empty() ? nullptr : scale.data(), output(y), output(w), add);
  });
}

std::tuple<Tensor, Tensor> sketch(Tensor a, Tensor b, Tensor u, Tensor v,
                                  std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_sketch("sketch", a, b, u, v, a_scale, b_scale);
  const ScalarType dtype = acc_dtype(a, b);
  Tensor y = new_matrix(a, {u.size(0), v.size(1)}, dtype);
  Tensor w = new_matrix(a, {v.size(0), u.size(1)}, dtype);
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

std::tuple<Tensor, Tensor> tangent_factors(Tensor u, Tensor v, Tensor y, Tensor w,
                                           double cond_max) {
  check_tangent_factors(u, v, y, w, cond_max);
  const Operand u_in(u), v_in(v), y_in(y), w_in(w);
  const int64_t k = u.size(1);
  Tensor left = new_matrix(u, {u.size(0), 2 * k}, acc_dtype(u));
  Tensor right = new_matrix(u, {v.size(0), 2 * k}, acc_dtype(u));
  with_compute_type(u, [&](auto zero) {
    cpu::tangent_factors<decltype(zero)>(u_in.view, v_in.view, y_in.view, w_in.view, cond_max,
                                         output(left), output(right));
  });
  return {left, right};
}

// The i-th of the (rows, cols) matrices that follow each other in a contiguous tensor.
template <typename C>
MutableView slice(const Tensor& x, int64_t i, int64_t rows, int64_t cols) {
  return cpu::view_of(static_cast<C*>(x.mutable_data_ptr()) + i * rows * cols, rows, cols);
}

// one(i) for every matrix of a batch. A batch that occupies all threads is spread over them; a
// smaller one leaves them to the products inside.
template <typename F>
void for_each_matrix(int64_t count, const F& one) {
  if (count < static_cast<int64_t>(torch::stable::get_num_threads())) {
    for (int64_t i = 0; i < count; ++i) one(i);
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i);
  });
}

std::tuple<Tensor, Tensor, Tensor> orthonormalize(Tensor y, double cond_max) {
  check_orthonormalize(y, cond_max);
  const Operand y_in(y);
  const int64_t m = y.size(y.dim() - 2), k = y.size(y.dim() - 1), count = y_in.view.rows / m;
  std::vector<int64_t> sizes(y.sizes().begin(), y.sizes().end() - 2);
  Tensor status = torch::stable::new_empty(y, sizes, ScalarType::Int);
  sizes.insert(sizes.end(), {k, k});
  Tensor q = new_like(y, acc_dtype(y)), r = torch::stable::new_empty(y, sizes, acc_dtype(y));
  with_compute_type(y, [&](auto zero) {
    using C = decltype(zero);
    auto* statuses = static_cast<int32_t*>(status.mutable_data_ptr());
    for_each_matrix(count, [&](int64_t i) {
      statuses[i] = cpu::orthonormalize<C>(cpu::part_of(y_in.view, i * m, m, 0, k), cond_max,
                                           slice<C>(q, i, m, k), slice<C>(r, i, k, k));
    });
  });
  return {q, r, status};
}

Tensor polar_factor(Tensor w) {
  check_polar_factor(w);
  const Operand w_in(w);
  const int64_t n = w.size(w.dim() - 2), k = w.size(w.dim() - 1), count = w_in.view.rows / n;
  Tensor p = new_like(w, acc_dtype(w));
  with_compute_type(w, [&](auto zero) {
    using C = decltype(zero);
    for_each_matrix(count, [&](int64_t i) {
      cpu::polar_factor<C>(cpu::part_of(w_in.view, i * n, n, 0, k), slice<C>(p, i, n, k));
    });
  });
  return p;
}

void lowrank_update_(Tensor weight, Tensor u, Tensor w, double alpha, double decay) {
  check_lowrank_update(weight, u, w);
  const Operand u_in(u), w_in(w);
  const int64_t m = weight.size(0), n = weight.size(1);
  const auto update = [&](const MutableView& target, const View& left, const View& right) {
    with_compute_type(weight, [&](auto zero) {
      cpu::rank_update<decltype(zero)>(target, left, right, 1.0 - decay, alpha);
    });
  };
  const auto fits = [](int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    return (cols <= 1 || col_stride == 1) && (rows <= 1 || row_stride >= cols);
  };
  const int64_t row = weight.stride(0), col = weight.stride(1);
  void* data = weight.mutable_data_ptr();
  const DType dtype = view_dtype(weight);
  if (fits(m, n, row, col)) {
    update({data, dtype, m, n, row}, u_in.view, w_in.view);
  } else if (fits(n, m, col, row)) {  // weightᵀ += alpha W Uᵀ
    update({data, dtype, n, m, col}, w_in.view, u_in.view);
  } else {
    Tensor copy = torch::stable::contiguous(weight);
    update(output(copy), u_in.view, w_in.view);
    torch::stable::copy_(weight, copy);
  }
}

Tensor sampled_grad_(Tensor grad, Tensor a, Tensor b, std::optional<Tensor> a_scale, Tensor counter,
                     double share, int64_t block, double alpha, int64_t seed) {
  check_sampled_grad(grad, a, b, a_scale, counter, share, block);
  const Operand a_in(a), b_in(b);
  const bool wide_a = a_in.view.cols > b_in.view.cols;
  Tensor scale = new_matrix(b, {a_scale.has_value() ? a_in.view.rows : 0}, acc_dtype(b));
  if (a_scale.has_value())
    torch::stable::copy_(scale,
                         torch::stable::reshape(*a_scale, std::vector<int64_t>{a_in.view.rows}));
  Tensor stats = new_matrix(b, {2}, ScalarType::Float);
  with_compute_type(b, [&](auto zero) {
    using C = decltype(zero);
    cpu::SampledGrad<C> args;
    args.x = wide_a ? a_in.view : b_in.view;
    args.z = wide_a ? b_in.view : a_in.view;
    if (a_scale.has_value())
      (wide_a ? args.x_scale : args.z_scale) = static_cast<const C*>(scale.const_data_ptr());
    args.counter = *static_cast<const int64_t*>(counter.const_data_ptr());
    args.seed = seed;
    args.block = block;
    args.share = share;
    args.alpha = alpha;
    args.grad = grad.mutable_data_ptr();
    args.grad_dtype = view_dtype(grad);
    args.feature_stride = grad.stride(wide_a ? 1 : 0);
    args.column_stride = grad.stride(wide_a ? 0 : 1);
    cpu::sampled_grad<C>(args, static_cast<float*>(stats.mutable_data_ptr()));
  });
  return stats;
}

ScalarType float8_dtype(bool e5m2) {
  return e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, bool e5m2) {
  check_quantize_rows(x);
  const Operand x_in(x);  // one dimension is one row
  Tensor data = new_like(x, float8_dtype(e5m2));
  const std::vector<int64_t> leading(x.sizes().begin(), x.sizes().end() - 1);
  Tensor scale = torch::stable::new_empty(x, leading, ScalarType::Float);
  cpu::quantize_rows(x_in.view, e5m2, data.mutable_data_ptr(),
                     static_cast<float*>(scale.mutable_data_ptr()));
  return {data, scale};
}

std::tuple<Tensor, Tensor> quantize_tensor(Tensor x, bool e5m2) {
  check_quantize_tensor(x);
  Tensor data = new_like(x, float8_dtype(e5m2)), scale = new_matrix(x, {}, ScalarType::Float);
  const Operand x_in(x.dim() > 0 ? x : torch::stable::reshape(x, std::vector<int64_t>{1}));
  *static_cast<float*>(scale.mutable_data_ptr()) =
      cpu::quantize_tensor(x_in.view, e5m2, data.mutable_data_ptr());
  return {data, scale};
}

void add_quantized_(Tensor data, Tensor scale, Tensor x) {
  check_add_quantized(data, scale, x);
  const Operand x_in(x);
  Tensor values = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  const bool by_column = scale.size(0) != data.size(0) || scale.size(1) != 1;
  cpu::add_quantized(static_cast<int8_t*>(values.mutable_data_ptr()),
                     static_cast<float*>(scales.mutable_data_ptr()), x_in.view, by_column);
  if (!data.is_contiguous()) torch::stable::copy_(data, values);
  if (!scale.is_contiguous()) torch::stable::copy_(scale, scales);
}

Tensor rademacher(int64_t rows, int64_t cols, Tensor counter, int64_t seed) {
  check_rademacher(rows, cols, counter);
  Tensor out = new_matrix(counter, {rows, cols}, ScalarType::Float);
  cpu::rademacher(*static_cast<const int64_t*>(counter.const_data_ptr()), seed, rows * cols,
                  static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) {
  m.impl("lowrank_grad", TORCH_BOX(&lowrank_grad));
  m.impl("sketch", TORCH_BOX(&sketch));
  m.impl("sketch_accumulate_", TORCH_BOX(&sketch_accumulate_));
  m.impl("sketch_accumulate_many_", TORCH_BOX(&sketch_accumulate_many_));
  m.impl("tangent_factors", TORCH_BOX(&tangent_factors));
  m.impl("orthonormalize", TORCH_BOX(&orthonormalize));
  m.impl("polar_factor", TORCH_BOX(&polar_factor));
  m.impl("lowrank_update_", TORCH_BOX(&lowrank_update_));
  m.impl("sampled_grad_", TORCH_BOX(&sampled_grad_));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_tensor", TORCH_BOX(&quantize_tensor));
  m.impl("add_quantized_", TORCH_BOX(&add_quantized_));
  m.impl("rademacher", TORCH_BOX(&rademacher));
}

}  // namespace molegrad
