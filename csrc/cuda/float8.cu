// Float8 rows and int8 sums, as molegrad/ops/float8.py has them.
#include "dtypes.h"
#include "float8.cuh"
#include "tensors.h"

using namespace molegrad::cuda;

namespace {

// A warp a row where the rows are narrow, else a block a row.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_rows(void (*by_warp)(Parameters...), void (*by_block)(Parameters...),
                        bool narrow, int64_t rows, cudaStream_t stream, Arguments... args) {
  const int64_t blocks = narrow ? ceil_div(rows, kQuantizedThreads / 32) : rows;
  return launch(narrow ? by_warp : by_block, dim3(static_cast<unsigned>(blocks)),
                dim3(kQuantizedThreads), 0, stream, args...);
}

// Blocks for work of which each thread takes a share in turn.
unsigned blocks_for(int64_t count) {
  constexpr int64_t kMostBlocks = 1 << 11;
  const int64_t blocks = ceil_div(count, kQuantizedThreads);
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks);
}

// fn(count) with the elements of a pack as a constant: 16 bytes, or one where rows lie otherwise.
template <typename T, typename F>
cudaError_t with_packs(const void* x, const void* data, int64_t cols, int64_t ld, const F& fn) {
  constexpr int kCount = 16 / sizeof(T);
  if (in_packs<T>(x, cols, ld) && reinterpret_cast<uintptr_t>(data) % kCount == 0)
    return fn(Width<kCount>());
  return fn(Width<1>());
}

}  // namespace

// data (rows, cols) float8 and scales (rows) of x (rows, cols), whose rows are `ld` elements apart.
extern "C" int molegrad_quantize_rows(int dtype, const void* x, int64_t rows, int64_t cols,
                                      int64_t ld, int e5m2, void* data, float* scales,
                                      cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::Element;
    return with_packs<T>(x, data, cols, ld, [&](auto width) {
      constexpr int kCount = decltype(width)::value;
      const auto run = [&](auto by_warp, auto by_block) {
        return launch_rows(by_warp, by_block, cols <= 32 * kCount * kHeldPacks, rows, stream,
                           static_cast<const T*>(x), rows, cols, ld, static_cast<uint8_t*>(data),
                           scales);
      };
      return e5m2 != 0 ? run(quantize_rows_kernel<true, T, kCount, 32>,
                             quantize_rows_kernel<true, T, kCount, kQuantizedThreads>)
                       : run(quantize_rows_kernel<false, T, kCount, 32>,
                             quantize_rows_kernel<false, T, kCount, kQuantizedThreads>);
    });
  });
}

// The same with one scale. Scratch of 4 bytes.
extern "C" int molegrad_quantize_tensor(int dtype, const void* x, int64_t rows, int64_t cols,
                                        int64_t ld, int e5m2, void* data, float* scale,
                                        void* scratch, cudaStream_t stream) {
  if (ld == cols) cols *= rows, ld = cols, rows = 1;
  auto* peak = static_cast<uint32_t*>(scratch);
  cudaError_t status = cudaMemsetAsync(peak, 0, sizeof(uint32_t), stream);
  if (status != cudaSuccess) return status;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::Element;
    const auto* from = static_cast<const T*>(x);
    return with_packs<T>(x, data, cols, ld, [&](auto width) {
      constexpr int kCount = decltype(width)::value;
      const dim3 grid(blocks_for(rows * cols / kCount)), block(kQuantizedThreads);
      status = launch(peak_kernel<T, kCount>, grid, block, 0, stream, from, rows, cols, ld, peak);
      if (status != cudaSuccess) return status;
      return launch(e5m2 != 0 ? quantize_tensor_kernel<true, T, kCount>
                              : quantize_tensor_kernel<false, T, kCount>,
                    grid, block, 0, stream, from, rows, cols, ld, peak, static_cast<uint8_t*>(data),
                    scale);
    });
  });
}

