// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/attention/gathered_codes.cuh"
#include "src/attention/gathered_rows.cuh"
#include "src/cuda/copy/async.cuh"
#include "src/cuda/ptx/barrier.cuh"

// Tiles of keys of which each warp has columns of its own: one or two slices of 64 that are values, too, and of keys
// wider than 512 the first four warps 16 more. A warp copies and converts them without waiting for the others.
namespace dsm::attention {

inline constexpr int kSlice = 64, kSlices = kMostValues / kSlice;
inline constexpr int kTailWarps = 4, kTailOfWarp = (kMostColumns - kMostValues) / kTailWarps;
/// Bytes of a key (or of a query) in a slice and in a warp's last columns, as 16-bit elements: pieces of 16 bytes,
/// permuted so that those of 8 keys lie in different banks.
inline constexpr int kMainBytes = kSlice * 2, kTailBytes = kTailOfWarp * 2;

DSM_HD_INLINE constexpr int main_at(int key, int piece) { return key * kMainBytes + (piece ^ key % 8) * 16; }
/// Codes of a key in kTogether slices with kPieces each: read, 8 or 16 bytes by a lane, in the order of keys and
/// slices.
template <int kPieces, int kTogether>
DSM_HD_INLINE constexpr int code_at(int key, int piece) {
  const int turned = kTogether == 1 ? 0 : kPieces == 4 ? key % 2 * 4 : key / 2 % 2 * 2;
  return (key * kPieces * kTogether + (piece ^ turned)) * 16;
}
inline constexpr int kSliceBytes = kTileKeys * kMainBytes;  // of a tile
DSM_HD_INLINE constexpr int tail_at(int key, int piece) { return key * kTailBytes + (piece ^ key / 4 % 2) * 16; }

/// Groups of a row that have float32 scales of any value, which no 16-bit element could take in: the products are
/// scaled instead.
inline constexpr int kScaleGroups = 4;
static_assert(KvV32Fp8::kGroup * kScaleGroups == kMostValues);

/// A stage, which rows are copied to: the slices as they are in memory; the rows' ends; of codes, 4 bytes of scales for
/// each slice and key.
struct Stage {
  int code_bytes;  ///< of a key in a slice; 0: these are elements already

  __host__ __device__ int main_bytes() const { return kTileKeys * (code_bytes == 0 ? kMainBytes : code_bytes); }
  __host__ __device__ int tails_at() const { return kSlices * main_bytes(); }
  __host__ __device__ int scales_at() const { return tails_at() + kTailWarps * kTileKeys * kTailBytes; }
  __host__ __device__ int bytes() const { return scales_at() + (code_bytes == 0 ? 0 : kSlices * kTileKeys * 4); }
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

/// Where a slice, and the last columns of the warp with as high a number, are in the rows of a pool.
struct ColumnBytes {
  int first, pieces;            ///< the 64 columns: 2, 4 or 8 pieces of 16 bytes
  int tail_first, tail_pieces;  ///< the 16 at the end
  int scales;                   ///< 4 bytes; −1: none
  int limit;                    ///< bytes of a row; what is behind counts as zeros
  bool scales_apart;
};

__device__ __forceinline__ ColumnBytes column_bytes(RowFormat format, int d_qk, int slice) {
  constexpr int kWhole = INT32_MAX;
  const int column = slice * kSlice, tail = kMostValues + slice * kTailOfWarp, some = slice < kTailWarps;
  ColumnBytes found{};
  switch (format) {
    case RowFormat::plain:
      found = {column * 2, 8, tail * 2, 2 * some, -1, d_qk * 2, false};
      break;
    case RowFormat::e4m3:
      found = {column, 4, tail, some, -1, d_qk, false};
      break;
    case RowFormat::v32_fp8:
      found = {
          column, 4,    KvV32Fp8::kTailAt + slice * 32, 2 * some, KvV32Fp8::kScalesAt + column / KvV32Fp8::kGroup * 4,
          kWhole, false};
      break;
    case RowFormat::v32_nvfp4:
      found = {column / 2, 2, KvV32Nvfp4::kTailAt + slice * 16, some, KvV32Nvfp4::kScalesAt + slice * 4, kWhole, false};
      break;
    case RowFormat::v4_fp8:  // the last slice is the record's tail, and follows the codes
      found = {column, column < KvV4Fp8::kQuantized ? 4 : 8, 0, 0, slice / 4 * 4, kWhole, true};
      break;
    case RowFormat::v41_fp8:
      found = {column, 4, 0, 0, KvV41Fp8::kScalesAt + slice / 2 * 4, kWhole, false};
      break;
    default:
      found = {column / 2, 2, 0, 0, KvV41Fp4::kScalesAt + slice * 4, kWhole, false};
  }
  if (found.tail_first >= found.limit) found.tail_pieces = 0;
  return found;
}

/// Of a warp's slices and last columns.
template <int kOwn>
struct ColumnsOfWarp {
  ColumnBytes slices[kOwn], end;

