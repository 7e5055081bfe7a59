// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// For 16-bit queries: products of 16-bit elements with sums in float32.
//
// A block has 16 · M query rows, M = 1 or 4, and walks over tiles of 32 keys; of few rows, up to three groups of its
// threads have tiles of their own and add up their results in shared memory at the end, so that a unit's keys need not
// be split between blocks before there are too few of these. Of queries, keys and outputs a warp has 64 columns, of
// codes and few rows 128 (and 16 of those that are not values): it copies its columns of the keys up to two tiles
// ahead, makes 16-bit elements of codes, and multiplies them, all by itself. The warps' parts of the scores meet in
// shared memory, where the online softmax adds them up; before and after it, and only there, the warps of a group wait
// for each other. Weights of few rows are used as sums of two 16-bit numbers where keys are no codes, so that the
// result's own rounding is all that shows: 1.7e-3 rms in bfloat16. Others are one number, as on Hopper: 2.0e-3.
//
// Elements of T are bound by memory with few rows. Codes are bound by latency and by the port of shared memory: 12
// warps run on a processor, as many as their registers allow, and issue an instruction in 40-50 % of cycles; a tile of
// V3.2 takes the port 1670 of 2600 cycles, of which copies take 530 instead of 144, as its rows begin at any multiple
// of 16 bytes and the columns of a warp, therefore, in two lines. Half of the time is conversion with the scores, a
// third the softmax and the values. Sixteen warps with 64 columns each have a third more instructions and take 10-16 %
// longer. Many rows are bound by latency, too, with 8 warps.
// H200, part of the copy bandwidth (4.27 TB/s), 16 heads: sparse, batch 128, topk 2048 out of 2^20 rows, bfloat16 77 %,
// V3.2 FP8 44 %, NVFP4 23 %, V4 FP8 48 %, V4.1 FP8 42 %; dense, batch 64, 16384 keys, bfloat16 96 %, FP8 57 %. 64
// heads: bfloat16 36 % and 37 %, codes 11-17 %. Prefill, 512 queries, topk 2048, 16 | 128 heads: 139 | 211 TFLOPS.
#include <algorithm>
#include <new>

#include "src/attention/gathered_memory.cuh"
#include "src/cuda/launch/launch.h"

