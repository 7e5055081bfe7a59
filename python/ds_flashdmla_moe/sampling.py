# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_sampling", "sample"]


def check_sampling(temperature: float, top_p: float) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits [vocab]: the likeliest at temperature 0, else from the smallest set of mass top_p."""
    if temperature == 0.0:
        return int(logits.argmax())
    p, order = (logits.double() / temperature).softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0.0  # the likeliest token always stays
    return int(order[torch.multinomial(p, 1, generator=generator)])
