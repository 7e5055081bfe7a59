# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""A library that is built without sm_90a leaves Hopper's kernels out: their bodies would be empty."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOPPER = {  # CMAKE_CUDA_ARCHITECTURES: whether that has sm_90a
    "80": False,
    "80-virtual;90a-real": True,
    "90": False,
    "90a": True,
    "90-real;100a-real": False,
    "all-major": False,
    "": True,  # the project's own
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("cmake") or not shutil.which(os.environ.get("CUDACXX", "nvcc")):
        pytest.skip("needs CMake and nvcc")
    return tmp_path_factory.mktemp("build")


@pytest.mark.parametrize("architectures", HOPPER, ids=lambda given: given or "default")
def test_hopper_rows_are_built_with_sm_90a_alone(architectures: str, build: Path) -> None:
    options = {"DSM_CUDA": "ON", "DSM_TORCH": "OFF", "DSM_TESTS": "OFF", "CMAKE_CUDA_ARCHITECTURES": architectures}
    words = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *words], check=True, capture_output=True)
    sources = {entry["file"]: entry["command"] for entry in json.loads((build / "compile_commands.json").read_text())}
    hopper = HOPPER[architectures]
    assert {f"-DDSM_WITH_SM90A={int(hopper)} " in command for command in sources.values()} == {True}
    kernels = [command for file, command in sources.items() if file.endswith("_sm90.cu")]
    assert {"compute_90a" in command for command in kernels} == {hopper}
