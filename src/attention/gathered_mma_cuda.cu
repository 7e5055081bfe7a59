// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// For 16-bit queries: products of 16-bit elements with sums in float32.
//
// A block has 16 · M query rows, M = 1 or 4, and walks over tiles of 32 keys; of few rows, two groups of its threads
// have tiles of their own and add up their results in shared memory at the end, so that a unit's keys need not be split
// between blocks before there are too few of these. Of queries, keys and outputs a warp has 64 columns, of codes and
// few rows 128 (and 16 of those that are not values). Elements of its columns it copies by itself up to two tiles
// ahead; rows of codes are copied as they are (gathered_supply.cuh), and a warp makes 16-bit elements of its columns.
// The warps' parts of the scores meet in shared memory, where the online softmax adds them up; before and after it the
// warps of a group wait for each other. Weights of few rows are used as sums of two 16-bit numbers where keys are no
// codes, so that the result's own rounding is all that shows: 1.7e-3 rms in bfloat16. Others are one number, as on
// Hopper: 2.0e-3.
//
// Elements of T are bound by memory with few rows. Codes are bound by instructions and their latency: a tile of V4.1
// takes a group 3500 cycles, of which conversion with the scores takes 1400, the softmax between two barriers 800, the
// values 800, and 350 are waiting for rows, which their warp takes 2400 to ask for; the processor issues in 46 % of
// cycles. Rows copied 16 bytes at a time by those who multiply held up all that goes to shared memory, 1000 cycles a
// tile: three groups took 74 to 95 us instead of 72 to 76. Copied so by the warp of its own, they took 110 us when that
// asked for one row after another; before sm_90 it asks for eight at a time, which has not been timed. Sixteen warps
// with 64 columns each have a third more instructions. Many rows are bound by latency, too, with
// 8 warps. H200, part of the copy bandwidth (4.28 TB/s), 16 heads: sparse, batch 128, topk 2048 out of 2^20 rows,
// bfloat16 77 %, V3.2 FP8 54 %, NVFP4 28 %, V4 FP8 50 %, V4.1 FP8 46 %; dense, batch 64, 16384 keys, bfloat16 96 %, FP8
// 56 %. 64 heads: bfloat16 36 % and 37 %, codes 10-16 %. Prefill, 512 queries, topk 2048, 16 | 128 heads: 138 | 209
// TFLOPS.
#include <algorithm>
#include <new>

#include "src/attention/gathered_memory.cuh"
#include "src/cuda/launch/launch.h"

