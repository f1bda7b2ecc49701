// The rules of csrc/cuda/*_plan.h and *_paths.h, for test_rules.py.
#include <cstring>
#include <thread>
#include <vector>

#include "cuda/grouped_paths.h"
#include "cuda/grouped_plan.h"
#include "cuda/product_paths.h"
#include "cuda/sketch_plan.h"

using namespace molegrad::cuda;

extern "C" int64_t rule_best_parts(int64_t tiles, int64_t units, int64_t overhead, int64_t slots,
                                   int64_t most) {
  return best_parts(tiles, units, overhead, slots, most);
}
extern "C" int64_t rule_chunk_tokens(int64_t tokens, int64_t bytes, int64_t l2) {
  return chunk_tokens(tokens, bytes, l2);
}
extern "C" int64_t rule_split_k(int64_t rows, int64_t cols, int64_t depth, int multiprocessors) {
  return split_k(rows, cols, depth, multiprocessors);
}
extern "C" int64_t rule_alignment(int64_t address) {
  return alignment_of(reinterpret_cast<const void*>(address));
}
extern "C" int64_t rule_path(int wanted, int dtype, int64_t rank) {
  return static_cast<int64_t>(choose_sketch_path(static_cast<SketchPath>(wanted), dtype, rank));
}
// What a value of MOLEGRAD_SKETCH_PATH wants; null where `text` starts with "null".
extern "C" int64_t rule_wanted(const char* text, int64_t n, int64_t m, int64_t tokens,
                               int64_t rank) {
  const bool unset = std::strncmp(text, "null", 4) == 0;
  const auto path = wanted_path(unset ? nullptr : text, {n, m, tokens, rank});
  return path.has_value() ? static_cast<int64_t>(*path) : -1;
}

// The plan of a sketch, as numbers: what covers what, and where memory lies.
extern "C" int64_t rule_plan(int64_t tokens, int64_t n, int64_t m, int64_t kv, int64_t ku,
                             int64_t chunk, int multiprocessors, int64_t* out) {
  const SketchPlan plan =
      plan_sketch(tokens, n, m, kv, ku, chunk, processors_for(multiprocessors, 228 << 10, 32));
  int64_t i = 0;
  for (int64_t x : {int64_t{plan.rank}, plan.token_tiles, int64_t{plan.project_parts},
                    int64_t{plan.steps_per_part}, int64_t{plan.gather_tiles}, int64_t{plan.splits},
                    plan.tokens_per_split, plan.tickets, plan.bytes})
    out[i++] = x;
  for (const HalfPlan& half : plan.half)
    for (int64_t x :
         {int64_t{half.k}, int64_t{half.steps}, int64_t{half.first_step}, int64_t{half.first_part},
          int64_t{half.parts}, int64_t{half.tiles}, int64_t{half.first_tile}, half.basis, half.q,
          half.scale, half.project_sums, half.gather_sums})
      out[i++] = x;
  return i;
}

// How many of the keys that differ from the first in one field alone are other keys than it.
extern "C" int64_t rule_other_keys(int64_t* fields) {
  const ProductKey key = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 2, 0, 16, 16, 16, 256};
  Memory<ProductKey, int> memory;
  memory.keep(key, 0);
  int64_t others = 0;
  *fields = 0;
  const auto changed = [&](auto ProductKey::* field) {
    ProductKey other = key;
    other.*field += 1;
    others += memory.find(other).has_value() ? 0 : 1;
    ++*fields;
  };
  changed(&ProductKey::rows);
  changed(&ProductKey::cols);
  changed(&ProductKey::depth);
  changed(&ProductKey::left_ld);
  changed(&ProductKey::right_ld);
  changed(&ProductKey::out_ld);
  changed(&ProductKey::workspace);
  changed(&ProductKey::version);
  changed(&ProductKey::device);
  changed(&ProductKey::transposed);
  changed(&ProductKey::in_dtype);
  changed(&ProductKey::out_dtype);
  changed(&ProductKey::left_alignment);
  changed(&ProductKey::right_alignment);
  changed(&ProductKey::out_alignment);
  changed(&ProductKey::workspace_alignment);
  return memory.find(key) == std::optional<int>(0) ? others : -1;
}

// Threads that all look for the same things and remember what they find: how many things are
// remembered, or -1 where two threads disagree.
extern "C" int64_t rule_memory(int threads, int things) {
  Memory<int, int> memory;
  std::vector<std::vector<int>> seen(threads);
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      for (int i = 0; i < things; ++i) {
        const auto found = memory.find(i);
        seen[t].push_back(found.has_value() ? *found : memory.keep(i, 100 * i + t));
      }
    });
  for (auto& thread : running) thread.join();
  for (const auto& mine : seen)
    if (mine != seen[0]) return -1;
  return static_cast<int64_t>(memory.size());
}

extern "C" int64_t rule_takes_group(int wanted, int sketch, int dtype, int64_t rank, int64_t bytes,
                                    int64_t chunk) {
  return takes_group(static_cast<GroupedPath>(wanted), static_cast<SketchPath>(sketch), dtype, rank,
                     bytes, chunk);
}
extern "C" int64_t rule_parse_grouped(int which) {
  const char* texts[] = {nullptr, "", "auto", "together", "single", "one"};
  const auto path = parse_grouped_path(texts[which]);
  return path.has_value() ? static_cast<int64_t>(*path) : -1;
}

// The plan of layers with sizes (tokens, n, m, kv, ku), as numbers: for the group, for every chunk
// and for every piece of it.
extern "C" int64_t rule_grouped_plan(const int64_t* sizes, int count, int64_t limit,
                                     int multiprocessors, int64_t* out) {
  std::vector<GroupedLayer> layers(count);
  int64_t rank = 0;
  for (int i = 0; i < count; ++i) {
    layers[i].tokens = sizes[5 * i];
    layers[i].n = sizes[5 * i + 1];
    layers[i].m = sizes[5 * i + 2];
    layers[i].kv = sizes[5 * i + 3];
    layers[i].ku = sizes[5 * i + 4];
    rank = larger(rank, larger(layers[i].kv, layers[i].ku));
  }
  const Processors processors = processors_for(multiprocessors, 228 << 10, padded_rank(rank));
  const GroupedPlan plan = plan_grouped(layers.data(), count, padded_rank(rank), limit, processors);
  int64_t i = 0;
  for (int64_t x : {int64_t{plan.rank}, int64_t{plan.chunks}, int64_t{plan.steps_per_part},
                    plan.tokens_per_split, int64_t{plan.ticket_count}, plan.bases_end, plan.bytes})
    out[i++] = x;
  GroupedChunk chunk;
  for (GroupedCursor cursor(layers.data(), count, limit); cursor.next(chunk);) {
    lay_out(plan, layers.data(), chunk);
    for (int64_t x : {int64_t{chunk.pieces}, chunk.tiles, int64_t{chunk.project_blocks},
                      int64_t{chunk.gather_blocks}, chunk.q, chunk.scale, chunk.end})
      out[i++] = x;
    for (int p = 0; p < chunk.pieces; ++p) {
      const GroupedPiece& piece = chunk.piece[p];
      for (int64_t x :
           {int64_t{piece.layer}, piece.first, piece.tokens, piece.first_tile, piece.tiles,
            int64_t{piece.first_project}, int64_t{piece.first_gather}, piece.project_sums[0],
            piece.project_sums[1], piece.gather_sums[0], piece.gather_sums[1]})
        out[i++] = x;
    }
  }
  return i;
}
