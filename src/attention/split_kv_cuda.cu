// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// Bound by latency where requests have many pieces, by the L2 where many requests have few. One launch after the
// writing kernel, which lets it start early; then two dependent reads: how many pieces there are, unless all requests
// are equal, and their states and values. Most of the time goes into fetching instructions that run once, about 25
// cycles for each: 64 pieces of 16 heads take 2.1 us if a warp has eight pieces, unrolled for sixteen, and 1.2 us if it
// has four. What did not help: going through the code once before the pieces are there, whether blocks stand ready
// early or not (1 us slower); blocks of 128 threads and 56 registers, one of which stands beside each block of the
// writing kernel and goes through the code while that computes: all others gather on the multiprocessors that are free
// first, nine on each (1 to 4 us slower).
#include <cmath>

#include "src/attention/split_kv.cuh"
#include "src/cuda/copy/element.cuh"
#include "src/cuda/index/divider.cuh"
#include "src/cuda/launch/launch.h"
#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/barrier.cuh"

namespace dsm::split_kv {
namespace {

constexpr int kPacks = kStripValues / 4;                 // of a strip, of 4 values
constexpr int kStepsOfStrip = kPacks / cuda::kWarpSize;  // of a warp through them
constexpr int kWarps = 8;
constexpr int kMostOfFew = kInvariantPieces;  // batch-invariant pieces are added up in one way
constexpr int kMostOfFewWarps = 31;           // pieces that half of the warps are enough for
constexpr int kMostOfTwo = 16;                // that a warp has two of, or hardly more

/// Where results go.
template <class T>
struct Results {
  const float* attn_sink;
  int rows;                   ///< of a group
  cuda::Divider strips, h_q;  ///< strips of a group
  int s_q;
  T* out;
  std::int64_t out_batch, out_position, out_head;  ///< strides
  float* lse;
};

/// What a warp adds up: of a lane's two rows, 8 apart, the largest reference point of the exponentials, their sum, and
/// values of kSteps steps, whose first two are the first row's.
template <int kSteps>
struct Sum {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
  float4 values[kSteps] = {};

  __device__ static float weight(float reference, float most) {
    return cuda::power_of_two(reference - (most == -INFINITY ? 0 : most));
  }
  /// Changes the reference points.
  __device__ void refer(const float (&to)[2]) {
    const float factors[2] = {weight(most[0], to[0]), weight(most[1], to[1])};
#pragma unroll
    for (int i = 0; i < 2; ++i) most[i] = to[i], total[i] *= factors[i];
#pragma unroll
    for (float4& x : values) x.x *= factors[0], x.y *= factors[0], x.z *= factors[1], x.w *= factors[1];
  }
  /// Adds a piece with the states of both rows, reference points −∞ where there is no key: what stands there is no
  /// value.
  __device__ void add(const float2 (&states)[2], const float4 (&piece)[kSteps]) {
    const float w[2] = {weight(states[0].x, most[0]), weight(states[1].x, most[1])};
    total[0] += w[0] * states[0].y, total[1] += w[1] * states[1].y;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float4& x = values[step];
      if (w[0] != 0) x.x += w[0] * piece[step].x, x.y += w[0] * piece[step].y;
      if (w[1] != 0) x.z += w[1] * piece[step].z, x.w += w[1] * piece[step].w;
    }
  }
};

/// Adds up pieces `turn`, turn + turns, … of steps of a strip, of which kAtOnce are in flight.
template <int kSteps, int kAtOnce>
__device__ __forceinline__ Sum<kSteps> add_pieces(const Workspace& from, Pieces pieces, int turn, int turns, int strip,
                                                  int first_step) {
  const int lane = threadIdx.x % cuda::kWarpSize;
  const float2* states = reinterpret_cast<const float2*>(from.states) + strip * kStripRows + lane / 4;
  const float4* values =
      reinterpret_cast<const float4*>(from.values) + strip * kPacks + first_step * cuda::kWarpSize + lane;
  std::int32_t slot = pieces.slot(turn);
  Sum<kSteps> sum;
#pragma unroll 1
  for (int i = turn; i < pieces.count; i += kAtOnce * turns) {
    float2 its[kAtOnce][2];
    float4 piece[kAtOnce][kSteps];
    // The slots of a warp's pieces are equally far apart, but perhaps the first one's.
    const std::int32_t next = pieces.slot(i + turns);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool there = k == 0 || i + k * turns < pieces.count;
      if (kAtOnce > 2 && !there) {  // where there are two, the first one is read again
        its[k][0] = its[k][1] = {};
#pragma unroll
        for (float4& x : piece[k]) x = {};
        continue;
      }
      const std::int64_t strips = from.first_strip(there && k > 0 ? next + (k - 1) * 2 * turns : slot);
      its[k][0] = states[strips * kStripRows], its[k][1] = states[strips * kStripRows + 8];
      if (!there) its[k][0].y = its[k][1].y = 0;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) piece[k][step] = values[strips * kPacks + step * cuda::kWarpSize];
    }
    slot = next + (kAtOnce - 1) * 2 * turns;
    float most[2] = {sum.most[0], sum.most[1]};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (its[k][row].y == 0) its[k][row].x = -INFINITY;
        most[row] = fmaxf(most[row], its[k][row].x);
      }
    sum.refer(most);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum.add(its[k], piece[k]);
  }
  return sum;
}

