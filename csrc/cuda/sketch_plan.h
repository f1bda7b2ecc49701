// How a sketch is cut into blocks, and where its scratch memory lies: plain C++, so that the rules
// are tested where there is no GPU.
#pragma once

#include <cstdint>

namespace molegrad::cuda {

constexpr int64_t divide_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }
constexpr int64_t round_up_to(int64_t x, int64_t unit) { return divide_up(x, unit) * unit; }
constexpr int64_t larger(int64_t x, int64_t y) { return x < y ? y : x; }
constexpr int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// What one launch works on at a time, see sketch.cuh: tokens of a block of `project`, columns of a
// block of `gather`, tokens of one of its steps.
constexpr int kProjectTokens = 128, kGatherColumns = 256, kGatherTokens = 32;
// Of the kernel for float32 and float64, see products.cuh.
constexpr int kWideRows = 128, kWideColumns = 32, kWideSteps = 32;
// The widest block of a basis that one pass takes; 16-bit numbers a float32 is split into.
constexpr int kRankMax = 128, kPieces = 2;

constexpr int padded_rank(int64_t k) { return k <= 16 ? 16 : k <= 32 ? 32 : k <= 64 ? 64 : 128; }
// Columns of A or B in one step of `project`: 128 bytes a row where shared memory allows it.
constexpr int project_columns(int rank) { return rank <= 32 ? 64 : 32; }

// The part of the GPU that decides how many blocks run at a time.
struct Processors {
  int count;           // streaming multiprocessors
  int blocks_of_each;  // of 256 threads, with the shared memory of `project` and `gather`
};

// Two blocks of at most 32 columns fit a multiprocessor of compute capability 9.0 (228 KiB), one
// that of 12.0 (100 KiB).
inline Processors processors_for(int count, int64_t shared_memory, int rank) {
  return {count, shared_memory >= (200 << 10) && rank <= 64 ? 2 : 1};
}

// Into how many parts to cut `units` of work in each of `tiles` so that all blocks together end
// soonest; a part costs `overhead` units of its own, and `most` parts are allowed.
inline int best_parts(int64_t tiles, int64_t units, int64_t overhead, int64_t slots, int64_t most) {
  int64_t best = 1, least = int64_t{1} << 62;
  for (int64_t parts = 1; parts <= smaller(most, larger(units, 1)); ++parts) {
    const int64_t waves = divide_up(tiles * parts, slots);
    const int64_t time = waves * (divide_up(units, parts) + (parts > 1 ? overhead : overhead / 2));
    if (time < least) best = parts, least = time;
  }
  return static_cast<int>(best);
}

// Tokens per chunk so that a chunk of A and B stays in an L2 of `l2` bytes until it is read again;
// all chunks of one size. An H100's L2 is two halves that may both hold a line: half of it counts.
inline int64_t chunk_tokens(int64_t tokens, int64_t bytes_per_token, int64_t l2) {
  const int64_t fit = larger(l2 / 2 + (l2 >> 4), 1) / larger(bytes_per_token, 1);
  const int64_t chunks = divide_up(tokens, larger(fit, kProjectTokens));
  return round_up_to(divide_up(tokens, larger(chunks, 1)), kProjectTokens);
}

constexpr int64_t kScratchAlignment = 256;

