// Sampled weight gradients, by the formulas of molegrad/ops/sampled.py: threshold, chunks of
// tokens, slices of features on threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tensors.h"

namespace molegrad::cpu {
namespace {

// As in molegrad/ops/sampled.py: tokens that decide the threshold, and its steps.
constexpr int64_t kThresholdTokens = 512, kThresholdSteps = 8;
// Features of a slice. Its sums, a panel of Z and its sample of X fit a per-core L2; a span of Z,
// several chunks of tokens, an L3. Properties of the machine are left out of this, so that they
// have no influence on the order of sums. Few features make smaller slices, for the threads' sake.
constexpr int64_t kSliceFeatures = 128, kSmallSlice = 32, kSlices = 8, kSpanBytes = 4 << 20;
// Memory for sums: more features are taken one range after the other.
constexpr int64_t kSumBytes = 32 << 20;
// Tokens that a thread takes at a time; scores of a partial sum; numbers of X worth a thread.
constexpr int64_t kTokens = 64, kScores = 1 << 16, kNumbers = 1 << 14;

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// τ with mean(min(1, score / τ)) ≈ fraction, from every (T / kThresholdTokens)-th token.
template <typename C>
C find_threshold(const SampledKernels<C>& kernels, const SampleRule<C>& rule, double fraction,
                 int64_t threads) {
  const int64_t stride = std::max<int64_t>(1, rule.x.rows / kThresholdTokens);
  const int64_t rows = ceil_div(rule.x.rows, stride), blocks = ceil_div(rule.x.cols, rule.block);
  const int64_t count = rows * blocks, pieces = ceil_div(count, kScores);
  const int64_t scratch_size = round_up(kernels.scores_scratch(rule), kAlignment);
  Buffer<C> scores(count), scratch(threads * scratch_size);
  for_each(threads, ceil_div(rows, kTokens), [&](int64_t part, int64_t i) {
    const int64_t begin = i * kTokens;
    kernels.scores(rule, begin * stride, stride, std::min(kTokens, rows - begin),
                   scores.data() + begin * blocks, scratch.data() + part * scratch_size);
  });
  std::vector<double> sums(pieces);
  const auto mean_clipped = [&](C limit) {
    // A few pieces are not worth waking threads for.
    for_each(std::min(threads, ceil_div(pieces, 8)), pieces, [&](int64_t, int64_t i) {
      sums[i] = kernels.clipped_sum(scores.data() + i * kScores,
                                    std::min(kScores, count - i * kScores), limit);
    });
    double sum = 0;
    for (const double x : sums) sum += x;
    return static_cast<C>(sum / static_cast<double>(count));
  };
  const C tiny = std::numeric_limits<C>::min();
  C threshold = mean_clipped(std::numeric_limits<C>::infinity()) + tiny;
  for (int64_t step = 0; step < kThresholdSteps; ++step) {
    const C expected = mean_clipped(threshold) / threshold;
    const C ratio = expected / static_cast<C>(fraction);
    threshold *= ratio < C(0.1) ? C(0.1) : ratio > C(10) ? C(10) : ratio;
  }
  return threshold < tiny ? tiny : threshold;
}

// Slices of X, ranges of slices whose sums are held at a time, spans of tokens.
struct Plan {
  int64_t blocks, slices, slice_blocks, slice_features, slice_rows;  // rows: features, padded
  int64_t range, span;                                               // slices, tokens

  Plan(int64_t features, int64_t block, int64_t row_bytes) : blocks(ceil_div(features, block)) {
    const int64_t share = round_up(ceil_div(features, kSlices), kGroup);
    slice_blocks =
        std::clamp<int64_t>(std::clamp(share, kSmallSlice, kSliceFeatures) / block, 1, blocks);
    slice_features = slice_blocks * block;
    slice_rows = round_up(slice_features, kGroup);
    slices = ceil_div(blocks, slice_blocks);
    range = std::clamp<int64_t>(kSumBytes / (slice_rows * row_bytes), 1, slices);
    span = std::max<int64_t>(1, kSpanBytes / (kChunk * row_bytes)) * kChunk;
  }
};

// What a thread needs to sample a slice of X and to multiply it.
template <typename C>
struct Workspace {
  Buffer<C> values, scratch;
  Buffer<uint64_t> masks;
  Buffer<int32_t> counts, starts, tokens, tile;
  Sample<C> sample;

