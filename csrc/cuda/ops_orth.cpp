// The CUDA kernels of torch.ops.molegrad.orthonormalize, tangent_factors, polar_factor,
// lowrank_update_ and lowrank_update_many_.
#include <optional>
#include <tuple>

#include "orth.h"
#include "polar.h"
#include "tensors.h"
#include "update.h"

namespace molegrad::cuda {
namespace {

// Sizes of a batch of matrices with other last dimensions.
std::vector<int64_t> batch_sizes(const Tensor& x, const std::vector<int64_t>& last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 2);
  sizes.insert(sizes.end(), last.begin(), last.end());
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> orthonormalize(Tensor y, double cond_max) {
  check_orthonormalize(y, cond_max);
  const Place place(y);
  const Matrix from(y);
  const int64_t m = y.size(y.dim() - 2), k = y.size(y.dim() - 1), batch = from.rows / m;
  Tensor q = new_tensor(y, batch_sizes(y, {m, k}), acc_dtype(y));
  Tensor r = new_tensor(y, batch_sizes(y, {k, k}), acc_dtype(y));
  Tensor status = new_tensor(y, batch_sizes(y, {}), ScalarType::Int);
  const int in_block = molegrad_orthonormalize_in_block(m, k, from.dtype);
  const Tensor scratch =
      new_scratch(y, molegrad_orthonormalize_scratch(batch, m, k, from.dtype, in_block));
  check_launch("orthonormalize",
               molegrad_orthonormalize(from.data, from.dtype, from.ld, batch, m, k, cond_max,
                                       in_block, q.mutable_data_ptr(), r.mutable_data_ptr(),
                                       static_cast<int32_t*>(status.mutable_data_ptr()),
                                       scratch.mutable_data_ptr(), place.stream()));
  return {q, r, status};
}

std::tuple<Tensor, Tensor> tangent_factors(Tensor u, Tensor v, Tensor y, Tensor w,
                                           double cond_max) {
  check_tangent_factors(u, v, y, w, cond_max);
  const Place place(u);
  const Matrix u_in(u), v_in(v), y_in(y), w_in(w);
  const int64_t m = u.size(0), n = v.size(0), k = u.size(1);
  Tensor left = new_tensor(u, {m, 2 * k}, acc_dtype(u));
  Tensor right = new_tensor(u, {n, 2 * k}, acc_dtype(u));
  const Tensor scratch = new_scratch(u, molegrad_tangent_factors_scratch(m, n, k, u_in.dtype));
  check_launch("tangent_factors",
               molegrad_tangent_factors(u_in.data, u_in.ld, v_in.data, v_in.ld, y_in.data, y_in.ld,
                                        w_in.data, w_in.ld, u_in.dtype, m, n, k, cond_max,
                                        left.mutable_data_ptr(), right.mutable_data_ptr(),
                                        scratch.mutable_data_ptr(), place.stream()));
  return {left, right};
}

Tensor polar_factor(Tensor w) {
  check_polar_factor(w);
  const Place place(w);
  const Matrix from(w);
  const int64_t n = w.size(w.dim() - 2), k = w.size(w.dim() - 1), batch = from.rows / n;
  Tensor p = new_tensor(w, batch_sizes(w, {n, k}), acc_dtype(w));
  const Tensor scratch = new_scratch(w, molegrad_polar_factor_scratch(batch, n, k, from.dtype));
  check_launch("polar_factor", molegrad_polar_factor(from.data, from.dtype, from.ld, batch, n, k,
                                                     p.mutable_data_ptr(),
                                                     scratch.mutable_data_ptr(), place.stream()));
  return p;
}

// Weights as the kernel takes them: rows of neighbours, that is themselves or their transposes.
struct Updates {
  std::vector<void*> data;
  std::vector<int64_t> ld, layer;
  void add(void* memory, int64_t stride, int64_t number) {
    data.push_back(memory);
    ld.push_back(stride);
    layer.push_back(number);
  }
};

bool in_rows(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  return (cols <= 1 || col_stride == 1) && (rows <= 1 || row_stride >= cols);
}

// u (layers, m, k) and w (layers, n, k) in any shape that collapses to them.
void update(const char* op, const std::vector<Tensor>& weights, const Tensor& u, const Tensor& w,
            double alpha, double decay, bool stochastic, const std::optional<Tensor>& counter,
            int64_t seed) {
  const Tensor& first = weights[0];
  const Place place(first);
  const Matrix left(u), right(w);
  const int64_t m = first.size(0), n = first.size(1);
  Updates straight, transposed;
  std::vector<Tensor> copies(weights.size(), first);
  std::vector<size_t> copied;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const int64_t row = weight.stride(0), col = weight.stride(1), layer = static_cast<int64_t>(i);
    if (in_rows(m, n, row, col)) {
      straight.add(weight.mutable_data_ptr(), row, layer);
    } else if (in_rows(n, m, col, row)) {
      transposed.add(weight.mutable_data_ptr(), col, layer);
    } else {
      copies[i] = torch::stable::contiguous(weight);
      copied.push_back(i);
      straight.add(copies[i].mutable_data_ptr(), n, layer);
    }
  }
  Tensor step;
  const int64_t* count = nullptr;
  if (stochastic) {
    step = beside(*counter, first);
    count = static_cast<const int64_t*>(step.const_data_ptr());
  }
  const auto run = [&](const Updates& some, const Matrix& a, const Matrix& b, int64_t rows,
                       int64_t cols, int64_t row_step, int64_t col_step) {
    check_launch(op, molegrad_lowrank_update_many(
                         some.data.data(), some.ld.data(), some.layer.data(),
                         static_cast<int64_t>(some.data.size()), dtype_code(first), a.data, a.dtype,
                         a.ld, b.data, b.dtype, b.ld, rows, cols, a.cols, 1.0 - decay, alpha,
                         stochastic, row_step, col_step, count, seed, place.stream()));
  };
  run(straight, left, right, m, n, n, 1);
  run(transposed, right, left, n, m, 1, n);
  for (const size_t i : copied) {
    Tensor weight = weights[i];
    torch::stable::copy_(weight, copies[i]);
  }
}

void lowrank_update_(Tensor weight, Tensor u, Tensor w, double alpha, double decay) {
  check_lowrank_update(weight, u, w);
  update("lowrank_update_", {weight}, u, w, alpha, decay, false, std::nullopt, 0);
}

void lowrank_update_many_(std::vector<Tensor> weights, Tensor u, Tensor w, double alpha,
                          double decay, bool stochastic, std::optional<Tensor> counter,
                          int64_t seed) {
  check_lowrank_update_many(weights, u, w, stochastic, counter);
  update("lowrank_update_many_", weights, u, w, alpha, decay, stochastic, counter, seed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) {
  m.impl("orthonormalize", TORCH_BOX(&orthonormalize));
  m.impl("tangent_factors", TORCH_BOX(&tangent_factors));
  m.impl("polar_factor", TORCH_BOX(&polar_factor));
  m.impl("lowrank_update_", TORCH_BOX(&lowrank_update_));
  m.impl("lowrank_update_many_", TORCH_BOX(&lowrank_update_many_));
}

}  // namespace molegrad::cuda
