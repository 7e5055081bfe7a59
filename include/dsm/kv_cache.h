// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "dsm/export.h"
#include "dsm/launch.h"
#include "dsm/tensor_view.h"

namespace dsm {

// A cache holds the rows that attention reads as keys and values, one per token (or per compressed entry), in pages of
// page_size rows. Row index = page · page_size + entry, everywhere: an index below 0 or beyond the last row is no row.
//
// A plain cache is [pages, page_size, 1, width] float64|float32|float16|bfloat16. A quantised cache is
// [pages, page_size, 1, bytes] uint8|int8|float8_e4m3fn, where the number of bytes names the format. In both, a page
// has no gaps inside; pages may be any distance apart (stride 0), e.g. padded to a multiple of 576 bytes.

/// The quantised formats. A row's value is element · scale of its group, formed in float32; it is exact in bfloat16 but
/// for v32_fp8 with scales that are no powers of two. Numbers are little-endian, an e2m1 pair has the element of even
/// index in its low nibble. Sources: FlashMLA (tests/quant.py and interface of 2026-09-30), vLLM.
enum class KvFormat : std::uint8_t {
  /// DeepSeek-V3.2, 656 bytes, 576 values: 512 e4m3 latent | 4 float32 scales, one per 128 | 64 bfloat16 rotary.
  v32_fp8,
  /// DeepSeek-V3.2 in NVFP4, 352 bytes, 576 values: 512 e2m1 latent (256 bytes) | 64 e4m3 rotary, unscaled | 32 e4m3
  /// scales, one per 16 latent values.
  v32_nvfp4,
  /// DeepSeek-V4, 584 bytes, 512 values. Not an array of records: a page is page_size times
  ///   448 e4m3 | 64 bfloat16 rotary                                (576 bytes)
  /// and then page_size times
  ///   7 e8m0 scales, one per 64 of the 448 | 1 byte of zero        (8 bytes).
  v4_fp8,
  /// DeepSeek-V4.1, 528 bytes, 512 values: 512 e4m3 | 16 e8m0 scales, one per 32.
  v41_fp8,
  /// DeepSeek-V4.1 in FP4, 288 bytes, 512 values: 512 e2m1 (256 bytes) | 32 e4m3 scales, one per 16.
  v41_fp4,
};
inline constexpr std::initializer_list<KvFormat> kKvFormats = {KvFormat::v32_fp8, KvFormat::v32_nvfp4, KvFormat::v4_fp8,
                                                               KvFormat::v41_fp8, KvFormat::v41_fp4};

/// How a writer chooses float32 scales of groups of E4M3 values.
enum class KvScales : std::uint8_t {
  ue8m0,  ///< the smallest power of two >= max(amax, 1e-4) · float(1 / 448)
  fp32,   ///< max(amax / 448, 2^-126)
};

/// Bytes of a row; no two formats have the same.
constexpr int kv_bytes(KvFormat format) {
  constexpr int kBytes[] = {656, 352, 584, 528, 288};
  return kBytes[static_cast<int>(format)];
}

/// Values of a row.
constexpr int kv_width(KvFormat format) {
  return format == KvFormat::v32_fp8 || format == KvFormat::v32_nvfp4 ? 576 : 512;
}

/// The format of a quantised cache, by its dtype and last extent; nothing for every other tensor.
DSM_API std::optional<KvFormat> kv_format(const TensorView& cache);

/// Values of a row of a cache.
DSM_API std::int64_t kv_width(const TensorView& cache);

/// Stores one row per token, [latent | k_pe], of DeepSeek-V3's latent attention: in a plain cache rounded to its dtype
/// (float64 to 16 bits by way of float32), in a quantised one element by element as the nearest code of value / scale,
/// ties to even, saturating. Values are taken in float32 there; the latent's scales come from the largest magnitude
/// amax of their group:
///
///   v32_fp8    as `scales` says; k_pe is rounded to bfloat16
///   v32_nvfp4  e4m3(min(max(amax / 6, 2^-9), 448)), 1 for a group of zeros; k_pe is rounded to e4m3
///
/// A NaN or infinity in the latent makes all of its group NaN. A slot that is no row of the cache (-1 for padding) is
/// passed over; of several tokens with the same slot the last is stored. Other rows of the cache keep every bit.
/// Sources: vLLM (cache_kernels.cu), NVIDIA Model Optimizer (nvfp4_tensor.py).
struct MlaKvInsertArgs {
  TensorView latent;  ///< [tokens, d_latent] float64|float32|float16|bfloat16, rows any distance apart
  TensorView k_pe;    ///< [tokens, d_rope] latent's dtype, rows any distance apart; the rotary part of the key
  TensorView slots;   ///< [tokens] int64
  KvScales scales = KvScales::ue8m0;
  TensorView cache;  ///< in, out: plain of width d_latent + d_rope, or v32_fp8, v32_nvfp4 with 512 + 64
};
DSM_API void mla_kv_insert(const MlaKvInsertArgs& args, const Launch& launch = {});
DSM_API std::size_t mla_kv_insert_workspace(const MlaKvInsertArgs& args);

/// Stores one row per token of DeepSeek-V4's attention, whose keys and values are the same rows, after
///
///   kv = rms_norm(kv, weight, eps)        where weight is given
///   kv = rope(kv, positions, inv_freq)    where those are given: interleaved, the last dimensions of the row
///
/// each rounded to kv's dtype, as those two operators do. Plain caches round once more to their dtype (float64 to 16
/// bits by way of float32). Quantised ones take the values in float32 and store the nearest codes of value / scale,
/// ties to even, saturating, with amax the largest magnitude of a group and
///
///   v4_fp8   the smallest power of two >= max(amax, 1e-4) · float(1 / 448); the last 64 values in bfloat16
///   v41_fp8  the same; all values
///   v41_fp4  e4m3(min(max(amax / 6, 2^-9), 448)); all values
///
/// NaN, infinity and slots as in mla_kv_insert. Sources: DeepSeek-V4 and V4.1 reference code; FlashMLA.
struct V4KvInsertArgs {
  TensorView kv;         ///< [tokens, width] float64|float32|float16|bfloat16, rows any distance apart
  TensorView weight;     ///< [width] kv's dtype or float32; absent: no normalisation
  double eps = 1e-6;     ///< added to the mean square, >= 0
  TensorView positions;  ///< [tokens] int64; given exactly when inv_freq is
  TensorView inv_freq;   ///< [pairs] float32, radians per position; 2 · pairs <= width
  TensorView slots;      ///< [tokens] int64
  TensorView cache;      ///< in, out: plain of that width, or v4_fp8, v41_fp8, v41_fp4 with 512
};
DSM_API void v4_kv_insert(const V4KvInsertArgs& args, const Launch& launch = {});
DSM_API std::size_t v4_kv_insert_workspace(const V4KvInsertArgs& args);

/// Stores one key per token of the indexer in its FP8 cache, whose pages are page_size · d e4m3 and then page_size
/// float32 scales:
///
///   scale = the smallest power of two >= max(amax, 1e-4) · float(1 / 448),   codes = e4m3(k / scale)
///
/// with amax the largest magnitude of the key. NaN, infinity and slots as in mla_kv_insert.
/// Source: DeepSeek-V3.2 and V4 reference code; DeepGEMM (tests/test_attention.py).
struct IndexerKInsertArgs {
  TensorView k;      ///< [tokens, d] float64|float32|float16|bfloat16, taken in float32; rows any distance apart
  TensorView slots;  ///< [tokens] int64
  TensorView cache;  ///< in, out: [pages, page_size, 1, d + 4] uint8|int8|float8_e4m3fn
};
DSM_API void indexer_k_insert(const IndexerKInsertArgs& args, const Launch& launch = {});
DSM_API std::size_t indexer_k_insert_workspace(const IndexerKInsertArgs& args);

/// Reads rows of a cache of any format: out[i] = the values of row indices[i], or i, rounded once to out's dtype (plain
/// float64 to 16 bits by way of float32). An index that is no row gives zeros.
struct KvGatherArgs {
  TensorView cache;    ///< plain or quantised
  TensorView indices;  ///< [count] int32; absent: every row in order
  TensorView out;      ///< out [count, width] float64|float32|float16|bfloat16, contiguous
};
DSM_API void kv_gather(const KvGatherArgs& args, const Launch& launch = {});

/// Gated pooling of DeepSeek-V4: each `ratio` tokens of a sequence become one entry of the cache of compressed keys and
/// values. Channel by channel, with s = z + ape[position mod ratio] and a softmax over the pooled tokens j:
///
///   c = Σ_j softmax_j(s) · a_j
///
/// Entry i of a sequence pools the tokens at positions ratio · i to ratio · (i + 1) − 1. With overlap it pools those of
/// group i − 1, too: a and z are then [tokens, 2 · d], the older group gives channels [0, d) and the newer one channels
/// [d, 2 · d). What lies before a sequence's beginning has no weight. An entry is there as soon as its last token is;
/// normalisation, rotation (at position ratio · i, its first token's) and quantisation are other operators' work.
///
/// Without a state, sequences are whole: each begins at position 0. With one, they may come in chunks, down to one
/// token per call, and give the same bits: the state keeps the rows (a, s) of each request's last tokens. Position p
/// stands in page block_table[b][(p / page_size) mod columns], entry p mod page_size: a table as wide as the context,
/// or a ring of at least (overlap ? 2 : 1) · ratio rows, and n more where n tokens may be taken back, as in speculative
/// decoding. A call reads the rows before start_positions[b] that it needs, then writes its own tokens, of more than
/// the table has rows the last ones. It reads nothing of a request that starts at 0, whatever the state holds.
/// Positions whose page does not exist are not written, and have no weight where they are missed. Source: DeepSeek-V4
/// reference code; the state as in vLLM.
struct KvCompressArgs {
  TensorView a;           ///< [tokens, channels] float64|float32: what is pooled; rows any distance apart
  TensorView z;           ///< [tokens, channels] a's dtype: scores; rows any distance apart
  TensorView ape;         ///< [ratio, channels] a's dtype, contiguous: scores by position
  TensorView cu_seqlens;  ///< [batch + 1] int32, where the packed sequences begin; tokens outside of them are ignored
  bool overlap = false;   ///< channels = 2 · d; otherwise d
  TensorView start_positions;  ///< [batch] int64 >= 0, of each sequence's first token; given exactly when state is
  TensorView state;            ///< in, out [pages, page_size, 2 · channels] a's dtype, pages any distance apart
  TensorView block_table;      ///< [batch, columns] int32, unit last stride; given exactly when state is
  TensorView c;  ///< out [entries, d] a's dtype, contiguous: in the order of the tokens, zero behind the last entry
  TensorView tokens;  ///< out [entries] int32: the token that completed the entry, −1 behind the last
};
DSM_API void kv_compress(const KvCompressArgs& args, const Launch& launch = {});

/// The number of rows of c: as many entries as so many tokens can complete at most, by shapes alone.
DSM_API std::int64_t kv_compress_entries(std::int64_t tokens, std::int64_t batch, std::int64_t ratio, bool whole);

/// Gradients of kv_compress of whole sequences. With w = softmax(s):
///
///   da_j = w_j · dc,   dz_j = w_j · (a_j − c) · dc,   dape[p] = Σ of dz over the tokens at positions p mod ratio
///
/// 0 for what no entry pools. dape is summed in float64 in a fixed order.
struct KvCompressBackwardArgs {
  TensorView dc;            ///< [entries, d] a's dtype, rows any distance apart
  TensorView a, z, ape;     ///< as in the forward call
  TensorView cu_seqlens;    ///< as in the forward call
  bool overlap = false;     ///< as in the forward call
  TensorView da, dz, dape;  ///< out, contiguous, of the shape and dtype of a, z and ape
};
DSM_API void kv_compress_backward(const KvCompressBackwardArgs& args, const Launch& launch = {});

}  // namespace dsm