// Consecutive pieces of one allocation.
class Layout {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = size_;
    size_ += round_up_to(bytes, kScratchAlignment);
    return at;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// One half of a sketch: Q = X S for the tokens of a chunk, then Zᵀ Q. Its X is A for Y = Bᵀ(A V)
// and B for W = Aᵀ(B U). A half with k = 0 is left out.
struct HalfPlan {
  int64_t x_columns = 0, z_columns = 0;
  int k = 0;
  int steps = 0, first_step = 0, first_part = 0, parts = 0;  // of `project`
  int tiles = 0, first_tile = 0;                             // of `gather`
  int64_t basis = 0, q = 0, scale = 0, tickets = 0, project_sums = 0, gather_sums = 0;  // offsets
};

// Both halves of a sketch of 16-bit A and B, with the basis blocks of one pass.
struct SketchPlan {
  int rank = 0;  // padded
  int64_t chunk = 0;
  int64_t token_tiles = 0;  // of a whole chunk
  int project_parts = 0, steps_per_part = 0, ticket_count = 0;
  int gather_tiles = 0, splits = 0;
  int64_t tokens_per_split = 0;
  int64_t tickets = 0, bytes = 0;
  HalfPlan half[2];
};

inline SketchPlan plan_sketch(int64_t tokens, int64_t n, int64_t m, int64_t kv, int64_t ku,
                              int64_t chunk, Processors processors) {
  SketchPlan plan;
  plan.rank = padded_rank(larger(kv, ku));
  plan.chunk = chunk;
  plan.token_tiles = divide_up(smaller(chunk, tokens), kProjectTokens);
  plan.half[0].x_columns = plan.half[1].z_columns = n;
  plan.half[0].z_columns = plan.half[1].x_columns = m;
  plan.half[0].k = static_cast<int>(kv);
  plan.half[1].k = static_cast<int>(ku);
  if (tokens == 0 || n == 0 || m == 0) return plan;  // no parts: sums of nothing

  const int step = project_columns(plan.rank);
  const int64_t slots = int64_t{processors.count} * processors.blocks_of_each;
  int64_t steps = 0, tiles = 0;
  for (HalfPlan& half : plan.half) {
    if (half.k == 0) continue;
    half.first_step = static_cast<int>(steps);
    half.steps = static_cast<int>(divide_up(half.x_columns, step));
    half.first_tile = static_cast<int>(tiles);
    half.tiles = static_cast<int>(divide_up(half.z_columns, kGatherColumns));
    steps += half.steps;
    tiles += half.tiles;
  }
  constexpr int64_t kMostParts = 64, kProjectOverhead = 3, kGatherOverhead = 4;
  const int parts = best_parts(plan.token_tiles, steps, kProjectOverhead, slots, kMostParts);
  plan.steps_per_part = static_cast<int>(divide_up(steps, parts));
  plan.project_parts = static_cast<int>(divide_up(steps, plan.steps_per_part));
  const int64_t in_chunk = plan.token_tiles * kProjectTokens, stages = in_chunk / kGatherTokens;
  const int splits = best_parts(tiles, stages, kGatherOverhead, slots, kMostParts);
  plan.tokens_per_split = divide_up(stages, splits) * kGatherTokens;
  plan.splits = static_cast<int>(divide_up(in_chunk, plan.tokens_per_split));
  plan.gather_tiles = static_cast<int>(tiles);

  Layout layout;
  plan.tickets = layout.take(2 * plan.token_tiles * 4);
  plan.ticket_count = static_cast<int>(2 * plan.token_tiles);
  for (int h = 0; h < 2; ++h) {
    HalfPlan& half = plan.half[h];
    if (half.k == 0) continue;
    half.first_part = half.first_step / plan.steps_per_part;
    half.parts = (half.first_step + half.steps - 1) / plan.steps_per_part - half.first_part + 1;
    half.tickets = plan.tickets + h * plan.token_tiles * 4;
    const int64_t row = int64_t{plan.rank} * kPieces * 2;
    half.basis = layout.take(int64_t{half.steps} * step * row);
    half.q = layout.take(in_chunk * row);
    half.scale = layout.take(plan.token_tiles * 4);
    half.project_sums = layout.take(half.parts > 1 ? half.parts * in_chunk * plan.rank * 4 : 0);
    half.gather_sums = layout.take(int64_t{plan.splits} * half.z_columns * plan.rank * 4);
  }
  plan.bytes = layout.size();
  return plan;
}

// ---- one launch: sketch_fused.cuh ---------------------------------------------------------------

constexpr int kFusedThreads = 256, kFusedWarps = 8, kFusedTokens = 16, kFusedStages = 5;
constexpr int kFusedRankMax = 64, kClusterMax = 8;

// Tiles of 16 columns whose sums and bases fit the registers of a warp.
constexpr int fused_tiles(int rank) { return rank <= 16 ? 14 : rank <= 32 ? 7 : 3; }
// Shared memory before the stages, in bytes; `numbers` of 16 bits for each number.
constexpr int64_t fused_parts(int rank) { return kFusedWarps * kFusedTokens * (rank + 8) * 4; }
constexpr int64_t fused_received(int rank) { return 2 * kFusedTokens * rank * 4; }
constexpr int64_t fused_q(int rank, int numbers) {
  return 2 * 2 * kFusedTokens * (numbers * rank + 8) * 2;
}
constexpr int64_t fused_low(int rank, int numbers) {
  return (numbers - 1) * fused_tiles(rank) * (rank / 16) * kFusedThreads * 16;
}

struct FusedPlan {
  int size = 0;  // blocks in a cluster; 0: the columns do not fit
  int rank = 0, clusters = 0;
  int slice[2] = {}, warps[2] = {};  // columns of a block, warps on them: of A and of B
  int64_t tokens_per_cluster = 0, shared = 0;
  int64_t sums[2] = {}, bytes = 0;
};

// The smallest clusters whose blocks have room for their columns.
inline FusedPlan plan_fused(int64_t tokens, int64_t n, int64_t m, int64_t kv, int64_t ku,
                            int numbers, int multiprocessors, int64_t shared_memory) {
  FusedPlan plan;
  const int rank = padded_rank(larger(kv, ku));
  const int64_t columns[2] = {n, m};
  constexpr int64_t kReserved = 1 << 10;  // of a block, by the system
  if (rank > kFusedRankMax || tokens == 0 || n == 0 || m == 0 || kv == 0 || ku == 0) return plan;
  for (int size = 1; size <= kClusterMax && size <= multiprocessors; size *= 2) {
    int64_t slice[2];
    for (int s = 0; s < 2; ++s) slice[s] = round_up_to(divide_up(columns[s], size), 16);
    const int64_t shared = fused_parts(rank) + fused_received(rank) + fused_q(rank, numbers) +
                           fused_low(rank, numbers) +
                           kFusedStages * kFusedTokens * (slice[0] + slice[1] + 8) * 2;
    int64_t best = fused_tiles(rank) + 1;
    int of_a = 0;
    for (int warps = 1; warps < kFusedWarps; ++warps) {
      const int64_t most =
          larger(divide_up(slice[0] / 16, warps), divide_up(slice[1] / 16, kFusedWarps - warps));
      if (most < best) best = most, of_a = warps;
    }
    if (of_a == 0 || shared > shared_memory - kReserved) continue;
    plan.size = size;
    plan.rank = rank;
    plan.shared = shared;
    plan.warps[0] = of_a;
    plan.warps[1] = kFusedWarps - of_a;
    plan.tokens_per_cluster = round_up_to(divide_up(tokens, multiprocessors / size), kFusedTokens);
    plan.clusters = static_cast<int>(divide_up(tokens, plan.tokens_per_cluster));
    Layout layout;
    for (int s = 0; s < 2; ++s) {
      plan.slice[s] = static_cast<int>(slice[s]);
      plan.sums[s] = layout.take(int64_t{plan.clusters} * columns[s] * rank * 4);
    }
    plan.bytes = layout.size();
    break;
  }
  return plan;
}

}  // namespace molegrad::cuda
