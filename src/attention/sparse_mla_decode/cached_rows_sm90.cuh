// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dsm/tensor_view.h"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/ptx/bulk_copy.cuh"
#include "src/cuda/ptx/wgmma.cuh"
#include "src/numerics/kv_record.h"

// Rows of a quantised cache on their way from global memory to a tile of bfloat16 keys. Four neighbouring lanes bring a
// row: piece c of its codes is 64 bytes, 16 of each lane, so that a warp asks for whole sectors. A lane's 16 codes E4M3
// are two neighbouring chunks of 16 bytes in the tile; row_of_lane says how stores of a warp meet no bank twice.

namespace dsm::sparse_mla_sm90 {

inline constexpr int kLanesPerRow = 4;
inline constexpr int kRowsPerWarp = 8;
inline constexpr std::uint32_t kTileBytes = 64 * 128;  // 64 rows of 64 columns

/// Row 0 of nowhere: what an index that is no row reads.
inline constexpr int kMostRowBytes = 656;
__device__ const uint4 zero_row[kMostRowBytes / 16] = {};

/// A cache, whose pages begin at multiples of 16 bytes.
struct Cache {
  const std::uint8_t* pages;
  std::int64_t page_bytes, page_size;
  std::uint32_t rows;  ///< at most 2^31: more have no index
  cuda::Divider page_of;

  explicit Cache(const TensorView& cache)
      : pages(cache.as<const std::uint8_t>()),
        page_bytes(cache.stride[0] * element_size(cache.dtype)),
        page_size(cache.size(1)),
        rows(static_cast<std::uint32_t>(std::min(cache.size(0) * cache.size(1), kMostRows))),
        page_of(static_cast<std::uint32_t>(std::clamp<std::int64_t>(cache.size(1), 1, kMostRows))) {}

  __device__ bool has(std::int32_t index) const { return static_cast<std::uint32_t>(index) < rows; }

  template <class Record>
  __device__ KvEntry<const std::uint8_t> entry(std::int32_t index) const {
    const auto* zeros = reinterpret_cast<const std::uint8_t*>(zero_row);
    const std::uint32_t page = page_of.quotient(index), in_page = index - page * page_of.divisor();
    const auto its = kv_entry<Record>(pages + page * page_bytes, page_size, in_page);
    return {has(index) ? its.data : zeros, has(index) ? its.scales : zeros};
  }

 private:
  static constexpr std::int64_t kMostRows = std::int64_t{1} << 31;
};

/// How a record lies in a thread's registers, in pieces of 16 bytes: codes, values without scale, scales.
template <class Record>
struct Pieces {
  static constexpr bool kE2m1 = std::is_same_v<typename Record::Element, float4_e2m1>;
  static constexpr int kCodes = Record::kQuantized / (kE2m1 ? 2 : 1) / 64;
  static constexpr int kTail =
      (Record::kWidth - Record::kQuantized) * static_cast<int>(sizeof(typename Record::Tail)) / 64;
  static constexpr int kScaleBytes =
      Record::kQuantized / Record::kGroup * static_cast<int>(sizeof(typename Record::Scale));
  static constexpr int kScales = (kScaleBytes + 15) / 16;
  static constexpr int kLot = (kCodes + kTail + 1) / 2;        // codes and tail come in two lots
  static constexpr int kFirstTiles = kE2m1 ? 2 * kLot : kLot;  // that the first lot fills
};

/// The row among kRowsPerWarp that a lane helps to bring: rows r and r ^ 5 side by side, so that neither the stores of
/// every other chunk (codes) nor those of half the chunks (the tail) of two rows share banks.
__device__ __forceinline__ int row_of_lane(int lane) { return lane / 8 ^ (lane / 4 % 2) * 5; }

__device__ __forceinline__ uint4 load_piece(const std::uint8_t* from) {
  uint4 piece;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "l"(from));
  return piece;
}
/// A row in global memory, and how soon the L2 may give it up.
struct CachedRow {
  const std::uint8_t* bytes;
  cuda::L2Hint hint;

