// How the sketches of several layers are cut into launches and blocks, and where their scratch
// memory lies: plain C++, so that the rules are tested where there is no GPU.
#pragma once

#include "sketch_plan.h"

namespace molegrad::cuda {

// A layer's sketch: Y (m, kv) += Bᵀ(A V) and W (n, ku) += Aᵀ(B U). Every field has eight bytes. A
// and B are of 16 bits, the columns of a row contiguous; y and w contiguous, in float32.
struct GroupedLayer {
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  int64_t tokens, n, m;  // 1 or more
  const void* v;         // (n, kv): DType code, strides
  int64_t v_dtype, v_row, v_column, kv;
  const void* u;  // (m, ku)
  int64_t u_dtype, u_row, u_column, ku;
  float* y;
  float* w;
};

// What one table of layers holds: it has to fit the 4 KB of a kernel's parameters.
constexpr int kGroupedLayers = 31;

// Tokens of one layer in a chunk, and its share of the blocks and of scratch memory.
struct GroupedPiece {
  int layer = 0;
  int64_t first = 0, tokens = 0;
  int64_t first_tile = 0, tiles = 0;                  // of 128 tokens
  int first_project = 0, first_gather = 0;            // blocks
  int64_t project_sums[2] = {}, gather_sums[2] = {};  // offsets
};

// Pieces that are worked on at the same time.
struct GroupedChunk {
  int pieces = 0;
  int64_t tiles = 0;
  int project_blocks = 0, gather_blocks = 0;
  int64_t q = 0, scale = 0, end = 0;  // offsets
  GroupedPiece piece[kGroupedLayers];
};

struct GroupedPlan {
  int rank = 0;  // padded, of all layers
  int steps_per_part = 1;
  int64_t tokens_per_split = kGatherTokens;
  int ticket_count = 0, chunks = 0;
  int64_t tickets = 0, basis[kGroupedLayers][2] = {}, bases_end = 0, bytes = 0;
};

// Bytes of A and B that stay in an L2 until they are read again, as chunk_tokens has it.
inline int64_t grouped_chunk_bytes(int64_t l2) { return larger(l2 / 2 + (l2 >> 4), 1); }

inline int64_t tile_bytes(const GroupedLayer& layer) {
  return (layer.n + layer.m) * kProjectTokens * 2;
}
inline int64_t project_steps(const GroupedLayer& layer, int rank) {
  return divide_up(layer.n, project_columns(rank)) + divide_up(layer.m, project_columns(rank));
}
inline int64_t gather_tiles(const GroupedLayer& layer) {
  return divide_up(layer.n, kGatherColumns) + divide_up(layer.m, kGatherColumns);
}

// Goes through the layers' tokens from chunk to chunk. A chunk is full at `limit` bytes of A and B,
// give or take an eighth, so that no layer is cut for a few tokens.
class GroupedCursor {
 public:
  GroupedCursor(const GroupedLayer* layers, int count, int64_t limit)
      : layers_(layers), count_(count) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i)
      total += divide_up(layers[i].tokens, kProjectTokens) * tile_bytes(layers[i]);
    limit = larger(limit, 1);
    target_ = divide_up(total, larger(divide_up(total, limit), 1));  // chunks of one size
    slack_ = limit / 8;
  }

  // Fills `chunk` with layers and tokens; false where none are left.
  bool next(GroupedChunk& chunk) {
    chunk.pieces = 0;
    int64_t room = target_;
    while (layer_ < count_) {
      const GroupedLayer& layer = layers_[layer_];
      const int64_t bytes = tile_bytes(layer);
      const int64_t left = divide_up(layer.tokens - first_, kProjectTokens);
      int64_t take = smaller(left, room / bytes);
      if (left * bytes <= room + slack_) take = left;
      if (take < left && take * bytes <= slack_) {
        if (chunk.pieces > 0) break;
        take = larger(take, 1);
      }
      GroupedPiece& piece = chunk.piece[chunk.pieces++];
      piece.layer = layer_;
      piece.first = first_;
      piece.tokens = smaller(take * kProjectTokens, layer.tokens - first_);
      first_ += piece.tokens;
      room -= take * bytes;
      if (take < left) break;
      ++layer_;
      first_ = 0;
      if (room <= 0) break;
    }
    return chunk.pieces > 0;
  }

 private:
  const GroupedLayer* layers_;
  int count_, layer_ = 0;
  int64_t first_ = 0, target_ = 0, slack_ = 0;
};

// Parts of the steps of half `h` (A's columns are the first ones), cut every `per_part`.
inline int64_t parts_of_half(const GroupedLayer& layer, int rank, int h, int64_t per_part) {
  const int64_t of_a = divide_up(layer.n, project_columns(rank));
  const int64_t first = h == 0 ? 0 : of_a, past = h == 0 ? of_a : project_steps(layer, rank);
  return (past - 1) / per_part - first / per_part + 1;
}

