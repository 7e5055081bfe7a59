#!/usr/bin/env bash
# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
# What users install: the C++ package with its example program, and the wheel in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

python tools/check_binaries.py build/lib

echo "== the C++ package: find_package(dsm) and the example program"
rm -rf build/package
cmake --install build --prefix build/package/prefix >/dev/null
cmake -S examples/cpp -B build/package/example -DCMAKE_PREFIX_PATH="$PWD/build/package/prefix" >/dev/null
cmake --build build/package/example >/dev/null
build/package/example/rms_norm_example

echo "== the wheel, in its own environment"
rm -rf dist
make --no-print-directory wheel
ls dist/ds_flashdmla_moe-*-py3-none-*.whl
python -m venv build/package/venv
# Its packages are those of .venv, so that torch is not installed twice; the wheel itself comes from its own folder.
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(build/package/venv/bin/python -c \
  'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
build/package/venv/bin/python -m pip install --quiet --no-deps dist/*.whl
cd build/package
venv/bin/python - <<'PYTHON'
import pathlib

import torch

import ds_flashdmla_moe as dsm
from ds_flashdmla_moe import _library

inside = pathlib.Path("venv").resolve()
for path in (pathlib.Path(dsm.__file__), _library.PATH):
    assert inside in path.resolve().parents, f"{path} is not the installed wheel's"
x = torch.randn(4, 8)
torch.testing.assert_close(dsm.ops.rms_norm(x), x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt())
print(f"ds-flashdmla-moe {dsm.__version__} runs from the wheel")
PYTHON
venv/bin/dsm env >/dev/null
