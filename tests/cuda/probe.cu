// Kernels that show what the emulation does with each instruction.
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace molegrad::cuda {
namespace {

// out[i] = the sum of what threads i + 1, i + 2, … (cyclically, `rounds` of them) wrote.
__global__ void neighbours(int rounds, int* out) {
  __shared__ int values[256];
  const int i = threadIdx.x, count = blockDim.x;
  int sum = 0;
  for (int round = 1; round <= rounds; ++round) {
    values[i] = i * round;
    __syncthreads();
    sum += values[(i + round) % count];
    __syncthreads();
  }
  if (i % 3 == 0) return;  // the barrier below does not wait for these
  __syncthreads();
  out[blockIdx.x * count + i] = sum;
}

__global__ void shuffles(int* out, uint32_t* votes, double* sums) {
  const int lane = threadIdx.x % 32, n = blockDim.x;
  int* mine = out + threadIdx.x;
  const int x = 100 + threadIdx.x;
  mine[0] = __shfl_sync(kWholeWarp, x, (lane * 7 + 3) % 32);
  mine[n] = __shfl_xor_sync(kWholeWarp, x, 5);
  mine[2 * n] = __shfl_up_sync(kWholeWarp, x, 3);
  mine[3 * n] = __shfl_down_sync(kWholeWarp, x, 4);
  mine[4 * n] = __shfl_sync(kWholeWarp, x, 2, 8);
  mine[5 * n] = __any_sync(kWholeWarp, lane == 40);
  votes[threadIdx.x] = __ballot_sync(kWholeWarp, x % 3 == 0);
  sums[threadIdx.x] = warp_sum(static_cast<double>(x));
  if (lane < 16) mine[5 * n] += __shfl_xor_sync(0xffffu, x, 1);
}

// D = A B with A (16, K) and B (K, 8), row by row, the fragments by the tables of the PTX ISA.
__global__ void product_16(int code, const uint16_t* a, const uint16_t* b, float* d) {
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  uint32_t x[4], y[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = group + (i < 2 || (i >= 4 && i < 6) ? 0 : 8);
    const int column = in_group * 2 + (i < 4 ? 0 : 8);
    x[i / 2] = a[row * 16 + column] | static_cast<uint32_t>(a[row * 16 + column + 1]) << 16;
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = in_group * 2 + (i < 2 ? 0 : 8);
    y[i / 2] = b[row * 8 + group] | static_cast<uint32_t>(b[(row + 1) * 8 + group]) << 16;
  }
  float c[4] = {1, 1, 1, 1};
  if (code == 2) mma_bf16(c, x, y);
  if (code == 3) mma_f16(c, x, y);
  for (int i = 0; i < 4; ++i) d[(group + (i < 2 ? 0 : 8)) * 8 + in_group * 2 + (i & 1)] = c[i];
}

__global__ void product_tf32(bool rounded, const float* a, const float* b, float* d) {
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  const auto bits = [&](float x) { return rounded ? to_tf32(x) : to_bits(x); };
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i)
    x[i] = bits(a[(group + (i == 0 || i == 2 ? 0 : 8)) * 8 + in_group + (i < 2 ? 0 : 4)]);
  for (int i = 0; i < 2; ++i) y[i] = bits(b[(in_group + (i == 0 ? 0 : 4)) * 8 + group]);
  float c[4] = {1, 1, 1, 1};
  mma_tf32(c, x, y);
  for (int i = 0; i < 4; ++i) d[(group + (i < 2 ? 0 : 8)) * 8 + in_group * 2 + (i & 1)] = c[i];
}

// The same product from shared memory, by the matrices that load_matrices gives: B (16, 8) lies by
// rows, as does A, so that it has to be transposed. B's second matrix pair is not used.
__global__ void product_loaded(const uint16_t* a, const uint16_t* b, float* d) {
  MOLEGRAD_SHARED(shared);
  auto* left = reinterpret_cast<uint16_t*>(shared);
  auto* right = left + 256;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  __syncwarp();
  uint32_t x[4], y[4];
  load_matrices(x, left + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_transposed(y, right + lane % 16 * 8);
  float c[4] = {};
  const uint32_t used[2] = {y[0], y[1]};
  mma_bf16(c, x, used);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + (i < 2 ? 0 : 8)) * 8 + lane % 4 * 2 + (i & 1)] = c[i];
}

