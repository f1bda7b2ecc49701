#include "dtypes.h"
#include "parts.h"
#include "sketch.h"
#include "sketch_gather.cuh"

namespace molegrad::cuda {
namespace {

struct Basis {
  int dtype;
  const void* data;
  int64_t row, column, k;

  Basis columns(int64_t first, int64_t count) const {
    const int64_t size = dtype == 1 ? 8 : dtype == 0 ? 4 : 2;
    return {dtype, static_cast<const char*>(data) + first * column * size, row, column, count};
  }
};

// One half of a sketch: out (columns of z, k) = or += Zᵀ (X S).
struct Half {
  const void* x;
  const void* z;
  Stored x_stored, z_stored;
  int64_t x_ld, z_ld, x_columns, z_columns;
  Basis basis;
  float* out;
  int64_t out_ld;
};

struct Sketch {
  int64_t tokens;
  Half half[2];
  TokenScales token_scales;
  int add;
  char* scratch;
  cudaStream_t stream;
};

bool aligned(Stored stored, const void* data, int64_t columns, int64_t ld) {
  return stored == Stored::k16Bits ? in_packs<BFloat16>(data, columns, ld)
                                   : in_packs<Float8>(data, columns, ld);
}

const void* row_of(const void* data, Stored stored, int64_t row, int64_t ld) {
  return static_cast<const char*>(data) + row * ld * (stored == Stored::k16Bits ? 2 : 1);
}

ProjectHalf project_of(const Sketch& s, const Half& half, const HalfPlan& plan) {
  ProjectHalf p = {};
  p.ld = half.x_ld;
  p.stored = half.x_stored;
  p.columns = static_cast<int>(half.x_columns);
  p.aligned = aligned(half.x_stored, half.x, half.x_columns, half.x_ld);
  p.basis = reinterpret_cast<uint16_t*>(s.scratch + plan.basis);
  p.q = reinterpret_cast<uint16_t*>(s.scratch + plan.q);
  p.scale = reinterpret_cast<float*>(s.scratch + plan.scale);
  p.sums = reinterpret_cast<float4*>(s.scratch + plan.project_sums);
  p.tickets = reinterpret_cast<unsigned*>(s.scratch + plan.tickets);
  p.first_step = plan.first_step;
  p.steps = plan.steps;
  p.first_part = plan.first_part;
  p.parts = plan.parts;
  return p;
}

GatherHalf gather_of(const Sketch& s, const Half& half, const HalfPlan& plan) {
  GatherHalf g = {};
  g.ld = half.z_ld;
  g.stored = half.z_stored;
  g.columns = static_cast<int>(half.z_columns);
  g.aligned = aligned(half.z_stored, half.z, half.z_columns, half.z_ld);
  g.q = reinterpret_cast<uint16_t*>(s.scratch + plan.q);
  g.scale = reinterpret_cast<float*>(s.scratch + plan.scale);
  g.sums = reinterpret_cast<float*>(s.scratch + plan.gather_sums);
  g.first_tile = plan.first_tile;
  g.tiles = plan.tiles;
  return g;
}

template <bool kFloat16, int kRank, bool kFloat8>
int sketch_of_rank(const Sketch& s, const SketchPlan& plan) {
  BasisArgs bases = {};
  ProjectArgs projected = {};
  GatherArgs gathered = {};
  SumArgs sums = {};
  for (int h = 0; h < 2; ++h) {
    const Half& half = s.half[h];
    const HalfPlan& where = plan.half[h];
    projected.half[h] = project_of(s, half, where);
    gathered.half[h] = gather_of(s, half, where);
    bases.half[h] = {half.basis.data,
                     half.basis.row,
                     half.basis.column,
                     half.basis.dtype,
                     where.k,
                     half.x_columns,
                     int64_t{where.steps} * project_columns(kRank),
                     reinterpret_cast<uint16_t*>(s.scratch + where.basis),
                     half.x_stored != Stored::k16Bits};
    sums.half[h] = {gathered.half[h].sums, half.z_columns * kRank, kRank,  half.out,
                    half.out_ld,           half.z_columns,         where.k};
  }
  sums.parts = plan.splits;
  sums.add = s.add;
  if (plan.splits == 0) return add_sums<float>(sums, s.stream);

  bases.rank = kRank;
  bases.tickets = reinterpret_cast<unsigned*>(s.scratch + plan.tickets);
  bases.ticket_count = plan.ticket_count;
  const int64_t rows = larger(bases.half[0].padded_rows, bases.half[1].padded_rows);
  MOLEGRAD_TRY(launch(split_bases_kernel<kFloat16>, dim3(grid_for(rows * (kRank / 2)), 2),
                      dim3(kThreads), 0, s.stream, bases));

  projected.steps_per_part = plan.steps_per_part;
  gathered.tokens_per_split = plan.tokens_per_split;
  for (int64_t first = 0; first < s.tokens; first += plan.chunk) {
    const int64_t tokens = smaller(plan.chunk, s.tokens - first);
    projected.tokens = gathered.tokens = tokens;
    gathered.accumulate = first > 0;
    for (int h = 0; h < 2; ++h) {
      const Half& half = s.half[h];
      projected.half[h].x = row_of(half.x, half.x_stored, first, half.x_ld);
      gathered.half[h].z = row_of(half.z, half.z_stored, first, half.z_ld);
      projected.token_scales = s.token_scales;
    }
    for (int i = 0; i < 2; ++i)
      if (s.token_scales.of[i] != nullptr)
        projected.token_scales.of[i] += first * s.token_scales.stride[i];
    // A launch waits for the one before it only where it needs that: see the kernels. The first
    // reads the bases at once.
    const dim3 tiles(static_cast<unsigned>(divide_up(tokens, kProjectTokens)), plan.project_parts);
    const auto start = [&](auto... args) {
      return first == 0 ? launch(args...) : launch_early(args...);
    };
    // Where one of A and B is float8, its stages fit into those of the other, or of 16 bits.
    MOLEGRAD_TRY(start(project_kernel<kFloat16, kRank, kFloat8>, tiles, dim3(kSketchThreads),
                       ProjectShape<kRank>::kBytes, s.stream, projected));
    MOLEGRAD_TRY(launch_early(gather_kernel<kFloat16, kRank, kFloat8>,
                              dim3(plan.gather_tiles, plan.splits), dim3(kSketchThreads),
                              GatherShape<kRank>::kBytes, s.stream, gathered));
  }
  return add_sums<float>(sums, s.stream);
}

template <bool kFloat16, bool kFloat8>
int sketch_of_dtype(const Sketch& s, const SketchPlan& plan) {
  switch (plan.rank) {
    case 16:
      return sketch_of_rank<kFloat16, 16, kFloat8>(s, plan);
    case 32:
      return sketch_of_rank<kFloat16, 32, kFloat8>(s, plan);
    case 64:
      return sketch_of_rank<kFloat16, 64, kFloat8>(s, plan);
    default:
      return sketch_of_rank<kFloat16, 128, kFloat8>(s, plan);
  }
}

Stored stored_as(int dtype) {
  return dtype == 4 ? Stored::kE4M3 : dtype == 5 ? Stored::kE5M2 : Stored::k16Bits;
}

// fn(first column, columns of V, columns of U) for what one pass takes.
template <typename F>
int for_passes(int64_t kv, int64_t ku, const F& fn) {
  for (int64_t first = 0; first < larger(kv, ku); first += kRankMax)
    MOLEGRAD_TRY(fn(first, smaller(larger(kv - first, 0), kRankMax),
                    smaller(larger(ku - first, 0), kRankMax)));
  return cudaSuccess;
}

SketchPlan plan_pass(int64_t tokens, int64_t n, int64_t m, int64_t kv, int64_t ku, int64_t chunk,
                     int multiprocessors, int64_t shared_memory) {
  const int rank = padded_rank(larger(kv, ku));
  return plan_sketch(tokens, n, m, kv, ku, chunk,
                     processors_for(multiprocessors, shared_memory, rank));
}

}  // namespace
}  // namespace molegrad::cuda

