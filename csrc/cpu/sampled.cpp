#include "sampled.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "memory.h"
#include "products.h"
#include "rademacher.h"

namespace molegrad::cpu {
namespace {

// As in molegrad/reference.py: tokens that decide the threshold, its steps, tokens per moment.
constexpr int64_t kThresholdTokens = 512, kThresholdSteps = 8, kMomentStride = 8;
// Tokens at a time: a wide panel of that many rows is a quarter of a per-core L2. X is sampled in
// smaller pieces, which are still in cache when their product with ZQ is formed.
constexpr int64_t kChunk = 512, kScanTokens = 48;
static_assert(kChunk % kMomentStride == 0 && kChunk % 64 == 0);
// Features at a time are limited by the memory of their sums and by that of what is kept of them.
constexpr int64_t kSumBytes = 16 << 20, kMaxFeatures = 8192;
// Numbers of X that are worth a thread.
constexpr int64_t kNumbersPerThread = 1 << 14;

// What one call has in common.
template <typename C>
struct Call {
  const SampledGrad& args;
  const KernelSet<C>& set = kernel_set<C>();
  int64_t tokens, features, d, block, blocks, k;
  bool sampling;
  std::vector<C> x_scale, z_scale, basis, basis_t;  // (T), (T), (d, k), (k, d)
  std::vector<double> noise;                        // per block
  std::vector<int64_t> chosen;                      // per block
  ScanJob<C> job;

  explicit Call(const SampledGrad& args);
  C find_threshold() const;
  // ‖z‖² becomes ‖z (I − QQᵀ)‖², given z Q.
  void subtract_modes(const C* zq, int64_t rows, C* z_sq) const;
  View q() const { return view_of<C>(basis.data(), d, k); }
  View q_t() const { return view_of<C>(basis_t.data(), k, d); }
  static const C* pointer(const std::vector<C>& x) { return x.empty() ? nullptr : x.data(); }
  int64_t part_count(int64_t rows, int64_t most) const {
    const int64_t worth = std::min(most, rows * features / kNumbersPerThread);
    return std::clamp<int64_t>(worth, 1, std::max<int64_t>(torch::stable::get_num_threads(), 1));
  }
};

template <typename C>
View read(const Buffer<C>& x, int64_t rows, int64_t cols) {
  return view_of<C>(static_cast<const C*>(x.data()), rows, cols);
}

template <typename C>
std::vector<C> load_matrix(const View& x) {
  std::vector<C> out(x.data == nullptr ? 0 : x.rows * x.cols);
  if (!out.empty())
    kernel_set<C>().sampled.load_rows(x, nullptr, 0, 1, x.rows, out.data(), nullptr);
  return out;
}

template <typename C>
Call<C>::Call(const SampledGrad& args)
    : args(args),
      tokens(args.x.rows),
      features(args.x.cols),
      d(args.z.cols),
      block(std::min(args.block, features)),
      blocks((features + block - 1) / block),
      k(args.share < 1 ? args.basis.cols : 0),
      sampling(args.share < 1),
      x_scale(load_matrix<C>(args.x_scale)),
      z_scale(load_matrix<C>(args.z_scale)),
      basis(k > 0 ? load_matrix<C>(args.basis) : std::vector<C>()),
      basis_t(basis.size()),
      noise(blocks, 0.0),
      chosen(blocks, 0) {
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < k; ++j) basis_t[j * d + i] = basis[i * k + j];
  job.x = args.x;
  job.scale = pointer(x_scale);
  job.block = block;
  job.sampling = sampling;
  job.stream = random_stream(args.counter, args.seed);
  job.noise = noise.data();
  job.chosen = chosen.data();
  job.stride = kMomentStride;
  if (sampling) job.threshold = find_threshold();
}

template <typename C>
void Call<C>::subtract_modes(const C* zq, int64_t rows, C* z_sq) const {
  for (int64_t r = 0; r < rows; ++r) {
    C sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += zq[r * k + j] * zq[r * k + j];
    z_sq[r] = z_sq[r] < sum ? C(0) : z_sq[r] - sum;  // NaN stays
  }
}

template <typename C>
C Call<C>::find_threshold() const {
  const int64_t stride = std::max<int64_t>(1, tokens / kThresholdTokens);
  const int64_t rows = (tokens + stride - 1) / stride, parts = part_count(rows, rows);
  Buffer<C> z(rows * d), z_sq(rows), zq(rows * k), scores(rows * blocks), row(parts * features);
  for_parts(parts, [&](int64_t part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    set.sampled.load_rows(args.z, pointer(z_scale), begin * stride, stride, end - begin,
                          z.data() + begin * d, z_sq.data() + begin);
  });
  if (k > 0) {
    product_nn<C>(read(z, rows, d), q(), view_of<C>(zq.data(), rows, k));
    subtract_modes(zq.data(), rows, z_sq.data());
  }
  for_parts(parts, [&](int64_t part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    set.sampled.scores(job, begin * stride, stride, end - begin, z_sq.data() + begin,
                       scores.data() + begin * blocks, row.data() + part * features);
  });
  return set.sampled.threshold(scores.data(), rows * blocks, args.share, kThresholdSteps);
}

// Blocks [first, last) of features: their part of the gradient, summed over all tokens. Threads
// share what is about Z by tokens and what is about X by features, so that every sum but those of
// the moments is made in the same order, however many threads there are.
template <typename C>
class Range {
 public:
  Range(Call<C>& call, int64_t first, int64_t last);
  void add_tokens(int64_t begin, int64_t count, const MutableView& moments);
  void add_modes();
  void write();

