// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// Everything: the vocabulary, then one header per family of operators.
#include "dsm/attention.h"
#include "dsm/block_scales.h"
#include "dsm/dtype.h"
#include "dsm/error.h"
#include "dsm/hyper_connection.h"
#include "dsm/indexer.h"
#include "dsm/kv_cache.h"
#include "dsm/launch.h"
#include "dsm/mla.h"
#include "dsm/moe.h"
#include "dsm/norm_rope.h"
#include "dsm/parallel.h"
#include "dsm/quant.h"
#include "dsm/quant_linear.h"
#include "dsm/registry.h"
#include "dsm/sparse_mla.h"
#include "dsm/tensor_view.h"
#include "dsm/version.h"