using namespace molegrad::cuda;

extern "C" int64_t molegrad_sketch_chunk(int64_t tokens, int64_t n, int64_t m, int64_t l2) {
  return chunk_tokens(tokens, (n + m) * 2, l2);
}

extern "C" int64_t molegrad_sketch_scratch(int64_t tokens, int64_t n, int64_t m, int64_t kv,
                                           int64_t ku, int64_t chunk, int multiprocessors,
                                           int64_t shared_memory) {
  int64_t bytes = 0;
  for_passes(kv, ku, [&](int64_t, int64_t v, int64_t u) -> int {
    const SketchPlan plan = plan_pass(tokens, n, m, v, u, chunk, multiprocessors, shared_memory);
    bytes = larger(bytes, plan.bytes);
    return cudaSuccess;
  });
  return bytes;
}

extern "C" int molegrad_sketch(int dtype, const void* a, int64_t lda, const void* b, int64_t ldb,
                               int64_t tokens, int64_t n, int64_t m, int v_dtype, const void* v,
                               int64_t v_row, int64_t v_column, int64_t kv, int u_dtype,
                               const void* u, int64_t u_row, int64_t u_column, int64_t ku, float* y,
                               int64_t ldy, float* w, int64_t ldw, int add, int64_t chunk,
                               int multiprocessors, int64_t shared_memory, void* scratch,
                               cudaStream_t stream) {
  return molegrad_sketch_scaled(dtype, a, lda, nullptr, 0, dtype, b, ldb, nullptr, 0, tokens, n, m,
                                v_dtype, v, v_row, v_column, kv, u_dtype, u, u_row, u_column, ku, y,
                                ldy, w, ldw, add, chunk, multiprocessors, shared_memory, scratch,
                                stream);
}

