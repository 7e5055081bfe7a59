# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of hyper-connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import hc_head, hc_post, hc_pre
from .case import Case, Draw, Function, Sizes, Work

EPS = 1e-6


def _mixing_inputs(sizes: Sizes, draw: Draw, outputs: int, scales: int) -> dict[str, Any]:
    """Mixes of order 1, so that neither the sigmoids nor the softmax saturate."""
    tokens, hc, hidden = sizes["tokens"], sizes["hc"], sizes["hidden"]
    return {
        "x": draw(tokens, hc, hidden, scale=2),
        "fn": draw(outputs, hc * hidden, scale=(hc * hidden) ** -0.5, dtype=draw.wide),
        "base": draw(outputs, scale=0.5, dtype=draw.wide),
        "scale": draw(scales, dtype=draw.wide),
    }


def _pre_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return _mixing_inputs(sizes, draw, (2 + sizes["hc"]) * sizes["hc"], 3)


def _head_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return _mixing_inputs(sizes, draw, sizes["hc"], 1)


def _post_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    tokens, hc, hidden = sizes["tokens"], sizes["hc"], sizes["hidden"]
    return {
        "y": draw(tokens, hidden),
        "x": draw(tokens, hc, hidden),
        "post": draw(tokens, hc, dtype=draw.wide),
        "comb": draw(tokens, hc, hc, dtype=draw.wide),
    }


# The formulas are also what torch is measured with: they widen what is not wide yet and round where torch would.


def _mixes(x: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """The wide streams and their projection."""
    wide = x.to(fn.dtype)
    row = wide.flatten(-2)
    return wide, (row @ fn.T) * (row.square().mean(-1, keepdim=True) + EPS).rsqrt()


def _weighted_sum(pre: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    return (pre[..., None] * wide).sum(-2).to(dtype)


def _pre(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hc = x.shape[-2]
    wide, mixes = _mixes(x, fn)
    pre, post, comb = torch.split(mixes, [hc, hc, hc * hc], dim=-1)
    pre_base, post_base, comb_base = torch.split(base, [hc, hc, hc * hc])
    weights = (pre * scale[0] + pre_base).sigmoid() + EPS
    matrix = (comb * scale[2] + comb_base).view(-1, hc, hc).softmax(-1) + EPS
    matrix = matrix / (matrix.sum(-2, keepdim=True) + EPS)
    for _ in range(19):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + EPS)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + EPS)
    return _weighted_sum(weights, wide, x.dtype), 2 * (post * scale[1] + post_base).sigmoid(), matrix


def _head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    wide, mixes = _mixes(x, fn)
    return _weighted_sum((mixes * scale + base).sigmoid() + EPS, wide, x.dtype)


def _post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    wide = comb.transpose(-1, -2) @ x.to(comb.dtype)
    return (post[..., None] * y.to(comb.dtype)[..., None, :] + wide).to(x.dtype)


def _torch(formula: Function) -> Callable[[str], Mapping[str, Function]]:
    return lambda device: {"torch": formula}


def _mixing_work(sizes: Sizes, width: int, outputs: int) -> Work:
    """x and fn (wide) read, the mixed stream written; the projection, the mean square and the weighted sum."""
    tokens, hc, hidden = sizes["tokens"], sizes["hc"], sizes["hidden"]
    streams = tokens * hc * hidden
    return Work(
        2 * streams * (outputs + 2), (streams + tokens * hidden) * width + outputs * hc * hidden * max(width, 4)
    )


def _pre_work(sizes: Sizes, width: int) -> Work:
    return _mixing_work(sizes, width, (2 + sizes["hc"]) * sizes["hc"])


def _head_work(sizes: Sizes, width: int) -> Work:
    return _mixing_work(sizes, width, sizes["hc"])


def _post_work(sizes: Sizes, width: int) -> Work:
    """y and x read, the streams written; hc + 1 products and sums for each of their elements."""
    tokens, hc, hidden = sizes["tokens"], sizes["hc"], sizes["hidden"]
    return Work(2 * tokens * hc * (hc + 1) * hidden, tokens * (2 * hc + 1) * hidden * width)


def _twice(work: Callable[[Sizes, int], Work]) -> Callable[[Sizes, int], Work]:
    """A backward pass: every product has two gradients, and what was read or written has one of its size."""
    return lambda sizes, width: Work(2 * work(sizes, width).flops, 2 * work(sizes, width).bytes)


_SMALL = {"tokens": 5, "hc": 4, "hidden": 24}
_BENCHMARK = {
    "cpu": ({"tokens": 1, "hc": 4, "hidden": 4096}, {"tokens": 512, "hc": 4, "hidden": 2048}),
}

CASES = (
    Case(
        operator="hc_pre",
        sizes=_SMALL,
        inputs=_pre_inputs,
        run=hc_pre,
        formula=_pre,
        gradients=("x", "fn", "base", "scale"),
        benchmark=_BENCHMARK,
        work=_pre_work,
        backward_work=_twice(_pre_work),
        peers=_torch(_pre),
    ),
    Case(
        operator="hc_post",
        sizes=_SMALL,
        inputs=_post_inputs,
        run=hc_post,
        formula=_post,
        gradients=("y", "x", "post", "comb"),
        benchmark=_BENCHMARK,
        work=_post_work,
        backward_work=_twice(_post_work),
        peers=_torch(_post),
    ),
    Case(
        operator="hc_head",
        sizes=_SMALL,
        inputs=_head_inputs,
        run=hc_head,
        formula=_head,
        gradients=("x", "fn", "base", "scale"),
        benchmark=_BENCHMARK,
        work=_head_work,
        backward_work=_twice(_head_work),
        peers=_torch(_head),
    ),
)