 private:
  void load_tokens(int64_t begin, int64_t count);
  void take_modes(int64_t begin, int64_t count);
  void scan(int64_t part, int64_t begin, int64_t count);
  void multiply(int64_t part);
  void add_moments(int64_t count, const MutableView& moments);

  int64_t part_begin(int64_t part) const { return blocks_ * part / parts_; }
  int64_t feature(int64_t block) const {  // the first of a block of the range
    return std::min(call_.features, (first_ + block) * call_.block);
  }
  C* part_modes(int64_t part) const { return modes_.data() + part * modes_size_; }

  Call<C>& call_;
  const KernelSet<C>& set_;
  const int64_t first_, blocks_, parts_, capacity_, ld_;
  // Z of a chunk by rows and by panels, ‖z (I − QQᵀ)‖², ZQ; the rows that the moments need.
  Buffer<C> rows_, panels_, z_sq_, zq_, few_, few_zq_, x_sq_;
  Buffer<int32_t> counts_, tokens_;
  Buffer<C> values_;
  Buffer<uint64_t> masks_;
  Buffer<bool> dense_;
  Kept<C> kept_;
  SketchJob<C> modes_job_;  // XᵀZQ
  const int64_t scan_scratch_, sketch_scratch_, modes_size_, sums_size_;
  Buffer<C> scratch_, modes_, sums_;
};

template <typename C>
SketchJob<C> modes_job(int64_t k) {
  SketchJob<C> job;
  job.kv = k;
  job.chunk = kScanTokens;
  return job;
}

template <typename C>
Range<C>::Range(Call<C>& call, int64_t first, int64_t last)
    : call_(call),
      set_(call.set),
      first_(first),
      blocks_(last - first),
      parts_(call.part_count(call.tokens, blocks_)),
      capacity_(round_up(std::min(kChunk, call.tokens), 64)),
      ld_(round_up(call.block, 4)),
      rows_(capacity_ * call.d),
      panels_(capacity_ * WidePanels(set_.lanes, call.d).cols),
      z_sq_(capacity_),
      zq_(capacity_ * call.k),
      few_(capacity_ / kMomentStride * call.d),
      few_zq_(capacity_ / kMomentStride * call.k),
      x_sq_(parts_ * capacity_ / kMomentStride),
      counts_(blocks_),
      tokens_(blocks_ * capacity_),
      values_(blocks_ * capacity_ * ld_),
      masks_(blocks_ * capacity_ / 64 * call.block),
      dense_(blocks_),
      modes_job_(modes_job<C>(call.k)),
      scan_scratch_(round_up(set_.sampled.scan_scratch(blocks_ * call.block, blocks_), kAlignment)),
      sketch_scratch_(round_up(set_.sketch_scratch(modes_job_), kAlignment)),
      modes_size_(
          Panels(set_.lanes, ((blocks_ + parts_ - 1) / parts_) * call.block, call.k).size()),
      sums_size_(blocks_ * ld_ * WidePanels(set_.lanes, call.d).cols),
      scratch_(parts_ * (scan_scratch_ + sketch_scratch_)),
      modes_(parts_ * modes_size_),
      sums_(sums_size_) {
  kept_.capacity = capacity_;
  kept_.ld = ld_;
  kept_.features = call.block;
  kept_.counts = counts_.data();
  kept_.tokens = tokens_.data();
  kept_.values = values_.data();
  kept_.masks = masks_.data();
  kept_.dense = dense_.data();
  for_parts(parts_, [&](int64_t part) {
    std::fill_n(part_modes(part), modes_size_, C(0));
    std::fill(sums_.data() + sums_size_ * part / parts_,
              sums_.data() + sums_size_ * (part + 1) / parts_, C(0));
  });
}

template <typename C>
void Range<C>::load_tokens(int64_t begin, int64_t count) {
  const int64_t d = call_.d, k = call_.k, parts = call_.part_count(count, count);
  const View& z = call_.args.z;
  const auto pack = [&](int64_t first, int64_t last) {
    set_.sampled.pack_wide(rows_.data() + first * d, last - first, d, capacity_, first,
                           panels_.data());
  };
  for_parts(parts, [&](int64_t part) {
    const int64_t first = count * part / parts, last = count * (part + 1) / parts;
    C* rows = rows_.data() + first * d;
    set_.sampled.load_rows(z, Call<C>::pointer(call_.z_scale), begin + first, 1, last - first, rows,
                           z_sq_.data() + first);
    if (!call_.sampling)  // then only whether all of z is finite matters
      for (int64_t t = first; t < last; ++t, rows += d)
        if (!std::isfinite(z_sq_.data()[t]) &&
            !std::all_of(rows, rows + d, [](C x) { return std::isfinite(x); }))
          z_sq_.data()[t] = std::numeric_limits<C>::quiet_NaN();
    if (k == 0) pack(first, last);
  });
  if (k == 0) return;
  take_modes(begin, count);
  for_parts(parts, [&](int64_t part) { pack(count * part / parts, count * (part + 1) / parts); });
}

// ZQ, and Z without it.
template <typename C>
void Range<C>::take_modes(int64_t begin, int64_t count) {
  const int64_t d = call_.d, k = call_.k;
  const MutableView rows = view_of<C>(rows_.data(), count, d);
  product_nn<C>(read(rows_, count, d), call_.q(), view_of<C>(zq_.data(), count, k));
  call_.subtract_modes(zq_.data(), count, z_sq_.data());
  for (int64_t t = 0; t < count; t += kMomentStride) {
    std::copy_n(rows_.data() + t * d, d, few_.data() + t / kMomentStride * d);
    std::copy_n(zq_.data() + t * k, k, few_zq_.data() + t / kMomentStride * k);
  }
  product_nn<C>(read(zq_, count, k), call_.q_t(), rows, true);
  if (!call_.x_scale.empty())  // from here on ZQ is what X, without its scale, is multiplied with
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < k; ++j) zq_.data()[t * k + j] *= call_.x_scale[begin + t];
}

