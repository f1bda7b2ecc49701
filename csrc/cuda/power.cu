// Small sums of lowrank_grad: norms, and the worst of two statuses.
#include "device.cuh"
#include "launch.h"
#include "sketch_plan.h"
#include "tensors.h"

namespace molegrad::cuda {

constexpr int kNormThreads = 256, kNormBlocks = 128;

struct NormArgs {
  const void* y;  // (rows, k), then the probes' r columns of G Ω; rows `ld` numbers apart
  int64_t ld, rows;
  int k, r;
  const void* overlap;  // (k, r), VᵀΩ
  double* sums;         // of each block
  int blocks;
  void* norm_sq;
};

// ‖Y‖² + ‖G Ω − Y VᵀΩ‖² / r, in float64: the sum of the blocks' sums, in their order.
template <typename C>
__global__ void __launch_bounds__(kNormThreads) squares_kernel(NormArgs args) {
  __shared__ double sums[kNormThreads / 32];
  const C* y = static_cast<const C*>(args.y);
  const C* overlap = static_cast<const C*>(args.overlap);
  constexpr int kWarps = kNormThreads / 32;
  double sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; i < args.rows;
       i += int64_t{gridDim.x} * kWarps) {  // a warp to a row
    const C* row = y + i * args.ld;
    for (int j = threadIdx.x % 32; j < args.k; j += 32) sum += static_cast<double>(row[j]) * row[j];
    for (int j = threadIdx.x % 32; j < args.r; j += 32) {
      double x = row[args.k + j];
      for (int l = 0; l < args.k; ++l) x -= static_cast<double>(row[l]) * overlap[l * args.r + j];
      sum += x * x / args.r;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kNormThreads / 32; ++i) sum += sums[i];
  args.sums[blockIdx.x] = sum;
}

template <typename C>
__global__ void sum_of_squares_kernel(NormArgs args) {
  double sum = 0;
  for (int i = threadIdx.x; i < args.blocks; i += 32) sum += args.sums[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) *static_cast<C*>(args.norm_sq) = static_cast<C>(sum);
}

__global__ void worse_of_kernel(int* status, const int* other) {
  if (*other > *status) *status = *other;
}

}  // namespace molegrad::cuda

namespace molegrad::cuda {
namespace {

template <typename C>
int norm(const NormArgs& args, cudaStream_t stream) {
  const int status =
      launch(squares_kernel<C>, dim3(args.blocks), dim3(kNormThreads), 0, stream, args);
  if (status != cudaSuccess) return status;
  return launch(sum_of_squares_kernel<C>, dim3(1), dim3(32), 0, stream, args);
}

}  // namespace
}  // namespace molegrad::cuda

using namespace molegrad::cuda;

// Bytes of scratch memory of molegrad_norm.
extern "C" int64_t molegrad_norm_scratch() { return kNormBlocks * sizeof(double); }

// The Hutch++ estimate of ‖G‖² from Y = G V and G Ω, which lies after Y in the same rows (k and r
// columns, rows `ld` numbers apart), and overlap = VᵀΩ (k, r): hutch_norm_sq of
// molegrad/ops/power.py. Without probes, r = 0, it is ‖Y‖². float32 (`dtype` 0) or float64 (1).
extern "C" int molegrad_norm(int dtype, const void* y, int64_t ld, int64_t rows, int64_t k,
                             int64_t r, const void* overlap, void* norm_sq, void* scratch,
                             cudaStream_t stream) {
  NormArgs args = {y,
                   ld,
                   rows,
                   static_cast<int>(k),
                   static_cast<int>(r),
                   overlap,
                   static_cast<double*>(scratch),
                   0,
                   norm_sq};
  const int64_t blocks = divide_up(rows, kNormThreads / 32);
  args.blocks = static_cast<int>(smaller(larger(blocks, 1), kNormBlocks));
  return dtype == 1 ? norm<double>(args, stream) : norm<float>(args, stream);
}

