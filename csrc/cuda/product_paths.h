// Which kernels multiply, and what cuBLASLt's algorithms are remembered by: plain C++, so that the
// rules are tested where there is no GPU.
#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string_view>
#include <system_error>
#include <tuple>

namespace molegrad::cuda {

// How the products of a sketch are computed. The values are what molegrad_sketch_path returns.
enum class SketchPath : int {
  kAuto = 0,      // by the rule below
  kOwn = 1,       // kernels of ours: sketch.cuh, products.cuh
  kCublasLt = 2,  // where it does not support a product, that one is ours
  kFused = 3,     // one launch of ours, sketch_fused.cuh; where it does not fit, as kOwn
};

// What a path of a sketch may depend on: A (tokens, n), B (tokens, m), `rank` the larger number of
// columns of U and V.
struct SketchCall {
  int64_t n = 0, m = 0, tokens = 0, rank = 0;
};

inline std::optional<SketchPath> path_named(std::string_view name) {
  if (name == "auto") return SketchPath::kAuto;
  if (name == "own") return SketchPath::kOwn;
  if (name == "cublaslt") return SketchPath::kCublasLt;
  if (name == "fused") return SketchPath::kFused;
  return std::nullopt;
}

// Whether NxM, NxMxTOKENS or NxMxTOKENSxRANK means a call: of these numbers of features, whichever
// of them goes in, at least so many tokens and at most that rank. Nothing where `sizes` is none of
// these.
inline std::optional<bool> means_call(std::string_view sizes, const SketchCall& call) {
  int64_t size[4] = {0, 0, 0, INT64_MAX};
  int count = 0;
  for (const char *at = sizes.data(), *end = at + sizes.size(); at != end; ++count) {
    if (count == 4 || (count > 0 && *at++ != 'x')) return std::nullopt;
    const auto [next, error] = std::from_chars(at, end, size[count]);
    if (error != std::errc() || size[count] < 0) return std::nullopt;
    at = next;
  }
  if (count < 2) return std::nullopt;
  const bool features =
      (call.n == size[0] && call.m == size[1]) || (call.n == size[1] && call.m == size[0]);
  return features && call.tokens >= size[2] && call.rank <= size[3];
}

constexpr const char* kSketchPathForm =
    "auto, own, cublaslt or fused, or rules and one of these for the rest, such as "
    "1280x5120x8192x32=fused,1280x5120=own,auto";

// The path that MOLEGRAD_SKETCH_PATH, of kSketchPathForm, wants for a call: that of the first rule
// which means it. Nothing where `text` is no such list.
inline std::optional<SketchPath> wanted_path(const char* text, const SketchCall& call) {
  std::string_view rest = text == nullptr ? "" : text;
  std::optional<SketchPath> found;
  for (bool last = rest.empty(); !last;) {
    const size_t comma = rest.find(',');
    const std::string_view entry = rest.substr(0, comma);
    const size_t equals = entry.find('=');
    last = comma == std::string_view::npos;
    if (!last) rest.remove_prefix(comma + 1);

    const bool rule = equals != std::string_view::npos;
    const std::optional<SketchPath> path = path_named(rule ? entry.substr(equals + 1) : entry);
    const std::optional<bool> meant = rule ? means_call(entry.substr(0, equals), call) : true;
    if (!path || !meant || (!rule && !last)) return std::nullopt;  // nothing after "the rest"
    if (*meant && !found) found = path;
  }
  return found.value_or(SketchPath::kAuto);
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
