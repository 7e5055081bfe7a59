// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "src/core/parallel_for.h"
#include "src/cpu/convert.h"
#include "src/indexer/hadamard_quantize/hadamard_quantize.h"
#include "src/numerics/e8m0.h"
#include "src/numerics/fp4.h"
#include "src/numerics/fp8.h"

namespace dsm {
namespace {

// Rows whose elements add up to about this many go to one thread at a time.
constexpr std::int64_t kGrainElements = 16384;
constexpr std::int64_t kFp4Block = 32;

/// One factor of the rotation: y[2i], y[2i + 1] = x[i] ± x[half + i]. Applied log2(d) times it is the whole of x · H:
/// it treats the highest bit of the index and moves it to the lowest place. Unlike the butterflies in place, every
/// factor is one long loop.
template <class A>
void rotate_highest_bit(const A* __restrict x, std::int64_t half, A* __restrict y) {
  for (std::int64_t i = 0; i < half; ++i) {
    const A low = x[i], high = x[half + i];
    y[2 * i] = low + high;
    y[2 * i + 1] = low - high;
  }
}

/// The largest magnitude as its bits, which order like the magnitudes, NaN above all.
float largest_magnitude(const float* x, std::int64_t n) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7fffffffu);
  return __builtin_bit_cast(float, largest);
}

/// Dividing by a power of two is exact; the quotient does not overflow, as the scale is at least amax / largest code.
void decode_fp4(float* x, std::int64_t d) {
  for (std::int64_t block = 0; block < d; block += kFp4Block) {
    const float scale = to_float(e2m1_block_scale(largest_magnitude(x + block, kFp4Block)));
    for (std::int64_t i = block; i < block + kFp4Block; ++i) x[i] = to_float(to_e2m1(x[i] / scale)) * scale;
  }
}

float encode_fp8(const float* x, std::int64_t d, float8_e4m3fn* y) {
  const float scale = to_float(e4m3_block_scale(largest_magnitude(x, d)));
  for (std::int64_t i = 0; i < d; ++i) y[i] = to_e4m3_saturating(x[i] / scale);
  return scale;
}

template <class A>
void forward(const HadamardQuantizeArgs& a) {
  const std::int64_t d = a.x.size(1), x_bytes = element_size(a.x.dtype), y_bytes = element_size(a.y.dtype);
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainElements / std::max<std::int64_t>(1, d));
  const A normalise = static_cast<A>(1 / std::sqrt(static_cast<double>(d)));
  parallel_for(0, a.x.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> first(d), second(d);
    A *x = first.data(), *spare = second.data();
    for (std::int64_t row = begin; row < end; ++row) {
      char* const y = a.y.as<char>() + row * d * y_bytes;
      cpu::widen(a.x.as<const char>() + row * a.x.stride[0] * x_bytes, a.x.dtype, d, x);
      if (a.rotate) {
        for (std::int64_t bit = 1; bit < d; bit *= 2) {
          rotate_highest_bit(x, d / 2, spare);
          std::swap(x, spare);
        }
        for (std::int64_t i = 0; i < d; ++i) x[i] *= normalise;
      }
      if constexpr (std::is_same_v<A, float>) {
        if (a.format != IndexerFormat::none && a.rotate && a.x.dtype != DType::float32) {
          cpu::narrow(x, d, spare, a.x.dtype);
          cpu::widen(spare, a.x.dtype, d, x);
        }
        if (a.format == IndexerFormat::fp8) {
          a.scale.as<float>()[row] = encode_fp8(x, d, reinterpret_cast<float8_e4m3fn*>(y));
          continue;
        }
        if (a.format == IndexerFormat::fp4) decode_fp4(x, d);
      }
      cpu::narrow(x, d, y, a.x.dtype);
    }
  });
}

}  // namespace

void hadamard_quantize_cpu(const HadamardQuantizeArgs& args, const Launch&) {
  args.x.dtype == DType::float64 ? forward<double>(args) : forward<float>(args);
}

}  // namespace dsm