  Workspace(int64_t groups, int64_t scratch_size)
      : values(groups * kGroup * kValues),
        scratch(scratch_size),
        masks(groups * kMasks * kGroup),
        counts(groups * kGroup),
        starts(groups * kMasks * kGroup),
        tokens(groups * kGroup / 2 * kValues),
        tile(groups),
        sample{values.data(), counts.data(), masks.data(),
               starts.data(), tokens.data(), tile.data()} {}
};

template <typename C>
struct SampledGrad {
  View x, z;  // (T, F), (T, d): the wider, the narrower operand
  const C *x_scale = nullptr, *z_scale = nullptr;  // (T), the factor of each row; null is 1
  int64_t counter = 0, seed = 0, block = 1;
  double fraction = 1, alpha = 1;
  // The gradient: its element of feature f of X and column c of Z.
  void* grad = nullptr;
  DType grad_dtype = DType::kFloat32;
  int64_t feature_stride = 0, column_stride = 0;
};

// grad += alpha Ĝ; stats (2): the share taken and the relative noise. The number of threads has no
// influence on the result. A score that is NaN makes its block of the gradient NaN.
template <typename C>
void add_sampled(const SampledGrad<C>& args, float* stats) {
  const int64_t tokens = args.x.rows, features = args.x.cols, d = args.z.cols;
  const bool sampling = args.fraction < 1 && tokens > 0;
  stats[0] = sampling ? 0.0f : 1.0f;
  stats[1] = 0.0f;
  if (tokens == 0 || features == 0 || d == 0) return;
  const KernelSet<C>& set = kernel_set<C>();
  const SampledKernels<C>& kernels = set.sampled;
  const int64_t threads = std::clamp<int64_t>(
      tokens * features / kNumbers, 1, std::max<int64_t>(torch::stable::get_num_threads(), 1));

  SampleRule<C> rule;
  rule.x = args.x;
  rule.z = args.z;
  rule.x_scale = args.x_scale;
  rule.z_scale = args.z_scale;
  rule.block = std::min(args.block, features);
  rule.sampling = sampling;
  rule.stream = random_stream(args.counter, args.seed);
  const double threshold =
      sampling ? static_cast<double>(find_threshold(kernels, rule, args.fraction, threads)) : 1.0;

  const WidePanels wide(set.lanes, d);
  const Plan plan(features, rule.block, wide.cols * static_cast<int64_t>(sizeof(C)));
  const int64_t span = std::min(plan.span, round_up(tokens, kChunk));
  const int64_t sum_rows = plan.range * plan.slice_rows;
  Buffer<C> panels(span * wide.cols), weights(span), sums(sum_rows * wide.cols);
  const int64_t scratch_size = std::max(wide.cols, kernels.scan_scratch(plan.slice_features));
  std::vector<std::unique_ptr<Workspace<C>>> workspaces;
  for (int64_t i = 0; i < threads; ++i)
    workspaces.push_back(std::make_unique<Workspace<C>>(plan.slice_rows / kGroup, scratch_size));
  std::vector<SampleSums> counts(plan.slices);

  // Tokens first, first + 1, … of Z, in a span that begins with token `begin`.
  const auto load_tokens = [&](int64_t begin, int64_t first, int64_t rows, Workspace<C>& work) {
    const int64_t at = first - begin;
    C* weight = weights.data() + at;
    kernels.pack_wide(rule, first, rows, at % kChunk,
                      panels.data() + at / kChunk * kChunk * wide.cols, weight,
                      work.scratch.data());
    for (int64_t i = 0; i < rows; ++i)
      if (std::isfinite(weight[i]))  // kept finite, as blocks of zeros are to stay zero
        weight[i] = static_cast<C>(
            std::min(weight[i] / threshold / threshold, double{std::numeric_limits<C>::max()}));
  };
  // A slice, whose sums begin with `row`, against a span of tokens.
  const auto add_slice = [&](int64_t begin, int64_t end, int64_t slice, int64_t row,
                             Workspace<C>& work) {
    const int64_t block = slice * plan.slice_blocks, feature = slice * plan.slice_features;
    const int64_t blocks = std::min(plan.slice_blocks, plan.blocks - block);
    const int64_t rows = std::min(plan.slice_features, features - feature);
    if (begin == 0) kernels.clear(sums.data(), sum_rows, d, row, row + plan.slice_rows);
    for (int64_t first = begin; first < end; first += kChunk) {
      kernels.scan(rule, first, std::min(kChunk, end - first), weights.data() + (first - begin),
                   block, blocks, work.sample, &counts[slice], work.scratch.data());
      kernels.multiply(work.sample, ceil_div(rows, kGroup),
                       panels.data() + (first - begin) * wide.cols, d, sums.data(), sum_rows, row);
    }
    if (end < tokens) return;
    AddJob<C> job;
    job.sums = sums.data();
    job.rows = sum_rows;
    job.d = d;
    job.alpha = static_cast<C>(args.alpha);
    job.target = args.grad;
    job.dtype = args.grad_dtype;
    job.offset = (feature - row) * args.feature_stride;
    job.row_stride = args.feature_stride;
    job.column_stride = args.column_stride;
    kernels.add(job, row, row + rows);
  };

  for (int64_t slice = 0; slice < plan.slices; slice += plan.range)
    for (int64_t begin = 0; begin < tokens; begin += span) {
      const int64_t end = std::min(tokens, begin + span);
      for_each(threads, ceil_div(end - begin, kTokens), [&](int64_t part, int64_t i) {
        const int64_t first = begin + i * kTokens;
        load_tokens(begin, first, std::min(kTokens, end - first), *workspaces[part]);
      });
      for_each(threads, std::min(plan.range, plan.slices - slice), [&](int64_t part, int64_t i) {
        add_slice(begin, end, slice + i, i * plan.slice_rows, *workspaces[part]);
      });
    }
  if (!sampling) return;
  SampleSums total;
  for (const SampleSums& x : counts) {
    total.taken += x.taken;
    total.noise += x.noise;
    total.energy += x.energy;
  }
  stats[0] = static_cast<float>(total.taken / static_cast<double>(tokens * plan.blocks));
  stats[1] = total.energy > 0 ? static_cast<float>(total.noise / total.energy) : 0.0f;
}

Tensor sampled_grad_(Tensor grad, Tensor a, Tensor b, std::optional<Tensor> a_scale, Tensor counter,
                     double fraction, int64_t block, double alpha, int64_t seed) {
  check_sampled_grad(grad, a, b, a_scale, counter, block);
  const Matrix a_in(a), b_in(b);
  const bool wide_a = a_in.cols > b_in.cols;
  Tensor scale = new_tensor(b, {a_scale.has_value() ? a_in.rows : 0}, acc_dtype(b));
  if (a_scale.has_value())
    torch::stable::copy_(scale, torch::stable::reshape(*a_scale, std::vector<int64_t>{a_in.rows}));
  Tensor stats = new_tensor(b, {2}, ScalarType::Float);
  with_compute_type(acc_dtype(b), [&](auto zero) {
    using C = decltype(zero);
    SampledGrad<C> args;
    args.x = view_of(wide_a ? a_in : b_in);
    args.z = view_of(wide_a ? b_in : a_in);
    if (a_scale.has_value()) (wide_a ? args.x_scale : args.z_scale) = read_memory_of<C>(scale);
    args.counter = *read_memory_of<int64_t>(counter);
    args.seed = seed;
    args.block = block;
    args.fraction = fraction;
    args.alpha = alpha;
    args.grad = grad.mutable_data_ptr();
    args.grad_dtype = static_cast<DType>(dtype_code(grad));
    args.feature_stride = grad.stride(wide_a ? 1 : 0);
    args.column_stride = grad.stride(wide_a ? 0 : 1);
    add_sampled<C>(args, memory_of<float>(stats));
  });
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) { m.impl("sampled_grad_", TORCH_BOX(&sampled_grad_)); }

}  // namespace molegrad::cpu
