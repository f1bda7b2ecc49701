// What the ops accept, in the words of molegrad/checks.py. Every failure is a RuntimeError that
// starts with "molegrad::<op>: " and names what was given.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace molegrad {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK without its source location, which would come before the op's name.
template <typename... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "molegrad::" << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline std::string shape(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Char:
      return "torch.int8";
    default: {
      std::ostringstream name;
      name << "torch." << dtype;
      return name.str();
    }
  }
}

inline ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of the products of two operands.
inline ScalarType acc_dtype(const Tensor& x, const Tensor& y) {
  return acc_dtype(x) == ScalarType::Double ? ScalarType::Double : acc_dtype(y);
}

// Float8 that is read as it is, with a scale.
inline bool is_float8(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float8_e4m3fn || x.scalar_type() == ScalarType::Float8_e5m2;
}

inline std::string device_name(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  if (device.is_cuda()) return "cuda:" + std::to_string(device.index());
  return "device type " + std::to_string(static_cast<int>(device.type()));
}

inline bool is_floating(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return true;
    default:
      return false;
  }
}

// Narrower than what is computed with.
inline bool is_narrow_floating(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e8m0fnu:
      return true;
    default:
      return false;
  }
}

inline void check_floating(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  require(is_floating(dtype) || is_narrow_floating(dtype), op, name,
          " must be floating point, got ", dtype_name(dtype));
  require(is_floating(dtype), op, name, " must be floating point of 16 bits or more, got ",
          dtype_name(dtype), ": convert it first");
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

inline void check_same_device(const char* op, const Named& first, const Named& other) {
  const auto device = first.tensor.device(), got = other.tensor.device();
  require(device == got, op, "expected ", first.name, " and ", other.name,
          " on the same device, got ", device_name(device), " and ", device_name(got));
}

// All are floating point and on one device.
inline void check_inputs(const char* op, std::initializer_list<Named> inputs) {
  for (const Named& x : inputs) check_floating(op, x.name, x.tensor);
  for (const Named& x : inputs) check_same_device(op, *inputs.begin(), x);
}

inline void check_matrix(const char* op, const char* name, const Tensor& x) {
  require(x.dim() == 2, op, name, " must be a matrix, got shape ", shape(x));
}

// No two numbers of x share memory, as those of an expanded one.
inline void check_in_place(const char* op, const std::string& name, const Tensor& x) {
  for (int64_t i = 0; i < x.dim(); ++i)
    require(x.stride(i) != 0 || x.size(i) <= 1, op, name, " ", shape(x),
            " is expanded, and numbers that share memory cannot be updated in place: give a clone "
            "of it");
}

inline void check_tokens(const char* op, const Tensor& a, const Tensor& b, bool same_dtype = true) {
  require(a.dim() >= 2 && b.dim() >= 2, op,
          "a and b need at least two dimensions (…, T, features), got a ", shape(a), " and b ",
          shape(b));
  bool agree = a.dim() == b.dim();
  for (int64_t i = 0; agree && i + 1 < a.dim(); ++i) agree = a.size(i) == b.size(i);
  require(agree, op, "expected a and b to agree in every dimension but the last, got a ", shape(a),
          " and b ", shape(b));
  require(a.scalar_type() == b.scalar_type() || !same_dtype, op,
          "expected a and b of the same dtype, got ", dtype_name(a.scalar_type()), " and ",
          dtype_name(b.scalar_type()));
}

// A scale where x is float8, and none where it is not: one for each token, or where `whole` is
// allowed one for all of x.
inline void check_scale(const char* op, const char* name, const Tensor& x,
                        const std::optional<Tensor>& scale, bool whole = true) {
  const std::string dtype = dtype_name(x.scalar_type());
  require(is_float8(x) || !scale.has_value(), op, name, "_scale belongs to a float8 ", name,
          ", got ", name, " of ", dtype, ": multiply ", name, " by it, or leave it out");
  if (!is_float8(x)) return;
  require(scale.has_value(), op, name, " of ", dtype, " needs ", name,
          "_scale, what quantize_rows ", whole ? "or quantize_tensor " : "", "returned with it");
  bool fits = (whole && scale->dim() == 0) || scale->dim() + 1 == x.dim();
  for (int64_t i = 0; fits && i < scale->dim(); ++i) fits = scale->size(i) == x.size(i);
  require(fits && scale->scalar_type() == ScalarType::Float, op, "expected ", name,
          "_scale in torch.float32, ", whole ? "one number or " : "", "one for each token of ",
          name, " ", shape(x), ", got ", shape(*scale), " of ", dtype_name(scale->scalar_type()));
  const auto device = x.device(), got = scale->device();
  require(device == got, op, "expected ", name, " and ", name, "_scale on the same device, got ",
          device_name(device), " and ", device_name(got));
}

// a and b of one dtype, or one or both in float8 with a scale: one number, or one for each token.
inline void check_factors(const char* op, const Tensor& a, const Tensor& b,
                          const std::optional<Tensor>& a_scale,
                          const std::optional<Tensor>& b_scale) {
  if (!is_float8(a)) check_floating(op, "a", a);
  if (!is_float8(b)) check_floating(op, "b", b);
  check_same_device(op, {"a", a}, {"b", b});
  check_tokens(op, a, b, !is_float8(a) && !is_float8(b));
  check_scale(op, "a", a, a_scale);
  check_scale(op, "b", b, b_scale);
}

inline void check_basis(const char* op, const char* name, const Tensor& x, int64_t rows,
                        int64_t rank_max = INT64_MAX) {
  check_matrix(op, name, x);
  require(x.size(0) == rows, op, "expected ", name, " with ", rows, " rows, got shape ", shape(x));
  const int64_t k = x.size(1);
  require(k >= 1, op, "rank k=", k, " of ", name, " must be at least 1");
  require(k <= rank_max, op, "rank k=", k, " of ", name, " exceeds ", rank_max,
          ": choose a smaller rank");
}

inline void check_cond(const char* op, double cond_max) {
  require(cond_max >= 1.0, op, "cond_max must be at least 1, got ", cond_max);
}

inline void check_lowrank_grad(const Tensor& a, const Tensor& b, const Tensor& v,
                               int64_t power_iters, const std::optional<Tensor>& probes,
                               double cond_max, const std::optional<Tensor>& a_scale,
                               const std::optional<Tensor>& b_scale) {
  const char* op = "lowrank_grad";
  check_factors(op, a, b, a_scale, b_scale);
  check_inputs(op, {{"v", v}});
  check_same_device(op, {"a", a}, {"v", v});
  if (probes.has_value()) check_inputs(op, {{"v", v}, {"probes", *probes}});
  const int64_t n = a.size(a.dim() - 1), m = b.size(b.dim() - 1);
  check_basis(op, "v", v, n, n < m ? n : m);
  if (probes.has_value()) check_basis(op, "probes", *probes, n);
  require(power_iters >= 0, op, "power_iters must be >= 0, got ", power_iters);
  check_cond(op, cond_max);
}

inline void check_sketch(const char* op, const Tensor& a, const Tensor& b, const Tensor& u,
                         const Tensor& v, const std::optional<Tensor>& a_scale,
                         const std::optional<Tensor>& b_scale) {
  check_factors(op, a, b, a_scale, b_scale);
  check_inputs(op, {{"u", u}, {"v", v}});
  check_same_device(op, {"a", a}, {"u", u});
  check_basis(op, "u", u, b.size(b.dim() - 1));
  check_basis(op, "v", v, a.size(a.dim() - 1));
}

inline void check_sum(const char* op, const char* name, const Tensor& x, int64_t rows, int64_t cols,
                      ScalarType dtype) {
  require(x.dim() == 2 && x.size(0) == rows && x.size(1) == cols && x.scalar_type() == dtype &&
              x.is_contiguous(),
          op, "expected ", name, " contiguous of shape (", rows, ", ", cols, ") and ",
          dtype_name(dtype), ", got ", shape(x), ", ", dtype_name(x.scalar_type()),
          x.is_contiguous() ? "" : ", not contiguous");
}

inline void check_sketch_accumulate(const Tensor& y, const Tensor& w, const Tensor& a,
                                    const Tensor& b, const Tensor& u, const Tensor& v,
                                    const std::optional<Tensor>& a_scale,
                                    const std::optional<Tensor>& b_scale,
                                    const char* op = "sketch_accumulate_") {
  check_sketch(op, a, b, u, v, a_scale, b_scale);
  check_inputs(op, {{"u", u}, {"y", y}, {"w", w}});
  check_sum(op, "y", y, b.size(b.dim() - 1), v.size(1), acc_dtype(a, b));
  check_sum(op, "w", w, a.size(a.dim() - 1), u.size(1), acc_dtype(a, b));
}

inline void check_sketch_accumulate_many(const std::vector<Tensor>& y, const std::vector<Tensor>& w,
                                         const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                         const std::vector<Tensor>& u,
                                         const std::vector<Tensor>& v) {
  const std::string op = "sketch_accumulate_many_";
  require(!y.empty(), op.c_str(), "expected at least one layer, got none");
  const size_t count = y.size();
  require(w.size() == count && a.size() == count && b.size() == count && u.size() == count &&
              v.size() == count,
          op.c_str(), "expected one of y, w, a, b, u and v for each layer, got ", count, ", ",
          w.size(), ", ", a.size(), ", ", b.size(), ", ", u.size(), ", ", v.size());
  for (size_t i = 0; i < count; ++i) {
    const std::string layer = op + ": layer " + std::to_string(i);
    check_sketch_accumulate(y[i], w[i], a[i], b[i], u[i], v[i], std::nullopt, std::nullopt,
                            layer.c_str());
    require(a[i].device() == a[0].device(), op.c_str(), "expected all layers on one device, got ",
            device_name(a[0].device()), " and, at ", i, ", ", device_name(a[i].device()));
  }
}

inline void check_orthonormalize(const Tensor& y, double cond_max) {
  const char* op = "orthonormalize";
  check_inputs(op, {{"y", y}});
  require(y.dim() >= 2, op, "y needs at least two dimensions (…, m, k), got ", shape(y));
  const int64_t m = y.size(y.dim() - 2), k = y.size(y.dim() - 1);
  require(1 <= k && k <= m, op, "rank k=", k, " must lie between 1 and m=", m, ", got y ",
          shape(y));
  check_cond(op, cond_max);
}

inline void check_factor(const char* op, const char* name, const Tensor& x, int64_t rows,
                         int64_t cols, ScalarType dtype) {
  require(x.dim() == 2 && x.size(0) == rows && x.size(1) == cols, op, "expected ", name, " (", rows,
          ", ", cols, "), got ", shape(x));
  require(x.scalar_type() == dtype, op, "expected u and ", name, " of the same dtype, got ",
          dtype_name(dtype), " and ", dtype_name(x.scalar_type()));
}

inline void check_tangent_factors(const Tensor& u, const Tensor& v, const Tensor& y,
                                  const Tensor& w, double cond_max) {
  const char* op = "tangent_factors";
  check_inputs(op, {{"u", u}, {"v", v}, {"y", y}, {"w", w}});
  check_matrix(op, "u", u);
  check_matrix(op, "v", v);
  const int64_t m = u.size(0), n = v.size(0), k = u.size(1);
  require(k >= 1 && 2 * k <= m, op, "rank k=", k, " needs 1 <= 2k <= m=", m,
          ": the tangent estimate has rank 2k");
  check_factor(op, "v", v, n, k, u.scalar_type());
  check_factor(op, "y", y, m, k, u.scalar_type());
  check_factor(op, "w", w, n, k, u.scalar_type());
  check_cond(op, cond_max);
}

inline void check_polar_factor(const Tensor& w) {
  const char* op = "polar_factor";
  check_inputs(op, {{"w", w}});
  require(w.dim() >= 2, op, "w needs at least two dimensions (…, n, k), got ", shape(w));
  const int64_t n = w.size(w.dim() - 2), k = w.size(w.dim() - 1);
  require(1 <= k && k <= n, op, "rank k=", k, " must lie between 1 and n=", n, ", got w ",
          shape(w));
}

inline void check_lowrank_update(const Tensor& weight, const Tensor& u, const Tensor& w) {
  const char* op = "lowrank_update_";
  check_inputs(op, {{"weight", weight}, {"u", u}, {"w", w}});
  check_matrix(op, "weight", weight);
  check_in_place(op, "weight", weight);
  check_basis(op, "u", u, weight.size(0));
  check_basis(op, "w", w, weight.size(1));
  require(u.size(1) == w.size(1), op, "expected u and w of one rank k, got ", shape(u), " and ",
          shape(w));
}

inline void check_counter(const char* op, const Tensor& counter) {
  require(counter.scalar_type() == ScalarType::Long && counter.dim() == 0, op,
          "expected counter as an int64 scalar tensor, got ", shape(counter), " of ",
          dtype_name(counter.scalar_type()));
}

inline void check_update_factor(const char* op, const char* name, const Tensor& x, int64_t count,
                                int64_t rows) {
  require(x.dim() == 3 && x.size(0) == count && x.size(1) == rows && x.size(2) >= 1, op,
          "expected ", name, " (", count, ", ", rows, ", k), got ", shape(x));
}

inline void check_lowrank_update_many(const std::vector<Tensor>& weights, const Tensor& u,
                                      const Tensor& w, bool stochastic,
                                      const std::optional<Tensor>& counter) {
  const char* op = "lowrank_update_many_";
  require(!weights.empty(), op, "expected at least one weight, got none");
  const Tensor& first = weights[0];
  check_inputs(op, {{"weights", first}, {"u", u}, {"w", w}});
  check_matrix(op, "weights[0]", first);
  const auto described = [](const Tensor& x) {
    return shape(x) + " of " + dtype_name(x.scalar_type()) + " on " + device_name(x.device());
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    require(described(weights[i]) == described(first), op,
            "expected weights of one shape, dtype and device, got ", described(first), " and, at ",
            i, ", ", described(weights[i]));
    check_in_place(op, "weights[" + std::to_string(i) + "]", weights[i]);
  }
  const auto count = static_cast<int64_t>(weights.size());
  check_update_factor(op, "u", u, count, first.size(0));
  check_update_factor(op, "w", w, count, first.size(1));
  require(u.size(2) == w.size(2), op, "expected u and w of one rank k, got ", shape(u), " and ",
          shape(w));
  if (!stochastic) return;
  require(first.scalar_type() == ScalarType::BFloat16, op,
          "stochastic rounding is for weights of torch.bfloat16, got ",
          dtype_name(first.scalar_type()));
  require(counter.has_value(), op, "stochastic rounding needs a counter, got none");
  check_counter(op, *counter);
  if (!counter->is_cpu()) check_same_device(op, {"weights", first}, {"counter", *counter});
}

inline void check_rademacher(int64_t rows, int64_t cols, const Tensor& counter) {
  const char* op = "rademacher";
  require(rows >= 0 && cols >= 0, op, "rows and cols must be >= 0, got ", rows, " and ", cols);
  check_counter(op, counter);
}

// As Python prints it.
inline std::string number(double x) {
  std::ostringstream text;
  text << x;
  return text.str() + (x == static_cast<double>(static_cast<int64_t>(x)) ? ".0" : "");
}

inline void check_sampled_grad(const Tensor& grad, const Tensor& a, const Tensor& b,
                               const std::optional<Tensor>& a_scale, const Tensor& counter,
                               double share, int64_t block) {
  const char* op = "sampled_grad_";
  const bool float8 = a.scalar_type() == ScalarType::Float8_e4m3fn;
  check_inputs(op, {{"b", b}, {"grad", grad}});
  if (a_scale.has_value()) check_inputs(op, {{"b", b}, {"a_scale", *a_scale}});
  if (!float8) check_inputs(op, {{"b", b}, {"a", a}});
  check_tokens(op, a, b, !float8);
  check_same_device(op, {"a", a}, {"b", b});
  const int64_t m = b.size(b.dim() - 1), n = a.size(a.dim() - 1);
  require(grad.dim() == 2 && grad.size(0) == m && grad.size(1) == n, op, "expected grad of shape (",
          m, ", ", n, "), got ", shape(grad));
  check_scale(op, "a", a, a_scale, false);
  check_counter(op, counter);
  if (!counter.is_cpu()) check_same_device(op, {"b", b}, {"counter", counter});
  require(share > 0, op, "fraction must be positive, got ", number(share));
  require(block >= 1, op, "block must be at least 1, got ", block);
}

inline void check_quantize_rows(const Tensor& x) {
  const char* op = "quantize_rows";
  check_inputs(op, {{"x", x}});
  require(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, "x needs at least one feature, got ",
          shape(x));
}

inline void check_quantize_tensor(const Tensor& x) { check_inputs("quantize_tensor", {{"x", x}}); }

inline void check_add_quantized(const Tensor& data, const Tensor& scale, const Tensor& x) {
  const char* op = "add_quantized_";
  check_matrix(op, "data", data);
  const int64_t m = data.size(0), n = data.size(1);
  require(data.scalar_type() == ScalarType::Char, op, "expected data in int8, got ",
          dtype_name(data.scalar_type()));
  const bool fits = scale.dim() == 2 && ((scale.size(0) == m && scale.size(1) == 1) ||
                                         (scale.size(0) == 1 && scale.size(1) == n));
  require(fits && scale.scalar_type() == ScalarType::Float, op, "expected scale (", m,
          ", 1) or (1, ", n, ") in float32, got ", shape(scale), " in ",
          dtype_name(scale.scalar_type()));
  check_inputs(op, {{"x", x}, {"scale", scale}});
  check_same_device(op, {"x", x}, {"data", data});
  require(x.dim() == 2 && x.size(0) == m && x.size(1) == n, op, "expected x ", shape(data),
          ", got ", shape(x));
}

}  // namespace molegrad
