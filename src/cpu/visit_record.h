// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "dsm/kv_cache.h"
#include "src/numerics/kv_record.h"

namespace dsm::cpu {

template <KvFormat F, class Record>
inline constexpr bool kMatches = kv_bytes(F) == Record::kBytes && kv_width(F) == Record::kWidth;

/// Calls `f.template operator()<Record>()` with the record type of a format.
template <class F>
decltype(auto) visit_record(KvFormat format, F&& f) {
  static_assert(kMatches<KvFormat::v32_fp8, KvV32Fp8> && kMatches<KvFormat::v32_nvfp4, KvV32Nvfp4> &&
                kMatches<KvFormat::v4_fp8, KvV4Fp8> && kMatches<KvFormat::v41_fp8, KvV41Fp8> &&
                kMatches<KvFormat::v41_fp4, KvV41Fp4>);
  switch (format) {
    case KvFormat::v32_fp8:
      return f.template operator()<KvV32Fp8>();
    case KvFormat::v32_nvfp4:
      return f.template operator()<KvV32Nvfp4>();
    case KvFormat::v4_fp8:
      return f.template operator()<KvV4Fp8>();
    case KvFormat::v41_fp8:
      return f.template operator()<KvV41Fp8>();
    default:
      return f.template operator()<KvV41Fp4>();
  }
}

}  // namespace dsm::cpu