extern "C" int molegrad_dequantize(int dtype, const void* x, int64_t rows, int64_t cols, int64_t ld,
                                   const float* scales, int64_t stride, int out_dtype, void* out,
                                   cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const auto run = [&](auto type, auto out_type) {
    using T = typename decltype(type)::Element;
    using Out = typename decltype(out_type)::Element;
    constexpr int kCount = 16 / sizeof(Out);
    const bool packed = cols % kCount == 0 && ld % kCount == 0 &&
                        reinterpret_cast<uintptr_t>(x) % kCount == 0 &&
                        reinterpret_cast<uintptr_t>(out) % 16 == 0;
    return launch(packed ? dequantize_kernel<T, Out, kCount> : dequantize_kernel<T, Out, 1>,
                  dim3(blocks_for(rows * cols / (packed ? kCount : 1))), dim3(kQuantizedThreads), 0,
                  stream, static_cast<const T*>(x), rows, cols, ld, scales, stride,
                  static_cast<Out*>(out));
  };
  return with_dtype(out_dtype, [&](auto out_type) {
    return dtype == 5 ? run(Type<Float8E5M2>(), out_type) : run(Type<Float8>(), out_type);
  });
}

// data (rows, cols) times scales, (rows) or by_column (cols), += x. Scratch of 8 cols bytes is
// needed by column only.
extern "C" int molegrad_add_quantized(int dtype, const void* x, int64_t rows, int64_t cols,
                                      int64_t ld, int8_t* data, float* scales, int by_column,
                                      void* scratch, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::Element;
    const auto* from = static_cast<const T*>(x);
    return with_packs<T>(x, data, cols, ld, [&](auto width) {
      constexpr int kCount = decltype(width)::value;
      if (by_column == 0)
        return launch_rows(
            add_by_row_kernel<T, kCount, 32>, add_by_row_kernel<T, kCount, kQuantizedThreads>,
            cols <= 32 * kCount * kHeldSums, rows, stream, from, rows, cols, ld, data, scales);
      auto* peaks = static_cast<uint32_t*>(scratch);
      auto* old_scales = reinterpret_cast<float*>(peaks + cols);
      cudaError_t status = cudaMemsetAsync(peaks, 0, cols * sizeof(uint32_t), stream);
      const dim3 grid(static_cast<unsigned>(ceil_div(rows, kColumnRows)),
                      static_cast<unsigned>(ceil_div(cols, 32 * kCount)));
      if (status == cudaSuccess)
        status = launch(column_peaks_kernel<T, kCount>, grid, dim3(kQuantizedThreads), 0, stream,
                        from, rows, cols, ld, data, scales, peaks, old_scales);
      if (status == cudaSuccess)
        status = launch(add_by_column_kernel<T, kCount>, grid, dim3(kQuantizedThreads), 0, stream,
                        from, rows, cols, ld, data, scales, peaks, old_scales);
      return status;
    });
  });
}

// ---- the ops ------------------------------------------------------------------------------------

#ifdef MOLEGRAD_HOST
namespace molegrad::cuda {
namespace {

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, bool e5m2) {
  check_quantize_rows(x);
  const Place place(x);
  const Matrix from(x);  // one dimension is one row
  Tensor data = new_tensor(x, other_last_sizes(x, 0, {}), float8_dtype(e5m2));
  Tensor scale = new_tensor(x, other_last_sizes(x, 1, {}), ScalarType::Float);
  check_launch("quantize_rows", molegrad_quantize_rows(from.dtype, from.data, from.rows, from.cols,
                                                       from.ld, e5m2, data.mutable_data_ptr(),
                                                       memory_of<float>(scale), place.stream()));
  return {data, scale};
}

std::tuple<Tensor, Tensor> quantize_tensor(Tensor x, bool e5m2) {
  check_floating("quantize_tensor", {x});
  const Place place(x);
  const Matrix from(x.dim() > 0 ? x : torch::stable::reshape(x, std::vector<int64_t>{1}));
  Tensor data = new_tensor(x, other_last_sizes(x, 0, {}), float8_dtype(e5m2));
  Tensor scale = new_tensor(x, {}, ScalarType::Float), scratch = new_scratch(x, 4);
  check_launch("quantize_tensor",
               molegrad_quantize_tensor(from.dtype, from.data, from.rows, from.cols, from.ld, e5m2,
                                        data.mutable_data_ptr(), memory_of<float>(scale),
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
                                      memory_of<int8_t>(values), memory_of<float>(scales),
                                      by_column, scratch.mutable_data_ptr(), place.stream()));
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
#endif
