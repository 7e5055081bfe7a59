// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#include "src/hyper_connection/hc_head/hc_head.h"
#include "src/hyper_connection/mixing_cpu.h"

namespace dsm {

using namespace hyper_connection;

void hc_head_cpu(const HcHeadArgs& args, const Launch&) {
  visit_wide(args.x, [&]<class A>() { mix_streams<A>(args, [](Index, A*) {}); });
}

void hc_head_backward_cpu(const HcHeadBackwardArgs& args, const Launch&) {
  visit_wide(args.x, [&]<class A>() { mix_streams_backward<A>(args, [](Index, A*) {}); });
}

}  // namespace dsm
