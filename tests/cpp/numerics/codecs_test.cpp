// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
//
// Every codec against the definition of its format: decoding against the value of each code, encoding against the
// nearest value found by comparing numbers, on all ties and their neighbours and on random bit patterns.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "src/numerics/bf16.h"
#include "src/numerics/float_traits.h"
#include "src/numerics/fp16.h"
#include "src/numerics/fp4.h"
#include "src/numerics/fp8.h"

namespace dsm {
namespace {

constexpr int kNone = -1;

/// A format by its definition, and the codec under test.
struct Codec {
  const char* name;
  float (*decode)(std::uint32_t);
  std::uint32_t (*encode_float)(float);
  std::uint32_t (*encode_double)(double);
  int exponent_bits, mantissa_bits, bias;
  double largest;
  int infinity;     // code, or kNone
  int first_nan;    // all codes from here to the largest magnitude are NaN, or kNone
  int encoded_nan;  // what NaN becomes
  int overflow;     // what everything too large becomes, infinity included

  std::uint32_t sign() const { return 1u << (exponent_bits + mantissa_bits); }

  /// Value of a code without sign, were it an ordinary number.
  double value(int code) const {
    const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  }

  /// GoogleTest would print the bytes, pointers included.
  friend void PrintTo(const Codec& codec, std::ostream* out) { *out << codec.name; }
};

// clang-format off
#define DSM_CODEC(Type, encode) #encode, \
    [](std::uint32_t code) { return to_float(Type{static_cast<decltype(Type::bits)>(code)}); }, \
    [](float x) -> std::uint32_t { return encode(x).bits; }, \
    [](double x) -> std::uint32_t { return encode(x).bits; }

const Codec kCodecs[] = {
    //                                            E  M   bias largest      infinity NaN     NaN     overflow
    {DSM_CODEC(bfloat16, to_bfloat16),            8, 7,  127, 0x1.FEp127,  0x7f80,  0x7f81, 0x7fc0, 0x7f80},
    {DSM_CODEC(float16, to_float16),              5, 10, 15,  65504,       0x7c00,  0x7c01, 0x7e00, 0x7c00},
    {DSM_CODEC(float8_e5m2, to_e5m2),             5, 2,  15,  57344,       0x7c,    0x7d,   0x7e,   0x7c},
    {DSM_CODEC(float8_e4m3fn, to_e4m3_saturating), 4, 3, 7,   448,         kNone,   0x7f,   0x7f,   0x7e},
    {DSM_CODEC(float8_e4m3fn, to_e4m3_or_nan),    4, 3,  7,   448,         kNone,   0x7f,   0x7f,   0x7f},
    {DSM_CODEC(float4_e2m1, to_e2m1),             2, 1,  1,   6,           kNone,   kNone,  7,      7},
};
// clang-format on

class CodecTest : public testing::TestWithParam<Codec> {
 protected:
  /// Values of the finite codes without sign, and of the one that would follow the largest.
  std::vector<double> values;

  void SetUp() override {
    for (int code = 0; values.empty() || values.back() <= GetParam().largest; ++code)
      values.push_back(GetParam().value(code));
  }

  int finite_codes() const { return static_cast<int>(values.size()) - 1; }

  /// The code nearest to x, by comparing numbers: sums of neighbouring values and 2|x| are exact in double.
  std::uint32_t nearest(double x) const {
    const std::uint32_t sign = std::signbit(x) ? GetParam().sign() : 0;
    const auto above = std::upper_bound(values.begin(), values.end(), std::abs(x));
    if (above == values.end()) return sign | GetParam().overflow;
    const int high = static_cast<int>(above - values.begin()), low = high - 1;
    const double twice = 2 * std::abs(x), sum = values[low] + values[high];
    const int code = twice < sum || (twice == sum && low % 2 == 0) ? low : high;
    return sign | (code == finite_codes() ? GetParam().overflow : code);
  }

  template <class T>
  std::uint32_t encode(T x) const {
    if constexpr (std::is_same_v<T, float>)
      return GetParam().encode_float(x);
    else
      return GetParam().encode_double(x);
  }

  template <class T>
  void check(T x) const {
    ASSERT_EQ(encode(x), nearest(x)) << "x = " << x;
    ASSERT_EQ(encode(-x), nearest(-x)) << "x = " << -x;
  }

  template <class T>
  void check_ties_and_values() const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    for (int code = 0; code < finite_codes(); ++code) {
      const T value = static_cast<T>(values[code]), tie = static_cast<T>((values[code] + values[code + 1]) / 2);
      for (T x : {value, tie}) {
        check(std::nextafter(x, -kInfinity));
        check(x);
        check(std::nextafter(x, kInfinity));
      }
      if (HasFatalFailure()) return;
    }
  }

  template <class T>
  void check_specials() const {
    using Limits = std::numeric_limits<T>;
    for (T x : {T(0), Limits::denorm_min(), Limits::min(), Limits::max()}) check(x);
    const std::uint32_t sign = GetParam().sign(), overflow = GetParam().overflow;
    EXPECT_EQ(encode(Limits::infinity()), overflow);
    EXPECT_EQ(encode(-Limits::infinity()), overflow | sign);
    const bool has_nan = GetParam().first_nan != kNone;
    for (T nan : {Limits::quiet_NaN(), Limits::signaling_NaN()}) {
      EXPECT_EQ(encode(std::copysign(nan, T(1))), GetParam().encoded_nan);
      EXPECT_EQ(encode(std::copysign(nan, T(-1))), GetParam().encoded_nan | (has_nan ? sign : 0));
    }
  }

