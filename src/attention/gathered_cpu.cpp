// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/gathered_cpu.h"

#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/tiles.h"
#include "src/numerics/softmax_merge.h"

namespace dsm::attention {
namespace {

// Keys of a tile, which shares a second-level cache with its scores, and of a part, which one thread works on. Both are
// part of the result.
constexpr std::int64_t kTileKeys = 128, kPartKeys = 1024;
// Parts whose results are held at once.
constexpr std::int64_t kPartsHeld = 64;

/// Adds a finished part to what has been merged so far.
template <class A>
void merge_rows(std::int64_t rows, std::int64_t d_v, const A* part, const A* part_lse, A* out, A* lse) {
  for (std::int64_t i = 0; i < rows; ++i, part += d_v, out += d_v) {
    const MergedLse<A> merged = merge_lse(lse[i], part_lse[i]);
    lse[i] = merged.lse;
    for (std::int64_t c = 0; c < d_v; ++c) out[c] = merged.a * out[c] + merged.b * part[c];
  }
}

/// Outputs and log-sum-exps over the keys [begin, end) alone; at least one.
template <class A>
void attend_part(const Head& head, const Gather<A>& gather, std::int64_t begin, std::int64_t end, A* out, A* lse) {
  const std::int64_t rows = head.s_q * head.heads, d_v = head.d_v;
  A* const keys = cpu::tile_scratch<A>(kTileKeys * head.d_qk + rows * (d_v + 1));
  A *const tile_out = keys + kTileKeys * head.d_qk, *const tile_lse = tile_out + rows * d_v;
  for (std::int64_t key = begin; key < end; key += kTileKeys) {
    Head tile = head;
    tile.s_kv = std::min(kTileKeys, end - key);
    // The diagonal of a causal mask keeps its place: s_kv - s_q is what it depends on.
    tile.s_q = tile.s_kv + head.s_q - head.s_kv + key;
    gather(key, tile.s_kv, keys);
    tile.k = tile.v = rows_of(keys, head.d_qk);
    if (key == begin) {
      attend(tile, 0, rows, out, lse);
    } else {
      attend(tile, 0, rows, tile_out, tile_lse);
      merge_rows(rows, d_v, tile_out, tile_lse, out, lse);
    }
  }
}

}  // namespace

template <class A>
void attend_gathered(const Head& head, const Gather<A>& gather, A* out, A* lse) {
  const std::int64_t rows = head.s_q * head.heads, d_v = head.d_v, keys = head.s_kv;
  if (keys > 0 && keys <= kPartKeys) return attend_part(head, gather, 0, keys, out, lse);
  std::fill(out, out + rows * d_v, A(0));
  std::fill(lse, lse + rows, -kInfinity<A>);

  const std::int64_t parts = (keys + kPartKeys - 1) / kPartKeys, part_size = rows * (d_v + 1);
  std::vector<A> held(std::min(kPartsHeld, parts) * part_size);
  for (std::int64_t first = 0; first < parts; first += kPartsHeld) {
    const std::int64_t count = std::min(kPartsHeld, parts - first);
    parallel_for(0, count, 1, [&](std::int64_t part, std::int64_t last) {
      for (; part < last; ++part) {
        A* const part_out = held.data() + part * part_size;
        const std::int64_t key = (first + part) * kPartKeys;
        attend_part(head, gather, key, std::min(key + kPartKeys, keys), part_out, part_out + rows * d_v);
      }
    });
    for (std::int64_t part = 0; part < count; ++part) {
      const A* const part_out = held.data() + part * part_size;
      merge_rows(rows, d_v, part_out, part_out + rows * d_v, out, lse);
    }
  }
}

template void attend_gathered(const Head&, const Gather<float>&, float*, float*);
template void attend_gathered(const Head&, const Gather<double>&, double*, double*);

}  // namespace dsm::attention
