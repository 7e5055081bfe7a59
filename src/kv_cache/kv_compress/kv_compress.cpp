// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/kv_cache/kv_compress/kv_compress.h"

#include <algorithm>

#include "src/core/checks.h"
#include "src/core/registry.h"

namespace dsm {
namespace {

const Operator<KvCompressArgs> forward("kv_cache", "kv_compress", {{"cpu", DeviceType::cpu, kv_compress_cpu}});
const Operator<KvCompressBackwardArgs> backward("kv_cache", "kv_compress_backward",
                                                {{"cpu", DeviceType::cpu, kv_compress_backward_cpu}});

// Positions stay far below the end of int64.
constexpr std::int64_t kMaxPosition = std::int64_t{1} << 60;

/// What both passes take in. `a` is KvCompressArgs or KvCompressBackwardArgs.
template <class Args>
void check_inputs(const Check& check, const Args& a) {
  check.tensor("a", a.a, "[tokens, channels]", {Check::kAny, Check::kAny}, {DType::float64, DType::float32});
  const std::int64_t tokens = a.a.size(0), channels = a.a.size(1);
  check.unit_last_stride("a", a.a);
  check.tensor("z", a.z, "[tokens, channels]", {tokens, channels}, {a.a.dtype});
  check.unit_last_stride("z", a.z);
  check.that(!a.overlap || channels % 2 == 0, "channels", "even to overlap", channels);
  check.contiguous("ape", a.ape, "[ratio, channels]", {Check::kAny, channels}, {a.a.dtype});
  check.that(a.ape.size(0) >= 1, "ratio", "at least 1", a.ape.size(0));
  check.offsets("cu_seqlens", a.cu_seqlens, tokens);
}

void check_state(const Check& check, const KvCompressArgs& a) {
  const bool given = bool(a.state);
  check.that(bool(a.start_positions) == given, "start_positions", "given exactly when state is",
             describe(a.start_positions));
  check.that(bool(a.block_table) == given, "block_table", "given exactly when state is", describe(a.block_table));
  if (!given) return;
  const std::int64_t channels = a.a.size(1), batch = a.cu_seqlens.size(0) - 1;
  check.contiguous("start_positions", a.start_positions, "[batch]", {batch}, {DType::int64});
  if (a.start_positions.device.type == DeviceType::cpu) {
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::int64_t start = a.start_positions.as<const std::int64_t>()[b];
      check.that(start >= 0 && start <= kMaxPosition, "start_positions", "from 0 to 2^60", start);
    }
  }
  check.tensor("state", a.state, "[pages, page_size, 2 * channels]", {Check::kAny, Check::kAny, 2 * channels},
               {a.a.dtype});
  check.unit_last_stride("state", a.state);
  check.tensor("block_table", a.block_table, "[batch, columns]", {batch, Check::kAny}, {DType::int32});
  check.unit_last_stride("block_table", a.block_table);
  const std::int64_t kept = (a.overlap ? 2 : 1) * a.ape.size(0), rows = a.block_table.size(1) * a.state.size(1);
  check.that(batch == 0 || rows >= kept, "block_table",
             "of pages for at least " + std::to_string(kept) + " positions of a request", rows);
}

std::int64_t entry_width(const TensorView& a, bool overlap) { return a.size(1) / (overlap ? 2 : 1); }

void check_args(const KvCompressArgs& a) {
  const Check check("kv_compress");
  check_inputs(check, a);
  check_state(check, a);
  const std::int64_t entries =
      kv_compress_entries(a.a.size(0), a.cu_seqlens.size(0) - 1, a.ape.size(0), !bool(a.state));
  check.contiguous("c", a.c, "[entries, d]", {entries, entry_width(a.a, a.overlap)}, {a.a.dtype});
  check.contiguous("tokens", a.tokens, "[entries]", {entries}, {DType::int32});
  check.on_device(a.a.device, {{"z", a.z},
                               {"ape", a.ape},
                               {"cu_seqlens", a.cu_seqlens},
                               {"start_positions", a.start_positions},
                               {"state", a.state},
                               {"block_table", a.block_table},
                               {"c", a.c},
                               {"tokens", a.tokens}});
}

void check_args(const KvCompressBackwardArgs& a) {
  const Check check("kv_compress_backward");
  check_inputs(check, a);
  const std::int64_t tokens = a.a.size(0), channels = a.a.size(1), ratio = a.ape.size(0);
  const std::int64_t entries = kv_compress_entries(tokens, a.cu_seqlens.size(0) - 1, ratio, true);
  check.tensor("dc", a.dc, "[entries, d]", {entries, entry_width(a.a, a.overlap)}, {a.a.dtype});
  check.unit_last_stride("dc", a.dc);
  check.contiguous("da", a.da, "[tokens, channels]", {tokens, channels}, {a.a.dtype});
  check.contiguous("dz", a.dz, "[tokens, channels]", {tokens, channels}, {a.a.dtype});
  check.contiguous("dape", a.dape, "[ratio, channels]", {ratio, channels}, {a.a.dtype});
  check.on_device(a.a.device, {{"dc", a.dc},
                               {"z", a.z},
                               {"ape", a.ape},
                               {"cu_seqlens", a.cu_seqlens},
                               {"da", a.da},
                               {"dz", a.dz},
                               {"dape", a.dape}});
}

}  // namespace

std::int64_t kv_compress_entries(std::int64_t tokens, std::int64_t batch, std::int64_t ratio, bool whole) {
  return whole ? tokens / ratio : std::min(tokens, tokens / ratio + batch);
}

void kv_compress(const KvCompressArgs& args, const Launch& launch) {
  check_args(args);
  if (args.a.size(0) == 0) return;
  forward(args, args.a.device, launch);
}

void kv_compress_backward(const KvCompressBackwardArgs& args, const Launch& launch) {
  check_args(args);
  // No early return without tokens: dape must still become zero.
  backward(args, args.a.device, launch);
}

}  // namespace dsm
