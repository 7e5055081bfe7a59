// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "src/attention/few_heads_softmax_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90.cuh"
#include "src/attention/sparse_mla_decode/sparse_mla_decode_sm90_few_heads_v32_rows.cuh"
#include "src/cuda/ptx/arithmetic.cuh"
#include "src/cuda/ptx/mma.cuh"
#include "src/cuda/ptx/wgmma.cuh"

// Sparse decode of up to 16 heads of V3.2. Rows stay in shared memory as they are in the cache. Who multiplies makes
// float16 of their codes in registers, from where wgmma takes them as rows of products whose columns are heads: keys
// for the scores Sᵀ = K Qᵀ, once more and transposed for the output Oᵀ = Vᵀ Pᵀ. So there is room for four blocks on
// their way, and the port of shared memory is free. Two warpgroups of scorers have a block of keys each and make the
// weights, two of adders half of the output's columns each; four warps have rows copied.
//
// float16 has room for a row's values if its scales are divided by a power of two, 2^e, by which the row's weights are
// multiplied instead; the reference of the weights is that of these products, so that the rows that contribute most are
// exact to 11 bits, but for groups whose scales are 2^-20 of their row's largest and less. It rises only where weights
// would leave float16: the maximum is looked for in a request's first round, mostly.
//
// Bound by the memory: 656 bytes at any multiple of 16 take it as much as 768, i.e. 47 us for 128 requests of 2048 keys
// at 4.3 TB/s. 64 keys take a warpgroup of scorers 2300 to 2800 cycles (1400 alone) and one of adders 1700 to 2000, in
// which others use the arithmetic units as well. What did not help: four chunks of codes to a batch of products instead
// of two; half as many warps that have rows copied; to have the first rows land before others are asked for; codes of
// the next rows loaded before the products of these are waited for.
//
// H200, 16 heads, 2048 keys, us end to end, beside the kernel for all few heads: rows out of 2^20 or fewer, batch
// 2 14.9 (12.8), 16 22.3 (20.7), 32 29.4 (30.4), 64 44.5 (47.5), 128 69.2 (79.2); out of 32768 for each of 128
// requests 58.6 (limit by bytes 41; 77.4), with 0.86 of its rms error. Where thread blocks have few keys, the other
// kernel begins sooner.

namespace dsm::sparse_mla_sm90 {

__device__ __forceinline__ std::uint32_t product(std::uint32_t pair, std::uint32_t factors) {
  const __half2 its = __hmul2(reinterpret_cast<const __half2&>(pair), reinterpret_cast<const __half2&>(factors));
  return reinterpret_cast<const std::uint32_t&>(its);
}
__device__ __forceinline__ __nv_bfloat162 bfloats_of(std::uint32_t word) {
  return reinterpret_cast<const __nv_bfloat162&>(word);
}

struct FewHeadsV32 : attention::FewHeadsSoftmax<1> {
  using Record = KvV32Fp8;
  static constexpr int kBlocks = 2;  // of keys in a round
  static constexpr int kScorers = kBlocks * kWarpgroup, kAdders = 2 * kWarpgroup, kAttending = kScorers + kAdders;
  static constexpr int kThreads = kAttending + kWarpgroup;
  static constexpr int kTiles = Record::kWidth / 64;
  static constexpr int kMessages = 2;  // that may be under way
  static constexpr std::uint32_t kQueryTile = kTileHeads * 128;
  static constexpr float kMostWeight = 14;  // base 2 logarithm

  enum : int { kScoring = 1, kQueriesThere = 2 };  // named barriers

  using Rows = FactoredRows;

  struct Shared {
    static constexpr std::size_t kOthers = (kTiles + kMessages * kBlocks) * kQueryTile + 2048;
    /// Halves of blocks: as many as there is room for.
    static constexpr int kRows = static_cast<int>((225 * 1024 - kOthers) / sizeof(Rows));

