// Which kernels multiply, and what cuBLASLt's algorithms are remembered by: plain C++, so that the
// rules are tested where there is no GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

namespace molegrad::cuda {

// How the products of a sketch are computed. The values are what molegrad_sketch_path returns.
enum class SketchPath : int {
  kAuto = 0,      // by the rule below
  kOwn = 1,       // kernels of ours: sketch.cuh, products.cuh
  kCublasLt = 2,  // where it does not support a product, that one is ours
  kFused = 3,     // one launch of ours, sketch_fused.cuh; where it does not fit, as kOwn
};

// MOLEGRAD_SKETCH_PATH: auto, own, cublaslt or fused. Nothing where it is none of these.
inline std::optional<SketchPath> parse_sketch_path(const char* text) {
  if (text == nullptr || *text == 0 || std::strcmp(text, "auto") == 0) return SketchPath::kAuto;
  if (std::strcmp(text, "own") == 0) return SketchPath::kOwn;
  if (std::strcmp(text, "cublaslt") == 0) return SketchPath::kCublasLt;
  if (std::strcmp(text, "fused") == 0) return SketchPath::kFused;
  return std::nullopt;
}

// By arithmetic, not measured yet:
//   float16             ours: P and R need a power of two for each tile, which a library's product
//                       has no place for
//   float32, float64    cuBLASLt: ours are plain multiply-adds (products.cuh)
//   float8              ours, whatever is wanted: only they read it
//   bfloat16            ours, which read A and B from memory once; above rank 128 they take several
//                       passes, cuBLASLt two. Fused only on request until it has been measured:
//                       by arithmetic it wins from about 4000 tokens on
// `dtype` is a DType code, `rank` the larger number of columns of U and V.
inline SketchPath choose_sketch_path(SketchPath wanted, int dtype, int64_t rank) {
  constexpr int kFloat16 = 3, kBFloat16 = 2;  // float8 ones follow
  constexpr int64_t kOnePass = 128;
  if (dtype >= kFloat16) return SketchPath::kOwn;
  if (wanted == SketchPath::kFused && dtype != kBFloat16) wanted = SketchPath::kAuto;
  if (wanted != SketchPath::kAuto) return wanted;
  return dtype == kBFloat16 && rank <= kOnePass ? SketchPath::kOwn : SketchPath::kCublasLt;
}

// The largest power of two up to 256 that divides an address.
inline int alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  int alignment = 256;
  while (address % alignment != 0) alignment /= 2;
  return alignment;
}

// Into how many parts to cut the sum over `depth` of a product whose result has too few tiles for
// all multiprocessors; 1 where it has enough, or where parts would be too short to pay.
inline int split_k(int64_t rows, int64_t cols, int64_t depth, int multiprocessors) {
  constexpr int64_t kTile = 128, kShortest = 512, kMost = 32;
  const int64_t tiles = ((rows + kTile - 1) / kTile) * ((cols + kTile - 1) / kTile);
  int64_t parts = tiles > 0 ? multiprocessors / tiles : 1;
  if (parts > depth / kShortest) parts = depth / kShortest;
  return static_cast<int>(parts < 1 ? 1 : parts > kMost ? kMost : parts);
}

// Everything an algorithm's choice depends on.
struct ProductKey {
  int64_t rows, cols, depth, left_ld, right_ld, out_ld;
  int64_t workspace;  // bytes
  int64_t version;    // of the library
  int device, transposed, in_dtype, out_dtype;
  int left_alignment, right_alignment, out_alignment, workspace_alignment;

  auto fields() const {
    return std::tie(rows, cols, depth, left_ld, right_ld, out_ld, workspace, version, device,
                    transposed, in_dtype, out_dtype, left_alignment, right_alignment, out_alignment,
                    workspace_alignment);
  }
  bool operator<(const ProductKey& other) const { return fields() < other.fields(); }
};

// What was found once is found again by every thread. Entries are never removed or changed: there
// are as many as a model has shapes of layers.
template <typename Key, typename Value>
class Memory {
 public:
  std::optional<Value> find(const Key& key) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(key);
    if (found == entries_.end()) return std::nullopt;
    return found->second;
  }
  // The first value that was kept for a key stays: threads that looked at once agree on it.
  Value keep(const Key& key, const Value& value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_.emplace(key, value).first->second;
  }
  size_t size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_.size();
  }

 private:
  mutable std::mutex mutex_;
  std::map<Key, Value> entries_;
};

}  // namespace molegrad::cuda
