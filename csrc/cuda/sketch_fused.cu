#include "parts.h"
#include "sketch_fused.cuh"
#include "sketch_fused.h"

namespace molegrad::cuda {
namespace {

template <int kRank>
int launch_fused(const FusedPlan& plan, const FusedArgs& args, int numbers, cudaStream_t stream) {
  const dim3 grid(plan.clusters * plan.size);
  const auto run = [&](auto kernel) -> int {
    return launch_clusters(plan.size, kernel, grid, dim3(kFusedThreads), plan.shared, stream, args);
  };
  return numbers == 2 ? run(fused_sketch_kernel<kRank, 2>) : run(fused_sketch_kernel<kRank, 1>);
}

}  // namespace
}  // namespace molegrad::cuda

using namespace molegrad::cuda;

extern "C" int64_t molegrad_fused_scratch(int64_t tokens, int64_t n, int64_t m, int64_t kv,
                                          int64_t ku, int numbers, int multiprocessors,
                                          int64_t shared_memory) {
  return plan_fused(tokens, n, m, kv, ku, numbers, multiprocessors, shared_memory).bytes;
}

extern "C" int molegrad_sketch_fused(const void* a, int64_t lda, const void* b, int64_t ldb,
                                     int64_t tokens, int64_t n, int64_t m, int v_dtype,
                                     const void* v, int64_t v_row, int64_t v_column, int64_t kv,
                                     int u_dtype, const void* u, int64_t u_row, int64_t u_column,
                                     int64_t ku, float* y, int64_t ldy, float* w, int64_t ldw,
                                     int add, int numbers, int multiprocessors,
                                     int64_t shared_memory, void* scratch, cudaStream_t stream) {
  const FusedPlan plan = plan_fused(tokens, n, m, kv, ku, numbers, multiprocessors, shared_memory);
  if (plan.size == 0) return cudaErrorInvalidValue;
  const auto sums = [&](int side) {
    return reinterpret_cast<float*>(static_cast<char*>(scratch) + plan.sums[side]);
  };
  FusedArgs args = {};
  args.side[0] = {static_cast<const uint16_t*>(a),
                  lda,
                  static_cast<int>(n),
                  plan.slice[0],
                  plan.warps[0],
                  v,
                  v_row,
                  v_column,
                  v_dtype,
                  static_cast<int>(kv),
                  sums(0)};
  args.side[1] = {static_cast<const uint16_t*>(b),
                  ldb,
                  static_cast<int>(m),
                  plan.slice[1],
                  plan.warps[1],
                  u,
                  u_row,
                  u_column,
                  u_dtype,
                  static_cast<int>(ku),
                  sums(1)};
  args.tokens = tokens;
  args.tokens_per_cluster = plan.tokens_per_cluster;
  switch (plan.rank) {
    case 16:
      MOLEGRAD_TRY(launch_fused<16>(plan, args, numbers, stream));
      break;
    case 32:
      MOLEGRAD_TRY(launch_fused<32>(plan, args, numbers, stream));
      break;
    default:
      MOLEGRAD_TRY(launch_fused<64>(plan, args, numbers, stream));
  }
  SumArgs total = {};
  total.half[0] = {sums(1), m * plan.rank, plan.rank, y, ldy, m, static_cast<int>(kv)};
  total.half[1] = {sums(0), n * plan.rank, plan.rank, w, ldw, n, static_cast<int>(ku)};
  total.parts = plan.clusters;
  total.add = add;
  return add_sums<float>(total, stream);
}
