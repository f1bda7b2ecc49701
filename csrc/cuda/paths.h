// Which CUDA paths a GPU and a cuBLASLt version allow, and which a sketch takes. Separate from
// info.cu so that the rules are compiled, exposed by molegrad._C and tested where there is no GPU.
#pragma once

#include <cstdint>
#include <string>

#include "product_paths.h"
#include "sketch_plan.h"

namespace molegrad::cuda {

struct Path {
  bool supported;
  std::string reason;  // why not, or which kind
};

// Whether code for an architecture, as CMake names it (90a-real, 120-virtual, 90), runs on a GPU.
inline bool runs_on(const std::string& architecture, int capability) {
  const size_t digits = architecture.find_first_not_of("0123456789");
  if (digits == 0) return true;  // native, all, all-major: what was there when it was built
  const int built = std::stoi(architecture.substr(0, digits));
  const std::string rest = digits == std::string::npos ? "" : architecture.substr(digits);
  if (rest[0] == 'a') return capability == built;
  const bool machine_code = rest != "-virtual", intermediate = rest != "-real";
  return (machine_code && capability / 10 == built / 10 && capability >= built) ||
         (intermediate && capability >= built);
}

// All kernels of ours. `capability` is 10 * major + minor, 0 means no device; `architectures` are
// what they were built for, separated by commas.
inline Path kernels_path(int capability, const std::string& architectures) {
  if (capability == 0) return {false, "no CUDA device"};
  if (capability < 90)
    return {false,
            "the kernels need compute capability 9.0 or newer: MOLEGRAD_BUILD=0 runs the ops "
            "on plain torch"};
  for (size_t first = 0; first <= architectures.size();) {
    size_t end = architectures.find(',', first);
    if (end == std::string::npos) end = architectures.size();
    if (runs_on(architectures.substr(first, end - first), capability))
      return {true, "built for " + architectures};
    first = end + 1;
  }
  return {false, "built for " + architectures +
                     ", not for this GPU: MOLEGRAD_CUDA_ARCHITECTURES=native pip install -e ."};
}

// Products of float8 operands, sketch.cuh: wherever the kernels run.
inline Path fp8_path(const Path& kernels) {
  if (!kernels.supported) return kernels;
  return {true, "kernels of ours, any layout, one scale or one for each token"};
}

// cuBLASLt's own grouped products, which nothing here uses: grouped_paths.h says what does.
// `cublaslt` is cublasLtGetVersion(), e.g. 130200 for 13.2.0.
inline Path cublaslt_grouped_path(int capability, int cublaslt) {
  if (capability == 0) return {false, "no CUDA device"};
  const bool hopper = capability == 90;
  const bool blackwell_server = capability >= 100 && capability < 120;
  if (!hopper && !blackwell_server)
    return {false, "cuBLASLt groups products on compute capability 9.0, 10.x and 11.0 only"};
  const int needed = hopper ? 130400 : 130200;
  if (cublaslt < needed)
    return {false, std::string("needs cuBLASLt ") + (hopper ? "13.4" : "13.2") + " or newer"};
  return {true, "cuBLASLt grouped layouts"};
}

// The dtypes that a sketch takes, each at the place of its DType code.
constexpr const char* kSketchDtypes[] = {"float32", "float64", "bfloat16", "float16"};

// The DType code; -1 where a sketch does not take the dtype.
inline int sketch_dtype(const std::string& name) {
  int code = 0;
  for (const char* known : kSketchDtypes) {
    if (name == known) return code;
    ++code;
  }
  return -1;
}

inline const char* path_name(SketchPath path) {
  switch (path) {
    case SketchPath::kOwn:
      return "own";
    case SketchPath::kCublasLt:
      return "cublaslt";
    case SketchPath::kFused:
      return "fused";
    default:
      return "auto";
  }
}

// Whether one launch computes the sketch of dense bfloat16 A (tokens, n) and B (tokens, m); where
// not, MOLEGRAD_SKETCH_PATH=fused runs the kernels of "own". `shared_memory` is a multiprocessor's.
inline bool fused_fits(int64_t tokens, int64_t n, int64_t m, int64_t rank, int multiprocessors,
                       int64_t shared_memory) {
  const bool aligned = n % 8 == 0 && m % 8 == 0;
  return aligned &&
         plan_fused(tokens, n, m, rank, rank, kPieces, multiprocessors, shared_memory).size > 0;
}

}  // namespace molegrad::cuda
