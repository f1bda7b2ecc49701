// The CUDA kernels of torch.ops.molegrad.sketch and sketch_accumulate_; sketch_op.h says why their
// host code is not in sketch.cu, which is long enough: power.cu and grouped.cu need it too.
#include "sketch_op.h"

#include <cstdlib>

namespace molegrad::cuda {
namespace {

constexpr const char* kPathVariable = "MOLEGRAD_SKETCH_PATH";

std::tuple<Tensor, Tensor> sketch(Tensor a, Tensor b, Tensor u, Tensor v,
                                  std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_sketch("sketch", a, b, u, v, a_scale, b_scale);
  Products products("sketch", a, b, a_scale, b_scale);
  const ScalarType dtype = acc_dtype(a, b);
  Tensor y = new_tensor(a, {u.size(0), v.size(1)}, dtype);
  Tensor w = new_tensor(a, {v.size(0), u.size(1)}, dtype);
  products.sketch(&v, &u, Output(y), Output(w), false);
  return {y, w};
}

void sketch_accumulate_(Tensor y, Tensor w, Tensor a, Tensor b, Tensor u, Tensor v,
                        std::optional<Tensor> a_scale, std::optional<Tensor> b_scale) {
  check_sketch_accumulate(y, w, a, b, u, v, a_scale, b_scale);
  Products products("sketch_accumulate_", a, b, a_scale, b_scale);
  products.sketch(&v, &u, Output(y), Output(w), true);
}

}  // namespace

// Read at every call, so that a benchmark can time one path after the other.
SketchPath wanted_sketch_path(const SketchCall& call) {
  const char* text = std::getenv(kPathVariable);
  const std::optional<SketchPath> wanted = wanted_path(text, call);
  require(wanted.has_value(), "sketch", kPathVariable, " must be ", kSketchPathForm, "; got ",
          text == nullptr ? "" : text);
  return *wanted;
}

void add_sketch(const char* op, const Tensor& y, const Tensor& w, const Tensor& a, const Tensor& b,
                const Tensor& u, const Tensor& v) {
  Products products(op, a, b, std::nullopt, std::nullopt);
  products.sketch(&v, &u, Output(y), Output(w), true);
}

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) {
  m.impl("sketch", TORCH_BOX(&sketch));
  m.impl("sketch_accumulate_", TORCH_BOX(&sketch_accumulate_));
}

}  // namespace molegrad::cuda

extern "C" int molegrad_sketch_path(int dtype, int64_t n, int64_t m, int64_t tokens, int64_t rank) {
  using namespace molegrad::cuda;
  const SketchPath path = choose_sketch_path(wanted_sketch_path({n, m, tokens, rank}), dtype, rank);
  return static_cast<int>(path == SketchPath::kCublasLt && lt_version() == 0 ? SketchPath::kOwn
                                                                             : path);
}
