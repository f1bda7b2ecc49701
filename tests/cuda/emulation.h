// CUDA C++ on the CPU, for tests: kernels of csrc/cuda and the functions that launch them compile
// as plain C++ with -DMOLEGRAD_EMULATED and this folder in the include path.
//
// The threads of a block are fibers that run one after the other until they wait for one another
// (a barrier, an instruction of the whole warp); blocks follow each other. Nothing runs at the same
// time, so what races on a GPU may pass here; MOLEGRAD_EMULATION_ORDER=reverse starts every round
// with the last thread, which many races do not survive. A block whose threads wait for something
// that cannot come ends the process with a message.
#pragma once

#include "emulation_block.h"

#define threadIdx (::emulation::current().thread)
#define blockIdx (::emulation::block().index)
#define blockDim (::emulation::block().size)
#define gridDim (::emulation::block().grid)
#define MOLEGRAD_SHARED(name) \
  unsigned char* const name = ::emulation::shared_memory(::emulation::block())

inline void __syncthreads() { emulation::sync_threads(); }
inline void __threadfence() {}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulation::exchange(mask, 0, [](auto) { return 0; });
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  const int lane = emulation::current().number % 32, base = lane / width * width;
  return emulation::exchange(mask, value, [&](auto slot) { return slot(base + from % width); });
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int with) {
  const int lane = emulation::current().number % 32;
  return emulation::exchange(mask, value, [&](auto slot) { return slot(lane ^ with); });
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by) {
  const int lane = emulation::current().number % 32, from = lane - static_cast<int>(by);
  return emulation::exchange(mask, value, [&](auto slot) { return slot(from < 0 ? lane : from); });
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by) {
  const int lane = emulation::current().number % 32, from = lane + static_cast<int>(by);
  return emulation::exchange(mask, value, [&](auto slot) { return slot(from > 31 ? lane : from); });
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return emulation::exchange(mask, predicate, [&](auto slot) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1u) != 0 && slot(lane) != 0) votes |= 1u << lane;
    return votes;
  });
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <typename T>
T atomicMax(T* p, T value) {
  const T old = *p;
  if (value > old) *p = value;
  return old;
}
template <typename T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::rint(x)); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = x | static_cast<uint64_t>(y) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T min(T x, T y) {
  return y < x ? y : x;
}
template <typename T>
T max(T x, T y) {
  return x < y ? y : x;
}

namespace molegrad::cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float f16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}
inline uint16_t float_to_f16(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7fffu;
  else if (magnitude >= 0x477ff000u)
    half = 0x7c00u;
  else if (magnitude < 0x38800000u)
    half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  else
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  return static_cast<uint16_t>(sign | half);
}
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) {
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return float_to_f16(low) | static_cast<uint32_t>(float_to_f16(high)) << 16;
}

// A float8 number with `mantissa` bits, by search among all of them: slow and plain.
inline float float8_value(uint8_t bits, int mantissa, int bias) {
  const int exponent = (bits & 0x7f) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  const float unit = std::ldexp(1.0f, -mantissa);
  const float size = exponent == 0 ? std::ldexp(fraction * unit, 1 - bias)
                                   : std::ldexp(1 + fraction * unit, exponent - bias);
  return bits & 0x80 ? -size : size;
}
inline uint8_t to_float8(float x, int mantissa, int bias, uint8_t largest) {
  if (std::isnan(x)) return 0x7f;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::fabs(x);
  for (uint8_t low = 0; low < largest; ++low) {
    const float here = float8_value(low, mantissa, bias),
                next = float8_value(low + 1, mantissa, bias);
    if (size > next) continue;
    const float middle = (here + next) / 2;
    const bool up = size > middle || (size == middle && low % 2 == 1);
    return sign | static_cast<uint8_t>(up ? low + 1 : low);
  }
  return sign | largest;
}
inline uint16_t pack_e4m3(float low, float high) {
  return static_cast<uint16_t>(to_float8(low, 3, 7, 0x7e) | to_float8(high, 3, 7, 0x7e) << 8);
}
inline uint16_t pack_e5m2(float low, float high) {
  return static_cast<uint16_t>(to_float8(low, 2, 15, 0x7b) | to_float8(high, 2, 15, 0x7b) << 8);
}
inline uint32_t e4m3_to_f16(uint16_t x) {
  const auto one = [](uint8_t b) {
    return (b & 0x7f) == 0x7f ? std::nanf("") : float8_value(b, 3, 7);
  };
  return pack_f16(one(static_cast<uint8_t>(x)), one(static_cast<uint8_t>(x >> 8)));
}
inline uint32_t e5m2_to_f16(uint16_t x) { return __byte_perm(x, 0, 0x1404); }

inline uint32_t to_tf32(float x) {  // ties away from zero
  const uint32_t bits = to_bits(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

struct At {
  int row, column;
};

// D += A B of one warp. a_at(register, part) and b_at say which (row, column) of A (16, K) and B
// (K, 8) part of a register is; value(bits, part) is that part as a number.
template <int kK, int kParts, typename A, typename B, typename V>
void warp_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const A& a_at,
                  const B& b_at, const V& value) {
  static const char instruction = 0;
  emulation::meet(
      kWholeWarp, &instruction,
      [&](emulation::Warp& warp, int side, int lane) {
        const int group = lane / 4, in_group = lane % 4;
        for (int r = 0; r < 4; ++r)
          for (int part = 0; part < kParts; ++part) {
            const At at = a_at(r, part, group, in_group);
            warp.left[side][at.row][at.column] = value(a[r], part);
          }
        for (int r = 0; r < 2; ++r)
          for (int part = 0; part < kParts; ++part) {
            const At at = b_at(r, part, group, in_group);
            warp.right[side][at.row][at.column] = value(b[r], part);
          }
      },
      [&](const emulation::Warp& warp, int side) {
        const int lane = emulation::current().number % 32;
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
          double sum = d[i];
          for (int k = 0; k < kK; ++k)
            sum += static_cast<double>(warp.left[side][row][k]) * warp.right[side][k][column];
          d[i] = static_cast<float>(sum);
          if (std::fabs(static_cast<double>(d[i])) > std::fabs(sum))
            d[i] = std::nextafter(d[i], 0.0f);
        }
        return 0;
      });
}

