// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "src/numerics/host_device.h"

namespace dsm {

/// What the largest codes of a binary floating-point format stand for.
enum class Specials {
  infinity_nan,  ///< IEEE 754: exponent field all ones is infinity (mantissa 0) or NaN
  nan,           ///< only the code of all ones is NaN; there is no infinity
  none,          ///< every code is a number
};

/// What encoding makes of a value whose rounding exceeds the largest finite number.
enum class Overflow { to_infinity, to_nan, saturate };

/// A binary floating-point format of 1 sign bit, E exponent bits and M mantissa bits, with exponent bias 2^(E-1) - 1
/// and subnormal numbers. A code is held in the low 1 + E + M bits of an unsigned integer.
template <int E, int M, Specials S>
struct FloatFormat {
  static constexpr int kExponentBits = E;
  static constexpr int kMantissaBits = M;
  static constexpr int kBias = (1 << (E - 1)) - 1;
  static constexpr Specials kSpecials = S;
  static constexpr std::uint32_t kSign = 1u << (E + M);
  static constexpr std::uint32_t kInfinity = ((1u << E) - 1) << M;  // when there is one
  static constexpr std::uint32_t kNan = S == Specials::infinity_nan ? kInfinity | 1u << (M - 1) : kSign - 1;
  static constexpr std::uint32_t kMaxFinite =
      S == Specials::infinity_nan ? kInfinity - 1 : (S == Specials::nan ? kSign - 2 : kSign - 1);
};

/// The formats that codes are made from: float and double.
template <class T>
struct WideFormat;
template <>
struct WideFormat<float> {
  using Bits = std::uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
};
template <>
struct WideFormat<double> {
  using Bits = std::uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
};

template <class T>
DSM_HD_INLINE constexpr typename WideFormat<T>::Bits bits_of(T x) {
  return __builtin_bit_cast(typename WideFormat<T>::Bits, x);
}

/// The power of two whose unit in the last place is the smallest subnormal of Format: adding it to a subnormal puts the
/// code into the low bits of the sum, rounded to nearest even by the addition itself; subtracting it undoes that.
template <class Format, class T>
inline constexpr T kSubnormalAligner = __builtin_bit_cast(
    T, static_cast<typename WideFormat<T>::Bits>(WideFormat<T>::kBias + 1 - Format::kBias - Format::kMantissaBits +
                                                 WideFormat<T>::kMantissaBits)
           << WideFormat<T>::kMantissaBits);

/// The code nearest to x (float or double); a tie goes to the even code. Zeros keep their sign. NaN becomes the quiet
/// NaN of the same sign; in a format without NaN it becomes the largest number, as in NVIDIA's conversion instruction.
///
/// Selections instead of branches: loops over arrays vectorise (for GCC under -fno-trapping-math).
template <class Format, Overflow O, class T>
DSM_HD_INLINE constexpr std::uint32_t encode(T x) {
  static_assert(O != Overflow::to_infinity || Format::kSpecials == Specials::infinity_nan);
  static_assert(O != Overflow::to_nan || Format::kSpecials != Specials::none);
  using Wide = WideFormat<T>;
  using Bits = typename Wide::Bits;
  constexpr int kShift = Wide::kMantissaBits - Format::kMantissaBits;
  constexpr Bits kRebias = static_cast<Bits>(Wide::kBias - Format::kBias) << Wide::kMantissaBits;
  constexpr Bits kSmallestNormal = kRebias + (Bits{1} << Wide::kMantissaBits);
  constexpr Bits kWideInfinity = static_cast<Bits>(2 * Wide::kBias + 1) << Wide::kMantissaBits;
  constexpr Bits kWideSign = Bits{1} << (8 * sizeof(T) - 1);

  const Bits bits = bits_of(x);
  const Bits magnitude = bits & (kWideSign - 1);
  // Half a unit, less one where the kept part is even, makes the cut round; its carry may run into the exponent.
  Bits code = (magnitude - kRebias + ((Bits{1} << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1)) >> kShift;
  if constexpr (kRebias != 0) {
    constexpr T kAligner = kSubnormalAligner<Format, T>;
    const Bits subnormal = bits_of(__builtin_bit_cast(T, magnitude) + kAligner) - bits_of(kAligner);
    code = magnitude < kSmallestNormal ? subnormal : code;
  }
  constexpr Bits kOverflow = O == Overflow::to_infinity ? Format::kInfinity
                             : O == Overflow::to_nan    ? Format::kNan
                                                        : Format::kMaxFinite;
  code = code > Format::kMaxFinite ? kOverflow : code;
  const Bits sign = bits >> (8 * sizeof(T) - 1) << (Format::kExponentBits + Format::kMantissaBits);
  if constexpr (Format::kSpecials == Specials::none)
    return static_cast<std::uint32_t>(magnitude > kWideInfinity ? Format::kMaxFinite : code | sign);
  else
    return static_cast<std::uint32_t>((magnitude > kWideInfinity ? Format::kNan : code) | sign);
}

/// The value of a code; exact. NaN stays NaN, with its sign.
template <class Format>
DSM_HD_INLINE constexpr float decode(std::uint32_t code) {
  constexpr int kShift = 23 - Format::kMantissaBits;
  constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - Format::kBias) << 23;
  constexpr std::uint32_t kFloatInfinity = 0x7f800000;

  const std::uint32_t magnitude = code & (Format::kSign - 1);
  std::uint32_t bits = (magnitude << kShift) + kRebias;
  if constexpr (kRebias != 0) {
    constexpr float kAligner = kSubnormalAligner<Format, float>;
    const float subnormal = __builtin_bit_cast(float, magnitude | bits_of(kAligner)) - kAligner;
    bits = magnitude >> Format::kMantissaBits == 0 ? bits_of(subnormal) : bits;
    if constexpr (Format::kSpecials == Specials::infinity_nan)
      bits = magnitude >= Format::kInfinity ? bits | kFloatInfinity : bits;
    if constexpr (Format::kSpecials == Specials::nan)
      bits = magnitude == Format::kNan ? kFloatInfinity | 0x00400000 : bits;
  }
  return __builtin_bit_cast(float, bits | (code & Format::kSign)
                                              << (31 - Format::kExponentBits - Format::kMantissaBits));
}

}  // namespace dsm
