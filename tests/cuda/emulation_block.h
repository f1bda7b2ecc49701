// How emulation.h runs the threads of a block and of a cluster: as fibers, one after the other.
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
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
// One device of few multiprocessors, with little cache: what it is asked for is cut up.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3
           : attribute == cudaDevAttrL2CacheSize       ? 64 << 10
                                                       : 228 << 10;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10, kShared = 228 << 10;

// Launches so far, for tests that count them.
extern "C" __attribute__((used, visibility("default"))) inline int64_t* emulation_launches() {
  static int64_t count = 0;
  return &count;
}

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
  uint64_t cluster_barrier = 0;  // the one that it has arrived at
  bool started = false, done = true;
  bool waited = false;  // for the launch before
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
  int rank = 0;  // in the cluster
  uint64_t barrier = 0, progress = 0;
  const std::function<void()>* body = nullptr;
};

// Blocks that run at the same time: one, unless the launch asks for clusters.
constexpr int kMostBlocks = 8;
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Block* running = nullptr;
  int size = 1, arrived = 0;
  uint64_t barrier = 0;

  Cluster() {
    for (int i = 0; i < kMostBlocks; ++i) {
      blocks.push_back(std::make_unique<Block>());
      blocks.back()->rank = i;
    }
    running = blocks[0].get();
  }
};

inline Cluster& cluster() {
  static Cluster instance;
  return instance;
}
inline Block& block() { return *cluster().running; }
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

inline void release_cluster() {
  Cluster& c = cluster();
  int alive = 0;
  for (int i = 0; i < c.size; ++i) alive += c.blocks[i]->alive;
  if (alive > 0 && c.arrived == alive) {
    c.arrived = 0;
    ++c.barrier;
    ++block().progress;
  }
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

// Whether the launch at work may start before the one before it is done.
inline bool& must_wait() {
  static bool value = false;
  return value;
}

// A fiber runs one thread of a block after the other, for as long as the process lives.
[[noreturn]] inline void enter() {
  for (;;) {
    Block& b = block();
    (*b.body)();
    if (must_wait() && !b.running->waited)
      fail("a launch may end before the one before it: wait_for_launch_before was not called");
    b.running->done = true;
    --b.alive;
    ++b.progress;
    release_barrier();  // those who wait do not wait for a thread that has returned
    release_cluster();
    yield();
  }
}

inline void prepare_block(Block& b, dim3 index, dim3 grid, dim3 size,
                          const std::function<void()>& body) {
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
    fiber.done = fiber.waited = false;
    fiber.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
  }
  std::memset(b.shared.data(), 0xff, b.shared.size());  // NaN
}

// The blocks of a cluster that prepare_block has prepared, until all their threads have returned.
inline void run_cluster(int size) {
  Cluster& c = cluster();
  c.size = size;
  c.arrived = 0;
  const char* order = std::getenv("MOLEGRAD_EMULATION_ORDER");
  const bool reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
  const auto sum = [&](const auto& of) {
    uint64_t total = 0;
    for (int i = 0; i < size; ++i) total += of(*c.blocks[i]);
    return total;
  };
  const auto alive = [](const Block& b) { return b.alive; };
  const auto progress = [](const Block& b) { return b.progress; };
  while (sum(alive) > 0) {
    const uint64_t before = sum(progress);
    for (int at = 0; at < size; ++at) {
      Block& b = *c.blocks[reverse ? size - 1 - at : at];
      c.running = &b;
      const int count = static_cast<int>(b.size.x * b.size.y * b.size.z);
      for (int i = 0; i < count; ++i) {
        Fiber& fiber = *b.fibers[reverse ? count - 1 - i : i];
        if (!fiber.done) resume(fiber);
      }
    }
    if (sum(progress) == before && sum(alive) > 0)
      fail("deadlock: threads wait for others that do not come");
  }
  c.running = c.blocks[0].get();
}

inline unsigned char* shared_memory(Block& b) {
  const auto address = reinterpret_cast<uintptr_t>(b.shared.data());
  return b.shared.data() + (128 - address % 128) % 128;
}

}  // namespace emulation
