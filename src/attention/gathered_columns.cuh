// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/attention/gathered_codes.cuh"
#include "src/attention/gathered_rows.cuh"
#include "src/cuda/copy/async.cuh"
#include "src/cuda/ptx/barrier.cuh"

// Tiles of keys, of which each warp has columns of its own: one or two slices of 64 that are values, too, and of keys
// wider than 512 the first four warps 16 more. Elements a warp copies for itself and needs not wait for the others. Of
// codes, whose columns of a warp are but parts of cache lines, warps copy whole rows for each other.
namespace dsm::attention {

inline constexpr int kSlice = 64, kSlices = kMostValues / kSlice;
inline constexpr int kTailWarps = 4, kTailOfWarp = (kMostColumns - kMostValues) / kTailWarps;
/// Bytes of a key (or of a query) in a slice, as 16-bit elements: pieces of 16 bytes, permuted so that those of 8 keys
/// lie in different banks. The columns behind the values are a slice, too, with two pieces of each of the first warps.
inline constexpr int kPiece = 16, kMainBytes = kSlice * 2, kTailPieces = kTailOfWarp * 2 / kPiece;

DSM_HD_INLINE constexpr int main_at(int key, int piece) { return key * kMainBytes + (piece ^ key % 8) * kPiece; }
inline constexpr int kSliceBytes = kTileKeys * kMainBytes;  // of a tile

/// Groups of a row that have float32 scales of any value, which no 16-bit element could take in: the products are
/// scaled instead.
inline constexpr int kScaleGroups = 4;
static_assert(KvV32Fp8::kGroup * kScaleGroups == kMostValues);

/// Where the parts of a row of codes are, in pieces unless said otherwise.
struct RowParts {
  int pieces, stride;         ///< of the row, and from one to the next in a stage, where scales follow codes
  int scales, scale_bytes;    ///< of a key; in bytes
  int tail, tail_pieces;      ///< what is not values: 8 of elements, 4 of codes
  int limit;                  ///< bytes of a row in memory; what is behind counts as zeros
  bool fp4 = false;           ///< codes of 4 bits, otherwise of 8
  bool scales_apart = false;  ///< in memory

  DSM_HD_INLINE constexpr bool has_tail() const { return tail_pieces > 0 && tail * kPiece < limit; }
  /// Where a key is in a stage: such that the lanes that read codes of neighbouring keys meet in no bank.
  DSM_HD_INLINE constexpr int at(int key) const {
    return (fp4 ? key : key / 8 * 8 + key % 2 * 4 + key / 2 % 4) * stride * kPiece;
  }
};

DSM_HD_INLINE constexpr RowParts row_parts(RowFormat format, int d_qk) {
  switch (format) {
    case RowFormat::plain:
      return {72, 73, 0, 0, 64, 8, d_qk * 2};
    case RowFormat::e4m3:
      return {36, 37, 0, 0, 32, 4, d_qk};
    case RowFormat::v32_fp8:
      return {41, 41, KvV32Fp8::kScalesAt, 16, KvV32Fp8::kTailAt / kPiece, 8, KvV32Fp8::kBytes};
    case RowFormat::v32_nvfp4:
      return {22, 22, KvV32Nvfp4::kScalesAt, 32, KvV32Nvfp4::kTailAt / kPiece, 4, KvV32Nvfp4::kBytes, true};
    case RowFormat::v4_fp8:  // the last slice is the record's tail, and follows the codes
      return {36, 37, KvV4Fp8::kDataBytes, 8, 0, 0, KvV4Fp8::kDataBytes, false, true};
    case RowFormat::v41_fp8:
      return {33, 33, KvV41Fp8::kScalesAt, 16, 0, 0, KvV41Fp8::kBytes};
    default:
      return {18, 18, KvV41Fp4::kScalesAt, 32, 0, 0, KvV41Fp4::kBytes, true};
  }
}

/// A stage, which rows are copied to: slices of elements and the columns behind the values, or rows of codes as they
/// are in memory.
struct Stage {
  int stride;  ///< of rows, in pieces; 0: all are elements