// out: what shared memory holds before and after the wait for each of two copies.
__global__ void copies(const float4* from, float* out) {
  MOLEGRAD_SHARED(shared);
  auto* to = reinterpret_cast<float4*>(shared);
  const int i = threadIdx.x, n = blockDim.x;
  to[i] = make_float4(-1, 0, 0, 0);
  to[n + i] = make_float4(-2, 0, 0, 0);
  copy_async(to + i, from + i, true);
  copies_commit();
  copy_async(to + n + i, from + n + i, i % 2 == 0);
  copies_commit();
  out[i] = to[i].x;
  copies_wait<1>();
  out[n + i] = to[i].x;
  out[2 * n + i] = to[n + i].x;
  copies_wait<0>();
  out[3 * n + i] = to[n + i].x;
}

__global__ void stuck(int kind) {
  if (kind == 0 && threadIdx.x == 0)
    for (;;) __shfl_xor_sync(kWholeWarp, 1, 1);
  if (kind == 1 && threadIdx.x % 32 < 16) __ballot_sync(kWholeWarp, 1);
  if (kind == 1 && threadIdx.x % 32 >= 16) __shfl_xor_sync(kWholeWarp, 1, 1);
  if (kind == 2) __shfl_xor_sync(threadIdx.x % 2 == 0 ? 0x55555555u : kWholeWarp, 1, 2);
  if (kind == 3) __shfl_xor_sync(0xffffu, 1, 1);
  __syncthreads();
}

// The number conversions: out (4, n) bits.
__global__ void conversions(const float* x, uint32_t* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    out[i] = pack_bf16(x[i], -x[i]);
    out[n + i] = pack_f16(x[i], -x[i]);
    out[2 * n + i] = pack_e4m3(x[i], -x[i]);
    out[3 * n + i] = pack_e5m2(x[i], -x[i]);
    out[4 * n + i] = to_tf32(x[i]);
    out[5 * n + i] = e4m3_to_f16(static_cast<uint16_t>(i));
    out[6 * n + i] = to_bits(f16_to_float(static_cast<uint16_t>(i)));
  }
}

}  // namespace
}  // namespace molegrad::cuda

using namespace molegrad::cuda;

extern "C" {

int probe_neighbours(int blocks, int threads, int rounds, int* out, cudaStream_t stream) {
  return launch(neighbours, dim3(blocks), dim3(threads), 0, stream, rounds, out);
}
int probe_shuffles(int threads, int* out, uint32_t* votes, double* sums, cudaStream_t stream) {
  return launch(shuffles, dim3(1), dim3(threads), 0, stream, out, votes, sums);
}
int probe_product_16(int code, const uint16_t* a, const uint16_t* b, float* d,
                     cudaStream_t stream) {
  return launch(product_16, dim3(1), dim3(32), 0, stream, code, a, b, d);
}
int probe_product_tf32(int rounded, const float* a, const float* b, float* d, cudaStream_t stream) {
  return launch(product_tf32, dim3(1), dim3(32), 0, stream, rounded != 0, a, b, d);
}
int probe_product_loaded(const uint16_t* a, const uint16_t* b, float* d, cudaStream_t stream) {
  return launch(product_loaded, dim3(1), dim3(32), 1024, stream, a, b, d);
}
int probe_copies(int threads, const float4* from, float* out, cudaStream_t stream) {
  return launch(copies, dim3(1), dim3(threads), threads * 2 * sizeof(float4), stream, from, out);
}
int probe_stuck(int kind, cudaStream_t stream) {
  return launch(stuck, dim3(1), dim3(32), 0, stream, kind);
}
int probe_conversions(const float* x, uint32_t* out, int n, cudaStream_t stream) {
  return launch(conversions, dim3(1), dim3(64), 0, stream, x, out, n);
}
}
