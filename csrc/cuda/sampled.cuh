// The sample of sampled_grad_: which tokens are taken for which features of X, and what X̃ is there.
//
// Bound by memory. X (T, F) is read once for the squares of its blocks (84 MB in bf16 at 8192 x
// 5120: 28 us at 3 TB/s), Z once for its norms (21 MB, 7 us), and what is taken, a quarter say,
// once more to be weighted and written where sampled_product.cuh finds it. The threshold is one
// block's work: its scores (41,000 at blocks of 64) stay in registers and shared memory during nine
// sums, a microsecond each. Everything is summed in a fixed order.
#pragma once

#include "elements.cuh"
#include "random.cuh"

namespace molegrad::cuda {

constexpr int kSampleThreads = 256;
// Features that a thread weighs, tokens whose marks are one word.
constexpr int kStrip = 8, kWordTokens = 32, kWarpFeatures = 32 * kStrip;

template <typename T>
struct Computed {
  using Type = float;
};
template <>
struct Computed<double> {
  using Type = double;
};

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// Rows of an operand, each times its scale; null is 1.
template <typename T, typename C>
struct SampledRows {
  using Element = T;
  const T* data;
  int64_t ld;
  const C* scale;
  int64_t tokens, columns;
  bool packed;  // rows can be read in packs of kStrip elements
};

// Elements `first` to first + kStrip of a row; zeros beyond its end.
template <typename T, typename C>
__device__ __forceinline__ void load_strip(const SampledRows<T, C>& x, int64_t token, int64_t first,
                                           C (&out)[kStrip]) {
  constexpr int kCount = sizeof(T) * kStrip > 16 ? 16 / sizeof(T) : kStrip;
  const T* from = x.data + token * x.ld + first;
  if (x.packed && first + kStrip <= x.columns) {
#pragma unroll
    for (int i = 0; i < kStrip; i += kCount) {
      const auto pack = load_pack<kCount>(from + i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[i + j] = widen(pack.at[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStrip; ++i) out[i] = first + i < x.columns ? widen(from[i]) : C(0);
  }
  if (x.scale != nullptr) {
    const C factor = x.scale[token];
#pragma unroll
    for (int i = 0; i < kStrip; ++i) out[i] *= factor;
  }
}

// ---- squares of blocks, norms of tokens ---------------------------------------------------------

// squares (T, pairs): ‖x_tβ‖². `team` lanes, a power of two, share a block; they take kCount
// elements at a time.
template <typename T, typename C, int kCount>
__global__ void __launch_bounds__(kSampleThreads)
    block_squares_kernel(SampledRows<T, C> x, int64_t block, int64_t pairs, int team, C* squares) {
  constexpr int kTokens = 4;  // at a time, so that enough is under way
  const int lane = threadIdx.x % team;
  const int64_t beta = (static_cast<int64_t>(blockIdx.x) * kSampleThreads + threadIdx.x) / team;
  const int64_t begin = beta * block, end = min(begin + block, x.columns);
  for (int64_t token = blockIdx.y * static_cast<int64_t>(kTokens); token < x.tokens;
       token += gridDim.y * static_cast<int64_t>(kTokens)) {
    C sums[kTokens] = {};
    for (int64_t f = begin + lane * kCount; f < end; f += team * kCount) {
      Pack<T, kCount> packs[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
        if (token + i < x.tokens) packs[i] = load_pack<kCount>(x.data + (token + i) * x.ld + f);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (token + i >= x.tokens) continue;
        const C factor = x.scale != nullptr ? x.scale[token + i] : C(1);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const C value = widen(packs[i].at[j]) * factor;
          sums[i] += value * value;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      for (int offset = team / 2; offset > 0; offset /= 2)
        sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], offset);
      if (lane == 0 && begin < end && token + i < x.tokens)
        squares[(token + i) * pairs + beta] = sums[i];
    }
  }
}

// norms (T): ‖z_t‖², and copy (T, width) of Z where it is asked for, with zeros up to the width,
// the columns in whole strips. A warp a token.
template <typename T, typename C, typename V>
__global__ void __launch_bounds__(kSampleThreads)
    tokens_kernel(SampledRows<T, C> z, C* norms, V* copy, int64_t width) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kSampleThreads / 32) + threadIdx.x / 32;
  if (token >= z.tokens) return;
  C sum = 0;
  for (int64_t first = lane * kStrip; first < z.columns; first += 32 * kStrip) {
    C values[kStrip];
    load_strip(z, token, first, values);
    Pack<V, kStrip> out;
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      sum += values[i] * values[i];
      narrow(values[i], out.at[i]);
    }
    if (copy != nullptr) *reinterpret_cast<Pack<V, kStrip>*>(copy + token * width + first) = out;
  }
  sum = warp_sum(sum);
  if (lane == 0 && norms != nullptr) norms[token] = sum;
}