/// One of the two rows of a lane.
template <class T>
struct Row {
  bool inside;
  int position, head;
  float sink;  ///< logarithm, base 2; read before there are pieces

  __device__ Row(const Results<T>& to, int strip, int i) {
    const int group = static_cast<int>(to.strips.quotient(strip));
    const int row = (strip - group * static_cast<int>(to.strips.divisor())) * kStripRows +
                    threadIdx.x % cuda::kWarpSize / 4 + 8 * i;
    inside = row < to.rows;
    position = static_cast<int>(to.h_q.quotient(group * to.rows + row));
    head = group * to.rows + row - position * static_cast<int>(to.h_q.divisor());
    sink = to.attn_sink && inside ? to.attn_sink[head] * static_cast<float>(M_LOG2E) : -INFINITY;
  }
  __device__ T* out(const Results<T>& to, int request) const {
    return to.out + request * to.out_batch + position * to.out_position + head * to.out_head;
  }
  /// The factor of the values; writes lse if asked.
  __device__ float finish(const Results<T>& to, int request, float most, float total, bool writes) const {
    const bool keys = total != 0;
    if (writes && inside && threadIdx.x % 4 == 0)
      to.lse[(std::int64_t{request} * to.h_q.divisor() + head) * to.s_q + position] =
          keys ? (most + log2f(total)) * static_cast<float>(M_LN2) : INFINITY;
    return keys ? __fdividef(1, total + cuda::power_of_two(sink - most)) : 0;
  }
};

/// The pieces of all requests, which the kernel before has written down or which are known without it.
struct AllPieces {
  bool known;
  EqualRequests equal;  ///< if known

  /// After the kernel before.
  __device__ Pieces await(const Workspace& from, int request) const {
    Pieces pieces;
    if (known) pieces = equal.pieces(request);
    cuda::await_previous_kernel();
    if (!known) pieces = from.pieces[request];
    return pieces;
  }
};

