# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The matrices of dense and expert feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import ops
from ..moe import MoEWeights
from ..qtensor import QTensor
from .weights import Linear, QuantisableWeights, rows_of

__all__ = ["Experts", "Mlp", "expert_parts", "moe_weights"]


class Mlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)
        self._w13: QTensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(ops.swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), -1)))
        return y

    def w13(self, dtype: torch.dtype) -> Tensor | QTensor:
        """Gate rows, then up rows, quantised if both are: that one does not change and is made once. Else in dtype."""
        gate, up = self.gate_proj.matrix("weight"), self.up_proj.matrix("weight")
        if isinstance(gate, Tensor) or isinstance(up, Tensor):
            dense = [w if isinstance(w, Tensor) else w.dequantize(dtype) for w in (gate, up)]
            return torch.cat(dense)
        if self._w13 is None or self._w13.device != gate.device:
            self._w13 = rows_of([gate, up])
        return self._w13


class Experts(QuantisableWeights):
    """The routed experts' matrices stacked, gate rows before up rows."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))


def moe_weights(gate: Tensor, bias: Tensor | None, experts: Experts, shared: Mlp | None) -> MoEWeights:
    return MoEWeights(
        gate=gate,
        w13=experts.matrix("gate_up_proj"),
        w2=experts.matrix("down_proj"),
        gate_bias=bias,
        shared_w13=None if shared is None else shared.w13(gate.dtype),
        shared_w2=None if shared is None else shared.down_proj.matrix("weight"),
    )


def expert_parts(parameter: str, experts: int, intermediate: int) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
    """The stored tensors that make up a parameter of :class:`Experts`, with the part that each one fills."""
    prefix, _, last = parameter.rpartition(".")
    for expert in range(experts):
        if last == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", (expert,)
        else:
            yield f"{prefix}.{expert}.gate_proj.weight", (expert, slice(0, intermediate))
            yield f"{prefix}.{expert}.up_proj.weight", (expert, slice(intermediate, 2 * intermediate))