// ---- the threshold ------------------------------------------------------------------------------

// Scores that a thread keeps in registers and in shared memory; more are computed in every step.
constexpr int kThresholdThreads = 1024, kThresholdSteps = 8, kHeldScores = 32;
constexpr int kStoredBytes = 64 * kThresholdThreads;

// Of the whole block, the same for every thread; `scratch` holds 32 numbers.
template <typename C>
__device__ __forceinline__ C block_sum(C x, C* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  x = warp_sum(lane < warps ? scratch[lane] : C(0));
  __syncthreads();
  return x;
}

template <typename C>
struct ThresholdJob {
  const C *squares, *norms;
  int64_t rows, stride, pairs;  // every stride-th token
  C share, tiny;
  C *limits, *sums;  // (steps + 2): τ of each step, the last is the result; (steps + 1, blocks)
};

// The scores of a thread, one after the other, without a division for each.
template <typename C>
struct Scores {
  const ThresholdJob<C>& job;
  int64_t row, pair, row_step, pair_step;

  __device__ __forceinline__ Scores(const ThresholdJob<C>& job, int64_t start, int64_t step)
      : job(job),
        row(start / job.pairs),
        pair(start % job.pairs),
        row_step(step / job.pairs),
        pair_step(step % job.pairs) {}
  __device__ __forceinline__ bool left() const { return row < job.rows; }
  __device__ __forceinline__ C next() {  // zero when none is left
    const int64_t token = row * job.stride;
    const C score = left() ? root(job.squares[token * job.pairs + pair] * job.norms[token]) : C(0);
    row += row_step;
    pair += pair_step;
    if (pair >= job.pairs) {
      pair -= job.pairs;
      ++row;
    }
    return score;
  }
};

// Steps first to last of τ ← τ mean(min(1, score / τ)) / share, clamped to tenths and tenfolds.
// Step 0 sums the scores, step kThresholdSteps + 1 only keeps the result. One block can take all of
// them; of several blocks, every step needs a launch.
template <typename C>
__global__ void __launch_bounds__(kThresholdThreads)
    threshold_kernel(ThresholdJob<C> job, int first, int last) {
  constexpr int kHeld = sizeof(C) == 8 ? kHeldScores / 4 : kHeldScores;
  constexpr int kStored = kStoredBytes / kThresholdThreads / static_cast<int>(sizeof(C));
  __shared__ C scratch[32];
  MOLEGRAD_SHARED(shared);
  C* stored = reinterpret_cast<C*>(shared) + threadIdx.x;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThresholdThreads + threadIdx.x;
  Scores<C> scores(job, start, static_cast<int64_t>(gridDim.x) * kThresholdThreads);
  C held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = scores.next();
#pragma unroll 8
  for (int i = 0; i < kStored; ++i) stored[i * kThresholdThreads] = scores.next();

  for (int step = first; step <= last; ++step) {
    C limit = 0;
    if (step > 0) {
      C mean = 0;
      for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kThresholdThreads)
        mean += job.sums[(step - 1) * gridDim.x + i];
      mean = block_sum(mean, scratch) / static_cast<C>(job.rows * job.pairs);
      if (step == 1) {
        limit = mean + job.tiny;
      } else {
        const C before = job.limits[step - 1], ratio = mean / before / job.share;
        limit = before * (ratio < C(0.1) ? C(0.1) : ratio > C(10) ? C(10) : ratio);
      }
      if (step > kThresholdSteps && limit < job.tiny) limit = job.tiny;
      if (start == 0) job.limits[step] = limit;
    }
    if (step > kThresholdSteps) return;
    const auto clipped = [&](C x) { return step > 0 && x > limit ? limit : x; };
    C sum = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) sum += clipped(held[i]);
