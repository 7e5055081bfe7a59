// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by memory, with instructions close behind where a row is normalised, turned and quantised. Half a warp makes a
// quantised row at a time. Its steps see it in two orders: as chunks of neighbours, in which it is loaded and stored,
// and, through shared memory, one column in 16 a lane, in which the CPU adds up the squares, and pair by pair for the
// rotation. The bytes are those of the CPU, but for the sign of NaN that arithmetic has made. Rows of plain caches can
// have any width: a warp makes them column by column.
//
// Many rows of 16-bit elements that are stored as they are come by bulk copies some rounds ahead (row_ring.cuh). H200,
// 131072 rows, every seventh without a slot, part of the same run's copy bandwidth, bfloat16 | float32, not normalised
// nor turned: V4 FP8 87 | 97 %, V4.1 FP8 85 | 99 %, V4.1 FP4 83 | 93 %; both, into a plain float32 cache: 85 %.
#include <cstdint>

#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/cuda/reduce/warp.cuh"
#include "src/kv_cache/placing.cuh"
#include "src/kv_cache/quantized_row.cuh"
#include "src/kv_cache/row_ring.cuh"
#include "src/kv_cache/v4_kv_insert/v4_kv_insert.h"
#include "src/kv_cache/warp_rows.cuh"
#include "src/numerics/rope.h"

namespace dsm {
namespace {

constexpr int kThreads = 128;
constexpr int kWidth = 512;  // of quantised rows
constexpr int kAtOnce = 4;   // columns of a plain row that a thread has in flight

/// Any rotation. A call, as its code for huge angles and for double would cost the kernels registers.
template <class A>
__device__ __noinline__ Rotation<A> any_rotation(float angle) {
  return rope_rotation<A>(angle);
}

/// What is done to a row of T's before it is stored.
template <class T>
struct Steps {
  using A = Compute<T>;
  const T* weight;  // one of the weights is given, or none
  const A* wide_weight;
  A eps;
  const std::int64_t* positions;
  const float* inv_freq;
  std::int64_t pairs;

  explicit Steps(const V4KvInsertArgs& a)
      : weight(a.weight && a.weight.dtype == a.kv.dtype ? a.weight.as<const T>() : nullptr),
        wide_weight(a.weight && a.weight.dtype != a.kv.dtype ? a.weight.as<const A>() : nullptr),
        eps(static_cast<A>(a.eps)),
        positions(a.positions.as<const std::int64_t>()),
        inv_freq(a.inv_freq.as<const float>()),
        pairs(a.positions ? a.inv_freq.size(0) : 0) {}

  __device__ bool normalizes() const { return weight || wide_weight; }
  __device__ A weight_at(std::int64_t column) const {
    return weight ? cuda::widened(weight[column]) : wide_weight[column];
  }
  /// The sum of 16 lanes, each of one column in 16 in ascending order, becomes the CPU's lane_sum, and so the factor.
  __device__ A rstd(A squares, std::int64_t width) const {
    return A(1) / sqrt(cuda::lane_group_sum(squares, 16) / static_cast<A>(width) + eps);
  }
  __device__ T normalized(T x, A rstd, A w) const { return cuda::narrowed<T>(cuda::widened(x) * rstd * w); }

