// The products of a sketch on whichever path: kernels of ours, cuBLASLt, one fused launch. Nothing
// here waits for the device; all scratch memory is torch's.
#pragma once

#include <array>
#include <mutex>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "cublaslt.h"
#include "product_paths.h"
#include "products.h"
#include "sketch.h"
#include "sketch_fused.h"
#include "sketch_plan.h"
#include "tensors.h"

namespace molegrad::cuda {

// What MOLEGRAD_SKETCH_PATH wants for a call; an error where it is malformed.
SketchPath wanted_sketch_path(const SketchCall& call);

// sketch_accumulate_ in the name of `op`, arguments checked.
void add_sketch(const char* op, const Tensor& y, const Tensor& w, const Tensor& a, const Tensor& b,
                const Tensor& u, const Tensor& v);

inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes(), dtype);
  return torch::stable::copy_(copy, x);
}

// A result, rows `ld` numbers apart, in float32 or float64.
struct Output {
  void* data = nullptr;
  int64_t ld = 0;

  Output() = default;
  explicit Output(const Tensor& x, int64_t first_column = 0)
      : data(static_cast<char*>(x.mutable_data_ptr()) +
             first_column * (dtype_code(x) == 1 ? 8 : 4)),
        ld(x.size(1)) {}
};

// The scale of a float8 operand as kernels read it: one number, or one for each token.
struct Scale {
  std::optional<Tensor> tensor;
  const float* data = nullptr;
  int stride = 0;

  explicit Scale(const std::optional<Tensor>& x) {
    if (!x.has_value()) return;
    tensor = torch::stable::contiguous(*x);
    data = static_cast<const float*>(tensor->const_data_ptr());
    stride = x->dim() > 0 ? 1 : 0;
  }
};

// Products of A (T, n) and B (T, m) on one stream.
class Products {
 public:
  Products(const char* op, const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_scale,
           const std::optional<Tensor>& b_scale)
      : op_(op),
        place_(a),
        gpu_(a),
        like_(a),
        a_(a),
        b_(b),
        a_scale_(a_scale),
        b_scale_(b_scale),
        dtype_(acc_dtype(a, b)) {
    // Float8 beside more than 16 bits has no kernel of its own.
    if (is_float8(a) && wide(b_)) a_ = widened(a_, a_scale_);
    if (is_float8(b) && wide(a_)) b_ = widened(b_, b_scale_);
  }

  cudaStream_t stream() const { return place_.stream(); }
  const Gpu& gpu() const { return gpu_; }

  // Y = or += Bᵀ(A V) and W = or += Aᵀ(B U); without V or U that half is left out.
  void sketch(const Tensor* v, const Tensor* u, const Output& y, const Output& w, bool add) {
    const int64_t rank = larger(v ? v->size(1) : 0, u ? u->size(1) : 0);
    // A float8 dtype where there is one: they have the larger codes.
    const SketchPath path =
        choose_sketch_path(wanted_sketch_path({a_.cols, b_.cols, a_.rows, rank}),
                           a_.dtype < b_.dtype ? b_.dtype : a_.dtype, rank);
    if (path == SketchPath::kFused && v && u && sketch_fused(*v, *u, y, w, add)) return;
    if (path != SketchPath::kCublasLt) return sketch_own(a_, b_, v, u, y, w, add);
    // Chunks of tokens that the second half finds in L2; one half alone reads nothing twice.
    const int64_t row = (a_.cols + b_.cols) * element_bytes(a_.dtype);
    const int64_t chunk = v && u && a_.rows > 0 ? chunk_tokens(a_.rows, row, gpu_.l2) : a_.rows;
    int64_t first = 0;
    do {  // once without tokens too
      const int64_t count = smaller(chunk, a_.rows - first);
      const Matrix a = rows_of(a_, first, count), b = rows_of(b_, first, count);
      const bool more = add || first > 0;
      const Tensor* own_v = v && !half_by_library(a, b, *v, y, more) ? v : nullptr;
      const Tensor* own_u = u && !half_by_library(b, a, *u, w, more) ? u : nullptr;
      if (own_v || own_u) sketch_own(a, b, own_v, own_u, y, w, more);
      first += count;
    } while (first < a_.rows);
  }

  // out(i, j) = Σ_r left(r, i) right(r, j) for `rows` i and `cols` j; strides of r, then of i or j.
  void product(int64_t rows, int64_t length, int64_t cols, const void* left,
               std::array<int64_t, 2> left_strides, const void* right,
               std::array<int64_t, 2> right_strides, const Output& out, bool add) {
    const int code = dtype_code(dtype_);
    const Tensor scratch = new_scratch(
        like_, molegrad_product_scratch(code, rows, length, cols, gpu_.multiprocessors));
    check(molegrad_product(code, rows, length, cols, left, left_strides[0], left_strides[1], right,
                           right_strides[0], right_strides[1], out.data, out.ld, add,
                           gpu_.multiprocessors, scratch.mutable_data_ptr(), stream()));
  }

