// The rank-k update of a weight.
#include "tensors.h"

namespace molegrad::cpu {
namespace {

constexpr int64_t kPanelsPerThread = 16;

// weight (m, n) = keep * weight + alpha * u wᵀ.
template <typename C>
void rank_update(const MutableView& weight, const View& u, const View& w, double keep,
                 double alpha) {
  const KernelSet<C>& set = kernel_set<C>();
  const Panels panels(set.lanes, w.cols, w.rows);
  Buffer<C> wt(panels.size());
  torch::stable::parallel_for(0, panels.count(), kPanelsPerThread, [&](int64_t begin, int64_t end) {
    set.pack_transposed(w, begin, end, wt.data());
  });
  UpdateJob<C> job;
  job.weight = weight;
  job.u = u;
  job.wt = wt.data();
  job.k = u.cols;
  job.keep = static_cast<C>(keep);
  job.alpha = static_cast<C>(alpha);
  const int64_t parts = part_count(weight.rows);
  const int64_t scratch_size = round_up(set.update_scratch(job), kAlignment);
  Buffer<C> scratch(parts * scratch_size);
  for_parts(parts, [&](int64_t part) {
    set.update(job, weight.rows * part / parts, weight.rows * (part + 1) / parts,
               scratch.data() + part * scratch_size);
  });
}

void lowrank_update_(Tensor weight, Tensor u, Tensor w, double alpha, double decay) {
  check_lowrank_update(weight, u, w);
  const Matrix u_in(u), w_in(w);
  const int64_t m = weight.size(0), n = weight.size(1);
  const int64_t row = weight.stride(0), col = weight.stride(1);
  const auto update = [&](const Tensor& to, int64_t rows, int64_t cols, int64_t ld,
                          const Matrix& left, const Matrix& right) {
    const MutableView target = {to.mutable_data_ptr(), static_cast<DType>(dtype_code(to)), rows,
                                cols, ld};
    with_compute_type(acc_dtype(weight), [&](auto zero) {
      rank_update<decltype(zero)>(target, view_of(left), view_of(right), 1.0 - decay, alpha);
    });
  };
  if (in_rows(m, n, row, col)) return update(weight, m, n, row, u_in, w_in);
  if (in_rows(n, m, col, row))
    return update(weight, n, m, col, w_in, u_in);  // weightᵀ += alpha W Uᵀ
  const Tensor copy = torch::stable::contiguous(weight);
  update(copy, m, n, n, u_in, w_in);
  torch::stable::copy_(weight, copy);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) {
  m.impl("lowrank_update_", TORCH_BOX(&lowrank_update_));
}

}  // namespace molegrad::cpu
