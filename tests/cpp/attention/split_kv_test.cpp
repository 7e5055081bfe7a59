// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/attention/split_kv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace dsm::split_kv {
namespace {

constexpr std::int64_t kManyBlocks = 1 << 20;  // of a long table
constexpr bool kInvariant = true;

/// Bytes for requests of so many tiles of 64 query rows.
std::size_t bytes(std::int64_t batch, std::int64_t tiles, bool batch_invariant = kInvariant) {
  const int parts = parts_of(tiles, kMostMultiprocessors, batch, kManyBlocks, batch_invariant);
  const bool cuts = cuts_requests(parts, batch, batch_invariant);
  return Workspace::bytes(batch, parts, cuts ? strips_of(1, 64 * tiles) : 0, batch_invariant);
}

TEST(SplitKv, InvariantPiecesFollowOneRequest) {
  EXPECT_EQ(invariant_pieces(1), kInvariantPieces);
  EXPECT_EQ(invariant_pieces(2), kInvariantPieces);
  EXPECT_EQ(invariant_pieces(kMostMultiprocessors / 2), 2);
  EXPECT_EQ(invariant_pieces(kMostMultiprocessors / 2 + 1), 1);
  EXPECT_EQ(invariant_pieces(1 << 20), 1);
  for (const std::int64_t batch : {1, 3, 4096}) {
    EXPECT_EQ(parts_of(1, kMostMultiprocessors, batch, kInvariantBlocks, kInvariant), batch);
    EXPECT_EQ(parts_of(1, kMostMultiprocessors, batch, kInvariantBlocks + 1, kInvariant), 2 * batch);
    EXPECT_EQ(parts_of(1, kMostMultiprocessors, batch, kManyBlocks, kInvariant), kInvariantPieces * batch);
  }
}

TEST(SplitKv, InvariantRequestsTakeTheirPiecesAlone) {
  constexpr std::size_t kStrip = 4 * (kStripValues + 2 * kStripRows), kTile = 4 * kStrip;
  for (const std::int64_t batch : {1, 4096})
    EXPECT_EQ(bytes(batch, 2), Workspace::bytes(batch, 0, 0, kInvariant) + batch * kInvariantPieces * 2 * kTile);
  // However many rows a request has, it takes no more than a tile of each multiprocessor's; prompts take nothing.
  for (std::int64_t tiles = 1; tiles < 2000; ++tiles) EXPECT_LE(bytes(1, tiles), kMostMultiprocessors * kTile + 256);
  EXPECT_LE(bytes(16, 1023), 4096u);
}

TEST(SplitKv, OthersTakeTwoPiecesAPart) {
  constexpr std::size_t kTile = 16 * (kStripValues + 2 * kStripRows);
  for (const std::int64_t batch : {1, 300})
    for (const std::int64_t tiles : {1, 2, 60})
      EXPECT_LE(bytes(batch, tiles, !kInvariant), 2 * kMostMultiprocessors * kTile + 4096);
}

/// How parts cut requests of so many blocks.
Line line_of(const std::vector<int>& blocks, int parts, int gap) {
  const auto shared_by = [](int what, int by) { return (what + by - 1) / by; };
  const int batch = static_cast<int>(blocks.size()), all = std::accumulate(blocks.begin(), blocks.end(), 0);
  return Line(gap, shared_by(all + batch * gap, parts), INT32_MAX, shared_by(batch, parts),
              *std::max_element(blocks.begin(), blocks.end()));
}
/// Pieces of all requests; expects that the parts' shares are all blocks, each once and in order.
int pieces_of(const std::vector<int>& blocks, int parts, int gap) {
  const Line line = line_of(blocks, parts, gap);
  int at = 0, pieces = 0;
  for (const int own : blocks) {
    int end = 0, owners = 0;
    for (int part = 0; part < parts; ++part) {
      const Line::Share share = line.share(part, at, own);
      if (!share.any) continue;
      EXPECT_EQ(share.begin, end);
      end = share.end, ++owners;
    }
    EXPECT_EQ(end, own);
    EXPECT_EQ(line.pieces(at, line.share(0, at, own)).count, owners);
    pieces += owners, at += line.stretch(own);
  }
  return pieces;
}

TEST(SplitKv, RequestsThatHardlyDifferStayWhole) {
  EXPECT_EQ(pieces_of(std::vector<int>(128, 64), 66, 1), 128);
  EXPECT_EQ(pieces_of(std::vector<int>(128, 64), 64, 1), 128);
  EXPECT_GT(pieces_of(std::vector<int>(128, 512), 33, 1), 128);  // the parts left over would have to do
  EXPECT_GT(pieces_of(std::vector<int>(100, 64), 66, 1), 100);
  std::vector<int> lengths(128, 64);
  for (int i = 0; i < 128; i += 2) lengths[i] = 63;
  EXPECT_EQ(pieces_of(lengths, 66, 1), 128);
  lengths[5] = 0;
  EXPECT_EQ(pieces_of(lengths, 66, 1), 128);
  lengths[7] = 80;
  EXPECT_GT(pieces_of(lengths, 66, 1), 128);
  for (int i = 0; i < 128; ++i) lengths[i] = 3 + i % 8;  // to save three blocks is not worth two cuts
  EXPECT_EQ(pieces_of(lengths, 132, 1), 128);
  for (int& length : lengths) length *= 2;
  EXPECT_GT(pieces_of(lengths, 132, 1), 128);
}

/// Expects that the parts of equal requests compute all blocks, each once and in order, and write down their pieces
/// where the combining kernel looks for them.
void expect_equal_requests_are_computed(int batch, int blocks, int parts) {
  SCOPED_TRACE(::testing::Message() << batch << " requests of " << blocks << " blocks in " << parts << " parts");
  Keys keys{};
  keys.batch = batch, keys.keys = blocks * kBlockKeys, keys.overhead_blocks = 1;
  keys.parts = Reciprocal(static_cast<unsigned>(parts));
  const EqualRequests equal(keys);
  std::vector<int> done(batch), pieces(batch);
  for (int number = 0; number < parts; ++number) {
    const Part part = equal.part(number, batch);
    int sum = 0;
    for (int request = part.first_request; request <= part.last_request; ++request) {
      const int begin = request == part.first_request ? part.first_block : 0,
                end = request == part.last_request ? part.end_block : blocks;
      ASSERT_EQ(begin, done[request]);
      ASSERT_LE(end, blocks);
      const Pieces its = equal.pieces(request);
      if (its.count > 1) ASSERT_EQ(its.slot(pieces[request]), 2 * number + (request != part.first_request));
      done[request] = end, sum += end - begin, ++pieces[request];
    }
    ASSERT_EQ(part.blocks, sum);
  }
  for (int request = 0; request < batch; ++request) {
    ASSERT_EQ(done[request], blocks);
    ASSERT_EQ(pieces[request], equal.pieces(request).count);
    if (equal.whole()) ASSERT_EQ(pieces[request], 1);
  }
}

TEST(SplitKv, EqualRequestsAreComputed) {
  for (const int parts : {1, 2, 33, 66, 132})
    for (const int blocks : {0, 1, 2, 10, 18, 32, 64, 513})
      for (const int batch : {1, 2, 3, 16, 31, 64, 65, 66, 67, 128, 132, 148})
        expect_equal_requests_are_computed(batch, blocks, parts);
}

}  // namespace
}  // namespace dsm::split_kv