template <typename C>
void Range<C>::scan(int64_t part, int64_t begin, int64_t count) {
  const int64_t first = part_begin(part), last = part_begin(part + 1), k = call_.k;
  const int64_t features = feature(last) - feature(first);
  C* scratch = scratch_.data() + part * (scan_scratch_ + sketch_scratch_);
  ScanJob<C> job = call_.job;
  job.z_sq = z_sq_.data();
  job.chunk = begin;
  job.range = first_;
  job.kept = kept_;
  if (k > 0) {
    job.x_sq = x_sq_.data() + part * (capacity_ / kMomentStride);
    std::fill_n(job.x_sq, capacity_ / kMomentStride, C(0));
  }
  SketchJob<C> modes = modes_job_;
  modes.b = part_of(call_.args.x, begin, count, feature(first), features);
  modes.p = read(zq_, count, k);
  std::fill(kept_.counts + first, kept_.counts + last, 0);
  for (int64_t t = 0; t < count; t += kScanTokens) {
    const int64_t end = std::min(count, t + kScanTokens);
    set_.sampled.scan(job, begin + t, begin + end, first_ + first, first_ + last, scratch);
    if (k > 0) set_.sketch(modes, t, end, part_modes(part), nullptr, scratch + scan_scratch_);
  }
}

template <typename C>
void Range<C>::multiply(int64_t part) {
  const int64_t first = part_begin(part), last = part_begin(part + 1);
  set_.sampled.classify(kept_, first, last);
  MultiplyJob<C> job;
  job.kept = kept_;
  job.z = panels_.data();
  job.rows = capacity_;
  job.d = call_.d;
  job.sums = sums_.data();
  job.blocks = blocks_;
  set_.sampled.multiply(job, first, last);
}

