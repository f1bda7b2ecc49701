// Which sketches of several layers share launches: plain C++, so that the rule is tested where
// there is no GPU.
#pragma once

#include <cstring>
#include <optional>
#include <string>

#include "product_paths.h"

namespace molegrad::cuda {

// MOLEGRAD_GROUPED_PATH: auto, together or single.
enum class GroupedPath : int {
  kAuto = 0,      // by the rule below
  kTogether = 1,  // all that the kernels of grouped.cuh can take
  kSingle = 2,    // every layer at once, as sketch_accumulate_ does it
};

inline std::optional<GroupedPath> parse_grouped_path(const char* text) {
  if (text == nullptr || *text == 0 || std::strcmp(text, "auto") == 0) return GroupedPath::kAuto;
  if (std::strcmp(text, "together") == 0) return GroupedPath::kTogether;
  if (std::strcmp(text, "single") == 0) return GroupedPath::kSingle;
  return std::nullopt;
}

// Whether a layer may share launches with others of its dtype and padded rank. The kernels are
// those of path kOwn with a table of layers, so what takes another path (MOLEGRAD_SKETCH_PATH;
// float32 and float64; ranks above 128) is computed layer by layer: cuBLASLt's grouped layouts
// exist on neither of our targets, and its batches want operands at equal distances. By arithmetic,
// not measured yet: a layer alone takes two launches for each chunk of tokens that fits L2 and two
// more, one of a group three for a chunk. A layer of several chunks gains nothing. `bytes` are
// those of its A and B, `chunk` those that stay in L2.
inline bool takes_group(GroupedPath wanted, SketchPath sketch, int dtype, int64_t rank,
                        int64_t bytes, int64_t chunk) {
  constexpr int64_t kOnePass = 128;
  if (wanted == GroupedPath::kSingle || (dtype != 2 && dtype != 3) || rank > kOnePass) return false;
  if (choose_sketch_path(sketch, dtype, rank) != SketchPath::kOwn) return false;
  return wanted == GroupedPath::kTogether || bytes <= chunk;
}

// The rule in words, for build_info(): `sketch` and `grouped` are the variables' values.
inline std::string describe_grouped(const char* sketch, const char* grouped) {
  const auto path = wanted_path(sketch, {});
  const auto wanted = parse_grouped_path(grouped);
  if (!path.has_value()) return std::string("MOLEGRAD_SKETCH_PATH is ") + sketch;
  if (!wanted.has_value()) return std::string("MOLEGRAD_GROUPED_PATH is ") + grouped;
  if (*wanted == GroupedPath::kSingle) return "one layer at a time (MOLEGRAD_GROUPED_PATH=single)";
  const bool bfloat16 = takes_group(GroupedPath::kTogether, *path, 2, 1, 0, 0);
  const std::string kinds = bfloat16 ? "bfloat16 and float16" : "float16";
  const std::string sizes = *wanted == GroupedPath::kTogether ? "" : " that fit L2";
  return "kernels of ours for layers of " + kinds + sizes +
         " and ranks up to 128, the others one at a time";
}

}  // namespace molegrad::cuda