  void check(int status) const { check_launch(op_, status); }

 private:
  static bool wide(const Matrix& x) { return x.dtype == 0 || x.dtype == 1; }
  static int64_t element_bytes(int dtype) {
    return cpu::element_size(static_cast<cpu::DType>(dtype));
  }

  static Matrix rows_of(const Matrix& x, int64_t first, int64_t count) {
    Matrix part = x;
    part.data = static_cast<const char*>(x.data) + first * x.ld * element_bytes(x.dtype);
    part.rows = count;
    return part;
  }

  // Kernels of ours. Scales are those of all tokens, so where there are any, so are a and b.
  void sketch_own(const Matrix& a, const Matrix& b, const Tensor* v, const Tensor* u,
                  const Output& y, const Output& w, bool add) {
    if (!wide(a)) return sketch_narrow(a, b, v, u, y, w, add);
    if (v != nullptr) half_wide(a, b, *v, y, add);
    if (u != nullptr) half_wide(b, a, *u, w, add);
  }

  // A float8 operand times its scale in float32 or float64, exactly; the scale is used up.
  Matrix widened(const Matrix& x, Scale& scale) {
    static std::once_flag said;
    std::call_once(said, [&] {
      const std::string message =
          std::string("molegrad::") + op_ + ": a float8 operand beside one of " +
          (dtype_ == ScalarType::Double ? "torch.float64" : "torch.float32") +
          " is converted to that first, which takes the memory and time " +
          "that float8 saves: give the other one 16 bits or float8 (said once)";
      aoti_torch_warn(op_, __FILE__, __LINE__, message.c_str());
    });
    const Tensor out = new_tensor(like_, {x.rows, x.cols}, dtype_);
    check(molegrad_dequantize(x.dtype, x.data, x.rows, x.cols, x.ld, scale.data, scale.stride,
                              dtype_code(dtype_), out.mutable_data_ptr(), stream()));
    scale = Scale(std::nullopt);
    return Matrix(out);
  }

  void sketch_narrow(const Matrix& a, const Matrix& b, const Tensor* v, const Tensor* u,
                     const Output& y, const Output& w, bool add) {
    struct Basis {
      int dtype = 0;
      const void* data = nullptr;
      int64_t row = 0, column = 0, k = 0;
      explicit Basis(const Tensor* x) {
        if (x == nullptr) return;
        dtype = dtype_code(*x);
        data = x->const_data_ptr();
        row = x->stride(0);
        column = x->stride(1);
        k = x->size(1);
      }
    };
    const Basis right(v), left(u);
    const int64_t tokens = a.rows, n = a.cols, m = b.cols;
    // One half alone reads nothing twice.
    const auto bytes = [](const Matrix& x) { return x.cols * element_bytes(x.dtype); };
    const int64_t chunk = v != nullptr && u != nullptr
                              ? chunk_tokens(tokens, bytes(a) + bytes(b), gpu_.l2)
                              : round_up_to(tokens, kProjectTokens);
    const Tensor scratch =
        new_scratch(like_, molegrad_sketch_scratch(tokens, n, m, right.k, left.k, chunk,
                                                   gpu_.multiprocessors, gpu_.shared_memory));
    check(molegrad_sketch_scaled(
        a.dtype, a.data, a.ld, a_scale_.data, a_scale_.stride, b.dtype, b.data, b.ld, b_scale_.data,
        b_scale_.stride, tokens, n, m, right.dtype, right.data, right.row, right.column, right.k,
        left.dtype, left.data, left.row, left.column, left.k, static_cast<float*>(y.data), y.ld,
        static_cast<float*>(w.data), w.ld, add, chunk, gpu_.multiprocessors, gpu_.shared_memory,
        scratch.mutable_data_ptr(), stream()));
  }