template <typename V>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const V& value) {
  warp_product<16, 2>(
      d, a, b,
      [](int r, int part, int group, int in_group) {
        return At{group + r % 2 * 8, in_group * 2 + part + r / 2 * 8};
      },
      [](int r, int part, int group, int in_group) {
        return At{in_group * 2 + part + r * 8, group};
      },
      value);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_16(d, a, b, [](uint32_t bits, int part) {
    return from_bits(part == 0 ? bits << 16 : bits & 0xffff0000u);
  });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_16(d, a, b, [](uint32_t bits, int part) {
    return f16_to_float(static_cast<uint16_t>(part == 0 ? bits : bits >> 16));
  });
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  warp_product<8, 1>(
      d, a, b,
      [](int r, int, int group, int in_group) {
        return At{group + r % 2 * 8, in_group + r / 2 * 4};
      },
      [](int r, int, int group, int in_group) { return At{in_group + r * 4, group}; },
      [](uint32_t bits, int) { return from_bits(bits & ~0x1fffu); });
}

template <bool kTransposed>
void load_8x8(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix: a row is not aligned");
  emulation::exchange(kWholeWarp, row, [&](auto slot) {
    const int lane = emulation::current().number % 32;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int part = 0; part < 2; ++part) {
        const int line = kTransposed ? lane % 4 * 2 + part : lane / 4;
        const int column = kTransposed ? lane / 4 : lane % 4 * 2 + part;
        std::memcpy(&pair[part],
                    static_cast<const char*>(slot(8 * i + line)) + column * sizeof(uint16_t), 2);
      }
      r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return 0;
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_8x8<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_8x8<true>(r, row); }

// Copies arrive when they are waited for, not before: what is read too early is stale.
struct Copy {
  void* to;
  uint4 bytes;
};
inline std::vector<std::vector<std::vector<Copy>>>& copies() {
  static std::vector<std::vector<std::vector<Copy>>> of_threads(1024 * emulation::kMostBlocks);
  return of_threads;
}
inline std::vector<std::vector<Copy>>& my_copies() {
  return copies()[1024 * emulation::block().rank + emulation::current().number];
}
inline void copy_async(void* shared, const void* global, bool valid) {
  auto& groups = my_copies();
  if (groups.empty()) groups.emplace_back();
  Copy copy{shared, {}};
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulation::fail("cp.async: not aligned");
  if (valid) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulation::fail("cp.async: not aligned");
    std::memcpy(&copy.bytes, global, 16);
  }
  groups.back().push_back(copy);
}
inline void copies_commit() { my_copies().emplace_back(); }
template <int kPending>
void copies_wait() {
  auto& groups = my_copies();
  while (static_cast<int>(groups.size()) > kPending + 1) {  // the last one is not committed yet
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, &copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

inline void wait_for_launch_before() { emulation::current().waited = true; }
inline void let_next_launch_start() {}

inline int cluster_rank() { return emulation::block().rank; }
inline int cluster_size() { return emulation::cluster().size; }
inline void cluster_arrive() {
  emulation::Cluster& c = emulation::cluster();
  emulation::current().cluster_barrier = c.barrier;
  ++c.arrived;
  ++emulation::block().progress;
  emulation::release_cluster();
}
inline void cluster_wait() {
  const uint64_t mine = emulation::current().cluster_barrier;
  while (emulation::cluster().barrier == mine) emulation::yield();
}
// The same place of shared memory in another block of the cluster.
inline void* of_other_block(const void* shared, int rank) {
  const auto at =
      static_cast<const unsigned char*>(shared) - emulation::shared_memory(emulation::block());
  return emulation::shared_memory(*emulation::cluster().blocks[rank]) + at;
}
inline void store_to_block(float4* shared, int rank, float4 x) {
  *static_cast<float4*>(of_other_block(shared, rank)) = x;
}
inline void store_to_block(uint32_t* shared, int rank, uint32_t x) {
  *static_cast<uint32_t*>(of_other_block(shared, rank)) = x;
}

// In clusters of that many blocks, neighbours in x.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(int size, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t shared, cudaStream_t, Arguments... args) {
  ++*emulation::emulation_launches();
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    emulation::fail("a grid that no GPU takes");
  if (shared > emulation::kShared - 1024) emulation::fail("more shared memory than a GPU has");
  if (size < 1 || size > emulation::kMostBlocks || grid.x % size != 0)
    emulation::fail("clusters of this size do not divide the grid");
  const std::function<void()> body = [=] { kernel(static_cast<Parameters>(args)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += size) {
        for (auto& groups : copies()) groups.clear();
        for (int i = 0; i < size; ++i)
          emulation::prepare_block(*emulation::cluster().blocks[i], dim3(x + i, y, z), grid, block,
                                   body);
        emulation::run_cluster(size);
      }
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Arguments... args) {
  return launch_clusters(1, kernel, grid, block, shared, stream, args...);
}

// One launch after the other here as well.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                         cudaStream_t stream, Arguments... args) {
  emulation::must_wait() = true;
  const cudaError_t status = launch(kernel, grid, block, shared, stream, args...);
  emulation::must_wait() = false;
  return status;
}

}  // namespace molegrad::cuda
