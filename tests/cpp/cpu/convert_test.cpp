// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/cpu/convert.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "src/numerics/bf16.h"
#include "src/numerics/fp16.h"
#include "tests/cpp/cpu/each_isa.h"

namespace dsm::cpu {
namespace {

using ConvertTest = EachIsa;

constexpr DType dtype_of(bfloat16) { return DType::bfloat16; }
constexpr DType dtype_of(float16) { return DType::float16; }

template <class Half, class T>
void expect_widening() {
  std::vector<Half> codes(1 << 16);
  for (std::uint32_t i = 0; i < codes.size(); ++i) codes[i].bits = static_cast<std::uint16_t>(i);
  std::vector<T> wide(codes.size());
  widen(codes.data(), dtype_of(Half{}), static_cast<std::int64_t>(codes.size()), wide.data());
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const float expected = to_float(codes[i]);
    ASSERT_TRUE(std::isnan(expected) ? std::isnan(wide[i])
                                     : wide[i] == expected && std::signbit(wide[i]) == std::signbit(expected))
        << i;
  }
}

TEST_P(ConvertTest, WidensEveryCode) {
  expect_widening<bfloat16, float>();
  expect_widening<float16, float>();
  expect_widening<bfloat16, double>();
  expect_widening<float16, double>();
}

bfloat16 nearest(float x, bfloat16) { return to_bfloat16(x); }
float16 nearest(float x, float16) { return to_float16(x); }

/// Every code's value, the midpoints between neighbours, what lies just beside both, and a sweep of all floats.
template <class Half>
std::vector<float> hard_floats() {
  std::vector<float> x;
  const auto add_around = [&x](float v) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (float w : {v, std::nextafter(v, infinity), std::nextafter(v, -infinity)}) {
      x.push_back(w);
      x.push_back(-w);
    }
  };
  for (std::uint32_t i = 0; i < 0x7fff; ++i) {
    const double low = to_float(Half{static_cast<std::uint16_t>(i)});
    const double high = to_float(Half{static_cast<std::uint16_t>(i + 1)});
    add_around(static_cast<float>(low));
    if (std::isfinite(low) && std::isfinite(high)) add_around(static_cast<float>((low + high) / 2));
  }
  add_around(65520);  // halfway between float16's largest number and infinity's place
  add_around(std::bit_cast<float>(0x7f7f8000));
  for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 7919) x.push_back(std::bit_cast<float>(std::uint32_t(bits)));
  return x;
}

template <class Half>
void expect_narrowing() {
  const std::vector<float> x = hard_floats<Half>();
  std::vector<Half> y(x.size());
  narrow(x.data(), static_cast<std::int64_t>(x.size()), y.data(), dtype_of(Half{}));
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      ASSERT_TRUE(std::isnan(to_float(y[i]))) << i;
    } else {
      ASSERT_EQ(y[i].bits, nearest(x[i], Half{}).bits) << x[i];
    }
  }
}

TEST_P(ConvertTest, NarrowsToNearestEven) {
  expect_narrowing<bfloat16>();
  expect_narrowing<float16>();
}

template <class T, class Storage>
void expect_every_length(DType dtype) {
  for (std::int64_t n = 0; n <= 40; ++n) {
    std::vector<T> x(n + 1, T(-9)), back(n + 1, T(-7));
    std::vector<Storage> stored(n + 1, Storage{});
    for (std::int64_t i = 0; i < n; ++i) x[i] = T(i) / 4;
    narrow(x.data(), n, stored.data(), dtype);
    const Storage untouched{};
    EXPECT_EQ(std::memcmp(&stored[n], &untouched, sizeof untouched), 0);
    widen(stored.data(), dtype, n, back.data());
    EXPECT_EQ(back[n], -7);
    back[n] = -9;
    EXPECT_EQ(back, x);
  }
}

TEST_P(ConvertTest, EveryLengthAndNothingBeyond) {
  expect_every_length<float, float16>(DType::float16);
  expect_every_length<float, bfloat16>(DType::bfloat16);
  expect_every_length<float, float>(DType::float32);
  expect_every_length<float, double>(DType::float64);
  expect_every_length<double, float16>(DType::float16);
  expect_every_length<double, bfloat16>(DType::bfloat16);
  expect_every_length<double, float>(DType::float32);
  expect_every_length<double, double>(DType::float64);
}

DSM_INSTANTIATE_FOR_EACH_ISA(ConvertTest);

}  // namespace
}  // namespace dsm::cpu
