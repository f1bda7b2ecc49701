// The sketches of several layers in a few launches, for A and B in 16 bits: layers of one dtype and
// padded rank together, the others by sketch_accumulate_ one at a time (grouped_paths.h).
#include "dtypes.h"
#include "grouped.cuh"
#include "grouped_plan.h"
#include "parts.h"
#include "tensors.h"

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

// Bytes of scratch memory that molegrad_sketch_many needs for the same arguments, aligned to 256.
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

// The sketches of `count` layers, an array on the host, of one `dtype`, bfloat16 or float16, and
// one padded rank (padded_rank of sketch_plan.h) are added to what is there. No two layers may
// share their y or w. `chunk_bytes`: of A and B that stay in L2. `shared_memory`: bytes of a
// multiprocessor.
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

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
#include <cstdlib>

#include "grouped_paths.h"
#include "sketch_op.h"

namespace molegrad::cuda {
namespace {

constexpr const char* kOp = "sketch_accumulate_many_";
constexpr const char* kGroupedVariable = "MOLEGRAD_GROUPED_PATH";

GroupedPath wanted_grouping() {
  const auto wanted = parse_grouped_path(std::getenv(kGroupedVariable));
  require(wanted.has_value(), kOp, kGroupedVariable, " must be auto, together or single, got ",
          std::getenv(kGroupedVariable));
  return *wanted;
}

GroupedLayer layer_of(const Matrix& a, const Matrix& b, const Tensor& u, const Tensor& v,
                      const Tensor& y, const Tensor& w) {
  GroupedLayer layer = {};
  layer.a = a.data;
  layer.lda = a.ld;
  layer.b = b.data;
  layer.ldb = b.ld;
  layer.tokens = a.rows;
  layer.n = a.cols;
  layer.m = b.cols;
  layer.v = v.const_data_ptr();
  layer.v_dtype = dtype_code(v);
  layer.v_row = v.stride(0);
  layer.v_column = v.stride(1);
  layer.kv = v.size(1);
  layer.u = u.const_data_ptr();
  layer.u_dtype = dtype_code(u);
  layer.u_row = u.stride(0);
  layer.u_column = u.stride(1);
  layer.ku = u.size(1);
  layer.y = static_cast<float*>(y.mutable_data_ptr());
  layer.w = static_cast<float*>(w.mutable_data_ptr());
  return layer;
}

// Whether two layers add to the same numbers: a layer that is used twice, then, and both its uses
// are in one call.
bool share_sums(const GroupedLayer& one, const GroupedLayer& other) {
  const auto meet = [](const float* x, int64_t of_x, const float* y, int64_t of_y) {
    return x < y + of_y && y < x + of_x;
  };
  const int64_t one_y = one.m * one.kv, one_w = one.n * one.ku;
  const int64_t other_y = other.m * other.kv, other_w = other.n * other.ku;
  return meet(one.y, one_y, other.y, other_y) || meet(one.w, one_w, other.w, other_w) ||
         meet(one.y, one_y, other.w, other_w) || meet(one.w, one_w, other.y, other_y);
}

// Layers for one call of molegrad_sketch_many, and their places in the op's arguments.
struct Group {
  int dtype, rank;
  std::vector<GroupedLayer> layers;
  std::vector<size_t> numbers;

  bool takes(int other_dtype, int other_rank, const GroupedLayer& layer) const {
    if (other_dtype != dtype || other_rank != rank) return false;
    for (const GroupedLayer& other : layers)
      if (share_sums(layer, other)) return false;
    return true;
  }
};

void sketch_accumulate_many_(std::vector<Tensor> y, std::vector<Tensor> w, std::vector<Tensor> a,
                             std::vector<Tensor> b, std::vector<Tensor> u, std::vector<Tensor> v) {
  check_sketch_accumulate_many(y, w, a, b, u, v);
  const Place place(a[0]);
  const Gpu gpu(a[0]);
  const int64_t chunk = grouped_chunk_bytes(gpu.l2);
  std::vector<Matrix> operands;  // copies, where there are any, live until all is launched
  std::vector<Group> groups;
  std::vector<size_t> alone;
  for (size_t i = 0; i < a.size(); ++i) {
    const int64_t rank = larger(u[i].size(1), v[i].size(1));
    const int64_t n = a[i].size(a[i].dim() - 1), m = b[i].size(b[i].dim() - 1);
    const int64_t tokens = n > 0 ? a[i].numel() / n : 0;
    if (tokens == 0 || b[i].numel() == 0) continue;  // a sum of nothing
    if (!takes_group(wanted_grouping(), wanted_sketch_path({n, m, tokens, rank}), dtype_code(a[i]),
                     rank, tokens * (n + m) * 2, chunk)) {
      alone.push_back(i);
      continue;
    }
    const size_t first = operands.size();
    operands.emplace_back(a[i]);
    operands.emplace_back(b[i]);
    const GroupedLayer layer =
        layer_of(operands[first], operands[first + 1], u[i], v[i], y[i], w[i]);
    const int dtype = dtype_code(a[i]), padded = padded_rank(rank);
    size_t at = 0;
    while (at < groups.size() && !groups[at].takes(dtype, padded, layer)) ++at;
    if (at == groups.size()) groups.push_back({dtype, padded, {}, {}});
    groups[at].layers.push_back(layer);
    groups[at].numbers.push_back(i);
  }
  for (const Group& group : groups) {
    const auto count = static_cast<int64_t>(group.layers.size());
    if (count == 1) {
      alone.push_back(group.numbers[0]);
      continue;
    }
    const Tensor scratch = new_scratch(
        a[0], molegrad_sketch_many_scratch(group.layers.data(), count, group.rank, chunk,
                                           gpu.multiprocessors, gpu.shared_memory));
    check_launch(kOp, molegrad_sketch_many(group.dtype, group.layers.data(), count, group.rank,
                                           chunk, gpu.multiprocessors, gpu.shared_memory,
                                           scratch.mutable_data_ptr(), place.stream()));
  }
  for (const size_t i : alone) add_sketch(kOp, y[i], w[i], a[i], b[i], u[i], v[i]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) {
  m.impl("sketch_accumulate_many_", TORCH_BOX(&sketch_accumulate_many_));
}

}  // namespace molegrad::cuda
#endif
