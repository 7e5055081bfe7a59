// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory, if many rows are in flight: an index must arrive before its row can be asked for. A thread makes
// 16-byte pieces of two output rows, several of each, as an index and an address cost as much as decoding a piece, and
// loads all of its codes and scales before it decodes the first. In a quantised cache its columns are the same in every
// row, so that it meets one kind of code, as all of its warp do; consecutive threads read and write consecutive bytes.
//
// H200, 131072 rows, part of the same run's copy bandwidth, bfloat16 | float32 results: plain 100 | 103 %, V3.2 FP8
// 92 | 91 %, V3.2 NVFP4 89 | 89 %, V4 FP8 92 | 89 %, V4.1 FP8 92 | 91 %, V4.1 FP4 89 | 88 %.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "src/cpu/visit_dtype.h"
#include "src/cpu/visit_record.h"
#include "src/cuda/copy/codes.cuh"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/launch/launch.h"
#include "src/kv_cache/kv_gather/kv_gather.h"
#include "src/kv_cache/pages.cuh"

namespace dsm {
namespace {

using cuda::Pack;

/// x in T, through float if from double to 16 bits.
template <class T, class A>
__device__ __forceinline__ T stored(A x) {
  return cuda::narrowed<T>(static_cast<Compute<T>>(x));
}

/// Without indices, rows follow each other.
__device__ __forceinline__ std::int32_t index_at(const std::int32_t* indices, std::int64_t row) {
  return indices ? indices[row] : static_cast<std::int32_t>(row);
}

/// A number of a storage type, by one access where kAligned.
template <class T, bool kAligned>
__device__ __forceinline__ T load_number(const std::uint8_t* from) {
  if constexpr (kAligned)
    return *reinterpret_cast<const T*>(from);
  else
    return load_unaligned<T>(from);
}

/// N neighbouring elements of a row, of one kind: codes with a scale. Zeros if not loaded.
template <class Record, int N, bool kAligned>
struct Quantized {
  static constexpr bool kE2m1 = std::is_same_v<typename Record::Element, float4_e2m1>;
  cuda::Words<kE2m1 ? N / 2 : N> codes{};
  typename Record::Scale scale{};

  /// From `column` + `further` on.
  __device__ void load(KvEntry<const std::uint8_t> entry, int column, int further) {
    using Scale = typename Record::Scale;
    constexpr int kCodes = kE2m1 ? 2 : 1;  // in a byte
    codes = cuda::load_words<sizeof(codes), kAligned>(entry.data + column / kCodes + further / kCodes);
    const int group = further % Record::kGroup == 0 ? column / Record::kGroup + further / Record::kGroup
                                                    : (column + further) / Record::kGroup;
    scale = load_number<Scale, kAligned>(entry.scales + group * sizeof(Scale));
  }
  __device__ void values(float (&to)[N]) {
    cuda::use_from_here(codes);
    if constexpr (kE2m1)
      cuda::widen_e2m1(codes, to);
    else
      cuda::widen_e4m3(codes, to);
    const float factor = widen(scale);
#pragma unroll
    for (float& value : to) value *= factor;
  }
};

/// As above, values that have no scale.
template <class Record, int N, bool kAligned>
struct Tail {
  using Element = typename Record::Tail;
  cuda::Words<N * sizeof(Element)> elements{};