  __device__ CachedRow operator+(int offset) const { return {bytes + offset, hint}; }
};
__device__ __forceinline__ uint4 load_piece(CachedRow from) {
  uint4 piece;
  asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "l"(from.bytes), "l"(static_cast<std::uint64_t>(from.hint)));
  return piece;
}
/// The same from shared memory.
__device__ __forceinline__ uint4 load_piece(std::uint32_t from) {
  uint4 piece;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "r"(from)
               : "memory");
  return piece;
}
/// 8 bytes of shared memory as the first half of a piece.
__device__ __forceinline__ void load_half_piece(uint4& piece, std::uint32_t from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(piece.x), "=r"(piece.y) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_chunk(std::uint32_t to, const std::uint32_t (&chunk)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(chunk[0]), "r"(chunk[1]), "r"(chunk[2]),
               "r"(chunk[3])
               : "memory");
}

/// Asks for a lane's pieces of a row, of one of the two lots. A row is a CachedRow, or an address of shared memory.
template <class Record, int kWhich, class Row, int N>
__device__ __forceinline__ void load_lot(uint4 (&lot)[N], Row row, int lane) {
  using Of = Pieces<Record>;
  static_assert(Of::kLot <= N && Record::kBytes <= kMostRowBytes);
  const Row own = row + lane % kLanesPerRow * 16;
#pragma unroll
  for (int i = 0; i < Of::kLot; ++i) {
    const int c = kWhich * Of::kLot + i;
    if (c < Of::kCodes + Of::kTail)
      lot[i] = load_piece(own + (c < Of::kCodes ? 64 * c : Record::kTailAt + 64 * (c - Of::kCodes)));
  }
}

template <class Record, class Row, int N>
__device__ __forceinline__ void load_scales(uint4 (&scales)[N], Row from) {
  if constexpr (Pieces<Record>::kScaleBytes % 16 == 0) {
#pragma unroll
    for (int c = 0; c < Pieces<Record>::kScales; ++c) scales[c] = load_piece(from + 16 * c);
  } else {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(scales[0].x), "=r"(scales[0].y) : "l"(from));
  }
}

__device__ __forceinline__ std::uint32_t word(const uint4& piece, int i) {
  return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
}
__device__ __forceinline__ std::uint32_t bits_of_pair(__nv_bfloat162 pair) {
  return reinterpret_cast<const std::uint32_t&>(pair);
}

/// Two numbers E4M3 in the low half of a word.
__device__ __forceinline__ float2 e4m3_pair(std::uint32_t codes) {
  __half2 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
      : "=r"(reinterpret_cast<std::uint32_t&>(halves))
      : "h"(static_cast<std::uint16_t>(codes)));
  return __half22float2(halves);
}