// moments += Zᵀ diag(‖x_t‖²) Z Q over every eighth token.
template <typename C>
void Range<C>::add_moments(int64_t count, const MutableView& moments) {
  const int64_t d = call_.d, k = call_.k, few = (count + kMomentStride - 1) / kMomentStride;
  for (int64_t t = 0; t < few; ++t) {
    C x_sq = 0;
    for (int64_t part = 0; part < parts_; ++part)
      x_sq += x_sq_.data()[part * (capacity_ / kMomentStride) + t];
    for (int64_t j = 0; j < k; ++j) few_zq_.data()[t * k + j] *= x_sq;
  }
  Buffer<C> product(d * k);
  product_tn<C>(read(few_, few, d), read(few_zq_, few, k), view_of<C>(product.data(), d, k));
  C* sum = static_cast<C*>(moments.data);
  for (int64_t i = 0; i < d * k; ++i) sum[i] += product.data()[i];
}

template <typename C>
void Range<C>::add_tokens(int64_t begin, int64_t count, const MutableView& moments) {
  load_tokens(begin, count);
  for_parts(parts_, [&](int64_t part) {
    scan(part, begin, count);
    multiply(part);
  });
  if (call_.k > 0) add_moments(count, moments);
}

// sums += (XᵀZQ) Qᵀ: the modes are k more tokens, of which everything is kept.
template <typename C>
void Range<C>::add_modes() {
  const int64_t d = call_.d, k = call_.k;
  for (int64_t mode = 0; mode < k; mode += capacity_) {
    const int64_t count = std::min(capacity_, k - mode);
    set_.sampled.pack_wide(call_.basis_t.data() + mode * d, count, d, capacity_, 0, panels_.data());
    for_parts(parts_, [&](int64_t part) {
      const int64_t first = part_begin(part), last = part_begin(part + 1);
      const int64_t features = feature(last) - feature(first);
      Buffer<C> product(features * k);
      set_.reduce(part_modes(part), 0, 1, features, false, view_of<C>(product.data(), features, k),
                  0, features);
      for (int64_t b = first; b < last; ++b) {
        kept_.counts[b] = static_cast<int32_t>(count);
        const int64_t rows = feature(b + 1) - feature(b);
        const C* from = product.data() + (feature(b) - feature(first)) * k + mode;
        for (int64_t j = 0; j < count; ++j) {
          kept_.tokens[b * capacity_ + j] = static_cast<int32_t>(j);
          C* to = kept_.values + (b * capacity_ + j) * ld_;
          for (int64_t f = 0; f < ld_; ++f) to[f] = f < rows ? from[f * k + j] : C(0);
        }
      }
      multiply(part);
    });
  }
}

template <typename C>
void Range<C>::write() {
  AddJob<C> job;
  job.sums = sums_.data();
  job.blocks = blocks_;
  job.ld = ld_;
  job.block = call_.block;
  job.d = call_.d;
  job.feature = feature(0);
  job.features = feature(blocks_) - feature(0);
  job.alpha = call_.args.alpha;
  job.target = call_.args.grad;
  job.dtype = call_.args.grad_dtype;
  job.feature_stride = call_.args.feature_stride;
  job.column_stride = call_.args.column_stride;
  for_parts(parts_,
            [&](int64_t part) { set_.sampled.add(job, part_begin(part), part_begin(part + 1)); });
}

}  // namespace

template <typename C>
void sampled_grad(const SampledGrad& args, const MutableView& moments, float* stats) {
  std::fill_n(static_cast<C*>(moments.data), moments.rows * moments.cols, C(0));
  stats[0] = args.share < 1 && args.x.rows > 0 ? 0.0f : 1.0f;
  stats[1] = 0.0f;
  if (args.x.rows == 0 || args.x.cols == 0 || args.z.cols == 0) return;
  Call<C> call(args);
  const int64_t row_bytes = WidePanels(call.set.lanes, call.d).cols * sizeof(C);
  const int64_t features = std::min(kMaxFeatures, kSumBytes / row_bytes);
  const int64_t step = std::max<int64_t>(1, features / call.block);
  for (int64_t first = 0; first < call.blocks; first += step) {
    Range<C> range(call, first, std::min(call.blocks, first + step));
    for (int64_t t = 0; t < call.tokens; t += kChunk)
      range.add_tokens(t, std::min(kChunk, call.tokens - t), moments);
    range.add_modes();
    range.write();
  }
  if (!call.sampling) return;
  double kept = 0, noise = 0;
  for (int64_t b = 0; b < call.blocks; ++b) {
    kept += static_cast<double>(call.chosen[b]);
    noise += call.noise[b];
  }
  stats[0] = static_cast<float>(kept / static_cast<double>(call.tokens * call.blocks));
  stats[1] = static_cast<float>(noise);
}

template void sampled_grad<float>(const SampledGrad&, const MutableView&, float*);
template void sampled_grad<double>(const SampledGrad&, const MutableView&, float*);

}  // namespace molegrad::cpu
