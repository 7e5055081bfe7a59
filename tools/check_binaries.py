# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Fails when a built library needs or shows what it should not.

libdsm_torch.so may use torch only through its stable C shims: no C++ symbol of torch (namespaces at, c10, torch) and no
Python symbol, so that one binary serves every Python and every torch from 2.10 on. libdsm.so needs neither, and shows
nothing but what is in namespace dsm. Usage: check_binaries.py FOLDER
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

STABLE_SHIM = re.compile(r"^(?:aoti_torch_|torch_)\w+$")
FORBIDDEN = re.compile(r"^(?:.*\b(?:at|c10|torch)::|_?Py[A-Z_])")
# The linker's own marks, and what the C++ runtime shares between libraries (templates of std and their type names).
UNAVOIDABLE = re.compile(r"^(?:_init|_fini|_edata|_end|__bss_start|.*\bstd::|.* for std::|operator (?:new|delete))")


def symbols(library: Path, kind: str) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "-C", f"--{kind}-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    # "0000 T name" or "     U name@VERSION"
    return [re.sub(r"^\s*[0-9a-f]*\s+\w\s+", "", line).split("@")[0] for line in listing.splitlines()]


def faults_of(folder: Path) -> list[str]:
    faults = []
    for name in ("libdsm.so", "libdsm_torch.so"):
        for symbol in symbols(folder / name, "undefined"):
            shim = STABLE_SHIM.match(symbol)
            if FORBIDDEN.match(symbol) or (shim and name == "libdsm.so"):
                faults.append(f"{name} needs {symbol}")
    shims = [symbol for symbol in symbols(folder / "libdsm_torch.so", "undefined") if STABLE_SHIM.match(symbol)]
    if not shims:
        faults.append("libdsm_torch.so needs no torch shim at all: nm shows nothing")
    faults += [
        f"libdsm.so shows {symbol}"
        for symbol in symbols(folder / "libdsm.so", "defined")
        if not re.search(r"\bdsm::", symbol) and not UNAVOIDABLE.match(symbol)
    ]
    return faults


def main() -> int:
    faults = faults_of(Path(sys.argv[1]))
    print("\n".join(faults) or "binaries: only stable torch symbols, no Python symbols")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
