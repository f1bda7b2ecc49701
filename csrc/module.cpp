// molegrad._C: what is not an op. Importing it loads this library, which registers the ops.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cuda/grouped_paths.h"
#include "cuda/paths.h"
#ifdef MOLEGRAD_WITH_CUDA
#include <cuda_runtime_api.h>
#include <dlfcn.h>

// Of cuda/sketch_op.h, without the headers of CUDA that what stands beside it may need.
extern "C" __attribute__((visibility("default"))) int molegrad_sketch_path(int dtype, int64_t n,
                                                                           int64_t m,
                                                                           int64_t tokens,
                                                                           int64_t rank);
#endif

namespace py = pybind11;

namespace {

constexpr const char* kCpuOnly = "this build has the CPU ops only";

py::dict path_dict(const molegrad::cuda::Path& path) {
  py::dict entry;
  entry["supported"] = path.supported;
  entry["reason"] = path.reason;
  return entry;
}

// The sketches of several layers, as this process computes them.
molegrad::cuda::Path grouped_path(const molegrad::cuda::Path& kernels) {
  if (!kernels.supported) return kernels;
  return {true, molegrad::cuda::describe_grouped(std::getenv("MOLEGRAD_SKETCH_PATH"),
                                                 std::getenv("MOLEGRAD_GROUPED_PATH"))};
}

py::dict cuda_paths(int capability, int cublaslt, const std::string& architectures) {
  py::dict paths;
  const auto kernels = molegrad::cuda::kernels_path(capability, architectures);
  paths["kernels"] = path_dict(kernels);
  paths["fp8"] = path_dict(molegrad::cuda::fp8_path(kernels));
  paths["grouped"] = path_dict(grouped_path(kernels));
  paths["cublaslt_grouped"] =
      path_dict(molegrad::cuda::cublaslt_grouped_path(capability, cublaslt));
  return paths;
}

// The path that a sketch of A (tokens, n) and B (tokens, m) takes now, by the name of their dtype.
std::string sketch_path(const std::string& dtype, int64_t n, int64_t m, int64_t tokens,
                        int64_t rank) {
  const int code = molegrad::cuda::sketch_dtype(dtype);
  if (code < 0)
    throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " +
                                dtype);
#ifdef MOLEGRAD_WITH_CUDA
  const int path = molegrad_sketch_path(code, n, m, tokens, rank);
  return molegrad::cuda::path_name(static_cast<molegrad::cuda::SketchPath>(path));
#else
  static_cast<void>(n), static_cast<void>(m), static_cast<void>(tokens), static_cast<void>(rank);
  throw std::runtime_error(kCpuOnly);
#endif
}

#ifdef MOLEGRAD_WITH_CUDA
// What MOLEGRAD_SKETCH_PATH asks for, and the path of every dtype at the ranks of one pass for
// layers that none of its rules means.
py::dict sketch_paths(bool found) {
  using namespace molegrad::cuda;
  const char* text = std::getenv("MOLEGRAD_SKETCH_PATH");
  if (!wanted_path(text, {}).has_value())
    return path_dict(
        {false, std::string("MOLEGRAD_SKETCH_PATH must be ") + kSketchPathForm + "; got " + text});
  py::dict entry = path_dict(
      {found, found ? "by dtype, up to rank " + std::to_string(kRankMax) : "no CUDA device"});
  entry["wanted"] = text == nullptr || *text == 0 ? "auto" : text;
  for (const char* dtype : kSketchDtypes) entry[dtype] = sketch_path(dtype, 0, 0, 0, kRankMax);
  return entry;
}

// torch has loaded its own cuBLASLt before this module; asking that copy, rather than linking one,
// reports the library that will really be used.
int loaded_cublaslt_version() {
  using GetVersion = size_t (*)();
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const auto get = reinterpret_cast<GetVersion>(dlsym(library, "cublasLtGetVersion"));
    const int version = get != nullptr ? static_cast<int>(get()) : 0;
    dlclose(library);
    return version;
  }
  return 0;
}

void add_cuda(py::dict& info) {
  int runtime = 0, driver = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  cudaDeviceProp device = {};
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) status = cudaGetDeviceProperties(&device, 0);
  const bool usable = status == cudaSuccess && devices > 0;
  py::dict built, found;
  built["toolkit"] = CUDART_VERSION;
  built["architectures"] = MOLEGRAD_CUDA_ARCHITECTURES;
  found["runtime"] = runtime;
  found["driver"] = driver;
  found["cublaslt"] = loaded_cublaslt_version();
  if (usable) {
    found["device"] = device.name;
    found["capability"] = py::make_tuple(device.major, device.minor);
    found["multiprocessors"] = device.multiProcessorCount;
    found["memory"] = device.totalGlobalMem;
  } else {
    found["error"] = status != cudaSuccess ? cudaGetErrorString(status) : "no CUDA device";
    cudaGetLastError();  // the failed query must not surface in a later call of torch's
  }
  info["cuda"] = true;
  info["cuda_built"] = built;
  info["cuda_found"] = found;
  py::dict paths = cuda_paths(usable ? 10 * device.major + device.minor : 0,
                              loaded_cublaslt_version(), MOLEGRAD_CUDA_ARCHITECTURES);
  paths["sketch"] = sketch_paths(usable);
  info["paths"] = paths;
}
#else
void add_cuda(py::dict& info) {
  const molegrad::cuda::Path none = {false, kCpuOnly};
  py::dict paths;
  for (const char* name : {"kernels", "fp8", "grouped", "sketch", "cublaslt_grouped"})
    paths[name] = path_dict(none);
  info["cuda"] = false;
  info["paths"] = paths;
}
#endif

py::dict build_info() {
  py::dict info;
  info["torch_built"] = MOLEGRAD_TORCH_VERSION;
  info["torch_abi_floor"] = MOLEGRAD_TORCH_FLOOR;
  info["torch_abi"] = py::int_(aoti_torch_abi_version());
  info["compiler"] = MOLEGRAD_COMPILER;
  info["cpu_capability"] = molegrad::cpu::kernels().name;
  add_cuda(info);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of MoleGrad; importing this module registers them.";
  m.def("build_info", &build_info,
        "Versions at build and at run time, the CPU instruction set picked, CUDA paths.");
  m.def("cuda_paths", &cuda_paths, py::arg("capability"), py::arg("cublaslt"),
        py::arg("architectures"),
        "Kernels, FP8 and products of several layers for a compute capability (90, 120, ...; 0 for "
        "none), a cublasLtGetVersion() and what the kernels were built for (\"90a-real,120\").");
  m.def("sketch_path", &sketch_path, py::arg("dtype"), py::arg("n"), py::arg("m"),
        py::arg("tokens"), py::arg("rank"),
        "The path (own, cublaslt or fused) that a sketch of A (tokens, n) and B (tokens, m) on a "
        "GPU takes now, for the name of their dtype and bases of up to `rank` columns; "
        "RuntimeError in a build without CUDA.");
  m.def("fused_fits", &molegrad::cuda::fused_fits, py::arg("tokens"), py::arg("n"), py::arg("m"),
        py::arg("rank"), py::arg("multiprocessors"), py::arg("shared_memory"),
        "Whether the fused path has room for a sketch of bfloat16 operands on a GPU with so many "
        "multiprocessors of so many bytes of shared memory; where not, it takes the path own.");
}
