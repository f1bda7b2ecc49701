// CUDA C++ on the CPU, for tests: kernels of csrc/cuda and the functions that launch them compile
// as plain C++ with -DMOLEGRAD_EMULATED and this folder in the include path.
//
// The threads of a block are fibers that run one after the other until they wait for one another
// (a barrier, an instruction of the whole warp); blocks follow each other. Nothing runs at the same
// time, so what races on a GPU may pass here; MOLEGRAD_EMULATION_ORDER=reverse starts every round
// with the last thread, which many races do not survive. A block whose threads wait for something
// that cannot come ends the process with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10, kShared = 228 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

struct Fiber {
  ucontext_t start;  // only to begin with: switching by it costs system calls
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int number = 0;
  bool started = false, done = true;
};

// What the lanes of a warp exchange; generations tell one rendezvous from the next.
struct Warp {
  int arrived = 0;
  uint32_t mask = 0;
  const void* instruction = nullptr;
  uint64_t generation = 0;
  unsigned char slots[2][kLanes][64];
  float left[2][16][16], right[2][16][8];  // the operands of a product
};

struct Block {
  dim3 index, grid, size;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared = std::vector<unsigned char>(kShared + 128);
  jmp_buf scheduler;
  Fiber* running = nullptr;
  int alive = 0, at_barrier = 0;
  uint64_t barrier = 0, progress = 0;
  const std::function<void()>* body = nullptr;
};

inline Block& block() {
  static Block instance;
  return instance;
}
inline Fiber& current() { return *block().running; }

__attribute__((noinline)) inline void yield() {
  if (_setjmp(current().here) == 0) _longjmp(block().scheduler, 1);
}
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  Block& b = block();
  b.running = &fiber;
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void release_barrier() {
  Block& b = block();
  if (b.alive > 0 && b.at_barrier == b.alive) {
    b.at_barrier = 0;
    ++b.barrier;
    ++b.progress;
  }
}

inline void sync_threads() {
  Block& b = block();
  const uint64_t mine = b.barrier;
  ++b.at_barrier;
  release_barrier();
  while (b.barrier == mine) yield();
}

// Every lane of `mask` gives something, give(warp, 0 or 1, lane), and then takes from what all have
// given: take(warp, 0 or 1). The address of `instruction` tells which one the lanes are to meet in.
template <typename Give, typename Take>
auto meet(uint32_t mask, const void* instruction, const Give& give, const Take& take) {
  Block& b = block();
  Warp& warp = b.warps[current().number / kLanes];
  const int lane = current().number % kLanes;
  if ((mask >> lane & 1u) == 0) fail("a lane takes part in an exchange that its mask leaves out");
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.instruction = instruction;
  }
  if (warp.mask != mask) fail("lanes of a warp meet with different masks");
  if (warp.instruction != instruction) fail("lanes of a warp meet in different instructions");
  const uint64_t mine = warp.generation;
  give(warp, mine & 1, lane);
  if (++warp.arrived == __builtin_popcount(mask)) {
    warp.arrived = 0;
    ++warp.generation;
    ++b.progress;
  }
  while (warp.generation == mine) yield();
  return take(warp, mine & 1);
}

// Every lane of `mask` gives a value and then sees the values of all: fn(slot of lane).
template <typename T, typename F>
auto exchange(uint32_t mask, const T& value, const F& fn) {
  static_assert(sizeof(T) <= 64, "too large for a slot");
  static const char instruction = 0;
  return meet(
      mask, &instruction,
      [&](Warp& warp, int side, int lane) {
        std::memcpy(warp.slots[side][lane], &value, sizeof(T));
      },
      [&](const Warp& warp, int side) {
        return fn([&](int from) {
          T other;
          std::memcpy(&other, warp.slots[side][from], sizeof(T));
          return other;
        });
      });
}

// A fiber runs one thread of a block after the other, for as long as the process lives.
[[noreturn]] inline void enter() {
  for (;;) {
    Block& b = block();
    (*b.body)();
    b.running->done = true;
    --b.alive;
    ++b.progress;
    release_barrier();  // those who wait do not wait for a thread that has returned
    yield();
  }
}

inline void run_block(dim3 index, dim3 grid, dim3 size, const std::function<void()>& body) {
  Block& b = block();
  const int count = static_cast<int>(size.x * size.y * size.z);
  if (count < 1 || count > 1024) fail("a block has 1 to 1024 threads");
  b.index = index;
  b.grid = grid;
  b.size = size;
  b.body = &body;
  b.warps.assign((count + kLanes - 1) / kLanes, Warp());
  b.alive = count;
  b.at_barrier = 0;
  while (static_cast<int>(b.fibers.size()) < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new char[kStack]);
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = kStack;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, enter, 0);
    b.fibers.push_back(std::move(fiber));
  }
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *b.fibers[i];
    fiber.number = i;
    fiber.done = false;
    fiber.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
  }
  const char* order = std::getenv("MOLEGRAD_EMULATION_ORDER");
  const bool reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
  while (b.alive > 0) {
    const uint64_t before = b.progress;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = *b.fibers[reverse ? count - 1 - i : i];
      if (!fiber.done) resume(fiber);
    }
    if (b.progress == before && b.alive > 0)
      fail("deadlock: threads wait for others that do not come");
  }
}

inline unsigned char* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(block().shared.data());
  return block().shared.data() + (128 - address % 128) % 128;
}

}  // namespace emulation

#define threadIdx (::emulation::current().thread)
#define blockIdx (::emulation::block().index)
#define blockDim (::emulation::block().size)
#define gridDim (::emulation::block().grid)
#define MOLEGRAD_SHARED(name) unsigned char* const name = ::emulation::shared_memory()

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
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <typename T>
T __ldg(const T* p) {
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
  static std::vector<std::vector<std::vector<Copy>>> of_threads(1024);
  return of_threads;
}
inline void copy_async(void* shared, const void* global, bool valid) {
  auto& groups = copies()[emulation::current().number];
  if (groups.empty()) groups.emplace_back();
  Copy copy{shared, {}};
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulation::fail("cp.async: not aligned");
  if (valid) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulation::fail("cp.async: not aligned");
    std::memcpy(&copy.bytes, global, 16);
  }
  groups.back().push_back(copy);
}
inline void copies_commit() { copies()[emulation::current().number].emplace_back(); }
template <int kPending>
void copies_wait() {
  auto& groups = copies()[emulation::current().number];
  while (static_cast<int>(groups.size()) > kPending + 1) {  // the last one is not committed yet
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, &copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t, Arguments... args) {
  if (shared > emulation::kShared - 1024) emulation::fail("more shared memory than a GPU has");
  const std::function<void()> body = [=] { kernel(static_cast<Parameters>(args)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        for (auto& groups : copies()) groups.clear();
        std::memset(emulation::block().shared.data(), 0xff, emulation::kShared);  // NaN
        emulation::run_block(dim3(x, y, z), grid, block, body);
      }
  return cudaSuccess;
}

}  // namespace molegrad::cuda
