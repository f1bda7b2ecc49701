// Sampled weight gradients, as molegrad/ops/sampled.py has them.
#include "dtypes.h"
#include "sampled.cuh"
#include "sampled_product.cuh"
#include "tensors.h"

using namespace molegrad::cuda;

// dtypes are DType codes. Memory is the device's.
struct MolegradSampled {
  // The wider operand X (T, F) and the narrower Z (T, d), of `dtype`, that of the output gradients,
  // or float8; rows are `ld` elements apart. Scales (T), float64 for float64 and else float32, may
  // be null.
  int64_t tokens, dtype;
  const void* x;
  int64_t x_dtype, x_ld, features;
  const void* x_scale;
  const void* z;
  int64_t z_dtype, z_ld, columns;
  const void* z_scale;
  // The sample; block >= 1 features, fraction > 0.
  const int64_t* counter;
  int64_t seed, block;
  double fraction, alpha;
  // The gradient; its element of feature f of X and column c of Z lies at f feature_stride + c
  // column_stride.
  void* grad;
  int64_t grad_dtype, feature_stride, column_stride;
  // Bytes that X̃ may take: features are taken in as many parts as that needs.
  int64_t memory;
  // Columns of a block's tile where numbers have 16 bits, 128 or 256; 0 decides.
  int64_t tile;
};

namespace {

// As in molegrad/ops: tokens that decide the threshold.
constexpr int64_t kThresholdTokens = 512;
// Scores that one block can do with; more are shared among so many blocks at most.
constexpr int64_t kScoresOfBlock = 1 << 16, kThresholdBlocks = 128;
// Blocks that are enough for tiles to be wide: one for each multiprocessor of an H100.
constexpr int64_t kEnoughBlocks = 132;

// Numbers of type V: what is done with them, and where it is kept.
template <typename V>
struct Plan {
  using C = typename Computed<V>::Type;
  static constexpr bool kTensorCores = sizeof(V) == 2;

  MolegradSampled args;
  bool sampling, copies_x, copies_z;
  int64_t block, pairs, groups, group_features, part, words, sum_tiles, z_width;
  int64_t threshold_rows, threshold_stride, threshold_blocks;
  C *squares, *norms, *limits, *threshold_sums;
  V *values, *z_copy;
  uint32_t* marks;
  double* sums;
  int64_t bytes;

  Plan(const MolegradSampled& a, void* memory) : args(a) {
    sampling = a.fraction < 1 && a.tokens > 0;
    copies_x = sampling || !direct(a.x_dtype, a.x, a.x_ld, a.features, a.x_scale);
    copies_z = !direct(a.z_dtype, a.z, a.z_ld, a.columns, a.z_scale);
    z_width = round_up(a.columns, kStrip);
    block = min(a.block, max(a.features, int64_t{1}));
    pairs = ceil_div(a.features, block);
    group_features = kTensorCores && a.block % 128 == 0 ? 128 : 64;
    groups = ceil_div(a.features, group_features);
    words = ceil_div(a.tokens, kWordTokens);
    sum_tiles = ceil_div(a.features, kWarpFeatures);
    // Parts end where the tiles of a warp do.
    const int64_t step = kWarpFeatures / group_features;
    const int64_t bytes_of_step = a.tokens * kWarpFeatures * static_cast<int64_t>(sizeof(V));
    const int64_t steps = a.memory / max(bytes_of_step, int64_t{1});
    part = copies_x ? min(groups, max(steps, int64_t{1}) * step) : groups;

    threshold_stride = max(int64_t{1}, a.tokens / kThresholdTokens);
    threshold_rows = ceil_div(a.tokens, threshold_stride);
    const int64_t scores = threshold_rows * pairs;
    threshold_blocks =
        scores <= kScoresOfBlock ? 1 : min(ceil_div(scores, kScoresOfBlock / 2), kThresholdBlocks);

    Scratch scratch(memory);
    const int64_t if_sampling = sampling ? 1 : 0, if_x = copies_x ? 1 : 0;
    squares = scratch.take<C>(if_sampling * a.tokens * pairs);
    norms = scratch.take<C>(if_sampling * a.tokens);
    limits = scratch.take<C>(kThresholdSteps + 2);
    threshold_sums = scratch.take<C>((kThresholdSteps + 1) * threshold_blocks);
    sums = scratch.take<double>(if_sampling * 3 * words * sum_tiles);
    marks = scratch.take<uint32_t>(if_x * part * words);
    values = scratch.take<V>(if_x * part * a.tokens * group_features);
    z_copy = scratch.take<V>((copies_z ? 1 : 0) * a.tokens * z_width);
    bytes = scratch.used;
  }

