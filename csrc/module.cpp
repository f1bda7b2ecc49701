// molegrad._C: what is not an op. Importing it loads this library, which registers the ops.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>

#include "cpu/kernels.h"
#include "cuda/grouped_paths.h"
#include "cuda/paths.h"
#ifdef MOLEGRAD_WITH_CUDA
#include "cuda/info.h"
#endif

namespace py = pybind11;

namespace {

py::dict path_dict(const molegrad::cuda::Path& path) {
  py::dict entry;
  entry["supported"] = path.supported;
  entry["reason"] = path.reason;
  return entry;
}

// The sketches of several layers, as this process computes them.
molegrad::cuda::Path grouped_path(int capability) {
  if (capability == 0) return {false, "no CUDA device"};
  return {true, molegrad::cuda::describe_grouped(std::getenv("MOLEGRAD_SKETCH_PATH"),
                                                 std::getenv("MOLEGRAD_GROUPED_PATH"))};
}

py::dict cuda_paths(int capability, int cublaslt) {
  py::dict paths;
  paths["fp8"] = path_dict(molegrad::cuda::fp8_path(capability));
  paths["grouped"] = path_dict(grouped_path(capability));
  paths["cublaslt_grouped"] =
      path_dict(molegrad::cuda::cublaslt_grouped_path(capability, cublaslt));
  return paths;
}

#ifdef MOLEGRAD_WITH_CUDA
void add_cuda(py::dict& info) {
  MolegradCudaInfo cuda;
  molegrad_cuda_info(0, &cuda);
  py::dict built, found;
  built["toolkit"] = cuda.toolkit;
  built["architectures"] = MOLEGRAD_CUDA_ARCHITECTURES;
  found["runtime"] = cuda.runtime;
  found["driver"] = cuda.driver;
  found["cublaslt"] = cuda.cublaslt;
  if (cuda.device_count > 0) {
    found["device"] = cuda.name;
    found["capability"] = py::make_tuple(cuda.major, cuda.minor);
    found["multiprocessors"] = cuda.multiprocessors;
    found["memory"] = cuda.memory;
  } else {
    found["error"] = cuda.error;
  }
  info["cuda"] = true;
  info["cuda_built"] = built;
  info["cuda_found"] = found;
  info["paths"] =
      cuda_paths(cuda.device_count > 0 ? 10 * cuda.major + cuda.minor : 0, cuda.cublaslt);
}
#else
void add_cuda(py::dict& info) {
  const molegrad::cuda::Path none = {false, "this build has the CPU ops only"};
  py::dict paths;
  paths["fp8"] = path_dict(none);
  paths["grouped"] = path_dict(none);
  paths["cublaslt_grouped"] = path_dict(none);
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
        "FP8 and products of several layers for a compute capability (89, 90, 120, ...; 0 for "
        "none) and a "
        "cublasLtGetVersion().");
}
