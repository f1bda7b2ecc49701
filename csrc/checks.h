// What memory safety depends on: shapes, dtypes, devices. Python checks first, and says in
// molegrad/ops what was wrong and what helps; these few words are for calls of torch.ops.molegrad.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace molegrad {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// RuntimeError "molegrad::<op>: <parts>". STD_TORCH_CHECK would put its source location first.
template <typename... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "molegrad::" << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// Of sums: float64 where one operand is float64, else float32.
inline ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType acc_dtype(const Tensor& x, const Tensor& y) {
  return acc_dtype(x) == ScalarType::Double ? ScalarType::Double : acc_dtype(y);
}

// Float8 that is read as it is, with a scale.
inline bool is_float8(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float8_e4m3fn || x.scalar_type() == ScalarType::Float8_e5m2;
}
inline bool is_floating(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return true;
    default:
      return false;
  }
}

inline bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  if (x.dim() != static_cast<int64_t>(shape.size())) return false;
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.size(i) != shape.begin()[i]) return false;
  return true;
}
inline int64_t last_size(const Tensor& x) { return x.size(x.dim() - 1); }

// Two or more dimensions, all but the last of one size.
inline bool same_tokens(const Tensor& a, const Tensor& b) {
  bool same = a.dim() >= 2 && a.dim() == b.dim();
  for (int64_t i = 0; same && i + 1 < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

using Tensors = std::initializer_list<std::reference_wrapper<const Tensor>>;

inline void check_device(const char* op, const Tensor& first, Tensors others) {
  for (const Tensor& x : others)
    require(x.device() == first.device(), op, "expected tensors on the same device");
}
inline void check_floating(const char* op, Tensors tensors) {
  for (const Tensor& x : tensors)
    require(is_floating(x), op, "expected floating point of 16 bits or more");
}
// Both, of one device.
inline void check_inputs(const char* op, const Tensor& first, Tensors others) {
  check_floating(op, {first});
  check_floating(op, others);
  check_device(op, first, others);
}

// A float8 x has a scale, one for each token or with `whole` one for all of x; no other x has.
inline void check_scale(const char* op, const Tensor& x, const std::optional<Tensor>& scale,
                        bool whole = true) {
  require(is_float8(x) == scale.has_value(), op, "float8, and it alone, needs a scale");
  if (!scale.has_value()) return;
  bool fits = (whole && scale->dim() == 0) || scale->dim() + 1 == x.dim();
  for (int64_t i = 0; fits && i < scale->dim(); ++i) fits = scale->size(i) == x.size(i);
  require(fits && scale->scalar_type() == ScalarType::Float, op,
          "expected a float32 scale of a tensor or of its tokens");
  check_device(op, x, {*scale});
}

// a (…, T, n) and b (…, T, m) of one dtype, or one or both in float8 with a scale.
inline void check_factors(const char* op, const Tensor& a, const Tensor& b,
                          const std::optional<Tensor>& a_scale,
                          const std::optional<Tensor>& b_scale) {
  if (!is_float8(a)) check_floating(op, {a});
  if (!is_float8(b)) check_floating(op, {b});
  require(same_tokens(a, b), op, "expected a (…, T, n) and b (…, T, m)");
  require(a.scalar_type() == b.scalar_type() || is_float8(a) || is_float8(b), op,
          "expected a and b of the same dtype");
  check_device(op, a, {b});
  check_scale(op, a, a_scale);
  check_scale(op, b, b_scale);
}

inline void check_basis(const char* op, const Tensor& x, int64_t rows,
                        int64_t rank_max = INT64_MAX) {
  check_floating(op, {x});
  require(x.dim() == 2 && x.size(0) == rows, op, "expected a basis of ", rows, " rows");
  require(x.size(1) >= 1 && x.size(1) <= rank_max, op, "rank k=", x.size(1), " is out of range");
}

inline void check_lowrank_grad(const Tensor& a, const Tensor& b, const Tensor& v,
                               const std::optional<Tensor>& probes,
                               const std::optional<Tensor>& a_scale,
                               const std::optional<Tensor>& b_scale) {
  const char* op = "lowrank_grad";
  check_factors(op, a, b, a_scale, b_scale);
  const int64_t n = last_size(a), m = last_size(b);
  check_basis(op, v, n, n < m ? n : m);
  check_device(op, a, {v});
  if (!probes.has_value()) return;
  check_basis(op, *probes, n);
  check_device(op, a, {*probes});
}

inline void check_sketch(const char* op, const Tensor& a, const Tensor& b, const Tensor& u,
                         const Tensor& v, const std::optional<Tensor>& a_scale,
                         const std::optional<Tensor>& b_scale) {
  check_factors(op, a, b, a_scale, b_scale);
  check_basis(op, u, last_size(b));
  check_basis(op, v, last_size(a));
  check_device(op, a, {u, v});
}

inline void check_sketch_accumulate(const Tensor& y, const Tensor& w, const Tensor& a,
                                    const Tensor& b, const Tensor& u, const Tensor& v,
                                    const std::optional<Tensor>& a_scale,
                                    const std::optional<Tensor>& b_scale,
                                    const char* op = "sketch_accumulate_") {
  check_sketch(op, a, b, u, v, a_scale, b_scale);
  check_device(op, a, {y, w});
  const auto is_sum = [&](const Tensor& x, int64_t rows, int64_t cols) {
    return has_shape(x, {rows, cols}) && x.scalar_type() == acc_dtype(a, b) && x.is_contiguous();
  };
  require(is_sum(y, last_size(b), v.size(1)) && is_sum(w, last_size(a), u.size(1)), op,
          "expected y and w contiguous, of the sketch's shapes and dtype");
}

inline void check_sketch_accumulate_many(const std::vector<Tensor>& y, const std::vector<Tensor>& w,
                                         const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                         const std::vector<Tensor>& u,
                                         const std::vector<Tensor>& v) {
  const char* op = "sketch_accumulate_many_";
  const size_t count = y.size();
  require(count > 0 && w.size() == count && a.size() == count && b.size() == count &&
              u.size() == count && v.size() == count,
          op, "expected one of y, w, a, b, u and v for each of at least one layer");
  for (size_t i = 0; i < count; ++i) {
    check_sketch_accumulate(y[i], w[i], a[i], b[i], u[i], v[i], std::nullopt, std::nullopt, op);
    check_device(op, a[0], {a[i]});
  }
}

// x (…, rows, k) with 1 <= k <= rows.
inline void check_block(const char* op, const Tensor& x) {
  check_floating(op, {x});
  require(x.dim() >= 2 && last_size(x) >= 1 && last_size(x) <= x.size(x.dim() - 2), op,
          "expected (…, rows, k) with 1 <= k <= rows");
}

inline void check_lowrank_update(const Tensor& weight, const Tensor& u, const Tensor& w) {
  const char* op = "lowrank_update_";
  check_inputs(op, weight, {u, w});
  require(weight.dim() == 2, op, "expected a matrix");
  check_basis(op, u, weight.size(0));
  check_basis(op, w, weight.size(1));
  require(u.size(1) == w.size(1), op, "expected u and w of one rank k");
}

inline void check_counter(const char* op, const Tensor& counter) {
  require(counter.scalar_type() == ScalarType::Long && counter.dim() == 0, op,
          "expected counter as an int64 scalar tensor");
}
// The same, on the host or beside x.
inline void check_counter(const char* op, const Tensor& counter, const Tensor& x) {
  check_counter(op, counter);
  if (!counter.is_cpu()) check_device(op, x, {counter});
}

inline void check_lowrank_update_many(const std::vector<Tensor>& weights, const Tensor& u,
                                      const Tensor& w, bool stochastic,
                                      const std::optional<Tensor>& counter) {
  const char* op = "lowrank_update_many_";
  require(!weights.empty(), op, "expected at least one weight");
  const Tensor& first = weights[0];
  check_inputs(op, first, {u, w});
  require(first.dim() == 2, op, "expected matrices");
  const int64_t m = first.size(0), n = first.size(1), count = static_cast<int64_t>(weights.size());
  for (const Tensor& x : weights)
    require(has_shape(x, {m, n}) && x.scalar_type() == first.scalar_type() &&
                x.device() == first.device(),
            op, "expected weights of one shape, dtype and device");
  require(u.dim() == 3 && last_size(u) >= 1 && has_shape(u, {count, m, last_size(u)}) &&
              has_shape(w, {count, n, last_size(u)}),
          op, "expected u (", count, ", ", m, ", k) and w (", count, ", ", n, ", k)");
  if (!stochastic) return;
  require(first.scalar_type() == ScalarType::BFloat16 && counter.has_value(), op,
          "stochastic rounding needs bfloat16 weights and a counter");
  check_counter(op, *counter, first);
}

inline void check_rademacher(int64_t rows, int64_t cols, const Tensor& counter) {
  require(rows >= 0 && cols >= 0, "rademacher", "rows and cols must be >= 0");
  check_counter("rademacher", counter);
}

inline void check_sampled_grad(const Tensor& grad, const Tensor& a, const Tensor& b,
                               const std::optional<Tensor>& a_scale, const Tensor& counter,
                               int64_t block) {
  const char* op = "sampled_grad_";
  const bool float8 = a.scalar_type() == ScalarType::Float8_e4m3fn;
  check_inputs(op, b, {grad});
  if (!float8) check_floating(op, {a});
  require(same_tokens(a, b), op, "expected a (…, T, n) and b (…, T, m)");
  require(float8 || a.scalar_type() == b.scalar_type(), op, "expected a and b of the same dtype");
  check_device(op, b, {a});
  require(has_shape(grad, {last_size(b), last_size(a)}), op, "expected grad of shape (m, n)");
  check_scale(op, a, a_scale, false);
  check_counter(op, counter, b);
  require(block >= 1, op, "block must be at least 1");
}

inline void check_quantize_rows(const Tensor& x) {
  check_floating("quantize_rows", {x});
  require(x.dim() >= 1 && last_size(x) >= 1, "quantize_rows", "x needs at least one feature");
}

inline void check_add_quantized(const Tensor& data, const Tensor& scale, const Tensor& x) {
  const char* op = "add_quantized_";
  check_inputs(op, x, {scale});
  check_device(op, x, {data});
  require(data.dim() == 2 && data.scalar_type() == ScalarType::Char, op, "expected data in int8");
  const int64_t m = data.size(0), n = data.size(1);
  require((has_shape(scale, {m, 1}) || has_shape(scale, {1, n})) &&
              scale.scalar_type() == ScalarType::Float,
          op, "expected scale (m, 1) or (1, n) in float32");
  require(has_shape(x, {m, n}), op, "expected x of data's shape");
}

}  // namespace molegrad
