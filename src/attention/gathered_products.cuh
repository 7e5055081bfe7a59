// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include "src/attention/gathered_columns.cuh"
#include "src/cuda/ptx/mma.cuh"

// The products of queries with keys and of weights with values, each warp its own columns; gathered_mma_cuda.cu says
// the rest.
namespace dsm::attention {

inline constexpr int kRowsOfTile = 16;
inline constexpr int kWeightStride = kTileKeys + 8;  // against bank conflicts
inline constexpr int kSteps = kSlice / 16;           // of the products over the columns of a slice

/// Of blocks with 16 · M query rows, of which each warp has kOwn slices of the columns.
template <int M, int kOwn>
struct Layout {
  static constexpr int kRowTiles = M, kOwnSlices = kOwn, kWarps = kSlices / kOwn, kThreads = kWarps * cuda::kWarpSize;
  static constexpr int kMainSteps = kOwn * kSteps;  // of the products over columns; one more for those at the end
  static constexpr int kRows = kRowsOfTile * M;
  static constexpr int kLanes = kThreads / kRows;  // threads of a row in the softmax
  static constexpr int kKeysOfLane = kTileKeys / kLanes;
  static constexpr int kScoreBytes = kWarps * kRows * kTileKeys * 4;
  /// 16-bit numbers whose sum is a weight: two where nothing but memory bounds the kernel.
  static constexpr int kTerms = M == 1 && kOwn == 1 ? 2 : 1;
  static constexpr int kWeights = kRows * kWeightStride;
  static constexpr int kQueryBytes = M == 1 ? 0 : kRows * (kSlices + 1) * kMainBytes;
};

/// A warp's part of a score in shared memory: [kWarps, rows, kTileKeys], keys permuted in groups of 8, so that neither
/// the products' fragments nor the softmax meet in a bank.
__device__ __forceinline__ int score_at(int row, int key) {
  return row * kTileKeys + (key ^ (row % 2 * 2 + row / 2 % 2) * 8);
}

/// The warp's columns of the block's queries: in registers, or, where these are needed for the outputs of many rows, in
/// shared memory, laid out as keys are. With kTurned, columns are in the order of KeyPieces: step i of a slice has of
/// each lane's 16 columns those from 4 · i on.
template <class T, class L, bool kTurned>
class QueryColumns {
 public:
  static constexpr int M = L::kRowTiles, kMainSteps = L::kMainSteps;
  static constexpr bool kShared = M > 1;
  static_assert(!kShared || L::kOwnSlices == 1);

  __device__ QueryColumns(const GatheredAttention& p, const Unit& unit, int first_row, std::uint8_t* shared) {
    const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
    std::uint8_t* const main = shared + warp * L::kRows * kMainBytes;
    std::uint8_t* const tail = shared + L::kRows * kSlices * kMainBytes;
#pragma unroll
    for (int half = 0; half < 2 * M; ++half) {
      const int row = half * 8 + lane / 4, of_unit = first_row + row;
      const bool inside = of_unit < p.rows();
      const int d_qk = inside ? static_cast<int>(p.d_qk) : 0;
      const T* const q = static_cast<const T*>(p.q) +
                         (inside ? p.q_strides.at(unit.request, unit.query_of(of_unit), unit.head_of(of_unit)) : 0);
      if constexpr (kTurned) {
#pragma unroll
        for (int i = 0; i < kMainSteps; i += 2) {  // two steps are 8 neighbouring columns of a lane
          const int column = (warp * kMainSteps + i / kSteps * kSteps + lane % 4) * 16 + i % kSteps * 4;
          const uint4 eight = column < d_qk ? *reinterpret_cast<const uint4*>(q + column) : uint4{};
          a_[i][half] = eight.x, a_[i][2 + half] = eight.y, a_[i + 1][half] = eight.z, a_[i + 1][2 + half] = eight.w;
        }
      }
#pragma unroll
      for (int i = kTurned ? kMainSteps : 0; i <= kMainSteps; ++i) {
        const bool at_end = i == kMainSteps;
        if (kShared && at_end && warp >= kTailWarps) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int column =
              (at_end ? kMostValues + warp * kTailOfWarp : (warp * kMainSteps + i) * 16) + k * 8 + lane % 4 * 2;
          const bool own = !at_end || warp < kTailWarps;
          const std::uint32_t pair = own && column < d_qk ? *reinterpret_cast<const std::uint32_t*>(q + column) : 0u;
          if constexpr (kShared)
            *reinterpret_cast<std::uint32_t*>(
                (at_end ? tail + main_at(row, warp * kTailPieces + k) : main + main_at(row, i * 2 + k)) +
                lane % 4 * 4) = pair;
          else
            a_[i][k * 2 + half] = pair;
        }
      }
    }
    if constexpr (kShared) {
      __syncwarp();
      main_ = cuda::shared_address(main) + main_at(lane % 16, lane / 16);
      tail_ = cuda::shared_address(tail) + main_at(lane % 16, warp * kTailPieces + lane / 16);
    }
  }

