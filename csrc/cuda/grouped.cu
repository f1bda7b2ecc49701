#include "dtypes.h"
#include "grouped.cuh"
#include "grouped.h"
#include "parts.h"

namespace molegrad::cuda {
namespace {

unsigned units(int64_t offset) { return static_cast<unsigned>(offset / kUnit); }

// fn(first layer, layers) for what one table holds.
template <typename F>
int for_tables(int64_t count, const F& fn) {
  for (int64_t first = 0; first < count; first += kGroupedLayers)
    MOLEGRAD_TRY(fn(first, static_cast<int>(smaller(kGroupedLayers, count - first))));
  return cudaSuccess;
}

template <bool kFloat16>
int split_bases(const GroupedPlan& plan, const GroupedLayer* layers, int count, char* scratch,
                cudaStream_t stream) {
  TableBases args = {};
  const int64_t step = project_columns(plan.rank);
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) {
    const GroupedLayer& layer = layers[i];
    args.half[2 * i] = {layer.v,
                        layer.v_row,
                        layer.v_column,
                        static_cast<int>(layer.v_dtype),
                        static_cast<int>(layer.kv),
                        layer.n,
                        round_up_to(layer.n, step),
                        reinterpret_cast<uint16_t*>(scratch + plan.basis[i][0]),
                        0};
    args.half[2 * i + 1] = {layer.u,
                            layer.u_row,
                            layer.u_column,
                            static_cast<int>(layer.u_dtype),
                            static_cast<int>(layer.ku),
                            layer.m,
                            round_up_to(layer.m, step),
                            reinterpret_cast<uint16_t*>(scratch + plan.basis[i][1]),
                            0};
    rows = larger(rows, larger(layer.n, layer.m));
  }
  args.rank = plan.rank;
  args.tickets = reinterpret_cast<unsigned*>(scratch + plan.tickets);
  args.ticket_count = plan.ticket_count;
  // Rows are padded by less than a step, which the threads go through all the same.
  return launch(split_many_kernel<kFloat16>, dim3(grid_for(rows * (plan.rank / 2)), 2 * count),
                dim3(kThreads), 0, stream, args);
}

Table table_of(const GroupedPlan& plan, const GroupedLayer* layers, const GroupedChunk& chunk,
               char* scratch) {
  Table table = {};
  table.scratch = scratch;
  table.q = units(chunk.q);
  table.scale = units(chunk.scale);
  table.tickets = units(plan.tickets);
  table.pieces = chunk.pieces;
  table.tiles = static_cast<int>(chunk.tiles);
  table.steps_per_part = plan.steps_per_part;
  table.tokens_per_split = static_cast<int>(plan.tokens_per_split);
  for (int i = 0; i < chunk.pieces; ++i) {
    const GroupedPiece& piece = chunk.piece[i];
    const GroupedLayer& layer = layers[piece.layer];
    TablePiece& to = table.piece[i];
    const void* x[2] = {layer.a, layer.b};
    const int64_t ld[2] = {layer.lda, layer.ldb}, columns[2] = {layer.n, layer.m};
    const int64_t k[2] = {layer.kv, layer.ku};
    float* out[2] = {layer.y, layer.w};
    for (int h = 0; h < 2; ++h) {
      TableHalf& half = to.half[h];
      half.x = static_cast<const uint16_t*>(x[h]) + piece.first * ld[h];
      half.ld = ld[h];
      half.out = out[h];
      half.columns = static_cast<int>(columns[h]);
      half.aligned = in_packs<BFloat16>(x[h], columns[h], ld[h]);
      half.k = static_cast<int>(k[h]);
      half.basis = units(plan.basis[piece.layer][h]);
      half.project_sums = units(piece.project_sums[h]);
      half.gather_sums = units(piece.gather_sums[h]);
    }
    to.tokens = static_cast<int>(piece.tokens);
    to.first_tile = static_cast<int>(piece.first_tile);
    to.first_project = piece.first_project;
    to.first_gather = piece.first_gather;
  }
  return table;
}

template <bool kFloat16, int kRank>
int sketch_table(const GroupedPlan& plan, const GroupedLayer* layers, int count, int64_t limit,
                 char* scratch, cudaStream_t stream) {
  MOLEGRAD_TRY(split_bases<kFloat16>(plan, layers, count, scratch, stream));
  GroupedChunk chunk;
  bool first = true;
  for (GroupedCursor cursor(layers, count, limit); cursor.next(chunk); first = false) {
    lay_out(plan, layers, chunk);
    const Table table = table_of(plan, layers, chunk, scratch);
    // As in sketch.cu: the first reads the bases at once, so it waits for them to be there.
    const auto start = [&](auto... args) {
      return first ? launch(args...) : launch_early(args...);
    };
    MOLEGRAD_TRY(start(project_many_kernel<kFloat16, kRank>, dim3(chunk.project_blocks),
                       dim3(kSketchThreads), ProjectShape<kRank>::kBytes, stream, table));
    MOLEGRAD_TRY(launch_early(gather_many_kernel<kFloat16, kRank>, dim3(chunk.gather_blocks),
                              dim3(kSketchThreads), GatherShape<kRank>::kBytes, stream, table));
    int64_t rows = 0;
    for (int i = 0; i < chunk.pieces; ++i)
      rows = larger(rows, larger(layers[chunk.piece[i].layer].n, layers[chunk.piece[i].layer].m));
    MOLEGRAD_TRY(launch_early(add_many_kernel<kRank>,
                              dim3(grid_for(rows * kRank), 2 * chunk.pieces), dim3(kThreads), 0,
                              stream, table));
  }
  return cudaSuccess;
}

template <bool kFloat16>
int sketch_layers(const GroupedPlan& plan, const GroupedLayer* layers, int count, int64_t limit,
                  char* scratch, cudaStream_t stream) {
  switch (plan.rank) {
    case 16:
      return sketch_table<kFloat16, 16>(plan, layers, count, limit, scratch, stream);
    case 32:
      return sketch_table<kFloat16, 32>(plan, layers, count, limit, scratch, stream);
    case 64:
      return sketch_table<kFloat16, 64>(plan, layers, count, limit, scratch, stream);
    default:
      return sketch_table<kFloat16, 128>(plan, layers, count, limit, scratch, stream);
  }
}

}  // namespace
}  // namespace molegrad::cuda