/// Four numbers E4M3 in two pairs of float16. The instruction takes either half of a word.
__device__ __forceinline__ void widen_e4m3(std::uint32_t codes, std::uint32_t& low, std::uint32_t& high) {
  asm("{ .reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}
__device__ __forceinline__ void e4m3_pairs(std::uint32_t codes, float2 (&pairs)[2]) {
  std::uint32_t halves[2];
  widen_e4m3(codes, halves[0], halves[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) pairs[i] = __half22float2(reinterpret_cast<const __half2&>(halves[i]));
}

/// A scale that is exact in bfloat16, as are its products with codes.
struct ExactScale {
  __nv_bfloat162 scale;

  __device__ std::uint32_t times(float2 pair) const {
    return bits_of_pair(__hmul2(__float22bfloat162_rn(pair), scale));
  }
};
/// Any other: products are formed in float32.
struct FloatScale {
  float scale;

  __device__ std::uint32_t times(float2 pair) const {
    return bits_of_pair(__floats2bfloat162_rn(pair.x * scale, pair.y * scale));
  }
};

/// The scale of E4M3 codes of piece c.
template <class Record>
__device__ __forceinline__ auto scale_of(const uint4* scales, int c, int lane) {
  if constexpr (std::is_same_v<typename Record::Scale, float>) {
    return FloatScale{__uint_as_float(word(*scales, 64 * c / Record::kGroup))};
  } else {
    // Bits of bfloat16 2^(code − 127) are code << 7, but 2^-127 is not normal, and code 255 is NaN.
    const int byte = 64 * c / Record::kGroup + (Record::kGroup < 64 ? lane % kLanesPerRow * 16 / Record::kGroup : 0);
    const std::uint32_t code = __byte_perm(word(*scales, 64 * c / Record::kGroup / 4), 0, 0x4040 | (byte % 4) * 0x0101);
    const std::uint32_t bits = code << 7 | ((code + 1 & 0xfe) == 0 ? 0x00400040u : 0);
    return ExactScale{reinterpret_cast<const __nv_bfloat162&>(bits)};
  }
}

/// The bits of two bfloat16, 2^-126 times as large as the E2M1 codes in byte i of a word.
__device__ __forceinline__ std::uint32_t e2m1_pair(std::uint32_t codes, int i) {
  const std::uint32_t apart = (codes >> 8 * i & 0xff) * 0x1001;
  return (apart << 6 & 0x01c001c0) | (apart << 12 & 0x80008000);
}

/// 16 codes E4M3 of a lane are two chunks of a column tile.
template <class Scale>
__device__ __forceinline__ void store_e4m3(const uint4& codes, Scale scale, std::uint32_t column_tile,
                                           std::uint32_t row, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t chunk[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float2 pairs[2];
      e4m3_pairs(word(codes, 2 * half + i / 2), pairs);
      chunk[i] = scale.times(pairs[0]), chunk[i + 1] = scale.times(pairs[1]);
    }
    store_chunk(column_tile + cuda::swizzled(row, lane % kLanesPerRow * 2 + half), chunk);
  }
}

/// 32 codes E2M1 of a lane are half a row of the first or the second of two column tiles, and have two scales. Lanes of
/// the second tile begin with their second pair of chunks, for the banks' sake.
__device__ __forceinline__ void store_e2m1(const uint4& codes, std::uint32_t scales, std::uint32_t column_tiles,
                                           std::uint32_t row, int lane) {
  const float2 both = e4m3_pair(scales);
  const __nv_bfloat162 first = __float2bfloat162_rn(both.x), second = __float2bfloat162_rn(both.y);
  const bool other = lane % kLanesPerRow / 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t eight = other ? word(codes, i ^ 2) : word(codes, i);
    const __nv_bfloat162 scale = other != (i / 2 == 1) ? second : first;
    std::uint32_t chunk[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t pair = e2m1_pair(eight, k);
      chunk[k] = bits_of_pair(
          __hmul2(__hmul2(reinterpret_cast<const __nv_bfloat162&>(pair), __float2bfloat162_rn(0x1p126f)), scale));
    }
    store_chunk(column_tiles + other * kTileBytes + cuda::swizzled(row, lane % 2 * 4 + (i ^ other * 2)), chunk);
  }
}

/// Writes the bfloat16 values of a lot to row `row` of a tile of 64 keys.
template <class Record, int kWhich, int N, int M>
__device__ __forceinline__ void store_lot(const uint4 (&lot)[N], const uint4 (&scales)[M], std::uint32_t tile,
                                          std::uint32_t row, int lane) {
  using Of = Pieces<Record>;
  constexpr std::uint32_t kTailTile = Record::kQuantized / 64 * kTileBytes;
#pragma unroll
  for (int i = 0; i < Of::kLot; ++i) {
    const int c = kWhich * Of::kLot + i;
    if (c < Of::kCodes) {
      if constexpr (Of::kE2m1) {
        const int at = c % 2 * 2;
        const std::uint32_t of_lane_pair = lane % 4 / 2 ? word(scales[c / 2], at + 1) : word(scales[c / 2], at);
        store_e2m1(lot[i], of_lane_pair >> 16 * (lane % 2), tile + 2 * c * kTileBytes, row, lane);
      } else {
        store_e4m3(lot[i], scale_of<Record>(scales, c, lane), tile + c * kTileBytes, row, lane);
      }
    } else if (c < Of::kCodes + Of::kTail) {
      if constexpr (std::is_same_v<typename Record::Tail, bfloat16>) {
        const std::uint32_t chunk[4] = {lot[i].x, lot[i].y, lot[i].z, lot[i].w};
        store_chunk(tile + kTailTile + cuda::swizzled(row, 4 * (c - Of::kCodes) + lane % kLanesPerRow), chunk);
      } else {
        store_e4m3(lot[i], ExactScale{__float2bfloat162_rn(1)}, tile + kTailTile, row, lane);
      }
    }
  }
}

}  // namespace dsm::sparse_mla_sm90