  /// The operand of the i-th step and the m-th 16 rows.
  __device__ void load(std::uint32_t (&a)[4], int i, int m) const {
    if constexpr (kShared) {
      cuda::load_matrices(a, (i == kMainSteps ? tail_ : main_ ^ i * 32) + m * kRowsOfTile * kMainBytes);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = a_[i][j];
    }
  }

 private:
  std::uint32_t a_[kShared ? 1 : kMainSteps + 1][4];
  std::uint32_t main_, tail_;
};

/// The warp's part of the scores of a tile: products over its columns alone.
template <class T, class L>
struct Scores {
  static constexpr int M = L::kRowTiles, kMainSteps = L::kMainSteps;
  static constexpr int kTiles = kTileKeys / 8;
  float s[M][kTiles][4] = {};

  /// Adds those of the columns of step i, from a slice (or the columns behind the values) of a tile in shared memory.
  template <bool kTurned>
  __device__ void add(const QueryColumns<T, L, kTurned>& queries, int i, const std::uint8_t* tile) {
    const int lane = threadIdx.x % cuda::kWarpSize, key = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
    const bool at_end = i == kMainSteps;
    const std::uint32_t from =
        cuda::shared_address(tile) +
        main_at(key, (at_end ? threadIdx.x / cuda::kWarpSize * kTailPieces : i % kSteps * 2) + half);
    std::uint32_t b[kTiles / 2][4];
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) cuda::load_matrices(b[n], from + n * 16 * kMainBytes);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      std::uint32_t a[4];
      queries.load(a, i, m);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) cuda::mma_m16n8k16<T>(s[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }

  /// Adds those of a group of 8 keys over the columns of a slice.
  __device__ void add(const QueryColumns<T, L, true>& queries, int slice, int group, const KeyPieces<T>& keys) {
    const std::uint32_t b[8] = {keys.at[0].x, keys.at[0].y, keys.at[0].z, keys.at[0].w,
                                keys.at[1].x, keys.at[1].y, keys.at[1].z, keys.at[1].w};
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        std::uint32_t a[4];
        queries.load(a, slice * kSteps + i, m);
        cuda::mma_m16n8k16<T>(s[m][group], a, b[2 * i], b[2 * i + 1]);
      }
    }
  }

  /// Multiplies by numbers of the keys.
  template <class ScaleOf>
  __device__ void scale(const ScaleOf& scale_of) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int key = n * 8 + threadIdx.x % 4 * 2;
      const float2 by = {scale_of(key), scale_of(key + 1)};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float (&of_8)[4] = s[m][n];
        of_8[0] *= by.x, of_8[1] *= by.y, of_8[2] *= by.x, of_8[3] *= by.y;
      }
    }
  }

  __device__ void store(float* scores) const {
    const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
    float* const to = scores + warp * L::kRows * kTileKeys;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int at = score_at(lane / 4, n * 8 + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float* const of_rows = to + at + m * kRowsOfTile * kTileKeys;
        *reinterpret_cast<float2*>(of_rows) = {s[m][n][0], s[m][n][1]};
        *reinterpret_cast<float2*>(of_rows + 8 * kTileKeys) = {s[m][n][2], s[m][n][3]};
      }
    }
  }
};

/// A warp's part of the output: all rows of the block, its columns.
template <class T, class L>
struct Outputs {
  static constexpr int M = L::kRowTiles, kTerms = L::kTerms, kColumns = L::kOwnSlices * kSlice;
  float d[M][kColumns / 8][4] = {};

  static __device__ int first_column() { return threadIdx.x / cuda::kWarpSize * kColumns; }