  __device__ bool alike() const { return slices[0].pieces == slices[kOwn - 1].pieces; }
};

/// A warp's columns of one tile in a stage: kOwn slices.
template <int kOwn>
struct StageColumns {
  std::uint8_t *main, *tail;
  std::uint32_t* scales;
  int slice_bytes;

  __device__ StageColumns(std::uint8_t* stage, const Stage& layout, int warp)
      : main(stage + warp * kOwn * layout.main_bytes()),
        tail(stage + layout.tails_at() + warp % kTailWarps * kTileKeys * kTailBytes),
        scales(reinterpret_cast<std::uint32_t*>(stage + layout.scales_at()) + warp * kOwn * kTileKeys),
        slice_bytes(layout.main_bytes()) {}

  /// Elements as they are, of a slice.
  __device__ std::uint8_t* elements(int slice) const { return main + slice * slice_bytes; }
  /// A piece of a key's codes in a slice that has kPieces. Slices of as many lie in one run, as in memory.
  template <int kPieces>
  __device__ std::uint8_t* codes(const ColumnsOfWarp<kOwn>& columns, int slice, int key, int piece) const {
    return columns.alike() ? main + code_at<kPieces, kOwn>(key, slice * kPieces + piece)
                           : elements(slice) + code_at<kPieces, 1>(key, piece);
  }
  /// Of a key's scales, those in a slice; slices with the same ones have them once.
  __device__ const std::uint32_t* scales_of(const ColumnsOfWarp<kOwn>& columns, int slice) const {
    return scales + (columns.slices[slice].scales == columns.slices[0].scales ? 0 : slice * kTileKeys);
  }

