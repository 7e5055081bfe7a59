// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// For all other problems: multiply-adds in the type computed in. A block has 16 query rows, a tile of 32 keys at a
// time, and 512 columns of the output; keys are brought to shared memory 64 columns at a time, once for the scores and,
// from L2 cache, once for the outputs. Bound by shared memory, whose loads of four numbers feed two to three
// multiply-adds each. H200, dense, batch 4, 8192 keys, 16 heads, float32: 248 µs, 5 TFLOPS.
#include <cmath>

#include "src/attention/gathered_cuda.cuh"
#include "src/cpu/visit_dtype.h"
#include "src/cuda/copy/element.cuh"
#include "src/cuda/copy/pack.cuh"
#include "src/cuda/launch/launch.h"
#include "src/cuda/reduce/warp.cuh"
#include "src/numerics/kv_record.h"

namespace dsm::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kFewRows;
constexpr int kLanes = kThreads / kRows;  // threads of a row
constexpr int kKeysOfLane = kTileKeys / kLanes;
constexpr int kChunk = 64;  // columns in shared memory
constexpr int kColumnsOfLane = kChunk / kLanes;
constexpr int kChunksOfBlock = 8;  // columns of the output that a block sums up
constexpr int kColumns = kChunk * kChunksOfBlock;

template <class Record>
__device__ float record_value(KvEntry<const std::uint8_t> entry, int column) {
  if (column >= Record::kQuantized) return kv_tail<Record>(entry, column - Record::kQuantized);
  float element;
  if constexpr (std::is_same_v<typename Record::Element, float4_e2m1>) {
    const std::uint8_t pair = entry.data[column / 2];
    element = to_float(column % 2 ? odd_e2m1(pair) : even_e2m1(pair));
  } else {
    element = to_float(float8_e4m3fn{entry.data[column]});
  }
  return element * kv_scale<Record>(entry, column / Record::kGroup);
}

/// A value of a row that is not plain. A call: it is long.
__device__ __noinline__ float coded_value(RowFormat format, KeyRow row, std::int64_t column, float k_scale) {
  const auto record = [&]<class Record>() -> float {
    KvEntry<const std::uint8_t> entry{row.data, row.scales};
    if constexpr (requires { Record::kScalesAt; }) entry.scales = row.data + Record::kScalesAt;
    return record_value<Record>(entry, static_cast<int>(column));
  };
  switch (format) {
    case RowFormat::e4m3:
      return to_float(float8_e4m3fn{row.data[column]}) * k_scale;
    case RowFormat::v32_fp8:
      return record.template operator()<KvV32Fp8>();
    case RowFormat::v32_nvfp4:
      return record.template operator()<KvV32Nvfp4>();
    case RowFormat::v4_fp8:
      return record.template operator()<KvV4Fp8>();
    case RowFormat::v41_fp8:
      return record.template operator()<KvV41Fp8>();
    case RowFormat::v41_fp4:
      return record.template operator()<KvV41Fp4>();
    case RowFormat::float16:
      return cuda::widened(reinterpret_cast<const float16*>(row.data)[column]);
    case RowFormat::bfloat16:
      return cuda::widened(reinterpret_cast<const bfloat16*>(row.data)[column]);
    default:
      return reinterpret_cast<const float*>(row.data)[column];
  }
}

template <class A>
struct Tile {
  static constexpr int kStride = kChunk + 4;  // rows begin in different banks

  alignas(cuda::kPackBytes) A q[kRows][kStride], k[kTileKeys][kStride];
  A p[kRows][kTileKeys + 1];
  KeyRow keys[kTileKeys];
};

/// Four neighbouring numbers in shared memory.
template <class A>
__device__ __forceinline__ void load_four(const A* from, A (&to)[4]) {
  constexpr int kPack = cuda::kPackSize<A>;
#pragma unroll
  for (int part = 0; part < 4; part += kPack) {
    const auto pack = cuda::load_pack<kPack>(from + part);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[part + i] = pack.at[i];
  }
}

/// What both kernels know of their rows. A row belongs to kLanes neighbouring threads.
template <class T>
class Rows {
 public:
  using A = Compute<T>;

  __device__ Rows(const GatheredAttention& p, const Unit& unit, int first_row, Tile<A>& tile)
      : p_(p),
        unit_(unit),
        tile_(tile),
        row_(first_row + threadIdx.x / kLanes),
        k_scale_(p.k_scale ? *p.k_scale : 1.f) {
#pragma unroll
    for (int i = 0; i < kQueriesOfThread; ++i) {
      const int row = first_row + threadIdx.x / kChunk + i * kRowsAtOnce;
      queries_[i] = row < p.rows() ? static_cast<const T*>(p.q) +
                                         p.q_strides.at(unit.request, unit.query_of(row), unit.head_of(row))
                                   : nullptr;
    }
  }

  __device__ bool inside() const { return row_ < p_.rows(); }
  __device__ int row() const { return row_; }
  __device__ int lane() const { return threadIdx.x % kLanes; }

