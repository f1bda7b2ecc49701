// The CUDA kernel of torch.ops.molegrad.sketch_accumulate_many_: layers of one dtype and padded
// rank go to grouped.cu together, the others to sketch_accumulate_ one at a time (grouped_paths.h).
// Nothing here waits for the device; all scratch memory is torch's.
#include <cstdlib>

#include "grouped.h"
#include "grouped_paths.h"
#include "ops_products.h"

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
