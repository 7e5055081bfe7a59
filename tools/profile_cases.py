# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Runs the largest measured size of every operator that has a CUDA implementation, for a profiler to watch:

ncu --clock-control none --kernel-name regex:cuda_kernel --set basic python tools/profile_cases.py [operator...]
"""

from __future__ import annotations

import sys

import torch

from ds_flashdmla_moe import _library
from ds_flashdmla_moe.cases import Trial, cases_of

on_cuda = {
    entry["name"]
    for entry in _library.operators()
    if any(row["built"] and row["name"] != "cpu" for row in entry["implementations"])
}
for case in cases_of(sys.argv[1:]):
    if "cuda" not in case.benchmark or not on_cuda.issuperset(case.operators):
        continue
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else torch.float32
    for sizes in case.benchmark["cuda"][1:] or case.benchmark["cuda"]:
        print(case.operator, dict(sizes), dtype, flush=True)
        trial = Trial(case, dtype, torch.device("cuda"), sizes)
        trial.forward()
        if case.gradients:
            trial.backward()
        torch.cuda.synchronize()
