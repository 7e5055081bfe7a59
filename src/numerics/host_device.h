// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// Functions marked DSM_HD run on host and device with the same bits.
#if defined(__CUDACC__)
#define DSM_HD __host__ __device__
#else
#define DSM_HD
#endif
