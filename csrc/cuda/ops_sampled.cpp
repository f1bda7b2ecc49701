// The CUDA kernel of torch.ops.molegrad.sampled_grad_.
#include "cublaslt.h"
#include "ops_products.h"
#include "quantized.h"
#include "sampled.h"
#include "tensors.h"
#ifdef MOLEGRAD_EMULATED
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

namespace molegrad::cuda {
namespace {

constexpr const char* kOp = "sampled_grad_";
constexpr int kBFloat16 = 2;

// grad += alpha BᵀA, all of one dtype, by torch's library.
void add_product(const Tensor& grad, const Tensor& a, const Tensor& b, double alpha) {
#ifdef MOLEGRAD_EMULATED
  const auto addmm_out = aoti_torch_cpu_addmm_out;
#else
  const auto addmm_out = aoti_torch_cuda_addmm_out;
#endif
  const Tensor left = torch::stable::transpose(b, 0, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(addmm_out(grad.get(), grad.get(), left.get(), a.get(), 1.0, alpha));
}

// The same for a float32 grad beside bfloat16 A and B; false where it has not been done.
bool add_to_wide(const Tensor& grad, const Matrix& a, const Matrix& b, double alpha,
                 const Place& place) {
  const bool by_rows = grad.stride(1) == 1;
  if (!by_rows && grad.stride(0) != 1) return false;
  const Matrix &left = by_rows ? b : a, &right = by_rows ? a : b;
  const Gpu gpu(grad);
  const Tensor workspace = new_scratch(grad, kLtWorkspace);
  const LtStatus status = lt_product(
      {kBFloat16, true, left.cols, right.cols, left.rows, left.data, left.ld, right.data, right.ld,
       grad.mutable_data_ptr(), grad.stride(by_rows ? 0 : 1), true, alpha},
      workspace.mutable_data_ptr(), kLtWorkspace, gpu.device, gpu.multiprocessors, place.stream());
  require(status != LtStatus::kFailed, kOp, "cuBLASLt failed");
  return status == LtStatus::kDone;
}

// All of grad += alpha BᵀA by a library, which adds to grad by itself, A in float8 as numbers of
// B's dtype; false where none takes these dtypes. `scale` holds a number for each row of A, if any.
bool add_whole(const Tensor& grad, const Matrix& a, const Matrix& b, const Tensor& scale,
               double alpha, const Place& place) {
  const int to = dtype_code(grad);
  if (to != b.dtype && (to != 0 || b.dtype != kBFloat16)) return false;
  const bool scaled = scale.numel() > 0;
  const auto add = [&](const Matrix& whole) {
    if (to != b.dtype) return add_to_wide(grad, whole, b, alpha, place);
    add_product(grad, whole.tensor, b.tensor, alpha);
    return true;
  };
  if (!scaled) return a.dtype == b.dtype && add(a);
  if (!is_float8(a.tensor) || b.dtype == 1) return false;
  const Tensor numbers = new_tensor(grad, {a.rows, a.cols}, b.tensor.scalar_type());
  check_launch(kOp, molegrad_dequantize(a.dtype, a.data, a.rows, a.cols, a.ld,
                                        static_cast<const float*>(scale.const_data_ptr()), 1,
                                        b.dtype, numbers.mutable_data_ptr(), place.stream()));
  return add(Matrix(numbers));
}

// Bytes for what is taken of X; where more is needed, features are taken in parts.
constexpr int64_t kSampleMemory = 128 << 20;

Tensor sampled_grad_(Tensor grad, Tensor a, Tensor b, std::optional<Tensor> a_scale, Tensor counter,
                     double share, int64_t block, double alpha, int64_t seed) {
  check_sampled_grad(grad, a, b, a_scale, counter, share, block);
  const Place place(b);
  const Matrix a_in(a), b_in(b);
  const bool wide_a = a_in.cols > b_in.cols;
  const Matrix &x = wide_a ? a_in : b_in, &z = wide_a ? b_in : a_in;
  const Tensor step = beside(counter, b);
  Tensor scale = new_tensor(b, {a_scale.has_value() ? a_in.rows : 0}, acc_dtype(b));
  if (a_scale.has_value())
    torch::stable::copy_(scale, torch::stable::reshape(*a_scale, std::vector<int64_t>{a_in.rows}));
  const void* factors = a_scale.has_value() ? scale.const_data_ptr() : nullptr;

  MolegradSampled args = {};
  args.tokens = x.rows;
  args.dtype = b_in.dtype;
  args.x = x.data;
  args.x_dtype = x.dtype;
  args.x_ld = x.ld;
  args.features = x.cols;
  args.x_scale = wide_a ? factors : nullptr;
  args.z = z.data;
  args.z_dtype = z.dtype;
  args.z_ld = z.ld;
  args.columns = z.cols;
  args.z_scale = wide_a ? nullptr : factors;
  args.counter = static_cast<const int64_t*>(step.const_data_ptr());
  args.seed = seed;
  args.block = block;
  args.share = share;
  args.alpha = alpha;
  args.grad = grad.mutable_data_ptr();
  args.grad_dtype = dtype_code(grad);
  args.feature_stride = grad.stride(wide_a ? 1 : 0);
  args.column_stride = grad.stride(wide_a ? 0 : 1);
  args.memory = kSampleMemory;
  if (share >= 1 && a_in.rows > 0 && add_whole(grad, a_in, b_in, scale, alpha, place))
    args.tokens = 0;  // nothing is left but to say that all was taken

  Tensor stats = new_tensor(b, {2}, ScalarType::Float);
  Tensor scratch = new_scratch(b, molegrad_sampled_scratch(&args));
  check_launch(kOp, molegrad_sampled_grad(&args, static_cast<float*>(stats.mutable_data_ptr()),
                                          scratch.mutable_data_ptr(), place.stream()));
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) { m.impl("sampled_grad_", TORCH_BOX(&sampled_grad_)); }

}  // namespace molegrad::cuda