/// Of requests with few pieces: a warp has four steps of a strip.
template <class T>
__global__ void __launch_bounds__(kWarps* cuda::kWarpSize)
    split_kv_combine_few_cuda_kernel(Workspace from, AllPieces all, Results<T> to) {
  constexpr int kSteps = 4;
  const int request = blockIdx.y, at = blockIdx.x * kWarps + threadIdx.x / cuda::kWarpSize;
  const int strip = at / (kStepsOfStrip / kSteps), first_step = at % (kStepsOfStrip / kSteps) * kSteps;
  const Row<T> rows[2] = {{to, strip, 0}, {to, strip, 1}};
  const Pieces pieces = all.await(from, request);
  if (pieces.count <= 1 || strip >= from.strips) return;
  const Sum<kSteps> sum = add_pieces<kSteps, 2>(from, pieces, 0, 1, strip, first_step);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = rows[i].finish(to, request, sum.most[i], sum.total[i], first_step == 0);
    std::uint32_t pairs[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float4& x = sum.values[step];
      pairs[step] = cuda::rounded_pair<T>((i == 0 ? x.x : x.z) * scale, (i == 0 ? x.y : x.w) * scale);
    }
    cuda::transpose_quad(pairs);  // 8 columns of a step
    if (rows[i].inside)
      reinterpret_cast<uint4*>(rows[i].out(to, request) + first_step * 8)[threadIdx.x % 4] =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

/// Of requests with many pieces: the warps of a block take the pieces of some steps of a strip in turn; then each
/// step's sums are added up in order by one of them. Few pieces are in flight at a time, as the instructions of code
/// that runs once take longer than the L2. With eight in flight a block takes a multiprocessor's registers: the first
/// ones that are free would get two blocks, others none.
template <class T, int kSteps, int kWarps, int kAtOnce>
__global__ void __launch_bounds__(kWarps* cuda::kWarpSize, kAtOnce >= 8 ? 1 : 16 / kWarps)
    split_kv_combine_many_cuda_kernel(Workspace from, AllPieces all, Results<T> to) {
  __shared__ float4 values[kWarps][kSteps][cuda::kWarpSize];
  __shared__ float4 states[kWarps][cuda::kWarpSize];  // of the lane's two rows
  const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
  const int first_step = blockIdx.x * kSteps, strip = blockIdx.y, request = blockIdx.z;
  const Row<T> rows[2] = {{to, strip, 0}, {to, strip, 1}};
  const Pieces pieces = all.await(from, request);
  if (pieces.count <= 1) return;
  {
    const auto sum = add_pieces<kSteps, kAtOnce>(from, pieces, warp, kWarps, strip, first_step);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) values[warp][step][lane] = sum.values[step];
    states[warp][lane] = {sum.most[0], sum.total[0], sum.most[1], sum.total[1]};
  }
  __syncthreads();
  if (warp >= kSteps) return;
  float most[2] = {-INFINITY, -INFINITY};
#pragma unroll 8
  for (int i = 0; i < kWarps; ++i)
    most[0] = fmaxf(most[0], states[i][lane].x), most[1] = fmaxf(most[1], states[i][lane].z);
  Sum<1> sum;
  sum.refer(most);
#pragma unroll 8
  for (int i = 0; i < kWarps; ++i) {
    const float4 its = states[i][lane];
    sum.add({{its.x, its.y}, {its.z, its.w}}, {values[i][warp][lane]});
  }
  const float4& x = sum.values[0];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = rows[i].finish(to, request, sum.most[i], sum.total[i], first_step + warp == 0);
    if (rows[i].inside)
      reinterpret_cast<std::uint32_t*>(rows[i].out(to, request) + (first_step + warp) * 8)[lane % 4] =
          cuda::rounded_pair<T>((i == 0 ? x.x : x.z) * scale, (i == 0 ? x.y : x.w) * scale);
  }
}

}  // namespace

void combine(const char* operation, const Workspace& workspace, const EqualRequests* equal, std::int64_t groups,
             const TensorView& attn_sink, const TensorView& out, const TensorView& lse, const Launch& launch) {
  const std::int64_t batch = out.size(0);
  const std::int64_t most = cuda::ceil_div<std::int64_t>(workspace.parts, batch),
                     pieces = equal ? equal->pieces(0).count : most;
  const AllPieces all{.known = equal != nullptr, .equal = equal ? *equal : EqualRequests()};
  const auto run = [&]<class T>() {
    const auto rows = static_cast<int>(out.size(1) * out.size(2) / groups);
    const Results<T> results{.attn_sink = attn_sink.as<const float>(),
                             .rows = rows,
                             .strips = cuda::Divider(static_cast<std::uint32_t>(strips_of(1, rows))),
                             .h_q = cuda::Divider(static_cast<std::uint32_t>(out.size(2))),
                             .s_q = static_cast<int>(out.size(1)),
                             .out = out.as<T>(),
                             .out_batch = out.stride[0],
                             .out_position = out.stride[1],
                             .out_head = out.stride[2],
                             .lse = lse.as<float>()};
    const auto start = [&](auto* kernel, dim3 grid, int warps) {
      cuda::launch_dependent(operation, kernel, grid, dim3(warps * cuda::kWarpSize), 0, launch, workspace, all,
                             results);
    };
    const std::int64_t strips = batch * workspace.strips;
    const auto many = [&]<int kSteps, int kWarps, int kAtOnce>() {
      start(split_kv_combine_many_cuda_kernel<T, kSteps, kWarps, kAtOnce>,
            dim3(kStepsOfStrip / kSteps, workspace.strips, batch), kWarps);
    };
    if (most <= kMostOfFew)
      start(split_kv_combine_few_cuda_kernel<T>,
            dim3(cuda::ceil_div(workspace.strips * kStepsOfStrip / 4, kWarps), batch), kWarps);
    else if (strips <= 4)  // blocks for all multiprocessors, as far as there are enough
      pieces <= kMostOfTwo ? many.template operator()<1, 8, 2>() : many.template operator()<1, 16, 4>();
    else if (pieces <= kMostOfTwo / 2)
      many.template operator()<4, 4, 2>();
    else if (pieces <= kMostOfFewWarps)
      many.template operator()<4, 4, 4>();
    else if (strips <= 8)
      many.template operator()<4, 8, 8>();
    else
      many.template operator()<4, 8, 4>();
  };
  out.dtype == DType::bfloat16 ? run.operator()<bfloat16>() : run.operator()<float16>();
}

}  // namespace dsm::split_kv