  __host__ __device__ int bytes() const {
    return stride == 0 ? (kSlices + 1) * kSliceBytes : (kTileKeys * stride * kPiece + 127) / 128 * 128;
  }
};

/// What a kernel knows of the rows it meets: their format, or that they have any but not all the same one. kScaled:
/// some may be of v32_fp8, whose scales the products take in.
template <RowFormat kFormat>
struct OneFormat {
  static constexpr bool kKnown = true, kPlain = kFormat == RowFormat::plain, kScaled = kFormat == RowFormat::v32_fp8;
  static constexpr RowFormat kOnly = kFormat;
};
template <bool kWithV32>
struct AnyFormat {
  static constexpr bool kKnown = false, kPlain = false, kScaled = kWithV32;
};

#ifdef __CUDACC__

/// Begins to copy the columns of a warp of a tile's rows of elements, d_qk wide, to a stage.
__device__ __forceinline__ void copy_columns(std::uint8_t* stage, int d_qk, const RowsOfTile& rows) {
  const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
  // kPieces of each row from byte `first` on, neighbouring lanes neighbouring ones, to a slice from piece `to_piece`
  // on.
  const auto copy = [&]<int kPieces>(int first, std::uint8_t* slice, int to_piece) {
    constexpr int kKeys = cuda::kWarpSize / kPieces, kAtOnce = kPieces < 4 ? kPieces : 4;  // registers are scarce
    const int key = lane / kPieces, piece = lane % kPieces, at = first + piece * kPiece;
    const int most = at < d_qk * 2 ? kPiece : 0;
    const std::uint32_t to = cuda::shared_address(slice);
#pragma unroll
    for (int begin = 0; begin < kPieces; begin += kAtOnce) {
      const std::uint8_t* data[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) data[i] = rows.data[(begin + i) * kKeys + key];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        cuda::copy_async<kPiece>(to + main_at((begin + i) * kKeys + key, to_piece + piece), data[i] + at, most);
    }
  };
  copy.template operator()<8>(warp * kMainBytes, stage + warp * kSliceBytes, 0);
  if (warp < kTailWarps && d_qk > kMostValues)
    copy.template operator()<kTailPieces>(kMostValues * 2 + warp * kTailOfWarp * 2, stage + kSlices * kSliceBytes,
                                          warp * kTailPieces);
}

/// The lane's 16 columns from 16 · (lane % 4) on of key 8 · group + lane / 4, as T's. Where scales are not powers of
/// two nor short (v32_fp8), codes count as numbers.
template <class T>
struct KeyPieces {
  uint4 at[2];

