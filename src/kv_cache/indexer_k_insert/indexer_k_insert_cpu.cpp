// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/quantize_group.h"
#include "src/kv_cache/indexer_k_insert/indexer_k_insert.h"
#include "src/kv_cache/placements.h"
#include "src/numerics/kv_record.h"

namespace dsm {
namespace {

constexpr std::int64_t kGrainRows = 128;

}  // namespace

void indexer_k_insert_cpu(const IndexerKInsertArgs& a, const Launch&) {
  const std::int64_t d = a.k.size(1), page_size = a.cache.size(1);
  const std::vector<Placement> list = placements(a.slots, a.cache.size(0) * page_size);
  parallel_for(0, static_cast<std::int64_t>(list.size()), kGrainRows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> key(d);
    for (std::int64_t i = begin; i < end; ++i) {
      const auto [slot, token] = list[i];
      cpu::widen_row(a.k, token, key.data());
      const float scale = to_float(e4m3_block_scale(cpu::largest_magnitude(key.data(), d)));
      std::uint8_t* page = a.cache.as<std::uint8_t>() + slot / page_size * a.cache.stride[0];
      const KvEntry<std::uint8_t> entry = indexer_entry(page, page_size, d, slot % page_size);
      cpu::encode_e4m3(key.data(), d, scale, entry.data);
      store_unaligned(entry.scales, scale);
    }
  });
}

}  // namespace dsm
