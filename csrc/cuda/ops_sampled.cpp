// The CUDA kernel of torch.ops.molegrad.sampled_grad_.
#include "sampled.h"
#include "tensors.h"
#ifdef MOLEGRAD_EMULATED
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

namespace molegrad::cuda {
namespace {

// grad += alpha BᵀA by the library, which adds to grad by itself.
void add_product(const Tensor& grad, const Tensor& a, const Tensor& b, double alpha) {
#ifdef MOLEGRAD_EMULATED
  const auto addmm_out = aoti_torch_cpu_addmm_out;
#else
  const auto addmm_out = aoti_torch_cuda_addmm_out;
#endif
  const Tensor left = torch::stable::transpose(b, 0, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(addmm_out(grad.get(), grad.get(), left.get(), a.get(), 1.0, alpha));
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
  if (share >= 1 && !a_scale.has_value() && a.scalar_type() == b.scalar_type() &&
      grad.scalar_type() == b.scalar_type()) {
    add_product(grad, a_in.tensor, b_in.tensor, alpha);
    args.tokens = 0;  // nothing is left but to say that all was taken
  }

  Tensor stats = new_tensor(b, {2}, ScalarType::Float);
  Tensor scratch = new_scratch(b, molegrad_sampled_scratch(&args));
  check_launch("sampled_grad_",
               molegrad_sampled_grad(&args, static_cast<float*>(stats.mutable_data_ptr()),
                                     scratch.mutable_data_ptr(), place.stream()));
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) { m.impl("sampled_grad_", TORCH_BOX(&sampled_grad_)); }

}  // namespace molegrad::cuda