  /// Begins to copy the columns of a tile's rows. kOnce: hardly any other block reads them.
  template <bool kOnce>
  __device__ void copy(const ColumnsOfWarp<kOwn>& columns, const RowsOfTile& rows) const {
    const auto& [slices, end] = columns;
    const int lane = threadIdx.x % cuda::kWarpSize;
    // kPieces of each row from byte `first` on, neighbouring lanes neighbouring ones, to to_of(key, piece).
    const auto copy_pieces = [&]<int kPieces>(int first, const auto& to_of) {
      constexpr int kKeys = cuda::kWarpSize / kPieces, kAtOnce = kPieces < 4 ? kPieces : 4;  // registers are scarce
      const int key = lane / kPieces, piece = lane % kPieces, at = first + piece * 16;
      const int most = at < end.limit ? 16 : 0;
#pragma unroll
      for (int begin = 0; begin < kPieces; begin += kAtOnce) {
        const std::uint8_t* data[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) data[i] = rows.data[(begin + i) * kKeys + key];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          (kOnce ? cuda::copy_async_once : cuda::copy_async<16>)(to_of((begin + i) * kKeys + key, piece), data[i] + at,
                                                                 most);
      }
    };
    const std::uint32_t to = cuda::shared_address(main);
    const auto copy_codes = [&]<int kPieces, int kTogether>(int slice) {
      copy_pieces.template operator()<kPieces * kTogether>(slices[slice].first, [&](int key, int piece) {
        return to + slice * slice_bytes + code_at<kPieces, kTogether>(key, piece);
      });
    };
    if (columns.alike() && slices[0].pieces == 4) {
      copy_codes.template operator()<4, kOwn>(0);
    } else if (columns.alike() && slices[0].pieces == 2) {
      copy_codes.template operator()<2, kOwn>(0);
    } else {
#pragma unroll
      for (int slice = 0; slice < kOwn; ++slice) {
        if (slices[slice].pieces == 4)
          copy_codes.template operator()<4, 1>(slice);
        else
          copy_pieces.template operator()<8>(
              slices[slice].first, [&](int key, int piece) { return to + slice * slice_bytes + main_at(key, piece); });
      }
    }
    const std::uint32_t tail_to = cuda::shared_address(tail);
    if (end.tail_pieces == 2)
      copy_pieces.template operator()<2>(end.tail_first,
                                         [&](int key, int piece) { return tail_to + tail_at(key, piece); });
    else if (end.tail_pieces == 1)
      copy_pieces.template operator()<1>(end.tail_first, [&](int key, int) { return tail_to + key * kTailBytes; });
    if (slices[0].scales < 0) return;
    const std::uint8_t* const row = end.scales_apart ? rows.scales[lane] : rows.data[lane];
#pragma unroll
    for (int slice = 0; slice < kOwn; ++slice) {
      if (slice > 0 && slices[slice].scales == slices[0].scales) continue;
      cuda::copy_async<4>(cuda::shared_address(scales + slice * kTileKeys + lane), row + slices[slice].scales, 4);
    }
  }
};

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

/// Calls use(group, pieces) for the four groups of 8 keys of one of the warp's slices in a stage.
template <class T, int kOwn, class Use>
__device__ __forceinline__ void convert_slice(RowFormat format, const ColumnsOfWarp<kOwn>& columns,
                                              const StageColumns<kOwn>& stage, int slice, const Use& use) {
  const int lane = threadIdx.x % cuda::kWarpSize, quarter = lane % 4;
  const int nth = threadIdx.x / cuda::kWarpSize * kOwn + slice;
  const std::uint32_t* const scales = stage.scales_of(columns, slice);
  // What is loaded of all groups comes before the first conversion, so that it is waited for together.
  const auto of_groups = [&](const auto& load, const auto& converted) {
    constexpr int kGroups = kTileKeys / 8;
    decltype(load(0)) loaded[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) loaded[group] = load(group * 8 + lane / 4);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) use(group, converted(loaded[group]));
  };
  if (columns.slices[slice].pieces == 8) {
#pragma unroll
    for (int group = 0; group < kTileKeys / 8; ++group) {
      const auto piece = [&](int j) {
        return *reinterpret_cast<const uint4*>(stage.elements(slice) + main_at(group * 8 + lane / 4, quarter * 2 + j));
      };
      use(group, KeyPieces<T>{{piece(0), piece(1)}});
    }
    return;
  }
  const auto e4m3_codes = [&](int key) {
    return *reinterpret_cast<const uint4*>(stage.template codes<4>(columns, slice, key, quarter));
  };
  const auto e4m3 = [](uint4 codes) {
    return KeyPieces<T>{{e4m3_chunk<T>({codes.x, codes.y}), e4m3_chunk<T>({codes.z, codes.w})}};
  };
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto e2m1_codes = [&](int key) {
      return *reinterpret_cast<const uint2*>(stage.template codes<2>(columns, slice, key, quarter / 2) +
                                             quarter % 2 * 8);
    };
    const auto e2m1 = [](uint2 codes) { return KeyPieces<T>{{e2m1_chunk(codes.x), e2m1_chunk(codes.y)}}; };
    // A lane's columns share a scale.
    const auto scaled = [&]<class Scale>(const auto& load, const auto& converted, int scale_byte) {
      struct Loaded {
        decltype(load(0)) codes;
        std::uint8_t scale;
      };
      of_groups(
          [&](int key) { return Loaded{load(key), reinterpret_cast<const std::uint8_t*>(scales + key)[scale_byte]}; },
          [&](const Loaded& loaded) {
            KeyPieces<T> pieces = converted(loaded.codes);
            const auto by = scale_pair<Scale>(loaded.scale);
            for (uint4& piece : pieces.at) piece = scaled_chunk(piece, by);
            return pieces;
          });
    };
    switch (format) {
      case RowFormat::v4_fp8:
        return scaled.template operator()<float8_e8m0fnu>(e4m3_codes, e4m3, nth % 4);
      case RowFormat::v41_fp8:
        return scaled.template operator()<float8_e8m0fnu>(e4m3_codes, e4m3, nth % 2 * 2 + quarter / 2);
      case RowFormat::v32_nvfp4:
      case RowFormat::v41_fp4:
        return scaled.template operator()<float8_e4m3fn>(e2m1_codes, e2m1, quarter);
      default:
        break;
    }
  }
  of_groups(e4m3_codes, e4m3);
}

/// Makes T's of the codes at the end of rows.
template <class T, int kOwn>
__device__ __forceinline__ void convert_tail(const ColumnsOfWarp<kOwn>& columns, const StageColumns<kOwn>& stage) {
  if (columns.end.tail_pieces != 1) return;
  const int lane = threadIdx.x % cuda::kWarpSize;
  const uint4 codes = *reinterpret_cast<const uint4*>(stage.tail + lane * kTailBytes);
  *reinterpret_cast<uint4*>(stage.tail + tail_at(lane, 0)) = e4m3_chunk<T>({codes.x, codes.y});
  *reinterpret_cast<uint4*>(stage.tail + tail_at(lane, 1)) = e4m3_chunk<T>({codes.z, codes.w});
}

#endif

}  // namespace dsm::attention