namespace dsm::attention {
namespace {

extern __shared__ __align__(128) std::uint8_t shared_memory[];

template <class T, int M, class Formats>
__global__ void __launch_bounds__(LayoutOf<M, Formats::kPlain>::kThreads* kGroups<M, Formats::kPlain>, 1)
    attend_gathered_mma_cuda_kernel(const __grid_constant__ GatheredAttention p, Destination to, Memory memory,
                                    int row_blocks) {
  constexpr bool kPlain = Formats::kPlain, kScaled = Formats::kScaled;
  using L = LayoutOf<M, kPlain>;
  constexpr int kOwn = L::kOwnSlices;
  __shared__ ColumnBytes columns_of_pools[2][Formats::kKnown ? 1 : kSlices];
  __shared__ alignas(Unit) unsigned char unit_memory[sizeof(Unit)];  // registers are scarce
  __shared__ float score_scale;
  std::uint8_t* const shared = shared_memory + threadIdx.y * memory.bytes;
  OfGroup<L>& own = *reinterpret_cast<OfGroup<L>*>(shared + memory.own_at);
  float* const scores = reinterpret_cast<float*>(shared + memory.scores_at);
  T* const weights = reinterpret_cast<T*>(shared + memory.weights_at);
  const auto sync_group = [] { cuda::named_sync(threadIdx.y + 1, L::kThreads); };
  const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;

  const int first_row = blockIdx.x % row_blocks * L::kRows;
  const auto last_row = [&] { return static_cast<int>(min(std::int64_t{first_row} + L::kRows, p.rows()) - 1); };
  if (threadIdx.x + threadIdx.y == 0) {
    new (unit_memory) Unit(p, blockIdx.x / row_blocks, last_row());
    score_scale = static_cast<float>(p.softmax_scale) * kLog2E * k_scale(p);
  }
  if (!Formats::kKnown && threadIdx.y == 0 && threadIdx.x < 2 * kSlices)
    columns_of_pools[threadIdx.x / kSlices][threadIdx.x % kSlices] =
        column_bytes(p.pools[threadIdx.x / kSlices].format, static_cast<int>(p.d_qk), threadIdx.x % kSlices);
  __syncthreads();
  const Unit& unit = *reinterpret_cast<const Unit*>(unit_memory);
  const auto first_tile = [&](unsigned group) {
    return to.parts.first_tile(blockIdx.y * blockDim.y + group, unit.tiles, blockDim.y);
  };
  const int begin = first_tile(threadIdx.y);
  if (threadIdx.x == 0) own.end = first_tile(threadIdx.y + 1);
  sync_group();

  TileRows<L::kWarps> rows(p, unit, begin, own.rows);
  const Stage layout{kPlain ? 0 : memory.stage.code_bytes};
  constexpr bool kTurned = !kPlain && M == 1;  // codes go from registers to the products
  const int stages = kPlain ? 2 : memory.stages;
  const auto stage_of = [&](int t) {
    return StageColumns<kOwn>(shared + (stages == 2 ? t % 2 * layout.bytes() : 0), layout, warp);
  };
  const auto format_of = [&](int t) {
    if constexpr (Formats::kKnown)
      return Formats::kOnly;
    else
      return p.pools[unit.pool_of(t)].format;
  };
  const auto columns_of = [&](int t) {
    const auto number = [&](int nth) {
      if constexpr (Formats::kKnown)
        return column_bytes(Formats::kOnly, static_cast<int>(p.d_qk), nth);
      else
        return columns_of_pools[unit.pool_of(t)][nth];
    };
    ColumnsOfWarp<kOwn> columns;
#pragma unroll
    for (int slice = 0; slice < kOwn; ++slice) columns.slices[slice] = number(warp * kOwn + slice);
    columns.end = number(warp);
    return columns;
  };
  const auto copy = [&](int t) {
    constexpr bool kOnce = !kPlain && M == 1;  // codes of so few query rows are read by one block, rarely by some
    if (t < own.end) stage_of(t).template copy<kOnce>(columns_of(t), rows.of(t));
    cuda::end_copy_group();
  };
  const QueryColumns<T, L, kTurned> queries(p, unit, first_row, shared + memory.queries_at);
  for (int t = begin; t < begin + rows.kTiles; ++t) rows.find(t);
  sync_group();
  for (int t = begin; t < begin + stages; ++t) copy(t);
  RowState state;
  Outputs<T, L> outputs;

  for (int t = begin; t < own.end; ++t) {
    const StageColumns<kOwn> stage = stage_of(t);
    std::uint8_t* const tile = kPlain ? stage.main : shared + memory.tiles_at + warp * kOwn * kSliceBytes;
    {
      const ColumnsOfWarp<kOwn> columns = columns_of(t);
      const RowFormat format = format_of(t);
      const bool of_codes = kScaled && format == RowFormat::v32_fp8;
      if (stages == 1)
        cuda::await_copy_groups<0>();
      else
        cuda::await_copy_groups<1>();
      __syncwarp();
      Scores<T, L> products;
      if constexpr (!kPlain) {
#pragma unroll
        for (int slice = 0; slice < kOwn; ++slice)
          convert_slice<T>(format, columns, stage, slice, [&](int group, const KeyPieces<T>& keys) {
            keys.store(tile + slice * kSliceBytes, group);
            if constexpr (kTurned) products.add(queries, slice, group, keys);
          });
        convert_tail<T>(columns, stage);
        __syncwarp();
      }
      if constexpr (!kTurned) {
#pragma unroll
        for (int i = 0; i < L::kMainSteps; ++i) products.add(queries, i, tile + i / kSteps * kSliceBytes);
      }
      if constexpr (kScaled) {
        constexpr int kWarpsOfGroup = L::kWarps / kScaleGroups;
        if (of_codes) products.scale(stage.scales);
        if (warp % kWarpsOfGroup == 0)
          own.scales[warp / kWarpsOfGroup * kTileKeys + lane] = of_codes ? __uint_as_float(stage.scales[lane]) : 1.f;
      }
      if (columns.end.tail_pieces > 0) products.add(queries, L::kMainSteps, stage.tail);
      products.store(scores);
      if constexpr (!kPlain) {
        __syncwarp();
        copy(t + stages);
      }
    }
    sync_group();
    bool rescaled;
    {
      const int row_of_block = threadIdx.x / L::kLanes, first_key = unit.key(t, 0);
      float s[L::kKeysOfLane];
      read_scores<L>(scores, rows.of(t).valid, unit.seen(p, first_row + row_of_block) - first_key, score_scale, s);
      const float rescale = weigh<T, L, kScaled>(s, own.scales, state, weights);
      if (threadIdx.x % L::kLanes == 0) own.factors[row_of_block] = rescale;
      rescaled = cuda::named_sync_or(threadIdx.y + 1, L::kThreads, rescale != 1);
    }
    rows.find(t + rows.kTiles);
    if (rescaled) outputs.rescale(own.factors);
    const int first_key = unit.key(t, 0);
    const T* const own_weights =
        weights + (kScaled ? outputs.first_column() / KvV32Fp8::kGroup * L::kTerms * L::kWeights : 0);
    if (unit.seen(p, first_row) - first_key >= kTileKeys) {
      outputs.template add<false>(own_weights, tile);
    } else {
      // Some queries do not see all keys. These have weight 0 there, but perhaps values that are not finite: query by
      // query, from the last to the first, what is not seen becomes 0.
      for (int query = unit.nth_query(last_row()); query >= unit.nth_query(first_row); --query) {
        const int seen = max(unit.seen(p, query * unit.group) - first_key, 0);
        for (int i = thread_again() % cuda::kWarpSize; i < kOwn * kSliceBytes / 16; i += cuda::kWarpSize)
          if (i / (kMainBytes / 16) % kTileKeys >= seen) reinterpret_cast<uint4*>(tile)[i] = uint4{};
        __syncwarp();
        outputs.template add<true>(own_weights, tile, query * unit.group - first_row,
                                   (query + 1) * unit.group - first_row);
        __syncwarp();
      }
    }
    if constexpr (kPlain) {
      __syncwarp();
      copy(t + stages);
    }
  }
  store_results<T, L>(p, to, unit, first_row, last_row(), state, outputs, shared_memory, memory.bytes, memory.own_at);
}

/// The probabilities of a tile of keys, summed over all rows of their unit, 16 after 16.
template <class T>
__global__ void __launch_bounds__(Layout<1, 1>::kThreads, 2)
    key_probs_mma_cuda_kernel(const __grid_constant__ GatheredAttention p, Memory memory, int tiles) {
  using L = Layout<1, 1>;
  __shared__ TileRows<L::kWarps>::Storage rows_storage;
  __shared__ float probabilities[L::kRows][kTileKeys + 1];
  float* const scores = reinterpret_cast<float*>(shared_memory + memory.scores_at);
  const int warp = threadIdx.x / cuda::kWarpSize;
  const int t = blockIdx.x % tiles;
  const Unit unit(p, blockIdx.x / tiles, static_cast<int>(p.rows()) - 1);
  float sum = 0;  // of key threadIdx.x
  if (t < unit.tiles) {
    TileRows<L::kWarps> rows(p, unit, t, rows_storage);
    rows.find(t);
    __syncthreads();
    const StageColumns<1> stage(shared_memory, memory.stage, warp);
    const ColumnBytes columns = column_bytes(RowFormat::plain, static_cast<int>(p.d_qk), warp);
    stage.copy<false>(ColumnsOfWarp<1>{{columns}, columns}, rows.of(t));
    cuda::end_copy_group();
    cuda::await_copy_groups<0>();
    __syncwarp();
    for (int first_row = 0; first_row < p.rows(); first_row += L::kRows) {
      const QueryColumns<T, L, false> queries(p, unit, first_row, nullptr);
      Scores<T, L> products;
#pragma unroll
      for (int i = 0; i < L::kMainSteps; ++i) products.add(queries, i, stage.main);
      if (columns.tail_pieces > 0) products.add(queries, L::kMainSteps, stage.tail);
      products.store(scores);
      __syncthreads();
      float s[L::kKeysOfLane];
      read_scores<L>(scores, rows.of(t).valid, kTileKeys, static_cast<float>(p.softmax_scale), s);
      const int row_of_block = threadIdx.x / L::kLanes, row = first_row + row_of_block;
#pragma unroll
      for (int j = 0; j < L::kKeysOfLane; ++j)
        probabilities[row_of_block][Keys<L>::first_key(0) + j] =
            row < p.rows() ? probability(p, unit.request, unit.query_of(row), unit.head_of(row), s[j]) : 0.f;
      __syncthreads();
      if (threadIdx.x < kTileKeys)
        for (const auto& of_row : probabilities) sum += of_row[threadIdx.x];
    }
  }
  const std::int64_t key = std::int64_t{t} * kTileKeys + threadIdx.x;
  if (threadIdx.x < kTileKeys && key < p.pools[0].listed)
    *pointer<float>(p.key_probs, unit.number * p.pools[0].listed + key) = sum;
}

template <class T, int M, class Formats>
void start(const char* operation, const GatheredAttention& p, const Memory& memory, const Launch& launch) {
  using L = LayoutOf<M, Formats::kPlain>;
  const auto kernel = attend_gathered_mma_cuda_kernel<T, M, Formats>;
  const auto row_blocks = static_cast<int>(cuda::ceil_div<std::int64_t>(p.rows(), L::kRows));
  const Destination to = destination(p, launch);
  const int groups = std::min(p.work().plan().groups, groups_of<M, Formats::kPlain>(memory));
  cuda::allow_shared_bytes(operation, kernel, groups * memory.bytes);
  cuda::launch(operation, kernel, dim3(static_cast<unsigned>(p.units() * row_blocks), to.parts.count),
               dim3(L::kThreads, groups), groups * memory.bytes, launch, p, to, memory, row_blocks);
}

/// Of the formats that few rows have kernels for, that of all keys; otherwise of any.
template <int M>
void start_rows(const char* operation, const GatheredAttention& p, const Memory& memory, const Launch& launch) {
  const auto run = [&]<class T, class Formats>() { start<T, M, Formats>(operation, p, memory, launch); };
  using Plain = OneFormat<RowFormat::plain>;
  const bool plain = memory.stage.code_bytes == 0;
  if (p.dtype == DType::float16)
    return plain ? run.template operator()<float16, Plain>() : run.template operator()<float16, AnyFormat<false>>();
  if (plain) return run.template operator()<bfloat16, Plain>();
  if constexpr (M == 1) {
    const RowFormat format = p.pools[0].format;
    const bool one = p.pool_count == 1 || p.pools[1].format == format;
    switch (one ? format : RowFormat::plain) {
      case RowFormat::e4m3:
        return run.template operator()<bfloat16, OneFormat<RowFormat::e4m3>>();
      case RowFormat::v32_fp8:
        return run.template operator()<bfloat16, OneFormat<RowFormat::v32_fp8>>();
      case RowFormat::v32_nvfp4:
        return run.template operator()<bfloat16, OneFormat<RowFormat::v32_nvfp4>>();
      case RowFormat::v4_fp8:
        return run.template operator()<bfloat16, OneFormat<RowFormat::v4_fp8>>();
      case RowFormat::v41_fp8:
        return run.template operator()<bfloat16, OneFormat<RowFormat::v41_fp8>>();
      default:
        break;
    }
  }
  scaled(p) ? run.template operator()<bfloat16, AnyFormat<true>>()
            : run.template operator()<bfloat16, AnyFormat<false>>();
}

}  // namespace

bool fits_gathered_mma(const GatheredAttention& p) {
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) return false;
  if (!multiple(p.d_qk, 8) || p.d_qk == 0 || p.d_qk > kMostColumns || p.d_v > kMostValues) return false;
  const int q_bytes = code_bytes(p) == 0 ? 4 : 16, elements = q_bytes / 2;  // of queries that are read at once
  if (!multiple(p.q, q_bytes) || !multiple(p.q_strides.request, elements) || !multiple(p.q_strides.query, elements) ||
      !multiple(p.q_strides.head, elements))
    return false;
  for (int i = 0; i < p.pool_count; ++i) {
    const KeyPool& pool = p.pools[i];
    if (pool.format > RowFormat::v41_fp4) return false;
    // float16 has not the range of records' values.
    if (p.dtype == DType::float16 && pool.format > RowFormat::e4m3) return false;
    if (pool.format == RowFormat::e4m3 && !multiple(p.d_qk, 16)) return false;
    if (!multiple(pool.data, 16) || !multiple(pool.page_bytes, 16) || !multiple(pool.head_bytes, 16)) return false;
    if (!multiple(pool.row_bytes, 16)) return false;
  }
  return fits(best_memory<1>(p));
}

void attend_gathered_mma(const char* operation, const GatheredAttention& p, const Launch& launch) {
  if (p.rows() > kMostOfFew) {
    const Memory memory = best_memory<4>(p);
    if (fits(memory)) return start_rows<4>(operation, p, memory, launch);
  }
  start_rows<1>(operation, p, best_memory<1>(p), launch);
}

void key_probs_mma(const char* operation, const GatheredAttention& p, const Launch& launch) {
  const auto tiles = static_cast<int>(cuda::ceil_div<std::int64_t>(p.pools[0].listed, kTileKeys));
  const Memory memory = memory_of<Layout<1, 1>>(p, 1);
  const auto start = [&]<class T>() {
    cuda::allow_shared_bytes(operation, key_probs_mma_cuda_kernel<T>, memory.bytes);
    cuda::launch(operation, key_probs_mma_cuda_kernel<T>, dim3(static_cast<unsigned>(p.units() * tiles)),
                 dim3(Layout<1, 1>::kThreads), memory.bytes, launch, p, memory, tiles);
  };
  p.dtype == DType::float16 ? start.template operator()<float16>() : start.template operator()<bfloat16>();
}

}  // namespace dsm::attention
