#include "quantized.h"

#include <algorithm>

#include "memory.h"

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

}  // namespace

void quantize_rows(const View& x, bool e5m2, void* data, float* scale) {
  const Parts parts(x);
  Buffer<float> scratch(parts.count * parts.scratch);
  const auto kernel = kernels().quantized.rows;
  parts.each([&](int64_t part, int64_t begin, int64_t end) {
    kernel(x, begin, end, e5m2, static_cast<uint8_t*>(data), scale,
           scratch.data() + part * parts.scratch);
  });
}

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

}  // namespace molegrad::cpu