#pragma unroll 8
    for (int i = 0; i < kStored; ++i) sum += clipped(stored[i * kThresholdThreads]);
#pragma unroll 4
    for (Scores<C> rest = scores; rest.left();) sum += clipped(rest.next());
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) job.sums[step * gridDim.x + blockIdx.x] = sum;
    __syncthreads();
  }
}

// ---- the sample ---------------------------------------------------------------------------------

template <typename T, typename V>
struct SampleJob {
  using C = typename Computed<V>::Type;
  SampledRows<T, C> x;
  int64_t block, pairs;
  const C *squares, *norms, *threshold;  // null: all is taken
  const int64_t* counter;
  int64_t seed;
  // Of features first_feature on, by groups of group_features: a mark for each token at which
  // anything of the group is taken, and there what is taken, weighted: values (group, T, features).
  int64_t first_feature, groups;
  int group_features;
  int64_t words;
  uint32_t* marks;  // (group, words)
  V* values;
  double* sums;       // (·, 3): pairs taken, noise and energy of each warp
  int64_t sum_tiles;  // in the whole of X
};

template <typename C>
struct SampleSums {
  C taken = 0, noise = 0, energy = 0;
};

// The weight of a pair: 0 where it is not taken.
template <typename C>
__device__ __forceinline__ C pair_weight(C score, C threshold, uint64_t stream, int64_t index,
                                         bool counts, SampleSums<C>* sums) {
  const C ratio = score / threshold;
  const bool sure = ratio >= C(1);
  const bool take =
      static_cast<C>(static_cast<int>(random_bits(stream, index))) * C(0x1p-24) < ratio;
  if (counts) {
    sums->taken += take || sure ? C(1) : C(0);
    sums->noise += sure ? C(0) : ratio - ratio * ratio;
    sums->energy += ratio * ratio;
  }
  // A score that is no number makes its block of the gradient NaN.
  return sure ? C(1) : take || ratio != ratio ? C(1) / ratio : C(0);
}

__device__ __forceinline__ void narrow_weighted(float x, bool, float& out) { out = x; }
__device__ __forceinline__ void narrow_weighted(double x, bool, double& out) { out = x; }
__device__ __forceinline__ void narrow_weighted(float x, bool, BFloat16& out) { narrow(x, out); }
// A weight is no reason to overflow.
__device__ __forceinline__ void narrow_weighted(float x, bool weighted, Float16& out) {
  constexpr float kMost = 65504.0f;
  narrow(!weighted ? x : x > kMost ? kMost : x < -kMost ? -kMost : x, out);
}

// How features lie in blocks: any way, no strip in two blocks, or eight strips in each part of one,
// which then share the work on its pairs.
enum class Blocks { kAny, kStrips, kTeams };
constexpr int kTeam = 8;

// What of a pair its strip has to know.
template <typename T, typename V>
struct PairWeights {
  using C = typename Computed<V>::Type;
  const SampleJob<T, V>& job;
  bool sampling;
  C threshold;
  uint64_t stream;
  SampleSums<C> sums;

  __device__ __forceinline__ explicit PairWeights(const SampleJob<T, V>& job)
      : job(job), sampling(job.threshold != nullptr) {
    threshold = sampling ? *job.threshold : C(1);
    stream = sampling ? random_stream(*job.counter, job.seed) : 0;
  }
  // `counts`: this is the thread that adds the pair to the sums.
  __device__ __forceinline__ C operator()(int64_t token, int64_t pair, bool counts) {
    if (!sampling) return C(1);
    const C score = root(job.squares[token * job.pairs + pair] * job.norms[token]);
    return pair_weight(score, threshold, stream, token * job.pairs + pair, counts, &sums);
  }
};

