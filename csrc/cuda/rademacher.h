// Random signs on the GPU; see molegrad/reference.py, rademacher.
#pragma once

#include <cstdint>

#include "launch.h"

// out (count), 16-byte aligned, in float32; `counter` lies on the device.
extern "C" int molegrad_rademacher(const int64_t* counter, int64_t seed, int64_t count, float* out,
                                   cudaStream_t stream);
