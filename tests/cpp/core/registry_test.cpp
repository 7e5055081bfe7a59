// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/registry.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "dsm/error.h"

namespace dsm {
namespace {

/// An operator whose fast row takes small requests only, and which records the row that ran.
struct ProbeArgs {
  int size;
  std::string* ran;
};

const std::vector<Implementation<ProbeArgs>> kRows = {
    {"sm90", DeviceType::cuda, nullptr},
    {"fast", DeviceType::cpu, [](const ProbeArgs& args, const Launch&) { *args.ran = "fast"; },
     [](const ProbeArgs& args) { return args.size > 8 ? Reason("size above 8") : Reason(); }},
    {"cpu", DeviceType::cpu, [](const ProbeArgs& args, const Launch&) { *args.ran = "cpu"; },
     [](const ProbeArgs& args) { return args.size > 100 ? Reason("size above 100") : Reason(); }},
};

const Operator<ProbeArgs> probe("a_test", "probe", kRows);

std::string run(const Operator<ProbeArgs>& operation, int size, Device device = {}) {
  std::string ran;
  operation({size, &ran}, device, {});
  return ran;
}

template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

struct Registry : testing::Test {
  void TearDown() override {
    force_implementation("probe", "");
    record_choices(false);
  }
};

TEST_F(Registry, RunsTheFirstRowThatAccepts) {
  EXPECT_EQ(run(probe, 8), "fast");
  EXPECT_EQ(run(probe, 9), "cpu");
}

TEST_F(Registry, ARefusalByAllNamesEachReason) {
  EXPECT_EQ(message_of([] { run(probe, 101); }),
            "probe: the request must be one that an implementation takes, got a refusal from each "
            "(sm90: takes CUDA tensors; fast: size above 8; cpu: size above 100)");
  EXPECT_EQ(message_of([] { run(probe, 1, {DeviceType::cuda, 0}); }),
            "probe: the request must be one that an implementation takes, got a refusal from each "
            "(sm90: this build of libdsm has no CUDA part; fast: takes CPU tensors; cpu: takes CPU tensors)");
}

TEST_F(Registry, AForcedRowRunsOrRefuses) {
  force_implementation("probe", "cpu");
  EXPECT_EQ(run(probe, 1), "cpu");
  force_implementation("probe", "fast");
  EXPECT_EQ(run(probe, 1), "fast");
  EXPECT_EQ(message_of([] { run(probe, 50); }),
            "probe: the request must be one that an implementation takes, got a refusal from each "
            "(sm90: another implementation is forced; fast: size above 8; cpu: another implementation is forced)");
  EXPECT_TRUE(probe.allows("fast"));
  EXPECT_FALSE(probe.allows("cpu"));
  force_implementation("probe", "");
  EXPECT_EQ(run(probe, 50), "cpu");
  EXPECT_TRUE(probe.allows("cpu"));
}

TEST_F(Registry, ForcingUnknownNamesIsAnError) {
  EXPECT_EQ(message_of([] { force_implementation("prob", "cpu"); }),
            "force_implementation: operation must be an operator's name, got 'prob'");
  EXPECT_EQ(message_of([] { force_implementation("probe", "cpux"); }),
            "probe: forced implementation must be sm90|fast|cpu, got 'cpux'");
  EXPECT_EQ(run(probe, 1), "fast") << "a refused wish changes nothing";
}

TEST_F(Registry, RecordsChoicesWithTheirReasons) {
  run(probe, 9);  // before recording
  record_choices(true);
  run(probe, 9);
  run(probe, 10);  // the same choice
  run(probe, 1);
  run(probe, 9);
  record_choices(false);
  run(probe, 1);
  const std::vector<Choice> choices = recorded_choices();
  ASSERT_EQ(choices.size(), 3u);
  EXPECT_EQ(choices[0].operation, "probe");
  EXPECT_EQ(choices[0].implementation, "cpu");
  ASSERT_EQ(choices[0].rejections.size(), 2u);
  EXPECT_EQ(choices[0].rejections[1].implementation, "fast");
  EXPECT_EQ(choices[0].rejections[1].reason, "size above 8");
  EXPECT_EQ(choices[1].implementation, "fast");
  EXPECT_EQ(choices[2].implementation, "cpu");
  record_choices(true);
  EXPECT_TRUE(recorded_choices().empty());
}

TEST_F(Registry, RecordsAChoiceOfNone) {
  record_choices(true);
  EXPECT_NE(message_of([] { run(probe, 101); }), "");
  const std::vector<Choice> choices = recorded_choices();
  ASSERT_EQ(choices.size(), 1u);
  EXPECT_EQ(choices[0].implementation, "");
  ASSERT_EQ(choices[0].rejections.size(), 3u);
  EXPECT_EQ(choices[0].rejections[2].reason, "size above 100");
}

TEST_F(Registry, ListsOperatorsInOrderWithWhatIsBuilt) {
  const std::vector<OperatorInfo> all = operators();
  const auto key = [](const OperatorInfo& info) { return std::pair(info.family, info.name); };
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end(), [&](const auto& a, const auto& b) { return key(a) < key(b); }));
  const auto found = std::find_if(all.begin(), all.end(), [](const auto& info) { return info.name == "probe"; });
  ASSERT_NE(found, all.end());
  EXPECT_EQ(found->family, "a_test");
  ASSERT_EQ(found->implementations.size(), 3u);
  EXPECT_EQ(found->implementations[0].name, "sm90");
  EXPECT_FALSE(found->implementations[0].built);
  EXPECT_TRUE(found->implementations[2].built);
}

/// An operator as the library's load makes it under the given DSM_FORCE_IMPL. It stays, as the registry points to it.
const Operator<ProbeArgs>& loaded_with(const char* environment, const char* name) {
  static std::deque<Operator<ProbeArgs>> loaded;
  setenv("DSM_FORCE_IMPL", environment, 1);
  loaded.emplace_back("a_test", name, kRows);
  unsetenv("DSM_FORCE_IMPL");
  return loaded.back();
}

TEST_F(Registry, TheEnvironmentForcesRowsOfNamedOperators) {
  EXPECT_EQ(run(loaded_with("other:fast,probe_a:cpu", "probe_a"), 1), "cpu");
  EXPECT_EQ(run(loaded_with("probe_b:cpu,other:fast", "probe_b"), 1), "cpu");
  EXPECT_EQ(run(loaded_with("my_probe_c:cpu,probe_c2:cpu", "probe_c"), 1), "fast") << "names must match as a whole";
  EXPECT_EQ(run(loaded_with("", "probe_d"), 1), "fast");
  const Operator<ProbeArgs>& misspelt = loaded_with("probe_e:cup", "probe_e");
  EXPECT_THROW(run(misspelt, 1), Error) << "a wrong name may not be ignored";
  EXPECT_FALSE(misspelt.allows("fast"));
  force_implementation("probe_e", "");
  EXPECT_EQ(run(misspelt, 1), "fast");
}

}  // namespace
}  // namespace dsm
