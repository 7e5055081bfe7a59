# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Manifold-constrained hyper-connections: a residual of several streams, mixed before and after every sub-layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import accumulator_dtype, fake, no_double_backward


def hc_pre(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    post_mult: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sub-layer's input, mixed from the residual streams, and the mixes with which :func:`hc_post` writes back.

    All of a token's ``hc * hidden`` elements are projected: ``mixes = (x @ fn.T) / sqrt(mean(x²) + norm_eps)``. The
    first ``hc`` of them make ``pre``, the next ``hc`` ``post`` and the others ``comb``, row by row, each by way of
    ``a = mixes * scale[i] + base`` with i = 0, 1, 2 for the three: ``pre = sigmoid(a) + eps``,
    ``post = post_mult * sigmoid(a)``, and ``comb`` is the softmax of every row plus eps, made doubly stochastic by
    Sinkhorn-Knopp: each iteration divides every row (in the first one the softmax has done so) and then every column by
    its sum plus eps. The sub-layer's input is ``sum_j pre[j] * x[j]``.

    Computed in float32 (float64 for float64 x); the input is rounded once to x's dtype. Differentiable in x, fn, base
    and scale, through all iterations.

    Args:
        x: ``[..., hc, hidden]``, float64, float32, float16 or bfloat16.
        fn: ``[(2 + hc) * hc, hc * hidden]`` float32 (float64 for float64 x), like base and scale.
        base: ``[(2 + hc) * hc]``.
        scale: ``[3]``.
        iterations: of Sinkhorn-Knopp, at least 1.
        eps: see above.
        norm_eps: see above.
        post_mult: largest weight with which a stream takes the sub-layer's output.

    Returns:
        ``(mixed, post, comb)``: ``[..., hidden]`` of x's dtype, ``[..., hc]`` and ``[..., hc, hc]`` of fn's.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.

    Source: Xie et al. 2025, arXiv 2512.24880; DeepSeek-V4 reference code.
    """
    lead = _lead("hc_pre", x)
    mixed, post, comb, _, _ = torch.ops.dsm.hc_pre(_tokens(x, 2), fn, base, scale, iterations, eps, norm_eps, post_mult)
    hc, hidden = x.shape[-2:]
    return mixed.view(*lead, hidden), post.view(*lead, hc), comb.view(*lead, hc, hc)


def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The residual streams after a sub-layer: ``out[k] = post[k] * y + sum_j comb[j, k] * x[j]``.

    Computed in float32 (float64 for float64 x) and rounded once. Differentiable in all arguments.

    Args:
        y: ``[..., hidden]``, the sub-layer's output, of x's dtype.
        x: ``[..., hc, hidden]``, the streams before the sub-layer; float64, float32, float16 or bfloat16.
        post: ``[..., hc]`` float32 (float64 for float64 x), from :func:`hc_pre`, as comb.
        comb: ``[..., hc, hc]``; a row is a source, a column a destination.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Xie et al. 2025, arXiv 2512.24880; DeepSeek-V4 reference code.
    """
    lead = _lead("hc_post", x)
    for name, tensor, own in (("y", y, 1), ("post", post, 1), ("comb", comb, 2)):
        if tensor.shape[: tensor.dim() - own] != lead:
            raise ValueError(f"hc_post: {name} must begin with {list(lead)} as x does, got {list(tensor.shape)}")
    mixes = _tokens(post, 1).contiguous(), _tokens(comb, 2).contiguous()
    out = torch.ops.dsm.hc_post(_tokens(y, 1), _tokens(x, 2), *mixes)
    return out.view(x.shape)  # type: ignore[no-any-return]


def hc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float = 1e-6, norm_eps: float = 1e-6) -> Tensor:
    """The model's last hidden state: ``sum_j pre[j] * x[j]`` with ``pre`` as in :func:`hc_pre`.

    Computed in float32 (float64 for float64 x) and rounded once. Differentiable in x, fn, base and scale.

    Args:
        x: ``[..., hc, hidden]``, float64, float32, float16 or bfloat16.
        fn: ``[hc, hc * hidden]`` float32 (float64 for float64 x), like base and scale.
        base: ``[hc]``.
        scale: ``[1]``.
        eps: added to the weights.
        norm_eps: added to the mean square.

    Returns:
        ``[..., hidden]`` of x's dtype.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.

    Source: Xie et al. 2025, arXiv 2512.24880; DeepSeek-V4 reference code.
    """
    lead = _lead("hc_head", x)
    mixed, _, _ = torch.ops.dsm.hc_head(_tokens(x, 2), fn, base, scale, eps, norm_eps)
    return mixed.view(*lead, x.shape[-1])  # type: ignore[no-any-return]


