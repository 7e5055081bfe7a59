# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of normalisation and rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..ops import rms_norm, rope, rope_frequencies, v4_output_projection, v4_q_norm_rope
from .case import Case, Draw, Function, Sizes, Work


def _rms_norm_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    rows, hidden = sizes["rows"], sizes["hidden"]
    return {"x": draw(rows, hidden, scale=3), "weight": draw(hidden), "eps": 1e-6}


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rms_norm_peers(device: str) -> Mapping[str, Function]:
    return {"torch": lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)}


def _rms_norm_work(sizes: Sizes, width: int) -> Work:
    """x read, y written; squares, their sum, two products."""
    elements = sizes["rows"] * sizes["hidden"]
    return Work(4 * elements, 2 * elements * width)


def _rms_norm_backward_work(sizes: Sizes, width: int) -> Work:
    """x and dy read, dx written; a row's dot product and dx, and the column sums of dweight."""
    elements = sizes["rows"] * sizes["hidden"]
    return Work(10 * elements, 3 * elements * width)


_MAX_POSITIONS = 1 << 20  # of DeepSeek-V4


def _rope_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    tokens, heads, d = sizes["tokens"], sizes["heads"], sizes["d"]
    return {
        "x": draw(tokens, heads, d),
        "positions": torch.arange(tokens, device=draw.device) * 37 % _MAX_POSITIONS,
        "inv_freq": rope_frequencies(sizes["d_rope"]).to(draw.device),
    }


def _rope_formula(interleaved: bool, inverse: bool) -> Function:
    def formula(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        # The angle in float32 is part of the operator's definition.
        angle = (positions.float()[:, None, None] * inv_freq.float()).double() * (-1 if inverse else 1)
        kept, rotated = x.tensor_split((x.shape[-1] - 2 * len(inv_freq),), dim=-1)
        if interleaved:
            pairs = torch.complex(rotated[..., 0::2], rotated[..., 1::2])
        else:
            pairs = torch.complex(*rotated.chunk(2, dim=-1))
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        parts = (turned.real, turned.imag)
        return torch.cat((kept, torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)), -1)

    return formula


def _rope(interleaved: bool, inverse: bool) -> Function:
    return lambda **inputs: rope(**inputs, interleaved=interleaved, inverse=inverse)


def _rope_peers(device: str) -> Mapping[str, Function]:
    return {"torch": reference.rope}


def _rope_work(sizes: Sizes, width: int) -> Work:
    """x and int64 positions read, y written; four products and two sums for every rotated pair."""
    vectors = sizes["tokens"] * sizes["heads"]
    return Work(3 * vectors * sizes["d_rope"], 2 * vectors * sizes["d"] * width + 8 * sizes["tokens"])


def _v4_q_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    inputs = _rope_inputs(sizes, draw)
    return {"q": 3 * inputs.pop("x"), "eps": 1e-6} | inputs