  __device__ Rotation<A> rotation(std::int64_t position, std::int64_t pair) const {
    const float angle = rope_angle(position, inv_freq[pair]);
    if constexpr (std::is_same_v<A, float>) {
      const SinCos<float> near = sincos_near(angle);
      if (fabsf(angle) <= kSincosNear) return {near.cos, near.sin};
    }
    return any_rotation<A>(angle);
  }
};

/// A lane's part of a row of the shared memory's is normalised.
template <class Record, class T>
__device__ __forceinline__ void normalize(Chunk<T> (&chunks)[kChunks], T* row, const Steps<T>& steps,
                                          bool packed_weight, int lane) {
  using A = Compute<T>;
  const auto column = [&](int k) { return RowLayout<Record>::column(lane, k); };
#pragma unroll
  for (int k = 0; k < kChunks; ++k) chunks[k].store_packed(row + column(k));
  __syncwarp();
  A squares = 0;
#pragma unroll 8
  for (int i = lane; i < kWidth; i += kRowLanes) {
    const A x = cuda::widened(row[i]);
    squares += rounded_product(x, x);
  }
  const A rstd = steps.rstd(squares, kWidth);
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    A w[kChunk];
    if (packed_weight && steps.weight) {
      cuda::load_widened(steps.weight + column(k), w);
    } else if (packed_weight) {
      cuda::load_widened(steps.wide_weight + column(k), w);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) w[i] = steps.weight_at(column(k) + i);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunks[k].at[i] = steps.normalized(chunks[k].at[i], rstd, w[i]);
  }
  __syncwarp();
}

/// As above, its last pairs are turned.
template <class Record, class T>
__device__ __forceinline__ void turn(Chunk<T> (&chunks)[kChunks], T* row, const Steps<T>& steps, std::int64_t position,
                                     int lane) {
  using A = Compute<T>;
  const auto column = [&](int k) { return RowLayout<Record>::column(lane, k); };
  const int pairs = static_cast<int>(steps.pairs), turned = kWidth - 2 * pairs;
#pragma unroll
  for (int k = 0; k < kChunks; ++k)
    if (column(k) + kChunk > turned) chunks[k].store_packed(row + column(k));
  __syncwarp();
  for (int pair = lane; pair < pairs; pair += kRowLanes) {
    T* at = row + turned + 2 * pair;
    A a = cuda::widened(at[0]), b = cuda::widened(at[1]);
    rotate(steps.rotation(position, pair), a, b);
    at[0] = cuda::narrowed<T>(a);
    at[1] = cuda::narrowed<T>(b);
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kChunks; ++k)
    if (column(k) + kChunk > turned) chunks[k].load(row + column(k), true);
  __syncwarp();
}

/// kPlain: that rows are stored as they are, and that they and the pages suit 16-byte accesses.
template <class Record, class T, bool kPlain>
__global__ void __launch_bounds__(kRowThreads)
    v4_kv_insert_record_cuda_kernel(Placing placing, const T* kv, std::int64_t stride, bool packed_weight,
                                    Steps<T> steps, Pages cache, bool any_aligned, int rounds) {
  using Layout = RowLayout<Record>;
  constexpr bool kAhead = kBulkCopies && kPlain && sizeof(T) == 2;  // wider rows come fast enough without
  constexpr int kRowBytes = kWidth * sizeof(T);
  constexpr int kPadding = 16;  // keeps two rows that a warp reads at the same columns in different banks
  using Ring = std::conditional_t<kAhead, RowRing<kHalves, kRowBytes>, NoRing>;
  __shared__ typename Ring::Shared shared;
  __shared__ __align__(16) T turned[kPlain ? 1 : kRowThreads / kRowLanes][kPlain ? 1 : kWidth + kPadding];
  const bool aligned = kPlain || any_aligned;
  const int half = threadIdx.x % cuda::kWarpSize / kRowLanes, lane = threadIdx.x % kRowLanes;
  const auto column = [&](int k) { return Layout::column(lane, k); };
  const bool ahead = kAhead && rounds > 1;
  WarpRows rows(placing, cache, kHalves * rounds, rounds > 1);
  Ring ring(shared);
  const auto fetch = [&](int round) {
    ring.fetch(round, rows, [&](std::int64_t token, std::uint32_t to, auto& landed) {
      cuda::bulk_load(to, kv + token * stride, kRowBytes, landed);
    });
  };
  Chunk<T> chunks[kChunks];
  std::int64_t position = 0;
  const auto load_from = [&](const T* row) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) chunks[k].load(row + column(k), aligned);
  };
  const auto load = [&](int round) {
    const std::int64_t token = rows.token(kHalves * round + half);
    load_from(kv + token * stride);
    if (!kPlain && steps.pairs > 0) position = steps.positions[token];
  };
  if (ahead)
    ring.begin(fetch);
  else if (rows.size() > 0)
    load(0);
  rows.place(placing, cache, kHalves * rounds, entry_at<Record>);
#pragma unroll 1
  for (int round = 0; kHalves * round < rows.size(); ++round) {
    if (ahead) {
      ring.await(round);
      load_from(ring.template row<T>(round, half));
    } else if (round > 0) {
      load(round);
    }
    if constexpr (!kPlain) {
      T* row = turned[threadIdx.x / kRowLanes];
      if (steps.normalizes()) normalize<Record>(chunks, row, steps, packed_weight, lane);
      if (steps.pairs > 0) turn<Record>(chunks, row, steps, position, lane);
    }
    const KvEntry<std::uint8_t> entry = rows.entry(kHalves * round + half);
    const bool stored = entry.data != nullptr;
    constexpr int kAtOnce = Layout::kGroupChunks;
#pragma unroll
    for (int k = 0; k < kChunks; k += kAtOnce) {
      const float amax = largest_magnitude<Layout::kGroupLanes>(largest_bits<kAtOnce>(chunks + k));
      if (!stored) continue;
      if (column(k) < Record::kQuantized) {
        store_group<Record, kAtOnce, KvScales::ue8m0>(entry, column(k), chunks + k, amax, aligned);
      } else {
#pragma unroll
        for (int c = k; c < k + kAtOnce; ++c)
          store_tail<Record>(entry.data, column(c) - Record::kQuantized, chunks[c], aligned);
      }
    }
    // The byte behind V4's 7 scales.
    if constexpr (std::is_same_v<Record, KvV4Fp8>)
      if (stored && lane == 0) entry.scales[Record::kScaleBytes - 1] = 0;
    if (ahead) {
      __syncwarp();
      fetch(round + Ring::kStages);
    }
  }
}