namespace dsm::attention {
namespace {

extern __shared__ __align__(128) std::uint8_t shared_memory[];

template <class T, int M, class Formats>
__global__ void __launch_bounds__(threads_of<M, Formats::kPlain>* kGroups<M>, 1)
    attend_gathered_mma_cuda_kernel(const __grid_constant__ GatheredAttention p, Destination to, Memory memory,
                                    int row_blocks) {
  constexpr bool kPlain = Formats::kPlain, kScaled = Formats::kScaled;
  using L = LayoutOf<M, kPlain>;
  constexpr int kOwn = L::kOwnSlices;
  __shared__ alignas(RowParts) unsigned char parts_memory[2 * sizeof(RowParts)];  // of both pools
  __shared__ alignas(Unit) unsigned char unit_memory[sizeof(Unit)];               // registers are scarce
  __shared__ float score_scale;
  RowParts* const parts_of_pools = reinterpret_cast<RowParts*>(parts_memory);
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
  if (!Formats::kKnown && threadIdx.y == 0 && threadIdx.x < 2)
    parts_of_pools[threadIdx.x] = row_parts(p.pools[threadIdx.x].format, static_cast<int>(p.d_qk));
  constexpr bool kSupplied = supplied<M, kPlain>, kTurned = kSupplied;  // codes go from registers to the products
  if (!kPlain && threadIdx.x == 0) own.supply.init(kSupplied ? 1 : L::kWarps, L::kWarps);
  __syncthreads();
  const Unit& unit = *reinterpret_cast<const Unit*>(unit_memory);
  const auto first_tile = [&](unsigned group) {
    return to.parts.first_tile(blockIdx.y * blockDim.y + group, unit.tiles, blockDim.y);
  };
  const int begin = first_tile(threadIdx.y), stages = kPlain ? 2 : memory.stages;
  const Stage layout{kPlain ? 0 : memory.stage.stride};
  const auto stage_of = [&](int n) { return shared + Supply::stage(n, stages) * layout.bytes(); };
  const auto format_of = [&](int t) {
    if constexpr (Formats::kKnown)
      return Formats::kOnly;
    else
      return p.pools[unit.pool_of(t)].format;
  };
  const auto parts_of = [&](int t) {
    if constexpr (Formats::kKnown)
      return row_parts(Formats::kOnly, static_cast<int>(p.d_qk));
    else
      return parts_of_pools[unit.pool_of(t)];
  };
  if (kSupplied && warp == L::kWarps) {
    supply_rows(p, unit, own.supply, stages, begin, first_tile(threadIdx.y + 1), stage_of, parts_of);
    return;
  }
  if (threadIdx.x == 0) own.end = first_tile(threadIdx.y + 1);
  sync_group();
  TileRows<L::kWarps> rows(p, unit, begin, own.rows);
  const auto find = [&](int t) {
    if constexpr (!kSupplied) rows.find(t);
  };
  const auto copy = [&](int t) {
    constexpr int kRows = kTileKeys / L::kWarps;
    if constexpr (kPlain) {
      if (t < own.end) copy_columns(stage_of(t - begin), static_cast<int>(p.d_qk), rows.of(t));
      cuda::end_copy_group();
    } else if (t < own.end) {
      const int key = warp * kRows + lane % kRows, n = t - begin;
      copy_rows<kRows, false>(stage_of(n), parts_of(t), warp * kRows, {rows.of(t).data[key], rows.of(t).scales[key]},
                              own.supply.full[Supply::stage(n, stages)]);
    }
  };
  if constexpr (!kSupplied) {
    for (int t = begin; t < begin + rows.kTiles; ++t) find(t);
    sync_group();
    for (int t = begin; t < begin + stages; ++t) copy(t);
  }
  const QueryColumns<T, L, kTurned> queries(p, unit, first_row, shared + memory.queries_at);
  RowState state;
  Outputs<T, L> outputs;

  for (int t = begin; t < own.end; ++t) {
    const int n = t - begin;
    std::uint8_t* const stage = stage_of(n);
    std::uint8_t* const slices = kPlain ? stage : shared + memory.tiles_at;
    std::uint8_t* const tile = slices + warp * kOwn * kSliceBytes;
    {
      const RowParts parts = parts_of(t);
      const RowFormat format = format_of(t);
      const bool of_codes = kScaled && format == RowFormat::v32_fp8;
      if constexpr (kPlain) {
        cuda::await_copy_groups<1>();
        __syncwarp();
      } else {
        own.supply.full[Supply::stage(n, stages)].wait(Supply::phase(n, stages));
      }
      Scores<T, L> products;
      if constexpr (!kPlain) {
#pragma unroll
        for (int slice = 0; slice < kOwn; ++slice)
          convert_slice<T>(format, parts, stage, warp * kOwn + slice, [&](int group, const KeyPieces<T>& keys) {
            keys.store(tile + slice * kSliceBytes, group);
            if constexpr (kTurned) products.add(queries, slice, group, keys);
          });
        if (warp < kTailWarps && parts.has_tail()) convert_tail<T>(parts, stage, slices + kSlices * kSliceBytes);
        __syncwarp();
      }
      if constexpr (!kTurned) {
#pragma unroll
        for (int i = 0; i < L::kMainSteps; ++i) products.add(queries, i, tile + i / kSteps * kSliceBytes);
      }
      if constexpr (kScaled) {
        constexpr int kWarpsOfGroup = L::kWarps / kScaleGroups;
        const auto scale_of = [&](int key) {
          return reinterpret_cast<const float*>(stage + parts.at(key) + parts.scales)[warp / kWarpsOfGroup];
        };
        if (of_codes) products.scale(scale_of);
        if (warp % kWarpsOfGroup == 0)
          own.scales[warp / kWarpsOfGroup * kTileKeys + lane] = of_codes ? scale_of(lane) : 1.f;
      }
      if constexpr (kSupplied) {
        __syncwarp();
        if (lane == 0) own.supply.free[Supply::stage(n, stages)].arrive();
      }
      if (warp < kTailWarps && parts.has_tail()) products.add(queries, L::kMainSteps, slices + kSlices * kSliceBytes);
      products.store(scores);
    }
    sync_group();
    bool rescaled;
    {
      const int row_of_block = threadIdx.x / L::kLanes, first_key = unit.key(t, 0);
      float s[L::kKeysOfLane];
      const float to_value = 1 / element_unit(parts_of(t));
      const std::uint32_t valid = kSupplied ? own.supply.valid[t % Supply::kTiles] : rows.of(t).valid;
      read_scores<L>(scores, valid, unit.seen(p, first_row + row_of_block) - first_key, score_scale * to_value, s);
      const float rescale = weigh<T, L, kScaled>(s, kWeightUnit<T> * to_value, own.scales, state, weights);
      if (threadIdx.x % L::kLanes == 0) own.factors[row_of_block] = rescale;
      rescaled = cuda::named_sync_or(threadIdx.y + 1, L::kThreads, rescale != 1);
    }
    if constexpr (!kPlain && !kSupplied) copy(t + stages);
    find(t + rows.kTiles);
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
    copy_columns(shared_memory, static_cast<int>(p.d_qk), rows.of(t));
    cuda::end_copy_group();
    cuda::await_copy_groups<0>();
    __syncwarp();
    for (int first_row = 0; first_row < p.rows(); first_row += L::kRows) {
      const QueryColumns<T, L, false> queries(p, unit, first_row, nullptr);
      Scores<T, L> products;
#pragma unroll
      for (int i = 0; i < L::kMainSteps; ++i) products.add(queries, i, shared_memory + warp * kSliceBytes);
      if (warp < kTailWarps && p.d_qk > kMostValues)
        products.add(queries, L::kMainSteps, shared_memory + kSlices * kSliceBytes);
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
  const int groups = std::min(p.plan.groups, groups_of<M>(memory));
  cuda::allow_shared_bytes(operation, kernel, groups * memory.bytes);
  cuda::launch(operation, kernel, dim3(static_cast<unsigned>(p.units() * row_blocks), to.parts.count),
               dim3(threads_of<M, Formats::kPlain>, groups), groups * memory.bytes, launch, p, to, memory, row_blocks);
}

/// Of the formats that few rows have kernels for, that of all keys; otherwise of any.
template <int M>
void start_rows(const char* operation, const GatheredAttention& p, const Memory& memory, const Launch& launch) {
  const auto run = [&]<class T, class Formats>() { start<T, M, Formats>(operation, p, memory, launch); };
  using Plain = OneFormat<RowFormat::plain>;
  const bool plain = attention::plain(p);
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
  const int q_bytes = plain(p) ? 4 : 16, elements = q_bytes / 2;  // of queries that are read at once
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