def _v4_q(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    normal = q / (q.square().mean(-1, keepdim=True) + eps).sqrt()
    turned: Tensor = _rope_formula(interleaved=True, inverse=False)(normal, positions, inv_freq)
    return turned


def _v4_q_peers(device: str) -> Mapping[str, Function]:
    def composition(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
        return reference.rope(reference.rms_norm(q, None, eps), positions, inv_freq)

    return {"torch": composition}


def _v4_q_work(sizes: Sizes, width: int) -> Work:
    """q read, y written; squares, their sum, a product, and the rotation."""
    vectors = sizes["tokens"] * sizes["heads"]
    return Work(3 * vectors * (sizes["d"] + sizes["d_rope"]), 2 * vectors * sizes["d"] * width)


def _v4_q_backward_work(sizes: Sizes, width: int) -> Work:
    """q and dy read, dq written; the rotation, a head's dot product and dq."""
    vectors = sizes["tokens"] * sizes["heads"]
    return Work(vectors * (6 * sizes["d"] + 3 * sizes["d_rope"]), 3 * vectors * sizes["d"] * width)


def _v4_output_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    inputs = _rope_inputs(sizes, draw)
    columns = sizes["heads"] // sizes["groups"] * sizes["d"]
    wo_a = draw(sizes["groups"] * sizes["rank"], columns, scale=columns**-0.5)
    return {"o": inputs.pop("x"), "wo_a": wo_a, "groups": sizes["groups"], "dtype": draw.dtype} | inputs


def _v4_output_run(dtype: torch.dtype, **inputs: Any) -> Tensor:
    return v4_output_projection(**inputs)


def _rounded_rope(o: Tensor, positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse rotation in float32, rounded to the dtype: from float64 some elements would round the other way."""
    wide = torch.promote_types(dtype, torch.float32)
    angle = (positions.float()[:, None, None] * inv_freq.float()).double()
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    kept, rotated = o.to(wide).tensor_split((o.shape[-1] - 2 * len(inv_freq),), dim=-1)
    a, b = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)
    return torch.cat((kept, pairs), -1).to(dtype).double()


def _v4_output(o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    exact = _rope_formula(interleaved=True, inverse=True)(o, positions, inv_freq)
    # Rounded to the dtype by definition, and differentiated as if it were not.
    rounded = exact + (_rounded_rope(o, positions, inv_freq, dtype) - exact).detach()
    heads = rounded.view(len(o), groups, -1)
    return torch.einsum("tgi,gri->tgr", heads, wo_a.view(groups, -1, heads.shape[-1])).flatten(1)


def _v4_output_peers(device: str) -> Mapping[str, Function]:
    def composition(
        o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: Tensor, groups: int, dtype: torch.dtype
    ) -> Tensor:
        heads = reference.rope(o, positions, inv_freq, inverse=True).view(len(o), groups, -1)
        z = torch.bmm(heads.transpose(0, 1), wo_a.view(groups, -1, heads.shape[-1]).mT)
        return z.transpose(0, 1).flatten(1)

    return {"torch": composition}


def _v4_output_work(sizes: Sizes, width: int) -> Work:
    """o and wo_a read, z written; the products."""
    elements = sizes["tokens"] * sizes["heads"] * sizes["d"]
    weights = sizes["rank"] * sizes["heads"] * sizes["d"]
    results = sizes["tokens"] * sizes["groups"] * sizes["rank"]
    return Work(2 * elements * sizes["rank"], (elements + weights + results) * width)


def _v4_output_backward_work(sizes: Sizes, width: int) -> Work:
    """o, wo_a and dz read, do and dwo_a written; twice the products."""
    elements = sizes["tokens"] * sizes["heads"] * sizes["d"]
    weights = sizes["rank"] * sizes["heads"] * sizes["d"]
    results = sizes["tokens"] * sizes["groups"] * sizes["rank"]
    return Work(4 * elements * sizes["rank"], (2 * elements + 2 * weights + results) * width)


_SMALL_ROPE = {"tokens": 5, "heads": 3, "d": 24, "d_rope": 16}

CASES = (
    Case(
        operator="rms_norm",
        sizes={"rows": 7, "hidden": 48},
        inputs=_rms_norm_inputs,
        run=rms_norm,
        formula=_rms_norm,
        gradients=("x", "weight"),
        benchmark={
            "cpu": ({"rows": 2048, "hidden": 128}, {"rows": 4096, "hidden": 2048}),
            "cuda": ({"rows": 128, "hidden": 7168}, {"rows": 8192, "hidden": 7168}, {"rows": 65536, "hidden": 2048}),
        },
        work=_rms_norm_work,
        backward_work=_rms_norm_backward_work,
        peers=_rms_norm_peers,
    ),
    Case(
        operator="rope",
        label="interleaved",
        sizes=_SMALL_ROPE,
        inputs=_rope_inputs,
        run=_rope(interleaved=True, inverse=False),
        formula=_rope_formula(interleaved=True, inverse=False),
        gradients=("x",),
        backward="rope",
        benchmark={
            "cpu": (
                {"tokens": 2048, "heads": 4, "d": 32, "d_rope": 32},
                {"tokens": 4096, "heads": 32, "d": 64, "d_rope": 64},
            ),
            "cuda": (
                {"tokens": 128, "heads": 128, "d": 64, "d_rope": 64},
                {"tokens": 8192, "heads": 128, "d": 64, "d_rope": 64},
                {"tokens": 8192, "heads": 64, "d": 512, "d_rope": 64},
                {"tokens": 524288, "heads": 1, "d": 64, "d_rope": 64},
            ),
        },
        work=_rope_work,
        peers=_rope_peers,
    ),
    Case(
        operator="rope",
        label="half-split inverse",
        sizes=_SMALL_ROPE,
        inputs=_rope_inputs,
        run=_rope(interleaved=False, inverse=True),
        formula=_rope_formula(interleaved=False, inverse=True),
        gradients=("x",),
        backward="rope",
    ),
    Case(
        operator="v4_q_norm_rope",
        sizes=_SMALL_ROPE,
        inputs=_v4_q_inputs,
        run=v4_q_norm_rope,
        formula=_v4_q,
        gradients=("q",),
        benchmark={
            "cpu": (
                {"tokens": 1, "heads": 64, "d": 512, "d_rope": 64},
                {"tokens": 256, "heads": 64, "d": 512, "d_rope": 64},
            ),
        },
        work=_v4_q_work,
        backward_work=_v4_q_backward_work,
        peers=_v4_q_peers,
    ),
    Case(
        operator="v4_output_projection",
        sizes={"tokens": 5, "heads": 4, "d": 24, "d_rope": 16, "groups": 2, "rank": 6},
        inputs=_v4_output_inputs,
        run=_v4_output_run,
        formula=_v4_output,
        gradients=("o", "wo_a"),
        benchmark={
            "cpu": (
                {"tokens": 1, "heads": 16, "d": 512, "d_rope": 64, "groups": 2, "rank": 1024},
                {"tokens": 256, "heads": 16, "d": 512, "d_rope": 64, "groups": 2, "rank": 1024},
            ),
        },
        work=_v4_output_work,
        backward_work=_v4_output_backward_work,
        peers=_v4_output_peers,
    ),
)
