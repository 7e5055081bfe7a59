# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The matrices of dense and expert feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import ops

__all__ = ["Experts", "Mlp", "expert_parts"]


class Mlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(ops.swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), -1)))
        return y

    def w13(self) -> Tensor:
        """Gate rows, then up rows."""
        return torch.cat((self.gate_proj.weight, self.up_proj.weight))


class Experts(nn.Module):
    """The routed experts' matrices stacked, gate rows before up rows."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))


def expert_parts(parameter: str, experts: int, intermediate: int) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
    """The stored tensors that make up a parameter of :class:`Experts`, with the part that each one fills."""
    prefix, _, last = parameter.rpartition(".")
    for expert in range(experts):
        if last == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", (expert,)
        else:
            yield f"{prefix}.{expert}.gate_proj.weight", (expert, slice(0, intermediate))
            yield f"{prefix}.{expert}.up_proj.weight", (expert, slice(intermediate, 2 * intermediate))
