// Sums that several blocks hold parts of.
#pragma once

#include "device.cuh"

namespace molegrad::cuda {

struct SumHalf {
  const void* sums;  // (parts, rows, k): parts and rows this many numbers apart
  int64_t part_stride, row_stride;
  void* out;  // (rows, k), rows `ld` numbers apart
  int64_t ld, rows;
  int k;
};

struct SumArgs {
  SumHalf half[2];
  int parts, add;
};

// out = or += the sums of the parts, in their order; blockIdx.y is the half.
template <typename C>
__global__ void add_parts_kernel(SumArgs args) {
  const SumHalf half = blockIdx.y == 0 ? args.half[0] : args.half[1];
  const C* sums = static_cast<const C*>(half.sums);
  C* out = static_cast<C*>(half.out);
  const int64_t count = half.rows * half.k;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / half.k, column = i % half.k;
    C* to = out + row * half.ld + column;
    C sum = args.add != 0 ? *to : C(0);
    for (int p = 0; p < args.parts; ++p)
      sum += sums[p * half.part_stride + row * half.row_stride + column];
    *to = sum;
  }
}

}  // namespace molegrad::cuda