  __device__ void load(KvEntry<const std::uint8_t> entry, int column, int further) {
    constexpr int kSize = static_cast<int>(sizeof(Element));
    const std::uint8_t* from = entry.data + Record::kTailAt + (column - Record::kQuantized) * kSize + further * kSize;
    elements = cuda::load_words<N * kSize, kAligned>(from);
  }
  __device__ void values(float (&to)[N]) {
    cuda::use_from_here(elements);
    if constexpr (std::is_same_v<Element, float8_e4m3fn>) {
      cuda::widen_e4m3(elements, to);
    } else {
      static_assert(std::is_same_v<Element, bfloat16>);
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        to[i] = __uint_as_float(elements.at[i / 2] << 16);
        to[i + 1] = __uint_as_float(elements.at[i / 2] & 0xffff0000u);
      }
    }
  }
};

/// How the rows of a quantised cache are laid over blocks: a thread makes 16 values of every kStep-th row, as kPieces
/// of N, so far apart that neighbouring threads write neighbouring pieces.
template <class Record, class T>
struct RecordLayout {
  static constexpr int N = cuda::kPackSize<T>, kPieces = 16 / N;
  static constexpr int kThreads = Record::kWidth / 2;
  static constexpr int kStep = 8;
  static constexpr int kAtOnce = 2;              // rows that a thread has in flight
  static constexpr int kRows = kStep * kAtOnce;  // of a block
  static_assert(kThreads * 16 == kStep * Record::kWidth && Record::kGroup % N == 0);
};

/// kApart: columns between the pieces.
template <class Piece, int kApart, class Record, class T, bool kAligned>
__device__ __forceinline__ void gather_pieces(const Pages& cache, const std::int32_t* indices, std::int64_t count,
                                              std::int64_t first_row, int column, T* out) {
  using Layout = RecordLayout<Record, T>;
  constexpr int kAtOnce = Layout::kAtOnce, N = Layout::N, kPieces = Layout::kPieces;
  const auto row_of = [&](int j) { return first_row + j * Layout::kStep; };
  std::int32_t index[kAtOnce];
  Piece pieces[kAtOnce][kPieces];
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) index[j] = row_of(j) < count ? index_at(indices, row_of(j)) : -1;
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    // No branches: they would make the next row's loads wait for these. The first row stands in for none.
    const Pages::Place place = cache[cache.valid(index[j]) ? index[j] : 0];
    const auto entry = kv_entry<Record>(static_cast<const std::uint8_t*>(place.page), place.page_size, place.entry);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) pieces[j][k].load(entry, column, k * kApart);
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    if (row_of(j) >= count) continue;
    T* to = out + row_of(j) * Record::kWidth + column;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      if (!cache.valid(index[j])) pieces[j][k] = Piece{};
      float values[N];
      pieces[j][k].values(values);
      Pack<T, N> pack;
#pragma unroll
      for (int i = 0; i < N; ++i) pack.at[i] = stored<T>(values[i]);
      if constexpr (kAligned) {
        // Which the compiler would split otherwise.
        __stwb(reinterpret_cast<uint4*>(to + k * kApart), __builtin_bit_cast(uint4, pack));
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) to[k * kApart + i] = pack.at[i];
      }
    }
  }
}

template <class Record, class T, bool kAligned>
__global__ void __launch_bounds__(Record::kWidth / 2, kAligned ? 4 : 3)
    kv_gather_record_cuda_kernel(Pages cache, const std::int32_t* indices, std::int64_t count, T* out) {
  using Layout = RecordLayout<Record, T>;
  constexpr int N = Layout::N, kTail = Record::kWidth - Record::kQuantized;
  constexpr int kPerRow = Record::kQuantized / 16, kTailPerRow = kTail / 16;  // threads; whole warps make tails
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Layout::kRows;
  const unsigned thread = threadIdx.x, of_tail = thread - kPerRow * Layout::kStep;
  if (thread < kPerRow * Layout::kStep) {
    gather_pieces<Quantized<Record, N, kAligned>, kPerRow * N, Record, T, kAligned>(
        cache, indices, count, first_row + thread / kPerRow, thread % kPerRow * N, out);
  } else if constexpr (kTail > 0) {
    gather_pieces<Tail<Record, N, kAligned>, kTailPerRow * N, Record, T, kAligned>(
        cache, indices, count, first_row + of_tail / kTailPerRow, Record::kQuantized + of_tail % kTailPerRow * N, out);
  }
}

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // that a thread has in flight
constexpr int kItemsPerBlock = kThreads * kAtOnce;

