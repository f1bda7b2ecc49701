// The CUDA kernels of torch.ops.molegrad.quantize_rows and add_quantized_.
#include <tuple>

#include "quantized.h"
#include "tensors.h"

namespace molegrad::cuda {
namespace {

ScalarType float8_dtype(bool e5m2) {
  return e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, bool e5m2) {
  check_quantize_rows(x);
  const Place place(x);
  const Matrix from(x);  // one dimension is one row
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor data = new_tensor(x, sizes, float8_dtype(e5m2));
  Tensor scale = new_tensor(x, {sizes.begin(), sizes.end() - 1}, ScalarType::Float);
  check_launch("quantize_rows", molegrad_quantize_rows(
                                    from.dtype, from.data, from.rows, from.cols, from.ld, e5m2,
                                    data.mutable_data_ptr(),
                                    static_cast<float*>(scale.mutable_data_ptr()), place.stream()));
  return {data, scale};
}

std::tuple<Tensor, Tensor> quantize_tensor(Tensor x, bool e5m2) {
  check_quantize_tensor(x);
  const Place place(x);
  const Matrix from(x.dim() > 0 ? x : torch::stable::reshape(x, std::vector<int64_t>{1}));
  Tensor data = new_tensor(x, {x.sizes().begin(), x.sizes().end()}, float8_dtype(e5m2));
  Tensor scale = new_tensor(x, {}, ScalarType::Float), scratch = new_scratch(x, 4);
  check_launch("quantize_tensor",
               molegrad_quantize_tensor(from.dtype, from.data, from.rows, from.cols, from.ld, e5m2,
                                        data.mutable_data_ptr(),
                                        static_cast<float*>(scale.mutable_data_ptr()),
                                        scratch.mutable_data_ptr(), place.stream()));
  return {data, scale};
}

void add_quantized_(Tensor data, Tensor scale, Tensor x) {
  check_add_quantized(data, scale, x);
  const Place place(x);
  const Matrix from(x);
  Tensor values = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  const bool by_column = scale.size(0) != data.size(0) || scale.size(1) != 1;
  Tensor scratch = new_scratch(x, by_column ? 8 * from.cols : 0);
  check_launch("add_quantized_",
               molegrad_add_quantized(from.dtype, from.data, from.rows, from.cols, from.ld,
                                      static_cast<int8_t*>(values.mutable_data_ptr()),
                                      static_cast<float*>(scales.mutable_data_ptr()), by_column,
                                      scratch.mutable_data_ptr(), place.stream()));
  if (!data.is_contiguous()) torch::stable::copy_(data, values);
  if (!scale.is_contiguous()) torch::stable::copy_(scale, scales);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_tensor", TORCH_BOX(&quantize_tensor));
  m.impl("add_quantized_", TORCH_BOX(&add_quantized_));
}

}  // namespace molegrad::cuda