  __device__ void find_keys(int tile) {
    __syncthreads();
    const int i = threadIdx.x;
    if (i < kTileKeys) tile_.keys[i] = unit_.row(p_, tile, i, unit_.fetch(p_, tile, i));
    format_ = p_.pools[unit_.pool_of(tile)].format;
    __syncthreads();
  }

  /// Scores of the row with keys lane() + kLanes · j, −inf where there is none.
  __device__ void scores(int tile, A (&s)[kKeysOfLane]) {
    for (A& score : s) score = 0;
    const A* const q = tile_.q[threadIdx.x / kLanes];
    for (std::int64_t first = 0; first < p_.d_qk; first += kChunk) {
      const int columns = static_cast<int>(min(p_.d_qk - first, std::int64_t{kChunk}));
      const int column = threadIdx.x % kChunk;
#pragma unroll
      for (int i = 0; i < kQueriesOfThread; ++i)
        tile_.q[threadIdx.x / kChunk + i * kRowsAtOnce][column] =
            queries_[i] && column < columns ? cuda::widened(queries_[i][first + column]) : A(0);
      load_keys(first, columns);
      __syncthreads();
      for (int c = 0; c < columns; c += 4) {
        A of_q[4], of_k[4];
        load_four(q + c, of_q);
#pragma unroll
        for (int j = 0; j < kKeysOfLane; ++j) {
          load_four(tile_.k[lane() + kLanes * j] + c, of_k);
#pragma unroll
          for (int i = 0; i < 4; ++i) s[j] += of_q[i] * of_k[i];
        }
      }
      __syncthreads();
    }
    const int seen = unit_.seen(p_, row_);
#pragma unroll
    for (int j = 0; j < kKeysOfLane; ++j) {
      const int i = lane() + kLanes * j;
      const bool key = tile_.keys[i].data && unit_.key(tile, i) < seen;
      s[j] = key ? s[j] * static_cast<A>(p_.softmax_scale) : -kInfinity<A>;
    }
  }

  /// Columns [first, first + columns) of the tile's keys, 0 behind them and where there is no key.
  __device__ void load_keys(std::int64_t first, int columns) {
    const int column = threadIdx.x % kChunk;
    const bool plain = format_ == RowFormat::plain;
    A values[kTileKeys / kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i) {
      const KeyRow key = tile_.keys[threadIdx.x / kChunk + i * kRowsAtOnce];
      values[i] = 0;
      if (!key.data || column >= columns) continue;
      values[i] = plain ? cuda::widened(reinterpret_cast<const T*>(key.data)[first + column])
                        : coded_value(format_, key, first + column, k_scale_);
    }
#pragma unroll
    for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i)
      tile_.k[threadIdx.x / kChunk + i * kRowsAtOnce][column] = values[i];
  }

 private:
  static constexpr int kRowsAtOnce = kThreads / kChunk, kQueriesOfThread = kRows / kRowsAtOnce;

  const GatheredAttention& p_;
  const Unit& unit_;
  Tile<A>& tile_;
  const T* queries_[kQueriesOfThread];  ///< of the rows that the thread loads
  int row_;
  float k_scale_;
  RowFormat format_;
};