extern "C" int molegrad_sketch_scaled(int a_dtype, const void* a, int64_t lda, const float* a_scale,
                                      int a_scale_stride, int b_dtype, const void* b, int64_t ldb,
                                      const float* b_scale, int b_scale_stride, int64_t tokens,
                                      int64_t n, int64_t m, int v_dtype, const void* v,
                                      int64_t v_row, int64_t v_column, int64_t kv, int u_dtype,
                                      const void* u, int64_t u_row, int64_t u_column, int64_t ku,
                                      float* y, int64_t ldy, float* w, int64_t ldw, int add,
                                      int64_t chunk, int multiprocessors, int64_t shared_memory,
                                      void* scratch, cudaStream_t stream) {
  const Stored of_a = stored_as(a_dtype), of_b = stored_as(b_dtype);
  const bool float16 = a_dtype == 3 || b_dtype == 3;
  const bool float8 = of_a != Stored::k16Bits || of_b != Stored::k16Bits;
  const Half halves[2] = {
      {a, b, of_a, of_b, lda, ldb, n, m, {v_dtype, v, v_row, v_column, kv}, y, ldy},
      {b, a, of_b, of_a, ldb, lda, m, n, {u_dtype, u, u_row, u_column, ku}, w, ldw},
  };
  const TokenScales scales = {{a_scale, b_scale}, {a_scale_stride, b_scale_stride}};
  return for_passes(kv, ku, [&](int64_t first, int64_t now_v, int64_t now_u) {
    Sketch s = {tokens, {halves[0], halves[1]}, scales, add, static_cast<char*>(scratch), stream};
    const int64_t k[2] = {now_v, now_u};
    for (int h = 0; h < 2; ++h) {
      if (k[h] == 0) continue;
      s.half[h].basis = halves[h].basis.columns(first, k[h]);
      s.half[h].out = halves[h].out + first;
    }
    const SketchPlan plan =
        plan_pass(tokens, n, m, now_v, now_u, chunk, multiprocessors, shared_memory);
    if (float8)
      return float16 ? sketch_of_dtype<true, true>(s, plan) : sketch_of_dtype<false, true>(s, plan);
    return float16 ? sketch_of_dtype<true, false>(s, plan) : sketch_of_dtype<false, false>(s, plan);
  });
}