  __device__ void store(std::uint8_t* tile, int group) const {
    const int lane = threadIdx.x % cuda::kWarpSize;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      *reinterpret_cast<uint4*>(tile + main_at(group * 8 + lane / 4, lane % 4 * 2 + j)) = at[j];
  }
};

/// Calls use(group, pieces) for the four groups of 8 keys of a slice in a stage of codes.
template <class T, class Use>
__device__ __forceinline__ void convert_slice(RowFormat format, const RowParts& parts, const std::uint8_t* stage,
                                              int slice, const Use& use) {
  const int lane = threadIdx.x % cuda::kWarpSize, quarter = lane % 4;
  const auto at = [&](int key, int byte) { return stage + parts.at(key) + byte; };
  // What is loaded of all groups comes before the first conversion, so that it is waited for together.
  const auto of_groups = [&](const auto& load, const auto& converted) {
    constexpr int kGroups = kTileKeys / 8;
    decltype(load(0)) loaded[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) loaded[group] = load(group * 8 + lane / 4);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) use(group, converted(loaded[group]));
  };
  const bool v4 = format == RowFormat::v4_fp8;
  if (format == RowFormat::plain || (v4 && slice == kSlices - 1)) {
    const int first = slice * (v4 ? kSlice : kMainBytes) + quarter * 2 * kPiece;
#pragma unroll
    for (int group = 0; group < kTileKeys / 8; ++group) {
      const auto* const from = reinterpret_cast<const uint4*>(at(group * 8 + lane / 4, first));
      use(group, KeyPieces<T>{{from[0], from[1]}});
    }
    return;
  }
  const auto e4m3_codes = [&](int key) {
    return *reinterpret_cast<const uint4*>(at(key, slice * kSlice + quarter * 16));
  };
  const auto e4m3 = [](uint4 codes) {
    return KeyPieces<T>{{e4m3_chunk<T>({codes.x, codes.y}), e4m3_chunk<T>({codes.z, codes.w})}};
  };
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto e2m1_codes = [&](int key) {
      return *reinterpret_cast<const uint2*>(at(key, slice * (kSlice / 2) + quarter * 8));
    };
    // A lane's columns share a scale.
    const auto scaled = [&]<class Scale>(const auto& load, const auto& times, int scale_byte) {
      struct Loaded {
        decltype(load(0)) codes;
        std::uint8_t scale;
      };
      of_groups([&](int key) { return Loaded{load(key), *at(key, parts.scales + scale_byte)}; },
                [&](const Loaded& loaded) { return times(loaded.codes, scale_pair<Scale>(loaded.scale)); });
    };
    const auto e4m3_times = [&](uint4 codes, __nv_bfloat162 by) {
      KeyPieces<T> pieces = e4m3(codes);
      for (uint4& piece : pieces.at) piece = scaled_chunk(piece, by);
      return pieces;
    };
    const auto e2m1_times = [](uint2 codes, __nv_bfloat162 by) {
      return KeyPieces<T>{{e2m1_chunk(codes.x, by), e2m1_chunk(codes.y, by)}};
    };
    switch (format) {
      case RowFormat::v4_fp8:
        return scaled.template operator()<float8_e8m0fnu>(e4m3_codes, e4m3_times, slice);
      case RowFormat::v41_fp8:
        return scaled.template operator()<float8_e8m0fnu>(e4m3_codes, e4m3_times, slice * 2 + quarter / 2);
      case RowFormat::v32_nvfp4:
      case RowFormat::v41_fp4:
        return scaled.template operator()<float8_e4m3fn>(e2m1_codes, e2m1_times, slice * 4 + quarter);
      default:
        break;
    }
  }
  of_groups(e4m3_codes, e4m3);
}

/// What the elements of a row are, of their values.
__device__ __forceinline__ constexpr float element_unit(const RowParts& parts) { return parts.fp4 ? kE2m1Unit : 1.f; }

/// Makes T's of a warp's codes at the end of rows, in a slice in shared memory.
template <class T>
__device__ __forceinline__ void convert_tail(const RowParts& parts, const std::uint8_t* stage, std::uint8_t* tails) {
  const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
  const auto* const from = reinterpret_cast<const uint4*>(stage + parts.at(lane) + parts.tail * kPiece);
  uint4 pieces[kTailPieces];
  if (parts.tail_pieces == 8) {
    for (int j = 0; j < kTailPieces; ++j) pieces[j] = from[warp * kTailPieces + j];
  } else {
    const uint4 codes = from[warp];
    pieces[0] = e4m3_chunk<T>({codes.x, codes.y}), pieces[1] = e4m3_chunk<T>({codes.z, codes.w});
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (parts.fp4)
        for (uint4& piece : pieces) piece = scaled_chunk(piece, __float2bfloat162_rn(element_unit(parts)));
    }
  }
  for (int j = 0; j < kTailPieces; ++j)
    *reinterpret_cast<uint4*>(tails + main_at(lane, warp * kTailPieces + j)) = pieces[j];
}

#endif

}  // namespace dsm::attention