template <class A>
__device__ A max_of_row(A x) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(cuda::kAllLanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attend_gathered_fma_cuda_kernel(const __grid_constant__ GatheredAttention p, Parts<Compute<T>> parts,
                                    int row_blocks) {
  using A = Compute<T>;
  __shared__ Tile<A> tile;
  const int first_row = blockIdx.x % row_blocks * kRows;
  const Unit unit(p, blockIdx.x / row_blocks, static_cast<int>(min(std::int64_t{first_row} + kRows, p.rows()) - 1));
  Rows<T> rows(p, unit, first_row, tile);
  const std::int64_t first_column = std::int64_t{blockIdx.z} * kColumns;
  const int row_of_block = threadIdx.x / kLanes;

  A sums[kChunksOfBlock][kColumnsOfLane] = {};
  SoftmaxState<A> state;
  const int begin = parts.first_tile(blockIdx.y, unit.tiles), end = parts.first_tile(blockIdx.y + 1, unit.tiles);
  for (int t = begin; t < end; ++t) {
    A s[kKeysOfLane];
    rows.find_keys(t);
    rows.scores(t, s);
    A most = state.m;
#pragma unroll
    for (const A score : s) most = score > most ? score : most;
    most = max_of_row(most);
    const A rescale = softmax_rescale(state.m, most);
    A sum = 0;
#pragma unroll
    for (int j = 0; j < kKeysOfLane; ++j) {
      const A weight = s[j] == -kInfinity<A> ? A(0) : exp(s[j] - most);  // NaN beside a score of +inf
      tile.p[row_of_block][rows.lane() + kLanes * j] = weight;
      sum += weight;
    }
    state = {most, state.l * rescale + cuda::lane_group_sum(sum, kLanes)};
    // Keys that the row does not see have weight 0, but perhaps values that are not finite.
    const int keys = min(max(unit.seen(p, rows.row()) - unit.key(t, 0), 0), kTileKeys);
#pragma unroll
    for (int chunk = 0; chunk < kChunksOfBlock; ++chunk) {
      const std::int64_t column = first_column + chunk * kChunk;
      if (column >= p.d_v) break;
      rows.load_keys(column, static_cast<int>(min(p.d_v - column, std::int64_t{kChunk})));
      __syncthreads();
      auto& total = sums[chunk];
#pragma unroll
      for (A& sum : total) sum *= rescale;
#pragma unroll 4
      for (int i = 0; i < keys; ++i) {
        A values[kColumnsOfLane];
        load_four(tile.k[i] + rows.lane() * kColumnsOfLane, values);
#pragma unroll
        for (int j = 0; j < kColumnsOfLane; ++j) total[j] += tile.p[row_of_block][i] * values[j];
      }
      __syncthreads();
    }
  }

  if (!rows.inside()) return;
  const bool first_of_row = rows.lane() == 0 && blockIdx.z == 0;
  const int query = unit.query_of(rows.row()), head = unit.head_of(rows.row());
  const bool whole = parts.count == 1;
  const std::int64_t part_row = blockIdx.y * parts.rows + unit.number * p.rows() + rows.row();
  A factor = 1;
  if (whole) {
    if (first_of_row) store_statistics(p, unit.request, query, head, state.m, state.l);
    factor = output_factor<A>(p, head, state.m, state.l);
  } else if (first_of_row) {
    parts.states[2 * part_row] = state.m, parts.states[2 * part_row + 1] = state.l;
  }
#pragma unroll
  for (int chunk = 0; chunk < kChunksOfBlock; ++chunk) {
#pragma unroll
    for (int j = 0; j < kColumnsOfLane; ++j) {
      const std::int64_t column = first_column + chunk * kChunk + rows.lane() * kColumnsOfLane + j;
      if (column >= p.d_v) continue;
      if (whole)
        *pointer<T>(p.out, p.out_strides.at(unit.request, query, head) + column) =
            cuda::narrowed<T>(factor == A(0) ? A(0) : sums[chunk][j] * factor);
      else
        parts.out[part_row * parts.stride + column] = sums[chunk][j];
    }
  }
}

/// The probabilities of a tile of keys, summed over all rows of their unit.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    key_probs_fma_cuda_kernel(const __grid_constant__ GatheredAttention p, int tiles) {
  using A = Compute<T>;
  __shared__ Tile<A> tile;
  const int t = blockIdx.x % tiles;
  const Unit unit(p, blockIdx.x / tiles, static_cast<int>(p.rows()) - 1);
  A sum = 0;  // of key threadIdx.x
  for (int first_row = 0; t < unit.tiles && first_row < p.rows(); first_row += kRows) {
    Rows<T> rows(p, unit, first_row, tile);
    rows.find_keys(t);
    A s[kKeysOfLane];
    rows.scores(t, s);
#pragma unroll
    for (int j = 0; j < kKeysOfLane; ++j)
      tile.p[threadIdx.x / kLanes][rows.lane() + kLanes * j] =
          rows.inside() ? probability<A>(p, unit.request, unit.query_of(rows.row()), unit.head_of(rows.row()), s[j])
                        : A(0);
    __syncthreads();
    if (threadIdx.x < kTileKeys)
      for (int i = 0; i < kRows; ++i) sum += tile.p[i][threadIdx.x];
  }
  const std::int64_t key = std::int64_t{t} * kTileKeys + threadIdx.x;
  if (threadIdx.x < kTileKeys && key < p.pools[0].listed)
    *pointer<A>(p.key_probs, unit.number * p.pools[0].listed + key) = sum;
}

}  // namespace

void attend_gathered_fma(const char* operation, const GatheredAttention& p, const Launch& launch) {
  const auto row_blocks = static_cast<int>(cuda::ceil_div<std::int64_t>(p.rows(), kRows));
  const auto column_blocks =
      static_cast<unsigned>(std::max<std::int64_t>(cuda::ceil_div<std::int64_t>(p.d_v, kColumns), 1));
  cpu::visit_floating(p.dtype, [&]<class T>() {
    const Parts<Compute<T>> parts(p, launch);
    cuda::launch(operation, attend_gathered_fma_cuda_kernel<T>,
                 dim3(static_cast<unsigned>(p.units() * row_blocks), parts.count, column_blocks), dim3(kThreads), 0,
                 launch, p, parts, row_blocks);
  });
}

void key_probs_fma(const char* operation, const GatheredAttention& p, const Launch& launch) {
  const auto tiles = static_cast<int>(cuda::ceil_div<std::int64_t>(p.pools[0].listed, kTileKeys));
  cpu::visit_floating(p.dtype, [&]<class T>() {
    cuda::launch(operation, key_probs_fma_cuda_kernel<T>, dim3(static_cast<unsigned>(p.units() * tiles)),
                 dim3(kThreads), 0, launch, p, tiles);
  });
}

}  // namespace dsm::attention
