// weight <- keep weight + alpha U Wᵀ for one or many weights of one shape, in place.
//
// Reading and writing the weights is the floor: 24 of 768 x 3072 in bfloat16 are 226 MB, 75 us at
// 3 TB/s; in float32 twice that. The product at rank 64 (momentum's bases) is 7.2 GFLOP, 200 us of
// float32 FMA at best, so it runs on tensor cores: float32 numbers as two of tf32 each, three
// products of four (the fourth is below float32's rounding). Tensor cores round sums towards zero;
// eight terms are all they add here, the sums are float32's own (Ootomo, Yokota 2022). That leaves
// the error of a product in float32, about 75 us at 60% of the rate that mma has on an H100.
#include "random.cuh"
#include "tall.h"
#include "tensors.h"

namespace molegrad::cuda {

constexpr int kUpdateRows = 64, kUpdateCols = 128, kUpdateLd = kTile + 4;
constexpr int kProductLd = kUpdateCols + 4;
constexpr int kMany = 64;  // weights of a launch: they are passed by value

// Weights (rows, cols) and what identifies them: their number in u and w.
struct Weights {
  void* data[kMany];
  int64_t ld[kMany];
  int layer[kMany];
};

struct Update {
  TallBatch u, w;  // (layers, rows, k), (layers, cols, k)
  int64_t rows, cols, k;
  double keep, alpha;
  // The random number of element (r, c) of layer l is number l size + r row_step + c col_step.
  int64_t size, row_step, col_step;
  const int64_t* counter;
  int64_t seed;
};

struct UpdateTiles {
  alignas(16) float u[kUpdateRows][kUpdateLd];
  alignas(16) float w[kUpdateCols][kUpdateLd];
};
constexpr int kUpdateShared = kUpdateRows * kProductLd * 4;
static_assert(sizeof(UpdateTiles) <= kUpdateShared, "the product takes the place of the tiles");

struct UpdateTile {
  int64_t row, col;
  int which;
};

template <int kRows, int kCols>
__device__ __forceinline__ UpdateTile update_tile(const Update& p) {
  const int64_t down = (p.rows + kRows - 1) / kRows, across = (p.cols + kCols - 1) / kCols;
  const int64_t tile = blockIdx.x % (down * across);
  return {tile / across * kRows, tile % across * kCols,
          static_cast<int>(blockIdx.x / (down * across))};
}

// x = high + low, but for what is below float32's rounding.
struct Split {
  uint32_t high, low;
};
__device__ __forceinline__ Split split_tf32(float x) {
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - from_bits(high))};
}

// To one of the two neighbours, the farther one with the probability that makes the mean exact.
__device__ __forceinline__ BFloat16 round_randomly(float x, uint64_t stream, int64_t index) {
  const uint32_t bits = to_bits(x);
  BFloat16 rounded;
  if ((bits & 0x7f800000u) == 0x7f800000u)
    narrow(x, rounded);
  else
    rounded.bits = static_cast<uint16_t>((bits + (random_bits(stream, index) >> 8)) >> 16);
  return rounded;
}

// The product's tile, to shared memory: warps 2 x 4, each 32 x 32 in fragments of 16 x 8.
__device__ __forceinline__ void update_product(const Update& p, const UpdateTile& at, int layer,
                                               unsigned char* memory) {
  auto& tiles = *reinterpret_cast<UpdateTiles*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 4 * 32 + lane / 4, col = warp % 4 * 32 + lane / 4, inner = lane % 4;
  float sums[2][4][4] = {};
  for (int64_t slab = 0; slab < p.k; slab += kTile) {
    load_tile<float, kUpdateRows, kUpdateLd>(&tiles.u[0][0], p.u, layer, at.row, p.rows, slab, p.k);
    load_tile<float, kUpdateCols, kUpdateLd>(&tiles.w[0][0], p.w, layer, at.col, p.cols, slab, p.k);
    __syncthreads();
    const int depth = p.k - slab < kTile ? static_cast<int>(p.k - slab) : kTile;
    for (int l = inner; l < depth + inner; l += 8) {
      Split a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          a[i][e] = split_tf32(tiles.u[row + 16 * i + e % 2 * 8][l + e / 2 * 4]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Split b0 = split_tf32(tiles.w[col + 8 * j][l]),
                    b1 = split_tf32(tiles.w[col + 8 * j][l + 4]);
        const uint32_t high[2] = {b0.high, b1.high}, low[2] = {b0.low, b1.low};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t a_high[4] = {a[i][0].high, a[i][1].high, a[i][2].high, a[i][3].high};
          const uint32_t a_low[4] = {a[i][0].low, a[i][1].low, a[i][2].low, a[i][3].low};
          float part[4] = {};
          mma_tf32(part, a_low, high);
          mma_tf32(part, a_high, low);
          mma_tf32(part, a_high, high);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] += part[e];
        }
      }
    }
    __syncthreads();
  }
  float* product = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        product[(row + 16 * i + e / 2 * 8) * kProductLd + warp % 4 * 32 + 8 * j + 2 * inner +
                e % 2] = sums[i][j][e];
  __syncthreads();
}

