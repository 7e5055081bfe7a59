// Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
#pragma once

// Everything in libdsm is hidden but what carries DSM_API.
#if defined(_WIN32)
#define DSM_API
#else
#define DSM_API __attribute__((visibility("default")))
#endif