/// A cache of C's; an item is W neighbouring elements.
template <class C, class T, int W>
__global__ void __launch_bounds__(kThreads)
    kv_gather_plain_cuda_kernel(Pages cache, const std::int32_t* indices, std::int64_t total, cuda::Divider per_row,
                                std::int64_t width, T* out) {
  const std::int64_t begin = std::int64_t{blockIdx.x} * kItemsPerBlock;
  const std::int64_t first_row = begin / per_row.divisor();
  const auto skipped = static_cast<std::uint32_t>(begin - first_row * per_row.divisor());
  const auto count = static_cast<std::uint32_t>(min(std::int64_t{kItemsPerBlock}, total - begin));
  std::uint32_t row[kAtOnce], column[kAtOnce];
  std::int32_t index[kAtOnce];
  Pack<C, W> packs[kAtOnce];
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const std::uint32_t item = skipped + min(j * kThreads + threadIdx.x, count - 1);
    row[j] = per_row.quotient(item);
    column[j] = (item - row[j] * per_row.divisor()) * W;
    index[j] = index_at(indices, first_row + row[j]);
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    const Pages::Place place = cache[cache.valid(index[j]) ? index[j] : 0];
    packs[j] = cuda::load_pack<W>(reinterpret_cast<const C*>(place.page) + place.entry * width + column[j]);
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    if (j * kThreads + threadIdx.x >= count) continue;
    cuda::use_from_here(packs[j]);
    if (!cache.valid(index[j])) packs[j] = {};
    Pack<T, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) result.at[i] = stored<T>(cuda::widened(packs[j].at[i]));
    cuda::store_pack(out + (first_row + row[j]) * width + column[j], result);
  }
}

template <class T>
void gather_records(const KvGatherArgs& a, KvFormat format, const Launch& launch) {
  const std::int64_t count = a.out.size(0);
  const bool aligned = Pages::aligned(a.cache) && cuda::packable({a.out});
  cpu::visit_record(format, [&]<class Record>() {
    using Layout = RecordLayout<Record, T>;
    cuda::launch(
        "kv_gather",
        aligned ? kv_gather_record_cuda_kernel<Record, T, true> : kv_gather_record_cuda_kernel<Record, T, false>,
        dim3(cuda::ceil_div<std::int64_t>(count, Layout::kRows)), dim3(Layout::kThreads), 0, launch, Pages(a.cache),
        a.indices.as<const std::int32_t>(), count, a.out.as<T>());
  });
}

template <class C, class T, int W>
void gather_plain(const KvGatherArgs& a, const Launch& launch) {
  const std::int64_t width = a.out.size(1), total = a.out.numel() / W;
  cuda::launch("kv_gather", kv_gather_plain_cuda_kernel<C, T, W>,
               dim3(cuda::ceil_div<std::int64_t>(total, kItemsPerBlock)), dim3(kThreads), 0, launch, Pages(a.cache),
               a.indices.as<const std::int32_t>(), total, cuda::Divider(static_cast<std::uint32_t>(width / W)), width,
               a.out.as<T>());
}

}  // namespace

void kv_gather_cuda(const KvGatherArgs& a, const Launch& launch) {
  cpu::visit_floating(a.out.dtype, [&]<class T>() {
    if (a.cache.numel() == 0) {
      cuda::check(cudaMemsetAsync(a.out.data, 0, a.out.numel() * sizeof(T), static_cast<cudaStream_t>(launch.stream)),
                  "kv_gather");
      return;
    }
    if (const auto format = kv_format(a.cache)) return gather_records<T>(a, *format, launch);
    cpu::visit_floating(a.cache.dtype, [&]<class C>() {
      constexpr int W = std::min(cuda::kPackSize<C>, cuda::kPackSize<T>);
      const bool packs = Pages::aligned(a.cache) && cuda::packable({a.out}) && a.out.size(1) % W == 0;
      packs ? gather_plain<C, T, W>(a, launch) : gather_plain<C, T, 1>(a, launch);
    });
  });
}

}  // namespace dsm