template <typename T, bool kStochastic>
__global__ void __launch_bounds__(kTallThreads, 2) update_kernel(Update p, Weights weights) {
  MOLEGRAD_SHARED(memory);
  constexpr int kCount = 16 / sizeof(T), kAcross = kUpdateCols / kCount;
  constexpr int kDown = kTallThreads / kAcross;
  const UpdateTile at = update_tile<kUpdateRows, kUpdateCols>(p);
  const int layer = weights.layer[at.which];
  update_product(p, at, layer, memory);
  const float* product = reinterpret_cast<const float*>(memory);
  const float keep = static_cast<float>(p.keep), alpha = static_cast<float>(p.alpha);
  const uint64_t stream = kStochastic ? random_stream(*p.counter, p.seed) : 0;
  const int64_t ld = weights.ld[at.which];
  T* weight = static_cast<T*>(weights.data[at.which]) + at.row * ld + at.col;
  const bool in_packs = reinterpret_cast<uintptr_t>(weight) % 16 == 0 && ld % kCount == 0;
  const auto updated = [&](T old, int r, int c) {
    const float value = keep * widen(old) + alpha * product[r * kProductLd + c];
    T rounded;
    if constexpr (kStochastic)
      rounded = round_randomly(
          value, stream, layer * p.size + (at.row + r) * p.row_step + (at.col + c) * p.col_step);
    else
      narrow(value, rounded);
    return rounded;
  };
  const int c = threadIdx.x % kAcross * kCount;
#pragma unroll 4
  for (int r = threadIdx.x / kAcross; r < kUpdateRows; r += kDown) {
    if (at.row + r >= p.rows) break;
    T* here = weight + r * ld + c;
    if (in_packs && at.col + c + kCount <= p.cols) {
      Pack<T, kCount> pack = load_pack<kCount>(here);
#pragma unroll
      for (int e = 0; e < kCount; ++e) pack.at[e] = updated(pack.at[e], r, c + e);
      store_pack(here, pack);
    } else {
      for (int e = 0; e < kCount; ++e)
        if (at.col + c + e < p.cols) here[e] = updated(here[e], r, c + e);
    }
  }
}

// float64: four elements for each thread.
__global__ void __launch_bounds__(kTallThreads) update_double_kernel(Update p, Weights weights) {
  __shared__ double u[kTile][kTile + 1], w[kTile][kTile + 1];
  const UpdateTile at = update_tile<kTile, kTile>(p);
  const int layer = weights.layer[at.which], c = threadIdx.x % kTile, first = threadIdx.x / kTile;
  double sums[4] = {};
  for (int64_t slab = 0; slab < p.k; slab += kTile) {
    load_tile<double, kTile, kTile + 1>(&u[0][0], p.u, layer, at.row, p.rows, slab, p.k);
    load_tile<double, kTile, kTile + 1>(&w[0][0], p.w, layer, at.col, p.cols, slab, p.k);
    __syncthreads();
    for (int l = 0; l < kTile; ++l)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += u[first + 8 * i][l] * w[c][l];
    __syncthreads();
  }
  const int64_t ld = weights.ld[at.which];
  double* weight = static_cast<double*>(weights.data[at.which]) + at.row * ld + at.col;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = first + 8 * i;
    if (at.row + r < p.rows && at.col + c < p.cols)
      weight[r * ld + c] = p.keep * weight[r * ld + c] + p.alpha * sums[i];
  }
}

}  // namespace molegrad::cuda

using namespace molegrad::cuda;

namespace {

cudaError_t launch_update(const Update& p, const Weights& weights, int count, int dtype,
                          bool stochastic, cudaStream_t stream) {
  const auto grid = [&](int64_t rows, int64_t cols) {
    return grid_of(count * ceil_div(p.rows, rows) * ceil_div(p.cols, cols));
  };
  const dim3 block(kTallThreads), tiles = grid(kUpdateRows, kUpdateCols);
  if (stochastic)
    return launch(update_kernel<BFloat16, true>, tiles, block, kUpdateShared, stream, p, weights);
  switch (dtype) {
    case 1:
      return launch(update_double_kernel, grid(kTile, kTile), block, 0, stream, p, weights);
    case 2:
      return launch(update_kernel<BFloat16, false>, tiles, block, kUpdateShared, stream, p,
                    weights);
    case 3:
      return launch(update_kernel<Float16, false>, tiles, block, kUpdateShared, stream, p, weights);
    default:
      return launch(update_kernel<float, false>, tiles, block, kUpdateShared, stream, p, weights);
  }
}

}  // namespace

// `count` weights at once; the arrays lie on the host. Weight i takes number layers[i] of u
// (layers, rows, k) and w (layers, cols, k), contiguous but for `ld`. `stochastic`, for bfloat16:
// rounded up or down at random, element (r, c) by the random number layers[i] rows cols + r
// row_step + c col_step; `counter` lies on the device.
extern "C" int molegrad_lowrank_update_many(
    void* const* weights, const int64_t* lds, const int64_t* layers, int64_t count, int dtype,
    const void* u, int u_dtype, int64_t u_ld, const void* w, int w_dtype, int64_t w_ld,
    int64_t rows, int64_t cols, int64_t k, double keep, double alpha, int stochastic,
    int64_t row_step, int64_t col_step, const int64_t* counter, int64_t seed, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const Update p{{u, u_dtype, u_ld, rows * u_ld},
                 {w, w_dtype, w_ld, cols * w_ld},
                 rows,
                 cols,
                 k,
                 keep,
                 alpha,
                 rows * cols,
                 row_step,
                 col_step,
                 counter,
                 seed};
  for (int64_t first = 0; first < count; first += kMany) {
    const int some = static_cast<int>(count - first < kMany ? count - first : kMany);
    Weights batch = {};
    for (int i = 0; i < some; ++i) {
      batch.data[i] = weights[first + i];
      batch.ld[i] = lds[first + i];
      batch.layer[i] = static_cast<int>(layers[first + i]);
    }
    const cudaError_t status = launch_update(p, batch, some, dtype, stochastic != 0, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
namespace molegrad::cuda {
namespace {

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
    count = read_memory_of<int64_t>(step);
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
  m.impl("lowrank_update_", TORCH_BOX(&lowrank_update_));
  m.impl("lowrank_update_many_", TORCH_BOX(&lowrank_update_many_));
}

}  // namespace molegrad::cuda
#endif
