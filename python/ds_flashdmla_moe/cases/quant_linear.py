# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of linear layers with quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import QTensor, fp8_block_quantize, linear, mxfp4_quantize, nvfp4_quantize
from .case import Case, Draw, Function, Sizes, Work


def _inputs(quantize: Callable[[Tensor], QTensor], activation_format: str | None) -> Callable[..., dict[str, Any]]:
    def make(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        n, k = sizes["n"], sizes["k"]
        weight = draw(n, k, scale=k**-0.5, dtype=torch.float32)
        return {"x": draw(sizes["tokens"], k), "q": quantize(weight), "activation_format": activation_format}

    return make


def _fp8(x: Tensor) -> Tensor:
    """What FP8 keeps of groups of 128, under a scale that is a power of two."""
    groups = F.pad(x.detach(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))  # type: ignore[no-untyped-call]
    fraction, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True).float().clamp_min(1e-4) * (1 / 448))
    scale = torch.ldexp(torch.ones_like(groups[..., :1]), exponent - (fraction == 0.5).int())
    kept = (groups / scale).float().to(torch.float8_e4m3fn).to(x.dtype) * scale
    taken: Tensor = x + (kept.flatten(-2)[..., : x.shape[-1]] - x.detach())
    return taken


def _formula(x: Tensor, q: QTensor, activation_format: str | None) -> Tensor:
    y: Tensor = (_fp8(x) if activation_format == "fp8" else x) @ q.dequantize(torch.float64).T
    return y


def _peers(device: str) -> Mapping[str, Function]:
    def composition(x: Tensor, q: QTensor, activation_format: str | None) -> Tensor:
        """The weights as numbers of x's dtype, then a product."""
        return F.linear(_fp8(x) if activation_format == "fp8" else x, q.dequantize(x.dtype))

    return {"torch": composition}


def _work(bytes_per_weight: float) -> Callable[[Sizes, int], Work]:
    """x, codes and scales read, y written."""

    def work(sizes: Sizes, width: int) -> Work:
        tokens, n, k = sizes["tokens"], sizes["n"], sizes["k"]
        return Work(2 * tokens * n * k, tokens * (n + k) * width + n * k * bytes_per_weight)

    return work


_SMALL = {"tokens": 5, "n": 40, "k": 288}
_CPU = {"cpu": ({"tokens": 1, "n": 2048, "k": 2048}, {"tokens": 256, "n": 2048, "k": 2048})}


def _case(operator: str, label: str, quantize: Callable[[Tensor], QTensor], width: float, form: str | None) -> Case:
    return Case(
        operator=operator,
        label=label,
        sizes=_SMALL,
        inputs=_inputs(quantize, form),
        run=linear,
        formula=_formula,
        gradients=("x",),
        benchmark=_CPU,
        work=_work(width),
        backward_work=_work(width),
        peers=_peers,
    )


CASES = (
    _case("fp8_linear", "128x128", fp8_block_quantize, 1, None),
    _case("fp8_linear", "128x128, FP8 activations", fp8_block_quantize, 1, "fp8"),
    _case("fp4_linear", "MXFP4, FP8 activations", mxfp4_quantize, 17 / 32, "fp8"),
    _case("fp4_linear", "NVFP4", nvfp4_quantize, 9 / 16, None),
)
