// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/kv_cache.h"

#include <algorithm>
#include <string>

namespace dsm {
namespace {

bool one_of(DType dtype, Check::DTypes dtypes) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

}  // namespace

std::optional<KvFormat> kv_format(const TensorView& cache) {
  if (cache.rank > 0 && one_of(cache.dtype, kByteTypes))
    for (KvFormat format : kKvFormats)
      if (kv_bytes(format) == cache.size(-1)) return format;
  return std::nullopt;
}

std::int64_t kv_width(const TensorView& cache) {
  const auto format = kv_format(cache);
  return format ? kv_width(*format) : (cache.rank > 0 ? cache.size(-1) : 0);
}

void check_pages(const Check& check, const char* argument, const TensorView& cache) {
  if (cache.numel() == 0) return;
  TensorView page = cache;
  page.shape[0] = 1;
  check.that(page.contiguous(), argument, "without gaps inside a page",
             "strides [" + std::to_string(cache.stride[0]) + ", " + std::to_string(cache.stride[1]) + ", " +
                 std::to_string(cache.stride[2]) + ", " + std::to_string(cache.stride[3]) + "]");
  check.that(cache.size(0) == 1 || cache.stride[0] >= page.numel(), argument,
             "with pages at least " + std::to_string(page.numel()) + " elements apart", cache.stride[0]);
}

void check_kv_cache(const Check& check, const char* argument, const TensorView& cache,
                    std::initializer_list<KvFormat> formats) {
  std::string sizes;
  for (KvFormat format : formats) sizes += (sizes.empty() ? "" : "|") + std::to_string(kv_bytes(format));
  const bool pages = cache && cache.rank == 4 && cache.size(2) == 1;
  const auto format = pages ? kv_format(cache) : std::nullopt;
  const bool known = format && std::find(formats.begin(), formats.end(), *format) != formats.end();
  check.that(pages && (known || one_of(cache.dtype, kFloating)), argument,
             "[pages, page_size, 1, width] float64|float32|float16|bfloat16 or [pages, page_size, 1, " + sizes +
                 "] uint8|int8|float8_e4m3fn",
             describe(cache));
  check_pages(check, argument, cache);
}

}  // namespace dsm