// Blocks and scratch memory of a chunk whose layers and tokens are known.
inline void lay_out(const GroupedPlan& plan, const GroupedLayer* layers, GroupedChunk& chunk) {
  chunk.tiles = 0;
  chunk.project_blocks = chunk.gather_blocks = 0;
  for (int i = 0; i < chunk.pieces; ++i) {
    GroupedPiece& piece = chunk.piece[i];
    const GroupedLayer& layer = layers[piece.layer];
    piece.first_tile = chunk.tiles;
    piece.tiles = divide_up(piece.tokens, kProjectTokens);
    piece.first_project = chunk.project_blocks;
    piece.first_gather = chunk.gather_blocks;
    chunk.tiles += piece.tiles;
    chunk.project_blocks += static_cast<int>(
        piece.tiles * divide_up(project_steps(layer, plan.rank), plan.steps_per_part));
    chunk.gather_blocks +=
        static_cast<int>(divide_up(piece.tokens, plan.tokens_per_split) * gather_tiles(layer));
  }
  Layout layout;
  layout.take(plan.bases_end);
  const int64_t row = int64_t{plan.rank} * kPieces * 2;
  chunk.q = layout.take(2 * chunk.tiles * kProjectTokens * row);
  chunk.scale = layout.take(2 * chunk.tiles * 4);
  for (int i = 0; i < chunk.pieces; ++i) {
    GroupedPiece& piece = chunk.piece[i];
    const GroupedLayer& layer = layers[piece.layer];
    const int64_t splits = divide_up(piece.tokens, plan.tokens_per_split);
    for (int h = 0; h < 2; ++h) {
      const int64_t parts = parts_of_half(layer, plan.rank, h, plan.steps_per_part);
      piece.project_sums[h] =
          layout.take(parts > 1 ? parts * piece.tiles * kProjectTokens * plan.rank * 4 : 0);
      piece.gather_sums[h] = layout.take(splits * (h == 0 ? layer.m : layer.n) * plan.rank * 4);
    }
  }
  chunk.end = layout.size();
}

// Into how many units to cut the work of each of several problems, `tiles(i)` of `units(i)`, so
// that all their blocks end soonest: best_parts for a group.
template <typename Tiles, typename Units>
int64_t best_unit(int count, const Tiles& tiles, const Units& units, int64_t overhead,
                  int64_t slots) {
  constexpr int64_t kMostParts = 64;
  int64_t longest = 1, best = 1, least = int64_t{1} << 62;
  for (int i = 0; i < count; ++i) longest = larger(longest, units(i));
  for (int64_t parts = 1; parts <= smaller(kMostParts, longest); ++parts) {
    const int64_t unit = divide_up(longest, parts);
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += tiles(i) * divide_up(units(i), unit);
    const int64_t time = divide_up(blocks, slots) * (unit + (parts > 1 ? overhead : overhead / 2));
    if (time < least) best = unit, least = time;
  }
  return best;
}

// The plan of up to kGroupedLayers layers of one padded rank; `limit` bytes of A and B in a chunk.
inline GroupedPlan plan_grouped(const GroupedLayer* layers, int count, int rank, int64_t limit,
                                Processors processors) {
  GroupedPlan plan;
  GroupedChunk chunk;
  plan.rank = rank;
  const int64_t slots = int64_t{processors.count} * processors.blocks_of_each;
  int64_t tiles = 0;
  for (GroupedCursor cursor(layers, count, limit); cursor.next(chunk); ++plan.chunks) {
    const auto layer = [&](int i) -> const GroupedLayer& { return layers[chunk.piece[i].layer]; };
    const auto token_tiles = [&](int i) {
      return divide_up(chunk.piece[i].tokens, kProjectTokens);
    };
    if (plan.chunks == 0) {  // the others are of its size
      constexpr int64_t kProjectOverhead = 3, kGatherOverhead = 4;
      plan.steps_per_part = static_cast<int>(best_unit(
          chunk.pieces, token_tiles, [&](int i) { return project_steps(layer(i), rank); },
          kProjectOverhead, slots));
      plan.tokens_per_split =
          kGatherTokens *
          best_unit(
              chunk.pieces, [&](int i) { return gather_tiles(layer(i)); },
              [&](int i) { return divide_up(chunk.piece[i].tokens, kGatherTokens); },
              kGatherOverhead, slots);
    }
    int64_t in_chunk = 0;
    for (int i = 0; i < chunk.pieces; ++i) in_chunk += token_tiles(i);
    tiles = larger(tiles, in_chunk);
  }

  Layout layout;
  plan.ticket_count = static_cast<int>(2 * tiles);
  plan.tickets = layout.take(2 * tiles * 4);
  const int64_t row = int64_t{rank} * kPieces * 2, step = project_columns(rank);
  for (int i = 0; i < count; ++i) {
    plan.basis[i][0] = layout.take(round_up_to(layers[i].n, step) * row);
    plan.basis[i][1] = layout.take(round_up_to(layers[i].m, step) * row);
  }
  plan.bases_end = plan.bytes = layout.size();
  for (GroupedCursor cursor(layers, count, limit); cursor.next(chunk);) {
    lay_out(plan, layers, chunk);
    plan.bytes = larger(plan.bytes, chunk.end);
  }
  return plan;
}

}  // namespace molegrad::cuda