// A warp takes kWordTokens tokens and 32 strips of features, kTokens tokens at a time.
template <typename T, typename V, Blocks kBlocks>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleJob<T, V> job) {
  using C = typename SampleJob<T, V>::C;
  constexpr int kTokens = kBlocks == Blocks::kAny ? 1 : 4;
  constexpr int kWeights = kBlocks == Blocks::kAny ? kStrip : 1;
  const int lane = threadIdx.x % 32, strips = job.group_features / kStrip;  // of a group
  const int64_t tile = blockIdx.y * (kSampleThreads / 32) + threadIdx.x / 32;
  const int64_t word = blockIdx.x, first_token = word * kWordTokens;
  if (tile * kWarpFeatures >= job.groups * job.group_features) return;
  const int64_t local = tile * kWarpFeatures + lane * kStrip, feature = job.first_feature + local;
  const int64_t group = local / job.group_features, within = local % job.group_features;
  const bool exists = group < job.groups;
  const int64_t first_pair = feature / job.block;
  const uint32_t of_group = (strips == 32 ? kWholeWarp : (1u << strips) - 1)
                            << lane / strips * strips;
  PairWeights<T, V> weigh(job);
  uint32_t marks = 0;
  C shared_weight = 0;

  for (int i = 0; i < kWordTokens; i += kTokens) {
    C weights[kTokens][kWeights];
    if (kBlocks == Blocks::kTeams && i % kTeam == 0) {
      const int64_t token = first_token + i + lane % kTeam, begin = feature - lane % kTeam * kStrip;
      shared_weight = begin < job.x.columns && token < job.x.tokens
                          ? weigh(token, first_pair, begin == first_pair * job.block)
                          : C(0);
    }
    bool taken[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int64_t token = first_token + i + k;
      bool any = false;
      int64_t pair = first_pair, next = (first_pair + 1) * job.block;
#pragma unroll
      for (int j = 0; j < kWeights; ++j) {
        C weight = 0;
        if (kBlocks == Blocks::kTeams) {
          weight = __shfl_sync(kWholeWarp, shared_weight, i % kTeam + k, kTeam);
        } else if (token < job.x.tokens && feature + j < job.x.columns) {
          if (j > 0 && feature + j == next) {
            ++pair;
            next += job.block;
          }
          if (j == 0 || feature + j == pair * job.block)
            weight = weigh(token, pair, feature + j == pair * job.block);
          else
            weight = weights[k][j > 0 ? j - 1 : 0];
        }
        weights[k][j] = weight;
        any = any || weight != C(0);
      }
      taken[k] = (__ballot_sync(kWholeWarp, any) & of_group) != 0;
      marks |= static_cast<uint32_t>(taken[k]) << (i + k);
    }
    C x[kTokens][kStrip];
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
      if (taken[k] && exists) load_strip(job.x, first_token + i + k, feature, x[k]);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (!taken[k] || !exists) continue;
      Pack<V, kStrip> out;
#pragma unroll
      for (int j = 0; j < kStrip; ++j) {
        const C weight = weights[k][kWeights == 1 ? 0 : j];
        // What is not taken may be infinite: it is zero all the same.
        const C value = weight == C(0) ? C(0) : x[k][j] * weight;
        narrow_weighted(value, weight != C(1), out.at[j]);
      }
      const int64_t row = group * job.x.tokens + first_token + i + k;
      *reinterpret_cast<Pack<V, kStrip>*>(job.values + row * job.group_features + within) = out;
    }
  }
  if (exists && lane % strips == 0) job.marks[group * job.words + word] = marks;
  if (!weigh.sampling) return;
  const int64_t at = word * job.sum_tiles + job.first_feature / kWarpFeatures + tile;
  const double totals[] = {warp_sum(static_cast<double>(weigh.sums.taken)),
                           warp_sum(static_cast<double>(weigh.sums.noise)),
                           warp_sum(static_cast<double>(weigh.sums.energy))};
  for (int i = 0; i < 3; ++i)
    if (lane == 0) job.sums[3 * at + i] = totals[i];
}

// stats (2) from `count` triples: the share of `total` pairs, noise over energy.
__global__ void __launch_bounds__(kThresholdThreads)
    statistics_kernel(const double* sums, int64_t count, double total, bool sampling,
                      float* stats) {
  __shared__ double scratch[32];
  double parts[3] = {};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    for (int j = 0; j < 3; ++j) parts[j] += sums[3 * i + j];
  for (int j = 0; j < 3; ++j) parts[j] = block_sum(parts[j], scratch);
  if (threadIdx.x == 0) {
    stats[0] = !sampling ? 1.0f : total > 0 ? static_cast<float>(parts[0] / total) : 0.0f;
    stats[1] = parts[2] > 0 ? static_cast<float>(parts[1] / parts[2]) : 0.0f;
  }
}

}  // namespace molegrad::cuda
