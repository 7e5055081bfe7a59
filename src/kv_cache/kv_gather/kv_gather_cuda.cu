// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory, if many rows are in flight: an index must arrive before its row can be asked for. A thread makes
// 16-byte pieces of several output rows and loads all of its codes and scales before it decodes the first. In a
// quantised cache its columns are the same in every row, so that it meets one kind of code; consecutive threads read
// and write consecutive bytes.
//
// H200, 131072 rows, part of the same run's copy bandwidth, bfloat16 | float32 results: plain 100 | 103 %, V3.2 FP8
// 84 | 75 %, V3.2 NVFP4 58 | 69 %, V4 FP8 84 | 75 %, V4.1 FP8 92 | 87 %, V4.1 FP4 81 | 85 %.
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

using cuda::Bytes;
using cuda::Pack;

constexpr int kAtOnce = 4;  // pieces that a thread has in flight

/// x in T, through float if from double to 16 bits.
template <class T, class A>
__device__ __forceinline__ T stored(A x) {
  return cuda::narrowed<T>(static_cast<Compute<T>>(x));
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
  Bytes<kE2m1 ? N / 2 : N> codes{};
  typename Record::Scale scale{};

  __device__ void load(KvEntry<const std::uint8_t> entry, int column) {
    using Scale = typename Record::Scale;
    codes = cuda::load_bytes<sizeof(codes), kAligned>(entry.data + (kE2m1 ? column / 2 : column));
    scale = load_number<Scale, kAligned>(entry.scales + column / Record::kGroup * sizeof(Scale));
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
  Pack<Element, N> elements{};

  __device__ void load(KvEntry<const std::uint8_t> entry, int column) {
    constexpr int kSize = static_cast<int>(sizeof(Element));
    const std::uint8_t* from = entry.data + Record::kTailAt + (column - Record::kQuantized) * kSize;
    if constexpr (kAligned)
      elements = cuda::load_pack<N>(reinterpret_cast<const Element*>(from));
    else
      elements = __builtin_bit_cast(Pack<Element, N>, cuda::load_bytes<N * kSize, false>(from));
  }
  __device__ void values(float (&to)[N]) {
    cuda::use_from_here(elements);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(elements.at[i]);
  }
};

/// How the rows of a quantised cache are laid over blocks: a thread makes N columns of every kStep-th row.
template <class Record, class T>
struct RecordLayout {
  static constexpr int N = cuda::kPackSize<T>;
  static constexpr int kPerRow = Record::kWidth / N;
  static constexpr int kThreads = Record::kWidth / 2;
  static constexpr int kStep = kThreads / kPerRow;
  static constexpr int kRows = 16;  // of a block
  static_assert(kThreads % kPerRow == 0 && kRows % (kStep * kAtOnce) == 0 && Record::kGroup % N == 0);
};

template <class Piece, class Record, class T, bool kAligned>
__device__ __forceinline__ void gather_pieces(const Pages& cache, const std::int32_t* indices, std::int64_t count,
                                              std::int64_t first_row, int column, T* out) {
  using Layout = RecordLayout<Record, T>;
#pragma unroll 1
  for (int begin = 0; begin < Layout::kRows; begin += kAtOnce * Layout::kStep) {
    const auto row_of = [&](int j) { return first_row + begin + j * Layout::kStep; };
    std::int32_t index[kAtOnce];
    Piece pieces[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) index[j] = row_of(j) < count ? indices[row_of(j)] : -1;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      // No branches: they would make the next row's loads wait for these. The first row stands in for none.
      const Pages::Place place = cache[cache.valid(index[j]) ? index[j] : 0];
      pieces[j].load(kv_entry<Record>(static_cast<const std::uint8_t*>(place.page), place.page_size, place.entry),
                     column);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (row_of(j) >= count) continue;
      if (!cache.valid(index[j])) pieces[j] = Piece{};
      float values[Layout::N];
      pieces[j].values(values);
      Pack<T, Layout::N> pack;
#pragma unroll
      for (int i = 0; i < Layout::N; ++i) pack.at[i] = stored<T>(values[i]);
      T* to = out + row_of(j) * Record::kWidth + column;
      if constexpr (kAligned) {
        __stwb(reinterpret_cast<uint4*>(to), __builtin_bit_cast(uint4, pack));  // which the compiler would split
      } else {
#pragma unroll
        for (int i = 0; i < Layout::N; ++i) to[i] = pack.at[i];
      }
    }
  }
}

template <class Record, class T, bool kAligned>
__global__ void __launch_bounds__(Record::kWidth / 2, 4)
    kv_gather_record_cuda_kernel(Pages cache, const std::int32_t* indices, std::int64_t count, T* out) {
  using Layout = RecordLayout<Record, T>;
  constexpr int N = Layout::N;
  const int column = threadIdx.x % Layout::kPerRow * N;
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Layout::kRows + threadIdx.x / Layout::kPerRow;
  if (column < Record::kQuantized)
    gather_pieces<Quantized<Record, N, kAligned>, Record, T, kAligned>(cache, indices, count, first_row, column, out);
  else
    gather_pieces<Tail<Record, N, kAligned>, Record, T, kAligned>(cache, indices, count, first_row, column, out);
}

constexpr int kThreads = 256;
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
    index[j] = indices[first_row + row[j]];
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
  const std::int64_t count = a.indices.size(0);
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