  // Whether the product can read an operand where it lies.
  bool direct(int64_t dtype, const void* data, int64_t ld, int64_t columns,
              const void* scale) const {
    return dtype == args.dtype && scale == nullptr &&
           (!kTensorCores || in_packs<V>(data, columns, ld));
  }
  const C* threshold() const { return sampling ? limits + kThresholdSteps + 1 : nullptr; }
};

template <typename T, typename C>
SampledRows<T, C> rows_of(const void* data, int64_t ld, int64_t tokens, int64_t columns,
                          const void* scale) {
  constexpr int64_t kCount = sizeof(T) * kStrip > 16 ? 16 / sizeof(T) : kStrip;
  const bool packed =
      reinterpret_cast<uintptr_t>(data) % (kCount * sizeof(T)) == 0 && ld % kCount == 0;
  return {static_cast<const T*>(data), ld, static_cast<const C*>(scale), tokens, columns, packed};
}

// fn(rows) with the elements of an operand, V or float8.
template <typename V, typename F>
cudaError_t with_rows(int64_t dtype, const void* data, int64_t ld, int64_t tokens, int64_t columns,
                      const void* scale, const F& fn) {
  using C = typename Computed<V>::Type;
  if (dtype == 4) return fn(rows_of<Float8, C>(data, ld, tokens, columns, scale));
  return fn(rows_of<V, C>(data, ld, tokens, columns, scale));
}

template <typename T, typename C>
cudaError_t launch_squares(const SampledRows<T, C>& x, int64_t block, int64_t pairs, C* squares,
                           cudaStream_t stream) {
  constexpr int kCount = sizeof(T) * kStrip > 16 ? 16 / sizeof(T) : kStrip;
  const bool packs = x.packed && block % kCount == 0 && x.columns % kCount == 0;
  const int64_t pieces = packs ? block / kCount : block;
  int team = 1;
  while (team < 32 && team < pieces) team *= 2;
  const dim3 grid(static_cast<unsigned>(ceil_div(pairs * team, kSampleThreads)),
                  static_cast<unsigned>(min(ceil_div(x.tokens, int64_t{16}), int64_t{65535})));
  return launch(packs ? block_squares_kernel<T, C, kCount> : block_squares_kernel<T, C, 1>, grid,
                dim3(kSampleThreads), 0, stream, x, block, pairs, team, squares);
}

template <typename V>
cudaError_t launch_threshold(const Plan<V>& plan, cudaStream_t stream) {
  using C = typename Plan<V>::C;
  const C tiny = sizeof(C) == 8 ? static_cast<C>(2.2250738585072014e-308)
                                : static_cast<C>(1.1754943508222875e-38);
  const ThresholdJob<C> job = {plan.squares,
                               plan.norms,
                               plan.threshold_rows,
                               plan.threshold_stride,
                               plan.pairs,
                               static_cast<C>(plan.args.fraction),
                               tiny,
                               plan.limits,
                               plan.threshold_sums};
  const dim3 grid(static_cast<unsigned>(plan.threshold_blocks));
  const int steps = plan.threshold_blocks == 1 ? kThresholdSteps + 2 : 1;
  cudaError_t status = cudaSuccess;
  for (int step = 0; step < kThresholdSteps + 2 && status == cudaSuccess; step += steps)
    status = launch(threshold_kernel<C>, grid, dim3(kThresholdThreads), kStoredBytes, stream, job,
                    step, step + steps - 1);
  return status;
}

template <typename T, typename V>
cudaError_t launch_sample(const Plan<V>& plan, const SampledRows<T, typename Plan<V>::C>& x,
                          int64_t first_group, int64_t groups, cudaStream_t stream) {
  const SampleJob<T, V> job = {x,
                               plan.block,
                               plan.pairs,
                               plan.squares,
                               plan.norms,
                               plan.threshold(),
                               plan.args.counter,
                               plan.args.seed,
                               first_group * plan.group_features,
                               groups,
                               static_cast<int>(plan.group_features),
                               plan.words,
                               plan.marks,
                               plan.values,
                               plan.sums,
                               plan.sum_tiles};
  const int64_t tiles = ceil_div(groups * plan.group_features, kWarpFeatures);
  const dim3 grid(static_cast<unsigned>(plan.words),
                  static_cast<unsigned>(ceil_div(tiles, kSampleThreads / 32)));
  const auto kernel = plan.block % (kTeam * kStrip) == 0 || !plan.sampling
                          ? sample_kernel<T, V, Blocks::kTeams>
                      : plan.block % kStrip == 0 ? sample_kernel<T, V, Blocks::kStrips>
                                                 : sample_kernel<T, V, Blocks::kAny>;
  return launch(kernel, grid, dim3(kSampleThreads), 0, stream, job);
}

template <typename V, int kM, int kN>
cudaError_t launch_tiles(const ProductJob& job, int64_t groups, cudaStream_t stream) {
  return launch(sampled_product_kernel<V, kM, kN>,
                dim3(static_cast<unsigned>(groups * ceil_div(job.columns, kN))),
                dim3(kProductThreads), SampledTile<kM, kN>::kBytes, stream, job);
}

template <typename V>
cudaError_t launch_product(const Plan<V>& plan, int64_t first_group, int64_t groups,
                           cudaStream_t stream) {
  using C = typename Plan<V>::C;
  const MolegradSampled& a = plan.args;
  const int64_t first = first_group * plan.group_features;
  const auto grad_bytes = with_dtype(static_cast<int>(a.grad_dtype), [](auto type) {
    return static_cast<int64_t>(sizeof(typename decltype(type)::Element));
  });
  ProductJob job;
  job.x = plan.copies_x ? static_cast<const void*>(plan.values) : a.x;
  job.x_row = plan.copies_x ? plan.group_features : a.x_ld;
  job.x_group = plan.copies_x ? a.tokens * plan.group_features : plan.group_features;
  job.z = plan.copies_z ? static_cast<const void*>(plan.z_copy) : a.z;
  job.z_row = plan.copies_z ? plan.z_width : a.z_ld;
  job.tokens = a.tokens;
  job.features = a.features - first;
  job.columns = a.columns;
  job.marks = plan.copies_x ? plan.marks : nullptr;
  job.words = plan.words;
  job.grad = static_cast<char*>(a.grad) + first * a.feature_stride * grad_bytes;
  job.grad_dtype = static_cast<int>(a.grad_dtype);
  job.feature_stride = a.feature_stride;
  job.column_stride = a.column_stride;
  job.alpha = a.alpha;
  if constexpr (Plan<V>::kTensorCores) {
    const bool wide =
        a.tile != 0 ? a.tile == 256 : groups * ceil_div(a.columns, 256) >= kEnoughBlocks;
    if (plan.group_features == 64)
      return wide ? launch_tiles<V, 64, 256>(job, groups, stream)
                  : launch_tiles<V, 64, 128>(job, groups, stream);
    return wide ? launch_tiles<V, 128, 256>(job, groups, stream)
                : launch_tiles<V, 128, 128>(job, groups, stream);
  } else {
    return launch(plain_product_kernel<C>,
                  dim3(static_cast<unsigned>(groups * ceil_div(a.columns, kPlainTile))),
                  dim3(kProductThreads), plain_product_bytes<C>(), stream, job);
  }
}

template <typename V>
cudaError_t run(const MolegradSampled& a, float* stats, void* scratch, cudaStream_t stream) {
  const Plan<V> plan(a, scratch);
  const bool empty = a.tokens == 0 || a.features == 0 || a.columns == 0;
  cudaError_t status = cudaSuccess;
  if (!empty) {
    if (plan.sampling || plan.copies_z)
      status = with_rows<V>(a.z_dtype, a.z, a.z_ld, a.tokens, a.columns, a.z_scale, [&](auto z) {
        using T = typename decltype(z)::Element;
        return launch(tokens_kernel<T, typename Plan<V>::C, V>,
                      dim3(static_cast<unsigned>(ceil_div(a.tokens, kSampleThreads / 32))),
                      dim3(kSampleThreads), 0, stream, z, plan.norms, plan.z_copy, plan.z_width);
      });
    status =
        status != cudaSuccess
            ? status
            : with_rows<V>(a.x_dtype, a.x, a.x_ld, a.tokens, a.features, a.x_scale, [&](auto x) {
                cudaError_t done = cudaSuccess;
                if (plan.sampling) {
                  done = launch_squares(x, plan.block, plan.pairs, plan.squares, stream);
                  if (done == cudaSuccess) done = launch_threshold(plan, stream);
                }
                for (int64_t g = 0; g < plan.groups && done == cudaSuccess; g += plan.part) {
                  const int64_t groups = min(plan.part, plan.groups - g);
                  if (plan.copies_x) done = launch_sample(plan, x, g, groups, stream);
                  if (done == cudaSuccess) done = launch_product(plan, g, groups, stream);
                }
                return done;
              });
  }
  if (status != cudaSuccess) return status;
  const int64_t warps = empty || !plan.sampling ? 0 : plan.words * plan.sum_tiles;
  return launch(statistics_kernel, dim3(1), dim3(kThresholdThreads), 0, stream, plan.sums, warps,
                static_cast<double>(a.tokens) * static_cast<double>(plan.pairs), plan.sampling,
                stats);
}

}  // namespace

