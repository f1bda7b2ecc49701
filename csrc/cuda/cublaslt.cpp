#include "cublaslt.h"

#include "product_paths.h"

// Where the toolkit comes without the headers of cuBLAS, or those of CUDA 12 without CCCL, which
// they need, products are ours.
#if __has_include(<cublasLt.h>) && !defined(MOLEGRAD_EMULATED) && \
    (CUDART_VERSION >= 13000 || __has_include(<nv/target>))
#include <cublasLt.h>
#include <dlfcn.h>

#include <string>

namespace molegrad::cuda {
namespace {

// The functions used, from the library of the major version that this was compiled for: types and
// numbers of another may differ.
struct Library {
  decltype(&cublasLtGetVersion) get_version = nullptr;
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) config_get = nullptr;
  decltype(&cublasLtMatmulAlgoConfigSetAttribute) config_set = nullptr;
  decltype(&cublasLtMatmulAlgoCheck) check = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  bool complete = false;

  Library() {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* loaded = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (loaded == nullptr) return;
    complete = true;
    const auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(loaded, symbol));
      complete = complete && function != nullptr;
    };
    find(get_version, "cublasLtGetVersion");
    find(create, "cublasLtCreate");
    find(desc_create, "cublasLtMatmulDescCreate");
    find(desc_set, "cublasLtMatmulDescSetAttribute");
    find(desc_destroy, "cublasLtMatmulDescDestroy");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(config_get, "cublasLtMatmulAlgoConfigGetAttribute");
    find(config_set, "cublasLtMatmulAlgoConfigSetAttribute");
    find(check, "cublasLtMatmulAlgoCheck");
    find(matmul, "cublasLtMatmul");
  }
};

const Library& library() {
  static const Library instance;
  return instance;
}

struct Choice {
  bool supported = false;
  cublasLtMatmulAlgo_t algorithm = {};
  size_t workspace = 0;
};

// The only state of the process: a handle for each device and the algorithms found. Looking for one
// takes longer than a product does and may not happen while a graph is captured.
Memory<int, cublasLtHandle_t>& handles() {
  static Memory<int, cublasLtHandle_t> instance;
  return instance;
}
Memory<ProductKey, Choice>& choices() {
  static Memory<ProductKey, Choice> instance;
  return instance;
}

// One product as the library describes it. It counts columns first, so a matrix by rows is its
// transpose there: outᵀ = rightᵀ leftᵀ.
class Description {
 public:
  explicit Description(const LtProduct& p) : lt_(library()) {
    const bool wide = p.dtype == 1;
    const cudaDataType_t in = wide ? CUDA_R_64F : p.dtype == 2 ? CUDA_R_16BF : CUDA_R_32F;
    const cudaDataType_t out = wide ? CUDA_R_64F : CUDA_R_32F;
    const cublasComputeType_t compute = wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    const cublasOperation_t as_it_is = CUBLAS_OP_N, across = CUBLAS_OP_T;
    complete_ =
        done(lt_.desc_create(&operation, compute, out)) &&
        done(lt_.desc_set(operation, CUBLASLT_MATMUL_DESC_TRANSA, &as_it_is, sizeof as_it_is)) &&
        done(lt_.desc_set(operation, CUBLASLT_MATMUL_DESC_TRANSB,
                          p.transposed ? &across : &as_it_is, sizeof as_it_is)) &&
        done(lt_.layout_create(&right, in, p.cols, p.depth, p.right_ld)) &&
        done(lt_.layout_create(&left, in, p.transposed ? p.rows : p.depth,
                               p.transposed ? p.depth : p.rows, p.left_ld)) &&
        done(lt_.layout_create(&result, out, p.cols, p.rows, p.out_ld)) &&
        done(lt_.preference_create(&preference));
  }
  ~Description() {
    if (preference != nullptr) lt_.preference_destroy(preference);
    for (cublasLtMatrixLayout_t layout : {result, left, right})
      if (layout != nullptr) lt_.layout_destroy(layout);
    if (operation != nullptr) lt_.desc_destroy(operation);
  }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  bool complete() const { return complete_; }
  static bool done(cublasStatus_t status) { return status == CUBLAS_STATUS_SUCCESS; }

  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t right = nullptr, left = nullptr, result = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;

 private:
  const Library& lt_;
  bool complete_ = false;
};

// What the library says of a product that it has no algorithm for, of ones we changed too.
bool unsupported(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
         status == CUBLAS_STATUS_ARCH_MISMATCH;
}

// The algorithm cut along the sum, if it is not and that fills the device: the library itself does
// not cut small products on every GPU.
void cut_along_depth(cublasLtHandle_t handle, const Description& d, int64_t workspace, int parts,
                     Choice* choice) {
  const Library& lt = library();
  int32_t now = 1;
  lt.config_get(&choice->algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &now, sizeof now, nullptr);
  if (parts <= 1 || now > 1) return;
  cublasLtMatmulAlgo_t cut = choice->algorithm;
  const int32_t count = parts;
  const uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // parts are added in their order
  cublasLtMatmulHeuristicResult_t found = {};
  if (Description::done(
          lt.config_set(&cut, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &count, sizeof count)) &&
      Description::done(
          lt.config_set(&cut, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme, sizeof scheme)) &&
      Description::done(
          lt.check(handle, d.operation, d.right, d.left, d.result, d.result, &cut, &found)) &&
      static_cast<int64_t>(found.workspaceSize) <= workspace) {
    choice->algorithm = cut;
    choice->workspace = found.workspaceSize;
  }
}