using namespace molegrad::cuda;

extern "C" int64_t molegrad_sketch_many_scratch(const GroupedLayer* layers, int64_t count,
                                                int64_t rank, int64_t chunk_bytes,
                                                int multiprocessors, int64_t shared_memory) {
  const int padded = padded_rank(rank);
  const Processors processors = processors_for(multiprocessors, shared_memory, padded);
  int64_t bytes = 0;
  for_tables(count, [&](int64_t first, int some) -> int {
    bytes =
        larger(bytes, plan_grouped(layers + first, some, padded, chunk_bytes, processors).bytes);
    return cudaSuccess;
  });
  return bytes;
}

extern "C" int molegrad_sketch_many(int dtype, const GroupedLayer* layers, int64_t count,
                                    int64_t rank, int64_t chunk_bytes, int multiprocessors,
                                    int64_t shared_memory, void* scratch, cudaStream_t stream) {
  const int padded = padded_rank(rank);
  const Processors processors = processors_for(multiprocessors, shared_memory, padded);
  return for_tables(count, [&](int64_t first, int some) -> int {
    const GroupedPlan plan = plan_grouped(layers + first, some, padded, chunk_bytes, processors);
    char* memory = static_cast<char*>(scratch);
    return dtype == 3
               ? sketch_layers<true>(plan, layers + first, some, chunk_bytes, memory, stream)
               : sketch_layers<false>(plan, layers + first, some, chunk_bytes, memory, stream);
  });
}