// Bytes of scratch memory, 256-byte aligned, that the call with these arguments needs.
extern "C" int64_t molegrad_sampled_scratch(const MolegradSampled* args) {
  return with_dtype(static_cast<int>(args->dtype), [&](auto type) {
    return Plan<typename decltype(type)::Element>(*args, nullptr).bytes;
  });
}

// grad += alpha Ĝ; stats (2): the fraction taken and the relative noise. Sums have a fixed order.
extern "C" int molegrad_sampled_grad(const MolegradSampled* args, float* stats, void* scratch,
                                     cudaStream_t stream) {
  return with_dtype(static_cast<int>(args->dtype), [&](auto type) {
    return run<typename decltype(type)::Element>(*args, stats, scratch, stream);
  });
}

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
#include "cublaslt.h"
#include "products.h"
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
  check_launch(
      kOp, molegrad_dequantize(a.dtype, a.data, a.rows, a.cols, a.ld, read_memory_of<float>(scale),
                               1, b.dtype, numbers.mutable_data_ptr(), place.stream()));
  return add(Matrix(numbers));
}

// Bytes for what is taken of X; where more is needed, features are taken in parts.
constexpr int64_t kSampleMemory = 128 << 20;

Tensor sampled_grad_(Tensor grad, Tensor a, Tensor b, std::optional<Tensor> a_scale, Tensor counter,
                     double fraction, int64_t block, double alpha, int64_t seed) {
  check_sampled_grad(grad, a, b, a_scale, counter, block);
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
  args.counter = read_memory_of<int64_t>(step);
  args.seed = seed;
  args.block = block;
  args.fraction = fraction;
  args.alpha = alpha;
  args.grad = grad.mutable_data_ptr();
  args.grad_dtype = dtype_code(grad);
  args.feature_stride = grad.stride(wide_a ? 1 : 0);
  args.column_stride = grad.stride(wide_a ? 0 : 1);
  args.memory = kSampleMemory;
  if (fraction >= 1 && a_in.rows > 0 && add_whole(grad, a_in, b_in, scale, alpha, place))
    args.tokens = 0;  // nothing is left but to say that all was taken

  Tensor stats = new_tensor(b, {2}, ScalarType::Float);
  Tensor scratch = new_scratch(b, molegrad_sampled_scratch(&args));
  check_launch(kOp, molegrad_sampled_grad(&args, memory_of<float>(stats),
                                          scratch.mutable_data_ptr(), place.stream()));
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) { m.impl("sampled_grad_", TORCH_BOX(&sampled_grad_)); }

}  // namespace molegrad::cuda
#endif
