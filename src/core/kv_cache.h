// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <initializer_list>

#include "dsm/kv_cache.h"
#include "src/core/checks.h"

namespace dsm {

/// `cache` must be pages without gaps inside and without overlap: plain, or in one of `formats`.
void check_kv_cache(const Check& check, const char* argument, const TensorView& cache,
                    std::initializer_list<KvFormat> formats = kKvFormats);

/// The pages of a cache must have no gaps inside and must not overlap.
void check_pages(const Check& check, const char* argument, const TensorView& cache);

/// The dtypes of caches made of bytes.
inline constexpr std::initializer_list<DType> kByteTypes = {DType::uint8, DType::int8, DType::float8_e4m3fn};

}  // namespace dsm
