#include "products.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace molegrad::cpu {
namespace {

// Share of a per-core L2 that the kept half of a chunk may take; bases and accumulators stream
// past it once per chunk.
constexpr int64_t kKeptBytes = 512 * 1024;
constexpr int64_t kMaxChunk = 96, kMinChunk = 48;
// Rows of a small parallel loop that are worth a thread.
constexpr int64_t kRowsPerThread = 512;

template <typename C>
int64_t chunk_tokens(int64_t kept_columns) {
  const int64_t fit = kKeptBytes / std::max<int64_t>(1, kept_columns * sizeof(C));
  return std::clamp(fit / kRowUnit * kRowUnit, kMinChunk, kMaxChunk);
}

template <typename F>
void for_rows(int64_t rows, const F& fn) {
  if (rows <= kRowsPerThread) return fn(int64_t{0}, rows);
  torch::stable::parallel_for(0, rows, kRowsPerThread,
                              [&](int64_t begin, int64_t end) { fn(begin, end); });
}

// A (rows, k) view in panel storage, padding rows zero.
template <typename C>
Buffer<C> pack_panels(const KernelSet<C>& set, const View& src) {
  const Panels panels(set.lanes, src.rows, src.cols);
  Buffer<C> packed(panels.size());
  for_rows(src.rows,
           [&](int64_t begin, int64_t end) { set.pack(src, src.rows, begin, end, packed.data()); });
  return packed;
}

// Runs a job over all tokens with per-part accumulators and reduces them into y and w.
template <typename C>
void run_sketch(const KernelSet<C>& set, const SketchJob<C>& job, const MutableView& y,
                const MutableView* w, bool add) {
  const int64_t total = job.b.rows;
  const int64_t parts = part_count(total);
  const int64_t y_size = Panels(set.lanes, y.rows, y.cols).size();
  const int64_t w_size = w != nullptr ? Panels(set.lanes, w->rows, w->cols).size() : 0;
  const int64_t stride = y_size + w_size;
  const int64_t scratch_size = round_up(set.sketch_scratch(job), kAlignment);
  Buffer<C> sums(parts * stride), scratch(parts * scratch_size);
  for_parts(parts, [&](int64_t part) {
    C* y_sum = sums.data() + part * stride;
    std::fill_n(y_sum, stride, C(0));
    set.sketch(job, total * part / parts, total * (part + 1) / parts, y_sum, y_sum + y_size,
               scratch.data() + part * scratch_size);
  });
  for_rows(y.rows, [&](int64_t begin, int64_t end) {
    set.reduce(sums.data(), stride, parts, y.rows, add, y, begin, end);
  });
  if (w != nullptr)
    for_rows(w->rows, [&](int64_t begin, int64_t end) {
      set.reduce(sums.data() + y_size, stride, parts, w->rows, add, *w, begin, end);
    });
}

}  // namespace

template <typename C>
void sketch(const View& a, const View& b, const View& v, const View& u, const C* token_scale,
            const MutableView& y, const MutableView& w, bool add) {
  // The narrower of A and B is the one whose chunk is kept for the second product.
  if (a.cols > b.cols) return sketch<C>(b, a, u, v, token_scale, w, y, add);
  const KernelSet<C>& set = kernel_set<C>();
  const Buffer<C> v_packed = pack_panels(set, v), u_packed = pack_panels(set, u);
  SketchJob<C> job;
  job.a = a;
  job.b = b;
  job.v = v_packed.data();
  job.u = u_packed.data();
  job.token_scale = token_scale;
  job.kv = v.cols;
  job.ku = u.cols;
  job.chunk = chunk_tokens<C>(a.cols);
  run_sketch(set, job, y, &w, add);
}

template <typename C>
void sketch_left(const View& a, const View& b, const View& v, const C* token_scale,
                 const MutableView& y) {
  const KernelSet<C>& set = kernel_set<C>();
  const Buffer<C> v_packed = pack_panels(set, v);
  SketchJob<C> job;
  job.a = a;
  job.b = b;
  job.v = v_packed.data();
  job.token_scale = token_scale;
  job.kv = v.cols;
  job.chunk = kMaxChunk;
  run_sketch<C>(set, job, y, nullptr, false);
}

template <typename C>
void product_tn(const View& b, const View& p, const MutableView& g) {
  const KernelSet<C>& set = kernel_set<C>();
  SketchJob<C> job;
  job.b = b;
  job.p = p;
  job.kv = p.cols;
  job.chunk = kMaxChunk;
  run_sketch<C>(set, job, g, nullptr, false);
}

template <typename C>
void product_nn(const View& a, const View& s, const MutableView& out, bool subtract) {
  const KernelSet<C>& set = kernel_set<C>();
  const Buffer<C> packed = pack_panels(set, s);
  ApplyJob<C> job;
  job.a = a;
  job.s = packed.data();
  job.k = s.cols;
  job.chunk = kMaxChunk;
  job.out = out;
  job.subtract = subtract;
  const int64_t parts = part_count(a.rows);
  const int64_t scratch_size = round_up(set.apply_scratch(job), kAlignment);
  Buffer<C> scratch(parts * scratch_size);
  for_parts(parts, [&](int64_t part) {
    set.apply(job, a.rows * part / parts, a.rows * (part + 1) / parts,
              scratch.data() + part * scratch_size);
  });
}

#define MOLEGRAD_INSTANTIATE(C)                                                         \
  template void sketch<C>(const View&, const View&, const View&, const View&, const C*, \
                          const MutableView&, const MutableView&, bool);                \
  template void sketch_left<C>(const View&, const View&, const View&, const C*,         \
                               const MutableView&);                                     \
  template void product_tn<C>(const View&, const View&, const MutableView&);            \
  template void product_nn<C>(const View&, const View&, const MutableView&, bool);
MOLEGRAD_INSTANTIATE(float)
MOLEGRAD_INSTANTIATE(double)

}  // namespace molegrad::cpu
