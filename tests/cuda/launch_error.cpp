// What check_launch says, for test_launch_error.py.
#include <cstdio>
#include <exception>

#include "cuda/tensors.h"

extern "C" int64_t say_launch(int64_t status, char* text, int64_t size) {
  try {
    molegrad::cuda::check_launch("sketch", static_cast<int>(status));
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(text, size, "%s", error.what());
    return 1;
  }
}
