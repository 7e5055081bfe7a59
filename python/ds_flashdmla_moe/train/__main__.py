# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``python -m ds_flashdmla_moe.train``: the same as ``dsm train``."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
