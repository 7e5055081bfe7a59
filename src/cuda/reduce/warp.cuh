// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

namespace dsm::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// All lanes of the warp must call these; the result is the same bits in every lane that shares in it.

/// Sum over groups of `lanes` neighbouring lanes, a power of two up to 32.
template <class T>
__device__ __forceinline__ T lane_group_sum(T value, int lanes = kWarpSize) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

/// Largest value of such a group. NaN does not count.
template <class T>
__device__ __forceinline__ T lane_group_max(T value, int lanes = kWarpSize) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
template <class T>
__device__ __forceinline__ T warp_max(T value) {
  return lane_group_max(value);
}

/// Words w[j] of lane i of four, neighbours or kApart lanes apart, become w[i] of lane j.
template <int kApart = 1>
__device__ __forceinline__ void transpose_quad(std::uint32_t (&w)[4]) {
  const bool odd = threadIdx.x / kApart % 2, upper = threadIdx.x / kApart / 2 % 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const std::uint32_t got = __shfl_xor_sync(kAllLanes, odd ? w[j] : w[j + 1], kApart);
    (odd ? w[j] : w[j + 1]) = got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const std::uint32_t got = __shfl_xor_sync(kAllLanes, upper ? w[j] : w[j + 2], 2 * kApart);
    (upper ? w[j] : w[j + 2]) = got;
  }
}

/// An unsigned key in the order of floating-point values, never 0; -0 comes before +0 (add 0 first where they must be
/// equal), NaN first or last by its sign.
__device__ __forceinline__ std::uint32_t ordered_key(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return max(bits >> 31 ? ~bits : bits | 0x80000000u, 1u);
}
__device__ __forceinline__ std::uint64_t ordered_key(double x) {
  const auto bits = static_cast<std::uint64_t>(__double_as_longlong(x));
  return max(bits >> 63 ? ~bits : bits | 1ull << 63, 1ull);
}

__device__ __forceinline__ std::uint32_t warp_max_key(std::uint32_t key) { return __reduce_max_sync(kAllLanes, key); }
__device__ __forceinline__ std::uint64_t warp_max_key(std::uint64_t key) {
  const auto high = static_cast<std::uint32_t>(key >> 32), low = static_cast<std::uint32_t>(key);
  const std::uint32_t max_high = __reduce_max_sync(kAllLanes, high);
  const std::uint32_t max_low = __reduce_max_sync(kAllLanes, high == max_high ? low : 0u);
  return static_cast<std::uint64_t>(max_high) << 32 | max_low;
}

/// The smallest index among the lanes that hold the largest key.
template <class Key>
__device__ __forceinline__ std::uint32_t warp_argmax(Key key, std::uint32_t index) {
  return __reduce_min_sync(kAllLanes, key == warp_max_key(key) ? index : 0xffffffffu);
}

}  // namespace dsm::cuda
