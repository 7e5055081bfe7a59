// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
// The functions of the library itself, which take no tensors, and the one-time set-up when torch loads the binding.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "dsm/parallel.h"
#include "dsm/registry.h"
#include "dsm/version.h"

namespace dsm::binding {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

template <class List, class Render>
std::string json_list(const List& list, const Render& render) {
  std::string text = "[";
  for (const auto& item : list) text += (text.size() > 1 ? ", " : "") + render(item);
  return text + "]";
}

std::string version() { return DSM_VERSION; }
std::string cuda_architectures() { return DSM_CUDA_ARCHITECTURES; }
std::string instruction_set() { return cpu_instruction_set(); }

std::string operators_json() {
  return json_list(operators(), [](const OperatorInfo& info) {
    return "{\"family\": " + quoted(info.family) + ", \"name\": " + quoted(info.name) + ", \"implementations\": " +
           json_list(info.implementations,
                     [](const OperatorInfo::Row& row) {
                       return "{\"name\": " + quoted(row.name) + ", \"built\": " + (row.built ? "true" : "false") + "}";
                     }) +
           "}";
  });
}

std::string recorded_choices_json() {
  return json_list(recorded_choices(), [](const Choice& choice) {
    return "{\"operation\": " + quoted(choice.operation) + ", \"implementation\": " + quoted(choice.implementation) +
           ", \"rejections\": " +
           json_list(choice.rejections,
                     [](const Choice::Rejection& r) {
                       return "{\"implementation\": " + quoted(r.implementation) + ", \"reason\": " + quoted(r.reason) +
                              "}";
                     }) +
           "}";
  });
}

void force_implementation(const std::string& operation, const std::string& implementation) {
  dsm::force_implementation(operation, implementation);
}

void record_choices(bool on) { dsm::record_choices(on); }

// torch's own threads also run the CPU operators: one pool, and torch.set_num_threads governs it.
const bool host_threads_set = [] {
  set_host_threads({.count = [] { return static_cast<int>(torch::stable::get_num_threads()); },
                    .run =
                        [](int count, void (*body)(void*), void* context) {
                          torch::stable::parallel_for(0, count, 1, [=](std::int64_t begin, std::int64_t end) {
                            for (; begin < end; ++begin) body(context);
                          });
                        }});
  return true;
}();

}  // namespace

STABLE_TORCH_LIBRARY(dsm, m) {
  m.def("version() -> str");
  m.def("cuda_architectures() -> str");
  m.def("cpu_instruction_set() -> str");
  m.def("operators() -> str");
  m.def("record_choices(bool on) -> ()");
  m.def("recorded_choices() -> str");
  m.def("force_implementation(str operation, str implementation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dsm, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&version));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("cpu_instruction_set", TORCH_BOX(&instruction_set));
  m.impl("operators", TORCH_BOX(&operators_json));
  m.impl("record_choices", TORCH_BOX(&record_choices));
  m.impl("recorded_choices", TORCH_BOX(&recorded_choices_json));
  m.impl("force_implementation", TORCH_BOX(&force_implementation));
}

}  // namespace dsm::binding