    alignas(1024) std::uint8_t q[kTiles * kQueryTile];                   // swizzled tiles of 64 columns
    alignas(1024) std::uint8_t weights[kMessages][kBlocks][kQueryTile];  // swizzled tiles: heads by keys
    Rows rows[kRows];
    alignas(16) float of_warps[kTileHeads][kScorers / 32];
    alignas(16) float factors[kMessages][kTileHeads];  // that the output is to be multiplied by, if
    int multiplies[kMessages];
    float query_power[kTileHeads];
    cuda::MBarrier sent[kMessages], taken[kMessages];

    __device__ void init() {
      for (auto& its : rows) its.init(kAdders / 32);
      for (int i = 0; i < kMessages; ++i) sent[i].init(kScorers / 32), taken[i].init(kAdders / 32);
      cuda::fence_barrier_init();
    }
  };

  /// Puts the queries of a request into shared memory, as float16 (the tail's as bfloat16) 2^-e times as large, with
  /// 2^e of each head. Each of those who attend calls it, a warp for a head; who reads waits for kQueriesThere.
  __device__ __forceinline__ static void bring_queries(const Problem& p, int request, Shared& shared) {
    constexpr int kUnits = Record::kWidth / 16;  // of 16 columns
    static_assert(kAttending / 32 == kTileHeads);
    const int row = threadIdx.x / 32;
    const __nv_bfloat16* q =
        p.q + request * p.q_request + RowTile<kTileHeads>(p).position * p.q_position + row * p.q_head;
    const auto place = [&](int unit, int half) {
      return cuda::shared_address(shared.q) + unit / 4 * kQueryTile + cuda::swizzled(row, unit % 4 * 2 + half);
    };
    std::uint32_t largest = 0;
#pragma unroll 1
    for (int unit = lane(); unit < kUnits; unit += 32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 its = row < p.h_q ? reinterpret_cast<const uint4*>(q)[2 * unit + half] : uint4{};
        const std::uint32_t words[4] = {its.x, its.y, its.z, its.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) largest = __vmaxu2(largest, words[w] & 0x7fff7fff);
        store_chunk(place(unit, half), words);
      }
    }
    largest = __reduce_max_sync(cuda::kAllLanes, max(largest >> 16, largest & 0xffff));
    const int exponent = max(static_cast<int>(largest >> 7) - 127 - 14, -100);
    const float inverse = __uint_as_float((127 - exponent) << 23);
    if (lane() == 0) shared.query_power[row] = __uint_as_float((127 + exponent) << 23);
#pragma unroll 1
    for (int unit = lane(); unit < kUnits; unit += 32) {
      const bool tail = unit * 16 >= Record::kQuantized;
      const uint4 halves[2] = {load_piece(place(unit, 0)), load_piece(place(unit, 1))};
      std::uint32_t words[8];
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const float2 pair = __bfloat1622float2(bfloats_of(word(halves[w / 4], w % 4)));
        const float x = pair.x * inverse, y = pair.y * inverse;
        words[w] = tail ? cuda::rounded_pair<__nv_bfloat16>(x, y) : cuda::rounded_pair<__half>(x, y);
      }
      // Of 16 codes a thread of a quad has four neighbours, at places 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a product.
      const std::uint32_t low[4] = {words[0], tail ? words[1] : words[2], tail ? words[2] : words[4],
                                    tail ? words[3] : words[6]};
      const std::uint32_t high[4] = {tail ? words[4] : words[1], tail ? words[5] : words[3], tail ? words[6] : words[5],
                                     words[7]};
      store_chunk(place(unit, 0), low);
      store_chunk(place(unit, 1), high);
    }
    cuda::fence_async_shared();
  }

  // ---- scores and weights: a warpgroup of scorers has one of a round's blocks ----

  /// Scores of a block, in units of 2^e of the row and of the queries. Keys are the rows of the product: numbers 4 n +
  /// 2 i + k are of the thread's key i and head 8 n + 2 (lane % 4) + k. Each group of codes has a product of its own,
  /// which is multiplied by its factor when all are there.
  __device__ __forceinline__ static void multiply_queries(Product& s, const Shared& shared, const Rows& rows) {
    const int first = warp() % 2 * 16, own = first + lane() / 4;
    const std::uint32_t from =
        cuda::shared_address(rows.bytes[first + lane() / 8 % 2 * 8 + lane() % 8]) + lane() / 16 * 16;
    const std::uint64_t q = cuda::k_major(shared.q);
    const auto columns = [&](int k) { return cuda::advanced(q, k / 4 * kQueryTile + k % 4 * 32); };
    const __nv_bfloat162 inverse[2] = {__bfloat162bfloat162(rows.inverse[own]),
                                       __bfloat162bfloat162(rows.inverse[own + 8])};
#pragma unroll
    for (int k = Record::kQuantized / 16; k < Record::kWidth / 16; ++k) {
      std::uint32_t a[4];
      cuda::load_matrices(a, from + Record::kTailAt + 32 * (k - Record::kQuantized / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = bits_of_pair(__hmul2(bfloats_of(a[i]), inverse[i % 2]));
      cuda::wgmma_fence();
      cuda::wgmma_m64n16<__nv_bfloat16, cuda::Major::k>(s, a, columns(k), k > Record::kQuantized / 16);
      cuda::wgmma_commit();
    }
    constexpr int kChunks = Record::kQuantized / 32, kTogether = 2;  // of whose products those before run meanwhile
    Product of_groups[Rows::kGroups];
    std::uint32_t codes[2][4], a[2][kTogether][2][4];
    cuda::load_matrices(codes[0], from);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c + 1 < kChunks) cuda::load_matrices(codes[(c + 1) % 2], from + 32 * (c + 1));
      auto& its = a[c / kTogether % 2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        widen_e4m3(codes[c % 2][i], its[c % kTogether][i / 2][i % 2], its[c % kTogether][i / 2][i % 2 + 2]);
      if (c % kTogether != kTogether - 1) continue;
      cuda::wgmma_fence();
#pragma unroll
      for (int k = 2 * (c + 1 - kTogether); k < 2 * (c + 1); ++k)
        cuda::wgmma_m64n16<__half, cuda::Major::k>(of_groups[k * 16 / Record::kGroup], its[k / 2 % kTogether][k % 2],
                                                   columns(k), k * 16 % Record::kGroup != 0);
      cuda::wgmma_commit();
      if (c != kChunks - 1) cuda::wgmma_wait<1>();
    }
    cuda::wgmma_wait<0>();
    cuda::wgmma_registers(s);
#pragma unroll
    for (int g = 0; g < Rows::kGroups; ++g) {
      cuda::wgmma_registers(of_groups[g]);
      const float factor[2] = {__half2float(rows.factors[g][factor_place(own)]),
                               __half2float(rows.factors[g][factor_place(own + 8)])};
#pragma unroll
      for (int i = 0; i < kTileHeads / 2; ++i) s[i] = fmaf(of_groups[g][i], factor[i / 2 % 2], s[i]);
    }
  }

  __device__ __forceinline__ static bool any_of_scorers(bool one) {
    int any;
    asm volatile(
        "{ .reg .pred p, q;\n"
        "setp.ne.u32 p, %1, 0;\n"
        "barrier.cta.red.or.pred q, %2, %3, p;\n"
        "selp.b32 %0, 1, 0, q; }"
        : "=r"(any)
        : "r"(static_cast<int>(one)), "r"(static_cast<int>(kScoring)), "r"(kScorers)
        : "memory");
    return any;
  }

  /// Combines numbers of a thread's own heads over the keys of all scorers, who wait for each other.
  template <class Op>
  __device__ __forceinline__ static void combine(float (&x)[kOwnHeads], Shared& shared, Op op) {
#pragma unroll
    for (int h = 0; h < kOwnHeads; ++h) {
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) x[h] = op(x[h], __shfl_xor_sync(cuda::kAllLanes, x[h], apart));
      if (lane() < 4) shared.of_warps[head(h)][threadIdx.x / 32] = x[h];
    }
    cuda::named_sync(kScoring, kScorers);
#pragma unroll
    for (int h = 0; h < kOwnHeads; ++h) {
      const float4* all = reinterpret_cast<const float4*>(shared.of_warps[head(h)]);
      const float4 a = all[0], b = all[1];
      x[h] = op(op(op(a.x, a.y), op(a.z, a.w)), op(op(b.x, b.y), op(b.z, b.w)));
    }
  }

  /// The running softmax of a thread's own heads; sums are over its own keys. Weights, times 2^e of their rows, have a
  /// reference so near the greatest one that they are up to 2^kMostWeight: -inf where no key has been seen.
  struct Softmax {
    float scale[kOwnHeads], most[kOwnHeads], sum[kOwnHeads];

    __device__ Softmax(const Problem& p, const Shared& shared) {
#pragma unroll
      for (int h = 0; h < kOwnHeads; ++h)
        scale[h] = p.scale * shared.query_power[head(h)], most[h] = -INFINITY, sum[h] = 0;
    }

    /// Scores become weights of the rows' values. Returns whether earlier ones are to be multiplied by `factors`.
    __device__ __forceinline__ bool weigh(Product& s, unsigned valid, const Rows& rows, float* factors,
                                          Shared& shared) {
      const int own = warp() % 2 * 16 + lane() / 4;
      const float power[2] = {rows.power[own], rows.power[own + 8]};
      float exponent[2];
      bool over = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        exponent[i] = static_cast<float>(static_cast<int>(__float_as_uint(power[i]) >> 23) - 127);
        const bool is_key = valid >> (own + 8 * i) & 1;
#pragma unroll
        for (int h = 0; h < kOwnHeads; ++h) {
          const bool none = most[h] == -INFINITY;
          float& x = s[h / 2 * 4 + 2 * i + h % 2];
          x = is_key ? fmaf(x, scale[h] * power[i], none ? 0 : -most[h]) : -INFINITY;
          over |= x + exponent[i] > (none ? -INFINITY : kMostWeight);
        }
      }
      const bool rises = any_of_scorers(over);
      if (rises) {
        float rise[kOwnHeads];
#pragma unroll
        for (int h = 0; h < kOwnHeads; ++h)
          rise[h] = fmaxf(s[h / 2 * 4 + h % 2] + exponent[0], s[h / 2 * 4 + 2 + h % 2] + exponent[1]);
        combine(rise, shared, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
        for (int h = 0; h < kOwnHeads; ++h) {
          const bool none = most[h] == -INFINITY;
          const float by = none ? (rise[h] == -INFINITY ? 0 : rise[h]) : fmaxf(rise[h], 0.f);
          const float factor = none ? 1 : cuda::power_of_two(-by);
          most[h] = none ? rise[h] : most[h] + by;
          sum[h] *= factor;
          s[h / 2 * 4 + h % 2] -= by, s[h / 2 * 4 + 2 + h % 2] -= by;
          if (threadIdx.x < 4) factors[head(h)] = factor;
        }
      }
#pragma unroll
      for (int h = 0; h < kOwnHeads; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[h / 2 * 4 + 2 * i + h % 2];
          x = cuda::power_of_two(x);
          sum[h] += x;
          x *= power[i];
        }
      return rises;
    }

    /// Factors of finished heads, whose statistics go to the result or the workspace.
    __device__ __forceinline__ void finish(const Problem& p, int request, int slot, float* factors, Shared& shared) {
      static_assert(kTileHeads == split_kv::kStripRows);
      cuda::named_sync(kScoring, kScorers);  // until all have read what a round combined
      combine(sum, shared, [](float x, float y) { return x + y; });
      const int position = RowTile<kTileHeads>(p).position;
#pragma unroll
      for (int h = 0; h < kOwnHeads; ++h) {
        const int its = head(h);
        const bool keys = sum[h] != 0, there = its < p.h_q, sink = p.attn_sink && there;
        const float factor =
            keys ? 1 / (sum[h] + (sink ? cuda::power_of_two(p.attn_sink[its] * kLog2e - most[h]) : 0)) : 0;
        if (threadIdx.x < 4) factors[its] = slot >= 0 ? 1 : factor;
        if (threadIdx.x >= 4 || !there) continue;
        if (slot < 0)
          p.lse[(std::int64_t{request} * p.h_q + its) * p.s_q + position] =
              keys ? (most[h] + log2f(sum[h])) * kLn2 : INFINITY;
        else
          split_kv::store_state(p.pieces, slot, position, its, keys ? most[h] : -INFINITY, sum[h]);
      }
    }
  };

  /// A message has the weights of a round, or the factors of a finished request.
  struct Message {
    int n = 0;

    __device__ int buffer() const { return n % kMessages; }
    __device__ void await_place(Shared& shared) const { shared.taken[buffer()].wait(n / kMessages % 2 ^ 1); }
    __device__ void await(Shared& shared) const { shared.sent[buffer()].wait(n / kMessages % 2); }
    __device__ void send(Shared& shared) const { arrive(shared.sent[buffer()]); }
    __device__ void take(Shared& shared) const { arrive(shared.taken[buffer()]); }

   private:
    __device__ static void arrive(cuda::MBarrier& barrier) {
      __syncwarp();
      if (lane() == 0) barrier.arrive();
    }
  };

  __device__ __forceinline__ static void make_weights(const Problem& p, const split_kv::Part& part, Shared& shared) {
    const int which = threadIdx.x / kWarpgroup;
    Message message;
    int n = 0;  // blocks before
#pragma unroll 1
    for (int request = part.first_request; request <= part.last_request; ++request) {
      const Run run(p, part, request);
      const int slot = slot_of(part, run, request);
      bring_queries(p, request, shared);
      cuda::named_sync(kQueriesThere, kAttending);
      Softmax softmax(p, shared);
#pragma unroll 1
      for (int block = run.begin; block < run.end; block += kBlocks, ++message.n) {
        const bool there = block + which < run.end;
        const int half = 2 * (n + which) + warp() / 2;
        Rows& rows = shared.rows[half % Shared::kRows];
        if (there) {
          rows.landed.wait(half / Shared::kRows % 2);
          factor_rows(rows, warp() % 2 * 16);
        }
        Product s;  // of whatever is there where there is no block: nobody reads its weights
        multiply_queries(s, shared, rows);
        message.await_place(shared);
        const int buffer = message.buffer();
        const bool multiplies = softmax.weigh(s, there ? rows.valid : 0, rows, shared.factors[buffer], shared);
        if (threadIdx.x == 0) shared.multiplies[buffer] = multiplies;
        store_weights<__half>(s, shared.weights[buffer][which]);
        message.send(shared);
        n += min(kBlocks, run.end - block);
      }
      message.await_place(shared);
      softmax.finish(p, request, slot, shared.factors[message.buffer()], shared);
      message.send(shared);
      ++message.n;
    }
  }

  // ---- values: each of two warpgroups of adders has half of the output's columns ----

  /// Four slices of 16 columns: their rows r and r + 8 of a product are columns 2 r and 2 r + 1, and heads its columns.
  struct Output {
    Product values[4] = {};

    __device__ __forceinline__ static int first_column() {
      return (threadIdx.x - kScorers) / kWarpgroup * kColumns + 64 * warp();
    }
    __device__ __forceinline__ void registers() {
#pragma unroll
      for (auto& its : values) cuda::wgmma_registers(its);
    }

    __device__ __forceinline__ void multiply(const float* factors) {
#pragma unroll
      for (int n = 0; n < kTileHeads / 8; ++n) {
        const float2 its = *reinterpret_cast<const float2*>(&factors[head(2 * n)]);
#pragma unroll
        for (auto& slice : values)
#pragma unroll
          for (int i = 0; i < 2; ++i) slice[4 * n + 2 * i] *= its.x, slice[4 * n + 2 * i + 1] *= its.y;
      }
    }

    /// Adds products of half a block, whose weights begin at `weights`; they are not waited for.
    __device__ __forceinline__ void add_products(const Rows& rows, std::uint64_t weights) {
      const std::uint32_t from = cuda::shared_address(rows.bytes[lane()]) + first_column();
      const uint4 factors =
          load_piece(cuda::shared_address(&rows.factors[first_column() / Record::kGroup][lane() % 4 * 8]));
      std::uint32_t codes[4][4], a[4][2][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) cuda::load_matrices_transposed(codes[j], from + 16 * j);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          std::uint32_t* its = &a[j][m / 2][m % 2 * 2];
          widen_e4m3(__byte_perm(codes[j][m], 0, 0x3120), its[0], its[1]);
          its[0] = product(its[0], word(factors, m)), its[1] = product(its[1], word(factors, m));
        }
      cuda::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          cuda::wgmma_m64n16<__half, cuda::Major::k>(values[j], a[j][k], cuda::advanced(weights, 32 * k), true);
      cuda::wgmma_commit();
    }

    /// Finished requests to the result, of others to the workspace.
    __device__ __forceinline__ void store(const Problem& p, int request, int slot) const {
      const int position = RowTile<kTileHeads>(p).position, first = 2 * (lane() % 4),
                column = first_column() + lane() / 4 * 2;
      __nv_bfloat16* to = p.out + request * p.out_request + position * p.out_position + first * p.out_head + column;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float *low = &values[j][k], *high = low + 4;  // heads first + k and 8 on
          if (slot >= 0) {                                    // the position is one strip of rows
            split_kv::store_values(p.pieces, slot, position, column / 8 + 2 * j, 4 * (first + k) + lane() / 4 % 4,
                                   make_float4(low[0], low[2], high[0], high[2]));
            continue;
          }
          if (first + k < p.h_q)
            *reinterpret_cast<std::uint32_t*>(to + k * p.out_head + 16 * j) =
                cuda::rounded_pair<__nv_bfloat16>(low[0], low[2]);
          if (first + k + 8 < p.h_q)
            *reinterpret_cast<std::uint32_t*>(to + (k + 8) * p.out_head + 16 * j) =
                cuda::rounded_pair<__nv_bfloat16>(high[0], high[2]);
        }
    }
  };

  __device__ __forceinline__ static void add_values(const Problem& p, const split_kv::Part& part, Shared& shared) {
    Message message;
    int n = 0;  // halves of blocks before
#pragma unroll 1
    for (int request = part.first_request; request <= part.last_request; ++request) {
      const Run run(p, part, request);
      bring_queries(p, request, shared);
      cuda::named_arrive(kQueriesThere, kAttending);
      Output o;
#pragma unroll 1
      for (int block = run.begin; block < run.end; block += kBlocks, ++message.n) {
        message.await(shared);
        const int buffer = message.buffer();
        if (shared.multiplies[buffer]) o.multiply(shared.factors[buffer]);
        const int halves = 2 * min(kBlocks, run.end - block);
#pragma unroll 1
        for (int half = 0; half < halves; ++half, ++n) {
          Rows& rows = shared.rows[n % Shared::kRows];
          rows.landed.wait(n / Shared::kRows % 2);
          o.registers();
          o.add_products(rows,
                         cuda::advanced(cuda::k_major(shared.weights[buffer]), half / 2 * kQueryTile + half % 2 * 64));
          __syncwarp();
          if (lane() == 0) rows.free.arrive();
          cuda::wgmma_wait<0>();
          o.registers();
        }
        message.take(shared);
      }
      message.await(shared);
      o.multiply(shared.factors[message.buffer()]);
      message.take(shared);
      ++message.n;
      o.store(p, request, slot_of(part, run, request));
    }
  }
};

}  // namespace dsm::sparse_mla_sm90