def _lead(operator: str, x: Tensor) -> torch.Size:
    if x.dim() < 3:
        raise ValueError(f"{operator}: x must be [..., tokens, hc, hidden], got {list(x.shape)}")
    return x.shape[:-2]


def _tokens(tensor: Tensor, own: int) -> Tensor:
    """All leading dimensions as one; ``own``: how many trailing ones a token has."""
    return tensor.flatten(0, -1 - own)


@fake("hc_pre")
def _(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    post_mult: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, hc, hidden = x.shape
    wide = accumulator_dtype(x)
    shapes = ((tokens, hc), (tokens, hc, hc), (tokens, (2 + hc) * hc), (tokens,))
    post, comb, mixes, rstd = (x.new_empty(shape, dtype=wide) for shape in shapes)
    return x.new_empty(tokens, hidden), post, comb, mixes, rstd


@fake("hc_pre_backward")
def _(
    dmixed: Tensor,
    dpost: Tensor,
    dcomb: Tensor,
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    post_mult: float,
    mixes: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empties(x, fn, base, scale)


@fake("hc_post")
def _(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("hc_post_backward")
def _(dout: Tensor, y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empties(y, x, post, comb)


@fake("hc_head")
def _(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    tokens, hc, hidden = x.shape
    wide = accumulator_dtype(x)
    return x.new_empty(tokens, hidden), x.new_empty((tokens, hc), dtype=wide), x.new_empty(tokens, dtype=wide)


@fake("hc_head_backward")
def _(
    dmixed: Tensor, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, mixes: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empties(x, fn, base, scale)


def _empties(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape), c.new_empty(c.shape), d.new_empty(d.shape)


def _pre_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, fn, base, scale, ctx.iterations, ctx.eps, _, ctx.post_mult = inputs
    mixes, rstd = output[3:]
    ctx.mark_non_differentiable(mixes, rstd)
    ctx.save_for_backward(x, fn, base, scale, mixes, rstd)


def _pre_backward(
    ctx: Any, dmixed: Tensor, dpost: Tensor, dcomb: Tensor, dmixes: Tensor, drstd: Tensor
) -> tuple[Tensor | None, ...]:
    x, fn, base, scale, mixes, rstd = ctx.saved_tensors
    gradients = torch.ops.dsm.hc_pre_backward(
        dmixed.contiguous(),
        dpost.contiguous(),
        dcomb.contiguous(),
        x,
        fn,
        base,
        scale,
        ctx.iterations,
        ctx.eps,
        ctx.post_mult,
        mixes,
        rstd,
    )
    return *gradients, None, None, None, None


def _post_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _post_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.dsm.hc_post_backward(dout.contiguous(), *ctx.saved_tensors)  # type: ignore[no-any-return]


def _head_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, fn, base, scale, ctx.eps, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, fn, base, scale, *output[1:])


def _head_backward(ctx: Any, dmixed: Tensor, dmixes: Tensor, drstd: Tensor) -> tuple[Tensor | None, ...]:
    x, fn, base, scale, mixes, rstd = ctx.saved_tensors
    gradients = torch.ops.dsm.hc_head_backward(dmixed.contiguous(), x, fn, base, scale, ctx.eps, mixes, rstd)
    return *gradients, None, None


torch.library.register_autograd("dsm::hc_pre", _pre_backward, setup_context=_pre_setup)
torch.library.register_autograd("dsm::hc_post", _post_backward, setup_context=_post_setup)
torch.library.register_autograd("dsm::hc_head", _head_backward, setup_context=_head_setup)
no_double_backward("hc_pre_backward")
no_double_backward("hc_post_backward")
no_double_backward("hc_head_backward")
