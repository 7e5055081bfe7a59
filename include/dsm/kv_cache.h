// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

// A cache holds the rows that attention reads as keys and values, one per token (or per compressed entry), in pages of
// page_size rows. Row index = page · page_size + entry, everywhere: an index below 0 or beyond the last row is no row.
//
// A plain cache is [pages, page_size, 1, width] float64|float32|float16|bfloat16. A quantised cache is
// [pages, page_size, 1, bytes] uint8|int8|float8_e4m3fn, where the number of bytes names the format. In both, a page
// has no gaps inside; pages may be any distance apart (stride 0), e.g. padded to a multiple of 576 bytes.

/// The quantised formats. A row's value is element · scale of its group, formed in float32; it is exact in bfloat16 but
/// for v32_fp8 with scales that are no powers of two. Numbers are little-endian, an e2m1 pair has the element of even
/// index in its low nibble. Sources: FlashMLA (tests/quant.py and interface of 2026-09-30), vLLM.
enum class KvFormat : std::uint8_t {
  /// DeepSeek-V3.2, 656 bytes, 576 values: 512 e4m3 latent | 4 float32 scales, one per 128 | 64 bfloat16 rotary.
  v32_fp8,
  /// DeepSeek-V3.2 in NVFP4, 352 bytes, 576 values: 512 e2m1 latent (256 bytes) | 64 e4m3 rotary, unscaled | 32 e4m3
  /// scales, one per 16 latent values.
  v32_nvfp4,
  /// DeepSeek-V4, 584 bytes, 512 values. Not an array of records: a page is page_size times
  ///   448 e4m3 | 64 bfloat16 rotary                                (576 bytes)
  /// and then page_size times
  ///   7 e8m0 scales, one per 64 of the 448 | 1 byte of zero        (8 bytes).
  v4_fp8,
  /// DeepSeek-V4.1, 528 bytes, 512 values: 512 e4m3 | 16 e8m0 scales, one per 32.
  v41_fp8,
  /// DeepSeek-V4.1 in FP4, 288 bytes, 512 values: 512 e2m1 (256 bytes) | 32 e4m3 scales, one per 16.
  v41_fp4,
};
inline constexpr KvFormat kKvFormats[] = {KvFormat::v32_fp8, KvFormat::v32_nvfp4, KvFormat::v4_fp8, KvFormat::v41_fp8,
                                          KvFormat::v41_fp4};

/// How a writer chooses float32 scales of groups of E4M3 values.
enum class KvScales : std::uint8_t {
  ue8m0,  ///< the smallest power of two >= max(amax, 1e-4) · float(1 / 448)
  fp32,   ///< max(amax / 448, 2^-126)
};

/// Bytes of a row; no two formats have the same.
constexpr int kv_bytes(KvFormat format) {
  constexpr int kBytes[] = {656, 352, 584, 528, 288};
  return kBytes[static_cast<int>(format)];
}

/// Values of a row.
constexpr int kv_width(KvFormat format) {
  return format == KvFormat::v32_fp8 || format == KvFormat::v32_nvfp4 ? 576 : 512;
}

}  // namespace dsm
