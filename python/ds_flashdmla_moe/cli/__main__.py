# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``python -m ds_flashdmla_moe.cli``: the command dsm where its script is not on the path."""

from . import main

if __name__ == "__main__":
    main()
