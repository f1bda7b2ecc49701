// Rows and tensors in float8 with scales, and sums kept in int8 with a scale for each row or
// column.
#include <algorithm>

#include "tensors.h"

namespace molegrad::cpu {
namespace {

constexpr int64_t kNumbersPerThread = 1 << 15;

struct Parts {
  int64_t rows, count, scratch;

  explicit Parts(const View& x) : rows(x.rows), scratch(round_up(x.cols, kAlignment)) {
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    count = std::clamp<int64_t>(x.rows * x.cols / kNumbersPerThread, 1, threads);
  }
  // fn(part, first row, end) on threads.
  template <typename F>
  void each(const F& fn) const {
    for_parts(count,
              [&](int64_t part) { fn(part, rows * part / count, rows * (part + 1) / count); });
  }
};

// data (rows, cols), contiguous, float8_e4m3fn or e5m2, and scale (rows) with x ≈ data · scale.
void quantize_rows(const View& x, bool e5m2, void* data, float* scale) {
  const Parts parts(x);
  Buffer<float> scratch(parts.count * parts.scratch);
  const auto kernel = kernels().quantized.rows;
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    kernel(x, begin, end, e5m2, static_cast<uint8_t*>(data), scale,
           scratch.data() + part * parts.scratch);
  });
}

// The same with one scale, which is returned.
float quantize_tensor(const View& x, bool e5m2, void* data) {
  const Parts parts(x);
  const QuantizedKernels& set = kernels().quantized;
  Buffer<float> scratch(parts.count * parts.scratch);
  Buffer<uint32_t> peaks(parts.count);
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    peaks.data()[part] = set.peak(x, begin, end, scratch.data() + part * parts.scratch);
  });
  const float scale = set.scale(*std::max_element(peaks.data(), peaks.data() + parts.count), e5m2);
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    set.scaled(x, begin, end, e5m2, scale, static_cast<uint8_t*>(data),
               scratch.data() + part * parts.scratch);
  });
  return scale;
}

// data · scale += x with new scales: one for each row, or with `by_column` one for each column.
// data (rows, cols) and scale are contiguous.
void add_quantized(int8_t* data, float* scale, const View& x, bool by_column) {
  const Parts parts(x);
  const QuantizedKernels& set = kernels().quantized;
  Buffer<float> scratch(parts.count * parts.scratch);
  if (!by_column) {
    parts.each([&](int64_t part, int64_t begin, int64_t end) {
      set.add_by_row(data, scale, x, begin, end, scratch.data() + part * parts.scratch);
    });
    return;
  }
  Buffer<uint32_t> peaks(parts.count * parts.scratch);
  Buffer<float> scales(x.cols);
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    set.column_peaks(data, scale, x, begin, end, peaks.data() + part * parts.scratch,
                     scratch.data() + part * parts.scratch);
  });
  for (int64_t part = 1; part < parts.count; ++part)
    for (int64_t c = 0; c < x.cols; ++c)
      peaks.data()[c] = std::max(peaks.data()[c], peaks.data()[part * parts.scratch + c]);
  set.scales(peaks.data(), x.cols, scales.data());
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    set.add_by_column(data, scale, scales.data(), x, begin, end,
                      scratch.data() + part * parts.scratch);
  });
  std::copy(scales.data(), scales.data() + x.cols, scale);
}

std::tuple<Tensor, Tensor> quantize_rows_op(Tensor x, bool e5m2) {
  check_quantize_rows(x);
  const Matrix x_in(x);  // one dimension is one row
  Tensor data = new_tensor(x, other_last_sizes(x, 0, {}), float8_dtype(e5m2));
  Tensor scale = new_tensor(x, other_last_sizes(x, 1, {}), ScalarType::Float);
  quantize_rows(view_of(x_in), e5m2, data.mutable_data_ptr(), memory_of<float>(scale));
  return {data, scale};
}

std::tuple<Tensor, Tensor> quantize_tensor_op(Tensor x, bool e5m2) {
  check_floating("quantize_tensor", {x});
  Tensor data = new_tensor(x, other_last_sizes(x, 0, {}), float8_dtype(e5m2)),
         scale = new_tensor(x, {}, ScalarType::Float);
  const Matrix x_in(x.dim() > 0 ? x : torch::stable::reshape(x, std::vector<int64_t>{1}));
  *memory_of<float>(scale) = quantize_tensor(view_of(x_in), e5m2, data.mutable_data_ptr());
  return {data, scale};
}

void add_quantized_(Tensor data, Tensor scale, Tensor x) {
  check_add_quantized(data, scale, x);
  const Matrix x_in(x);
  Tensor values = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  const bool by_column = scale.size(0) != data.size(0) || scale.size(1) != 1;
  add_quantized(memory_of<int8_t>(values), memory_of<float>(scales), view_of(x_in), by_column);
  if (!data.is_contiguous()) torch::stable::copy_(data, values);
  if (!scale.is_contiguous()) torch::stable::copy_(scale, scales);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molegrad, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows_op));
  m.impl("quantize_tensor", TORCH_BOX(&quantize_tensor_op));
  m.impl("add_quantized_", TORCH_BOX(&add_quantized_));
}

}  // namespace molegrad::cpu
