// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/core/registry.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>

#include "dsm/error.h"

namespace dsm {
namespace {

std::vector<OperatorEntry*>& entries() {
  static std::vector<OperatorEntry*> list;
  return list;
}

std::atomic<bool> is_recording = false;
std::mutex record_mutex;
std::vector<Choice> record;

bool same(const Choice& a, const Choice& b) {
  return a.operation == b.operation && a.implementation == b.implementation &&
         std::equal(
             a.rejections.begin(), a.rejections.end(), b.rejections.begin(), b.rejections.end(),
             [](const auto& x, const auto& y) { return x.implementation == y.implementation && x.reason == y.reason; });
}

// The part of DSM_FORCE_IMPL that concerns one operator: "cpu" for "rms_norm" in "rope:cuda,rms_norm:cpu".
std::string forced_by_environment(const std::string& operation) {
  const char* value = std::getenv("DSM_FORCE_IMPL");
  const std::string list = value ? "," + std::string(value) + "," : "";
  const std::size_t at = list.find("," + operation + ":");
  if (at == std::string::npos) return "";
  const std::size_t from = at + operation.size() + 2;
  return list.substr(from, list.find(',', from) - from);
}

int row_named(const OperatorInfo& info, const std::string& implementation) {
  std::string names;
  for (std::size_t i = 0; i < info.implementations.size(); ++i) {
    if (info.implementations[i].name == implementation) return static_cast<int>(i);
    names += (names.empty() ? "" : "|") + info.implementations[i].name;
  }
  throw Error(info.name, "forced implementation", names, "'" + implementation + "'");
}

}  // namespace

OperatorEntry::OperatorEntry(const char* family, const char* name, std::vector<OperatorInfo::Row> rows)
    : info_{family, name, std::move(rows)} {
  entries().push_back(this);
  // A wrong name must not abort the load of the library: the operator then refuses every call instead.
  const std::string forced = forced_by_environment(name);
  if (forced.empty()) return;
  const auto& list = info_.implementations;
  const auto row = std::find_if(list.begin(), list.end(), [&](const auto& r) { return r.name == forced; });
  forced_ = static_cast<int>(row - list.begin());
}

bool OperatorEntry::recording() { return is_recording.load(std::memory_order_relaxed); }

void OperatorEntry::note(const Choice& choice) {
  const std::lock_guard lock(record_mutex);
  if (record.empty() || !same(record.back(), choice)) record.push_back(choice);
}

void OperatorEntry::fail(const Choice& choice) const {
  if (recording()) note(choice);
  std::string reasons;
  for (const auto& [implementation, reason] : choice.rejections)
    reasons += (reasons.empty() ? "" : "; ") + implementation + ": " + reason;
  throw Error(info_.name, "the request", "one that an implementation takes", "a refusal from each (" + reasons + ")");
}

std::vector<OperatorInfo> operators() {
  std::vector<OperatorInfo> result;
  for (const OperatorEntry* entry : entries()) result.push_back(entry->info());
  std::sort(result.begin(), result.end(), [](const OperatorInfo& a, const OperatorInfo& b) {
    return a.family != b.family ? a.family < b.family : a.name < b.name;
  });
  return result;
}

void record_choices(bool on) {
  const std::lock_guard lock(record_mutex);
  if (on) record.clear();
  is_recording = on;
}

std::vector<Choice> recorded_choices() {
  const std::lock_guard lock(record_mutex);
  return record;
}

void force_implementation(const std::string& operation, const std::string& implementation) {
  for (OperatorEntry* entry : entries()) {
    if (entry->info().name != operation) continue;
    return entry->force(implementation.empty() ? -1 : row_named(entry->info(), implementation));
  }
  throw Error("force_implementation", "operation", "an operator's name", "'" + operation + "'");
}

}  // namespace dsm