// Nothing where the library failed for a reason that may pass, such as memory.
std::optional<Choice> look_for(cublasLtHandle_t handle, const Description& d, const ProductKey& key,
                               int parts) {
  const Library& lt = library();
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    return Description::done(lt.preference_set(d.preference, attribute, &value, sizeof value));
  };
  Choice choice;
  const auto workspace = static_cast<uint64_t>(key.workspace);
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  const auto left = static_cast<uint32_t>(key.left_alignment),
             right = static_cast<uint32_t>(key.right_alignment),
             out = static_cast<uint32_t>(key.out_alignment);
  cublasLtMatmulHeuristicResult_t found = {};
  int count = 0;
  if (!set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace) ||
      !set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions) ||
      !set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, right) ||
      !set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, left) ||
      !set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out) ||
      !set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out))
    return choice;
  const cublasStatus_t status = lt.heuristic(handle, d.operation, d.right, d.left, d.result,
                                             d.result, d.preference, 1, &found, &count);
  if (status != CUBLAS_STATUS_SUCCESS && !unsupported(status)) return std::nullopt;
  if (status != CUBLAS_STATUS_SUCCESS || count == 0 || found.state != CUBLAS_STATUS_SUCCESS)
    return choice;
  choice.supported = true;
  choice.algorithm = found.algo;
  choice.workspace = found.workspaceSize;
  cut_along_depth(handle, d, key.workspace, parts, &choice);
  return choice;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // told to nobody: the next to ask would take it for its own
  return true;
}

}  // namespace

int64_t lt_version() {
  return library().complete ? static_cast<int64_t>(library().get_version()) : 0;
}

LtStatus lt_product(const LtProduct& p, void* workspace, int64_t bytes, int device,
                    int multiprocessors, cudaStream_t stream) {
  const Library& lt = library();
  if (!lt.complete || p.dtype > 2 || p.rows == 0 || p.cols == 0 || p.depth == 0)
    return LtStatus::kNotSupported;
  const ProductKey key = {p.rows,
                          p.cols,
                          p.depth,
                          p.left_ld,
                          p.right_ld,
                          p.out_ld,
                          bytes,
                          lt_version(),
                          device,
                          p.transposed,
                          p.dtype,
                          p.dtype == 1 ? 1 : 0,
                          alignment_of(p.left),
                          alignment_of(p.right),
                          alignment_of(p.out),
                          alignment_of(workspace)};
  std::optional<Choice> choice = choices().find(key);
  std::optional<cublasLtHandle_t> handle = handles().find(device);
  if (choice.has_value() && !choice->supported) return LtStatus::kNotSupported;
  if ((!choice.has_value() || !handle.has_value()) && capturing(stream))
    return LtStatus::kNotSupported;
  if (!handle.has_value()) {
    cublasLtHandle_t created = nullptr;
    if (lt.create(&created) != CUBLAS_STATUS_SUCCESS) return LtStatus::kNotSupported;
    handle = handles().keep(device, created);
  }
  const Description d(p);
  if (!d.complete()) return LtStatus::kNotSupported;
  if (!choice.has_value()) {
    choice = look_for(*handle, d, key, split_k(p.rows, p.cols, p.depth, multiprocessors));
    if (!choice.has_value()) return LtStatus::kNotSupported;
    choice = choices().keep(key, *choice);
  }
  if (!choice->supported) return LtStatus::kNotSupported;

  const double old = p.add ? 1 : 0;
  const float alpha_32 = static_cast<float>(p.alpha), old_32 = p.add ? 1 : 0;
  const bool wide = p.dtype == 1;
  const void* alpha = wide ? static_cast<const void*>(&p.alpha) : &alpha_32;
  const void* beta = wide ? static_cast<const void*>(&old) : &old_32;
  const cublasStatus_t status = lt.matmul(*handle, d.operation, alpha, p.right, d.right, p.left,
                                          d.left, beta, p.out, d.result, p.out, d.result,
                                          &choice->algorithm, workspace, choice->workspace, stream);
  if (unsupported(status)) return LtStatus::kNotSupported;
  return status == CUBLAS_STATUS_SUCCESS ? LtStatus::kDone : LtStatus::kFailed;
}

}  // namespace molegrad::cuda

#else

namespace molegrad::cuda {

int64_t lt_version() { return 0; }

LtStatus lt_product(const LtProduct&, void*, int64_t, int, int, cudaStream_t) {
  return LtStatus::kNotSupported;
}

}  // namespace molegrad::cuda

#endif