  __device__ void rescale(const float* factors) {
    const int lane = threadIdx.x % cuda::kWarpSize;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float low = factors[m * kRowsOfTile + lane / 4], high = factors[m * kRowsOfTile + lane / 4 + 8];
#pragma unroll
      for (auto& of_8 : d[m]) of_8[0] *= low, of_8[1] *= low, of_8[2] *= high, of_8[3] *= high;
    }
  }

  /// Adds the weighted values of a tile; with kSome, to the rows [begin, end) only.
  template <bool kSome>
  __device__ void add(const T* weights, const std::uint8_t* tile, int begin = 0, int end = 0) {
    // Of a slice, 16 columns at a time; loads that are waited for together take registers.
    constexpr int kPairs = kSlice / 16, kAtOnce = kTerms * M == 1 ? kPairs : 1;
    const int lane = (kSome ? thread_again() : static_cast<int>(threadIdx.x)) % cuda::kWarpSize;
    const int key = lane / 8 % 2 * 8 + lane % 8, next = lane / 16;
    const std::uint32_t weights_at = cuda::shared_address(weights) + (key * kWeightStride + next * 8) * 2;
    const std::uint32_t values_at = cuda::shared_address(tile) + main_at(key, next);
#pragma unroll(kSome ? 1 : kTileKeys / 16)
    for (int k = 0; k < kTileKeys; k += 16) {
      std::uint32_t a[kTerms][M][4];
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
#pragma unroll
        for (int m = 0; m < M; ++m)
          cuda::load_matrices(a[term][m], weights_at + (term * L::kWeights + m * kRowsOfTile * kWeightStride + k) * 2);
      }
#pragma unroll
      for (int first = 0; first < L::kOwnSlices * kPairs; first += kAtOnce) {
        const std::uint32_t from = values_at + first / kPairs * kSliceBytes + k * kMainBytes;
        std::uint32_t b[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) cuda::load_matrices_transposed(b[i], from ^ (first + i) % kPairs * 32);
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                auto& of_8 = d[m][2 * (first + i) + n];
                if (!kSome) {
                  cuda::mma_m16n8k16<T>(of_8, a[term][m], b[i][2 * n], b[i][2 * n + 1]);
                  continue;
                }
                float sum[4] = {of_8[0], of_8[1], of_8[2], of_8[3]};
                cuda::mma_m16n8k16<T>(sum, a[term][m], b[i][2 * n], b[i][2 * n + 1]);
                const int row = m * kRowsOfTile + lane / 4;
                if (row >= begin && row < end) of_8[0] = sum[0], of_8[1] = sum[1];
                if (row + 8 >= begin && row + 8 < end) of_8[2] = sum[2], of_8[3] = sum[3];
              }
            }
          }
        }
      }
    }
  }

  /// Multiplies, for the last time, by factors of the rows. What is multiplied by 0 becomes 0.
  __device__ void finish(const float* factors) {
    const int lane = threadIdx.x % cuda::kWarpSize;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = factors[m * kRowsOfTile + lane / 4 + i / 2 * 8];
#pragma unroll
        for (auto& of_8 : d[m]) of_8[i] = factor == 0 ? 0 : of_8[i] * factor;
      }
    }
  }

  /// Gives them away in shared memory, or adds what a thread with the same number has given.
  __device__ void give(float4* shared) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) shared[given_at(m, n)] = {d[m][n][0], d[m][n][1], d[m][n][2], d[m][n][3]};
    }
  }
  __device__ void take(const float4* shared) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float4 given = shared[given_at(m, n)];
        d[m][n][0] += given.x, d[m][n][1] += given.y, d[m][n][2] += given.z, d[m][n][3] += given.w;
      }
    }
  }

  /// Calls row_at(row of the block), and what that returns for each of the row's columns, with two values.
  template <class RowAt>
  __device__ void visit(int d_v, const RowAt& row_at) const {
    const int lane = threadIdx.x % cuda::kWarpSize, first = first_column() + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto store = row_at(m * kRowsOfTile + lane / 4 + 8 * half);
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
          if (first + n * 8 < d_v) store(first + n * 8, d[m][n][2 * half], d[m][n][2 * half + 1]);
      }
    }
  }

 private:
  static __device__ int given_at(int m, int n) { return (m * (kColumns / 8) + n) * L::kThreads + threadIdx.x; }
};

}  // namespace dsm::attention
