// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "dsm/launch.h"
#include "dsm/registry.h"
#include "dsm/tensor_view.h"

// The CUDA rows stay in every build's tables; a build without CUDA gives them no function.
#if DSM_WITH_CUDA
#define DSM_CUDA_ROW(function) function
#else
#define DSM_CUDA_ROW(function) nullptr
#endif

namespace dsm {

/// Why an implementation refuses a request; empty when it takes it.
using Reason = std::string;

/// One row of an operator's table.
template <class Args>
struct Implementation {
  const char* name;  ///< "cpu", "cuda", "sm90", or of another operator that does it
  DeviceType device;
  void (*run)(const Args&, const Launch&);    ///< null: not in this build
  Reason (*supports)(const Args&) = nullptr;  ///< null: every request that passed the checks
};

/// The untyped part of an operator: its entry in the list of all operators and the choice among the rows.
class OperatorEntry {
 public:
  OperatorEntry(const char* family, const char* name, std::vector<OperatorInfo::Row> rows);
  OperatorEntry(const OperatorEntry&) = delete;
  OperatorEntry& operator=(const OperatorEntry&) = delete;

  const OperatorInfo& info() const { return info_; }
  void force(int row) { forced_ = row; }
  /// Whether the row of this name may take requests: no other one is forced.
  bool allows(std::string_view name) const {
    return forced_ < 0 ||
           (forced_ < static_cast<int>(info_.implementations.size()) && info_.implementations[forced_].name == name);
  }

 protected:
  /// The first row for which `refuse(row)` is empty. Throws dsm::Error with every row's reason when there is none.
  template <class Refuse>
  int choose(const Refuse& refuse) const {
    Choice choice{info_.name, "", {}};
    const int rows = static_cast<int>(info_.implementations.size());
    for (int row = 0; row < rows; ++row) {
      const bool skipped = forced_ >= 0 && forced_ != row;
      Reason reason = skipped ? "another implementation is forced" : refuse(row);
      if (reason.empty()) {
        if (recording()) {
          choice.implementation = info_.implementations[row].name;
          note(choice);
        }
        return row;
      }
      choice.rejections.push_back({info_.implementations[row].name, std::move(reason)});
    }
    fail(choice);
  }

 private:
  static bool recording();
  static void note(const Choice& choice);
  [[noreturn]] void fail(const Choice& choice) const;

  OperatorInfo info_;
  int forced_ = -1;
};

/// An operator's table of implementations, best first. Define one object per operator in its .cpp file.
template <class Args>
class Operator : OperatorEntry {
 public:
  Operator(const char* family, const char* name, std::vector<Implementation<Args>> rows)
      : OperatorEntry(family, name, infos(rows)), rows_(std::move(rows)) {}
  using OperatorEntry::allows;

  /// Runs the first row that takes the request, whose tensors are on `device`.
  void operator()(const Args& args, const Device& device, const Launch& launch) const {
    const int row = choose([&](int i) -> Reason {
      const Implementation<Args>& implementation = rows_[i];
      if (implementation.device != device.type)
        return implementation.device == DeviceType::cpu ? "takes CPU tensors" : "takes CUDA tensors";
      if (!implementation.run) return "this build of libdsm has no CUDA part";
      return implementation.supports ? implementation.supports(args) : Reason();
    });
    rows_[row].run(args, launch);
  }

 private:
  static std::vector<OperatorInfo::Row> infos(const std::vector<Implementation<Args>>& rows) {
    std::vector<OperatorInfo::Row> result;
    for (const auto& row : rows) result.push_back({row.name, row.run != nullptr});
    return result;
  }

  std::vector<Implementation<Args>> rows_;
};

}  // namespace dsm