// *status = max(*status, *other), on the device.
extern "C" int molegrad_worse(int* status, const int* other, cudaStream_t stream) {
  return launch(worse_of_kernel, dim3(1), dim3(1), 0, stream, status, other);
}

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
#include "sketch_op.h"

namespace molegrad::cuda {
namespace {

struct Orthonormal {
  Tensor q, r, status;
};

Orthonormal orthonormalize(const Tensor& y, double cond_max) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(y),
                                    torch::stable::detail::from(cond_max)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("molegrad::orthonormalize", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lowrank_grad(
    Tensor a, Tensor b, Tensor v, int64_t power_iters, std::optional<Tensor> probes,
    double cond_max, std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_lowrank_grad(a, b, v, probes, a_scale, b_scale);
  Products products("lowrank_grad", a, b, a_scale, b_scale);
  const ScalarType dtype = acc_dtype(a, b);
  const int code = dtype_code(dtype);
  const int64_t n = v.size(0), m = b.size(b.dim() - 1), k = v.size(1);
  const int64_t r = probes.has_value() ? probes->size(1) : 0, width = k + r;
  const auto matrix = [&](int64_t rows, int64_t cols) {
    return new_tensor(a, {rows, cols}, dtype);
  };

  Tensor start = v;  // [V, Ω], so that both cost one pass
  if (r > 0) {
    start = matrix(n, width);
    Tensor first = torch::stable::narrow(start, 1, 0, k),
           rest = torch::stable::narrow(start, 1, k, r);
    torch::stable::copy_(first, v);
    torch::stable::copy_(rest, *probes);
  }
  Tensor all = matrix(m, width);
  products.sketch(&start, nullptr, Output(all), Output(), false);

  Tensor norm_sq = new_tensor(a, {}, dtype);
  const Tensor norm_scratch = new_scratch(a, molegrad_norm_scratch());
  const auto norm = [&](const Tensor& y, const void* overlap) {
    const int64_t probed = overlap != nullptr ? r : 0;
    products.check(molegrad_norm(code, y.const_data_ptr(), y.size(1), y.size(0), k, probed, overlap,
                                 norm_sq.mutable_data_ptr(), norm_scratch.mutable_data_ptr(),
                                 products.stream()));
  };
  if (r > 0) {
    const Tensor overlap = matrix(k, r);
    products.product(k, n, r, start.const_data_ptr(), {width, 1}, Output(start, k).data, {width, 1},
                     Output(overlap), false);
    norm(all, overlap.const_data_ptr());
  }

  Tensor y = torch::stable::narrow(all, 1, 0, k);
  Orthonormal basis = orthonormalize(y, cond_max);
  Tensor u = basis.q, status = basis.status, w = matrix(n, k);
  if (power_iters == 0) {  // W = V Rᵀ
    const Tensor right = in_dtype(v, dtype);
    products.product(n, k, k, right.const_data_ptr(), {right.stride(1), right.stride(0)},
                     basis.r.const_data_ptr(), {1, k}, Output(w), false);
  }
  for (int64_t i = 0; i < power_iters; ++i) {
    products.sketch(nullptr, &u, Output(), Output(w), false);
    if (i + 1 == power_iters) break;
    const Tensor right = orthonormalize(w, cond_max).q;
    y = matrix(m, k);
    products.sketch(&right, nullptr, Output(y), Output(), false);
    const Orthonormal next = orthonormalize(y, cond_max);
    u = next.q;
    products.check(molegrad_worse(memory_of<int>(status),
                                  static_cast<const int*>(next.status.const_data_ptr()),
                                  products.stream()));
  }
  if (r == 0) norm(w, nullptr);
  return {u, w, norm_sq, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) { m.impl("lowrank_grad", TORCH_BOX(&lowrank_grad)); }

}  // namespace molegrad::cuda
#endif
