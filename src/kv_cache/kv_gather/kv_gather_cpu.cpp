// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <type_traits>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/cpu/kv_rows.h"
#include "src/kv_cache/kv_gather/kv_gather.h"

namespace dsm {
namespace {

constexpr std::int64_t kGrainRows = 32;

template <class A>
void gather(const KvGatherArgs& a) {
  const cpu::KvRows cache(a.cache);
  const std::int64_t row_bytes = cache.width() * element_size(a.out.dtype);
  parallel_for(0, a.out.size(0), kGrainRows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> row(cache.width());
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t index = a.indices ? a.indices.as<const std::int32_t>()[i] : i;
      std::uint8_t* out = a.out.as<std::uint8_t>() + i * row_bytes;
      if (!cache.valid(index)) {
        std::fill_n(out, row_bytes, std::uint8_t{0});
        continue;
      }
      cache.read(index, row.data());
      cpu::narrow(row.data(), cache.width(), out, a.out.dtype);
    }
  });
}

}  // namespace

void kv_gather_cpu(const KvGatherArgs& args, const Launch&) {
  args.out.dtype == DType::float64 ? gather<double>(args) : gather<float>(args);
}

}  // namespace dsm