/// For a cache of C's.
template <class T, class C>
__global__ void __launch_bounds__(kThreads, 6)
    v4_kv_insert_plain_cuda_kernel(Placing placing, const T* kv, std::int64_t stride, std::int64_t width,
                                   Steps<T> steps, Pages cache) {
  using A = Compute<T>;
  constexpr int kTokens = kThreads / cuda::kWarpSize;
  const int lane = threadIdx.x % cuda::kWarpSize, of_block = threadIdx.x / cuda::kWarpSize;
  const std::int64_t token = std::int64_t{blockIdx.x} * kTokens + of_block, slot = placing.slot(token);
  const T* row = kv + token * stride;
  A rstd = 1;
  if (steps.normalizes() && cache.valid(slot)) {
    A squares = 0;
    // Both halves of the warp add up the same, so that all lanes know the sum.
#pragma unroll 16
    for (std::int64_t i = lane % 16; i < width; i += 16) {
      const A x = cuda::widened(row[i]);
      squares += rounded_product(x, x);
    }
    rstd = steps.rstd(squares, width);
  }
  if (!placing.stores(slot, of_block, kTokens, cache)) return;
  const auto value = [&](std::int64_t column) {
    return steps.normalizes() ? steps.normalized(row[column], rstd, steps.weight_at(column)) : row[column];
  };
  // Through float, if from double to 16 bits.
  const auto stored_as = [](T x) { return narrow<C>(static_cast<Compute<C>>(cuda::widened(x))); };
  const Pages::Place place = cache[slot];
  C* to = reinterpret_cast<C*>(place.page) + place.entry * width;
  const std::int64_t turned = width - 2 * steps.pairs;
  for (std::int64_t begin = lane; begin < turned; begin += kAtOnce * cuda::kWarpSize) {
    T values[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (begin + j * cuda::kWarpSize < turned) values[j] = value(begin + j * cuda::kWarpSize);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (begin + j * cuda::kWarpSize < turned) to[begin + j * cuda::kWarpSize] = stored_as(values[j]);
  }
  for (std::int64_t pair = lane; pair < steps.pairs; pair += cuda::kWarpSize) {
    const std::int64_t column = turned + 2 * pair;
    A a = cuda::widened(value(column)), b = cuda::widened(value(column + 1));
    rotate(steps.rotation(steps.positions[token], pair), a, b);
    to[column] = stored_as(cuda::narrowed<T>(a));
    to[column + 1] = stored_as(cuda::narrowed<T>(b));
  }
}

template <class T>
void insert_records(const V4KvInsertArgs& a, KvFormat format, const Launch& launch) {
  const bool aligned = cuda::packable({a.kv}) && Pages::aligned(a.cache), plain = aligned && !a.weight && !a.positions;
  const auto insert = [&]<class Record>() {
    const Placing placing("v4_kv_insert", a.slots, a.cache, launch);
    const int rounds = rounds_of(placing, kHalves, plain && sizeof(T) == 2 ? 16 : 4);
    launch_placing(
        "v4_kv_insert", placing,
        plain ? v4_kv_insert_record_cuda_kernel<Record, T, true> : v4_kv_insert_record_cuda_kernel<Record, T, false>,
        dim3(cuda::ceil_div<std::int64_t>(placing.tokens, kRowThreads / kRowLanes * rounds)), dim3(kRowThreads), launch,
        a.kv.as<const T>(), a.kv.stride[0], cuda::packable({a.weight}), Steps<T>(a), Pages(a.cache), aligned, rounds);
  };
  switch (format) {
    case KvFormat::v4_fp8:
      return insert.template operator()<KvV4Fp8>();
    case KvFormat::v41_fp8:
      return insert.template operator()<KvV41Fp8>();
    default:
      return insert.template operator()<KvV41Fp4>();
  }
}

}  // namespace

void v4_kv_insert_cuda(const V4KvInsertArgs& a, const Launch& launch) {
  cpu::visit_floating(a.kv.dtype, [&]<class T>() {
    if (const auto format = kv_format(a.cache)) return insert_records<T>(a, *format, launch);
    cpu::visit_floating(a.cache.dtype, [&]<class C>() {
      launch_placing("v4_kv_insert", Placing("v4_kv_insert", a.slots, a.cache, launch),
                     v4_kv_insert_plain_cuda_kernel<T, C>,
                     dim3(cuda::ceil_div<std::int64_t>(a.slots.numel(), kThreads / cuda::kWarpSize)), dim3(kThreads),
                     launch, a.kv.as<const T>(), a.kv.stride[0], a.kv.size(1), Steps<T>(a), Pages(a.cache));
    });
  });
}

}  // namespace dsm