  // False where the columns do not fit.
  bool sketch_fused(const Tensor& v, const Tensor& u, const Output& y, const Output& w, bool add) {
    const auto aligned = [](const Matrix& x) {
      return alignment_of(x.data) >= 16 && x.cols % 8 == 0 && x.ld % 8 == 0;
    };
    const int64_t tokens = a_.rows, n = a_.cols, m = b_.cols;
    const int64_t bytes = molegrad_fused_scratch(tokens, n, m, v.size(1), u.size(1), kPieces,
                                                 gpu_.multiprocessors, gpu_.shared_memory);
    if (bytes == 0 || !aligned(a_) || !aligned(b_)) return false;
    const Tensor scratch = new_scratch(like_, bytes);
    check(molegrad_sketch_fused(
        a_.data, a_.ld, b_.data, b_.ld, tokens, n, m, dtype_code(v), v.const_data_ptr(),
        v.stride(0), v.stride(1), v.size(1), dtype_code(u), u.const_data_ptr(), u.stride(0),
        u.stride(1), u.size(1), static_cast<float*>(y.data), y.ld, static_cast<float*>(w.data),
        w.ld, add, kPieces, gpu_.multiprocessors, gpu_.shared_memory, scratch.mutable_data_ptr(),
        stream()));
    return true;
  }

  // out = or += Zᵀ(X S) in float32 or float64.
  void half_wide(const Matrix& x, const Matrix& z, const Tensor& s, const Output& out, bool add) {
    const Tensor basis = in_dtype(s, dtype_);
    const int64_t k = s.size(1);
    const Tensor p = new_tensor(like_, {x.rows, k}, dtype_);
    product(x.rows, x.cols, k, x.data, {1, x.ld}, basis.const_data_ptr(),
            {basis.stride(0), basis.stride(1)}, Output(p), false);
    product(z.cols, z.rows, k, z.data, {z.ld, 1}, p.const_data_ptr(), {k, 1}, out, add);
  }

  // The same by cuBLASLt, bfloat16 too; false where it has not been done.
  bool half_by_library(const Matrix& x, const Matrix& z, const Tensor& s, const Output& out,
                       bool add) {
    const Tensor workspace = new_scratch(like_, kLtWorkspace);
    const auto run = [&](const LtProduct& product) {
      const LtStatus status = lt_product(product, workspace.mutable_data_ptr(), kLtWorkspace,
                                         gpu_.device, gpu_.multiprocessors, stream());
      require(status != LtStatus::kFailed, op_, "cuBLASLt failed");
      return status == LtStatus::kDone;
    };
    const int64_t tokens = x.rows, k = s.size(1);
    if (x.dtype != 2) {
      const Matrix basis(in_dtype(s, dtype_));
      const Tensor p = new_tensor(like_, {tokens, k}, dtype_);
      return run({x.dtype, false, tokens, k, x.cols, x.data, x.ld, basis.data, basis.ld,
                  p.mutable_data_ptr(), k, false}) &&
             run({x.dtype, true, z.cols, k, tokens, z.data, z.ld, p.const_data_ptr(), k, out.data,
                  out.ld, add});
    }
    // Two pieces of every number of the basis and of P side by side, as in sketch.cuh.
    constexpr int64_t kUnit = 8;  // numbers, 16 bytes
    const int64_t rank = round_up_to(k, kUnit), width = kPieces * rank;
    const auto pieces = [&](int64_t rows) {
      return new_tensor(like_, {rows, width}, ScalarType::BFloat16);
    };
    const Tensor basis = pieces(x.cols), q = pieces(tokens);
    const Tensor p = new_tensor(like_, {tokens, width}, ScalarType::Float);
    const Tensor sums = new_tensor(like_, {z.cols, width}, ScalarType::Float);
    const auto bits = [](const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); };
    const auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
    const int padded = static_cast<int>(rank);
    check(molegrad_split(dtype_code(s), s.const_data_ptr(), s.stride(0), s.stride(1), x.cols, k,
                         padded, bits(basis), stream()));
    if (!run({x.dtype, false, tokens, width, x.cols, x.data, x.ld, bits(basis), width, floats(p),
              width, false}))
      return false;
    check(molegrad_join(floats(p), tokens, padded, bits(q), stream()));
    if (!run({x.dtype, true, z.cols, width, tokens, z.data, z.ld, bits(q), width, floats(sums),
              width, false}))
      return false;
    check(molegrad_add_pieces(floats(sums), z.cols, k, padded, static_cast<float*>(out.data),
                              out.ld, add, stream()));
    return true;
  }

  const char* op_;
  Place place_;
  Gpu gpu_;
  Tensor like_;
  Matrix a_, b_;
  Scale a_scale_, b_scale_;
  ScalarType dtype_;
};

}  // namespace molegrad::cuda

extern "C" {

// The path, SketchPath of product_paths.h, that a sketch of A (tokens, n) and B (tokens, m) of a
// DType with bases of up to `rank` columns takes now: 1 for kernels of ours, 2 for cuBLASLt, 3 for
// the fused kernel. What 2 and 3 do not support takes path 1 all the same.
__attribute__((visibility("default"))) int molegrad_sketch_path(int dtype, int64_t n, int64_t m,
                                                                int64_t tokens, int64_t rank);
}