  /// Random sign and mantissa; exponents around the format's range, and now and then any bit pattern.
  template <class T, class Bits>
  void check_random(int mantissa_bits, int wide_bias) const {
    std::mt19937_64 random(7);
    const int lowest = std::max(0, wide_bias - GetParam().bias - GetParam().mantissa_bits - 3);
    const int span = (1 << GetParam().exponent_bits) + GetParam().mantissa_bits + 6;
    for (int i = 0; i < 400000; ++i) {
      Bits bits = static_cast<Bits>(random());
      if (i % 4 != 0) {
        const Bits exponent = std::min<Bits>(lowest + random() % span, 2 * wide_bias);
        bits = (bits & ((Bits{1} << mantissa_bits) - 1)) | exponent << mantissa_bits;
      }
      T x;
      std::memcpy(&x, &bits, sizeof x);
      if (!std::isnan(x)) check(x);
      if (HasFatalFailure()) return;
    }
  }
};

TEST_P(CodecTest, DecodesEveryCodeToItsDefinedValue) {
  const Codec& codec = GetParam();
  for (std::uint32_t code = 0; code < 2 * codec.sign(); ++code) {
    const bool negative = code & codec.sign();
    const int magnitude = static_cast<int>(code & (codec.sign() - 1));
    const float got = codec.decode(code);
    ASSERT_EQ(std::signbit(got), negative) << code;
    if (codec.first_nan != kNone && magnitude >= codec.first_nan) {
      ASSERT_TRUE(std::isnan(got)) << code;
    } else if (magnitude == codec.infinity) {
      ASSERT_TRUE(std::isinf(got)) << code;
    } else {
      ASSERT_LT(magnitude, finite_codes());
      ASSERT_EQ(static_cast<double>(got), negative ? -values[magnitude] : values[magnitude]) << code;
    }
  }
}

TEST_P(CodecTest, EveryNumberReturnsToItsCode) {
  const Codec& codec = GetParam();
  for (std::uint32_t code = 0; code < 2 * codec.sign(); ++code) {
    const float x = codec.decode(code);
    if (std::isnan(x)) continue;
    ASSERT_EQ(codec.encode_float(x), code);
    ASSERT_EQ(codec.encode_double(x), code);
  }
}

TEST_P(CodecTest, RoundsTiesToEvenAndTheirNeighboursToNearest) {
  check_ties_and_values<float>();
  check_ties_and_values<double>();  // a double just off a tie must not be rounded to float first
}

TEST_P(CodecTest, EncodesZeroInfinityAndNan) {
  check_specials<float>();
  check_specials<double>();
}

TEST_P(CodecTest, EncodesRandomNumbersToTheNearestCode) {
  check_random<float, std::uint32_t>(23, 127);
  check_random<double, std::uint64_t>(52, 1023);
}

INSTANTIATE_TEST_SUITE_P(Codecs, CodecTest, testing::ValuesIn(kCodecs),
                         [](const auto& info) { return std::string(info.param.name); });

// Values as printed in the format's specifications.
TEST(Codecs, KnownValues) {
  const float e2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  for (std::uint8_t code = 0; code < 8; ++code) EXPECT_EQ(to_float(float4_e2m1{code}), e2m1[code]);
  const float ties[][2] = {{0.25, 0}, {0.75, 1}, {1.25, 1}, {1.75, 2}, {2.5, 2}, {3.5, 4}, {5, 4}};
  for (const auto& [tie, rounded] : ties) EXPECT_EQ(to_float(to_e2m1(tie)), rounded) << tie;
  EXPECT_EQ(to_e4m3_or_nan(464.0f).bits, 0x7e);
  EXPECT_EQ(to_e4m3_or_nan(std::nextafter(464.0f, 1e9f)).bits, 0x7f);
  EXPECT_EQ(to_e4m3_saturating(1e30f).bits, 0x7e);
  EXPECT_EQ(to_float16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(to_float16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(to_e5m2(61439.0f).bits, 0x7b);
  EXPECT_EQ(to_e5m2(61440.0f).bits, 0x7c);
}

TEST(Codecs, PackedPairsPutTheEvenElementLow) {
  EXPECT_EQ(pack_e2m1({0x3}, {0xc}), 0xc3);
  for (int byte = 0; byte < 256; ++byte) {
    const auto pair = static_cast<std::uint8_t>(byte);
    EXPECT_EQ(pack_e2m1(even_e2m1(pair), odd_e2m1(pair)), pair);
  }
}

TEST(FloatTraits, NarrowInvertsWidenAndRoundsOnce) {
  static_assert(std::is_same_v<Compute<double>, double> && std::is_same_v<Compute<float>, float>);
  static_assert(std::is_same_v<Compute<bfloat16>, float> && std::is_same_v<Compute<float16>, float>);
  EXPECT_EQ(narrow<double>(widen(0.1)), 0.1);
  EXPECT_EQ(narrow<float>(widen(0.1f)), 0.1f);
  EXPECT_EQ(narrow<bfloat16>(widen(bfloat16{0x3dcd})).bits, 0x3dcd);
  EXPECT_EQ(narrow<float16>(widen(float16{0x2e66})).bits, 0x2e66);
  // 1 + 2^-8 lies between two bfloat16 numbers; a float keeps nothing of the 2^-40 that decides.
  EXPECT_EQ(narrow<bfloat16>(1 + 0x1p-8 + 0x1p-40).bits, 0x3f81);
  EXPECT_EQ(narrow<bfloat16>(1 + 0x1p-8f).bits, 0x3f80);
}

}  // namespace
}  // namespace dsm
