# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Fails on an #include or import that points against the layers.

The layers, each of which may use itself and those named after it:

    include/dsm         the standard library only
    src/core            include/dsm
    src/numerics        the standard library; CUDA's type headers
    src/cpu             core, numerics, include/dsm
    src/cuda            numerics, include/dsm, CUDA, CUTLASS
    src/<family>/<op>   its family, cpu, cuda, core, numerics, include/dsm; never another operator's folder
    bindings/torch      include/dsm, torch
    python              torch; nothing of integrations
    examples            the installed package
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
IMPORT = re.compile(r"^\s*(?:import|from)\s+([\w.]+)", re.MULTILINE)
# Headers with a folder or a .h that belong to no layer of ours.
SYSTEM = re.compile(r"^(?:[a-z_0-9]+|dlfcn\.h|immintrin\.h|arm_neon\.h|unistd\.h|sys/\w+\.h|gtest/gtest\.h)$")
CUDA = re.compile(r"^(?:cuda\w*\.h|cub/.*|cooperative_groups.*|cute/.*|cutlass/.*|nvtx3/.*)$")
TORCH = re.compile(r"^torch/(?:csrc/stable|csrc/inductor/aoti_torch|headeronly)/")

MAY_USE = {
    "include/dsm": {"include/dsm"},
    "src/core": {"src/core", "include/dsm"},
    "src/numerics": {"src/numerics"},
    "src/cpu": {"src/cpu", "src/core", "src/numerics", "include/dsm"},
    "src/cuda": {"src/cuda", "src/numerics", "include/dsm", "cuda"},
    "operator": {"src/cpu", "src/cuda", "src/core", "src/numerics", "include/dsm", "cuda"},
    "bindings/torch": {"bindings/torch", "include/dsm", "torch"},
    "examples": {"include/dsm"},
}


def layer_of(path: str) -> str:
    """The layer that a file or an included header belongs to; an operator's folder is its own layer."""
    parts = path.split("/")
    if parts[0] == "dsm":
        return "include/dsm"
    if parts[0] == "src" and parts[1] not in ("core", "numerics", "cpu", "cuda"):
        return "/".join(parts[:3])
    if parts[0] in ("include", "src", "bindings"):
        return "/".join(parts[:2])
    if TORCH.match(path):
        return "torch"
    if CUDA.match(path):
        return "cuda"
    return parts[0] if parts[0] in ("examples", "tests") else "system" if SYSTEM.match(path) else "unknown"


def native_faults(path: str) -> list[str]:
    layer = layer_of(path)
    if layer == "tests":
        return []
    allowed = MAY_USE.get(layer) or MAY_USE["operator"] | {layer}
    faults = []
    for header in INCLUDE.findall((ROOT / path).read_text()):
        target = layer_of(header)
        # numerics headers see CUDA's types only when nvcc compiles them.
        conditional = layer == "src/numerics" and target == "cuda"
        family = header.startswith(f"{layer.rsplit('/', 1)[0]}/") and header.count("/") == 2 and layer.count("/") == 2
        if target not in allowed and target != "system" and not conditional and not family:
            faults.append(f"{path}: includes {header}, which {layer} may not use")
        if target == "cuda" and path.endswith("_cpu.cpp"):
            faults.append(f"{path}: a CPU implementation includes the CUDA header {header}")
    return faults


def python_faults(path: str) -> list[str]:
    return [
        f"{path}: imports {module}, which the package may not use"
        for module in IMPORT.findall((ROOT / path).read_text())
        if module.split(".")[0] in ("vllm", "integrations", "transformers")
    ]


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "include", "src", "bindings", "examples", "python"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    faults: list[str] = []
    for path in listed:
        if not (ROOT / path).is_file():
            continue
        if path.endswith((".cpp", ".h", ".cu", ".cuh", ".h.in")):
            faults += native_faults(path)
        elif path.endswith(".py") and path.startswith("python/"):
            faults += python_faults(path)
    print("\n".join(faults) or "layers: every arrow points down", file=sys.stderr if faults else sys.stdout)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
