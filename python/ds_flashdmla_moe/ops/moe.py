# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Mixture of experts: routing, permutation, grouped products, gated activation, combination, and the fused experts.

A *pair* is one visit of a token to an expert: (token, slot) with slot in [0, topk). A negative index stands for a pair
that capacity dropped; it contributes nothing and gets no gradient. "Wide" is float32, float64 for float64 tensors: all
products are accumulated in it and rounded once.

Weights may be quantised tensors (:mod:`ds_flashdmla_moe.quant`): products are then taken with the exact numbers that
the codes and scales stand for, and the weights get no gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..qtensor import QTensor
from ._register import adjacent, fake, no_double_backward
from ._weights import ActivationFormat, format_name, parts_of

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]


def moe_gate(
    logits: Tensor,
    topk: int,
    *,
    bias: Tensor | None = None,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    renormalize_after_drop: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    capacity_rows: int | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Routing: which experts each token visits, and with what weight. Differentiable in the logits.

    1. Scores: softmax over all experts, sigmoid, or sqrt(softplus) of each logit.
    2. Selection by score + bias, in decreasing order; of equal values the smaller expert first. With ``n_group > 1``
       the experts form equal groups of neighbours, a group is worth the sum of its two best values, and only experts
       of the best ``topk_group`` groups can be selected (DeepSeek-V3). With ``tid2eid`` the token's row of that table
       is the selection (hash routing of DeepSeek-V4).
    3. Capacity: each expert keeps its first ``capacity_rows`` pairs by token, then slot.
    4. Weight: the score without bias, divided by the sum over the selected (``renormalize``) or over the kept experts
       (``renormalize_after_drop``, which goes before) plus 1e-20, times ``routed_scaling_factor``; 0 where dropped.

    The gradient is the derivative of that, sums included; the choice of experts has none.

    Args:
        logits: ``[tokens, experts]`` float32 or float64.
        topk: experts per token.
        bias: ``[experts]`` float32, used for selection only.
        scoring: ``"softmax"``, ``"sigmoid"`` or ``"sqrtsoftplus"``.
        renormalize: see above.
        renormalize_after_drop: see above.
        routed_scaling_factor: see above.
        n_group: divides the number of experts.
        topk_group: at most ``n_group``.
        capacity_rows: ``None``: no limit.
        token_ids: ``[tokens]`` int64, given exactly when ``tid2eid`` is.
        tid2eid: ``[vocab, topk]`` int32 or int64.

    Returns:
        Weights ``[tokens, topk]`` in the logits' dtype and indices ``[tokens, topk]`` int32: the expert, or
        ``-1 - expert`` where that expert dropped the pair.

    Raises:
        ValueError: a shape, dtype or device does not fit, topk experts cannot be selected, an id is out of range, or
            (on CPU) a logit is NaN or +inf.
    """
    normalize = "kept" if renormalize_after_drop else "selected" if renormalize else "none"
    weights, indices = torch.ops.dsm.moe_gate(
        logits,
        topk,
        bias,
        token_ids,
        tid2eid,
        scoring,
        normalize,
        routed_scaling_factor,
        n_group,
        topk_group,
        -1 if capacity_rows is None else capacity_rows,
    )
    return weights, indices


def moe_permute(x: Tensor, indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies tokens to the experts they visit: rows by expert, inside an expert by token, then slot.

    Differentiable in x; the gradient of a token is the sum over its rows in wide.

    Args:
        x: ``[tokens, hidden]``, any floating dtype.
        indices: ``[tokens, topk]`` int32 as from :func:`moe_gate`.
        experts: their number; every index is below it.

    Returns:
        rows ``[tokens * topk, hidden]``, zero behind the last kept pair; expert_offsets ``[experts + 1]`` int32: expert
        e has the rows ``expert_offsets[e]`` up to ``expert_offsets[e + 1]``; row_of_slot ``[tokens, topk]`` int32, −1
        where dropped; slot_of_row ``[tokens * topk]`` int32, ``token * topk + slot`` or −1.

    Raises:
        ValueError: a shape, dtype, device or index does not fit.
    """
    rows, expert_offsets, row_of_slot, slot_of_row = torch.ops.dsm.moe_permute(
        adjacent(x), indices.contiguous(), experts
    )
    return rows, expert_offsets, row_of_slot, slot_of_row


def grouped_gemm(
    a: Tensor,
    b: Tensor | QTensor,
    expert_offsets: Tensor,
    transpose_b: bool = True,
    activation_format: ActivationFormat | None = None,
) -> Tensor:
    """Multiplies each expert's rows by its own matrix: ``c[row] = a[row] · b[e]ᵀ``. Differentiable in a and b.

    Args:
        a: ``[rows, k]``, any floating dtype.
        b: ``[experts, n, k]`` in a's dtype or quantised, or ``[experts, k, n]`` in a's dtype with
            ``transpose_b=False``.
        expert_offsets: ``[experts + 1]`` int32, from 0, not decreasing, at most rows. Rows behind the last expert's
            give 0, whatever they hold.
        transpose_b: see b.
        activation_format: ``"fp8"`` rounds a to FP8 first, per row and 128 channels, as in
            :func:`ds_flashdmla_moe.ops.fp8_linear`; a's gradient passes that rounding straight through, b's is taken
            with the rounded a.

    Returns:
        c ``[rows, n]`` in a's dtype.

    Raises:
        ValueError: a shape, dtype, device or offset does not fit.
    """
    weight = parts_of(b)
    c: Tensor = torch.ops.dsm.grouped_gemm(
        adjacent(a),
        weight.data,
        expert_offsets.contiguous(),
        transpose_b,
        weight.scales,
        weight.global_scale,
        list(weight.block),
        format_name(activation_format),
    )
    return c


def swiglu(z: Tensor, limit: float | None = None) -> Tensor:
    """Gated activation ``silu(min(g, limit)) * clamp(u, -limit, limit)`` with ``z = [g | u]``. Differentiable in z.

    The gradient is 0 beyond a limit.

    Args:
        z: ``[..., 2 * intermediate]``, any floating dtype.
        limit: above 0; ``None``: no limit.

    Returns:
        ``[..., intermediate]`` in z's dtype.

    Raises:
        ValueError: z has no or an odd last dimension, or limit is not above 0.

    Source: Shazeer 2020, arXiv 2002.05202; the limit is DeepSeek-V4's.
    """
    if z.dim() == 0:
        raise ValueError("swiglu: z must have at least one dimension, got a scalar")
    rows = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    y: Tensor = torch.ops.dsm.swiglu(adjacent(rows), _limit(limit))
    return y.view(*z.shape[:-1], y.shape[-1])


def moe_combine(
    rows: Tensor, row_of_slot: Tensor, weights: Tensor | None = None, shared: Tensor | None = None
) -> Tensor:
    """Adds up what a token's experts gave: ``y[token] = Σ_slot weights · rows[row_of_slot] + shared[token]``.

    Summed in wide by increasing row, that is by increasing expert, then shared. Differentiable in rows, weights and
    shared.

    Args:
        rows: ``[rows, hidden]``, any floating dtype.
        row_of_slot: ``[tokens, topk]`` int32 as from :func:`moe_permute`; negative: nothing. No row twice.
        weights: ``[tokens, topk]`` wide; ``None``: 1.
        shared: ``[tokens, hidden]`` in rows' dtype; ``None``: 0.

    Returns:
        ``[tokens, hidden]`` in rows' dtype.

    Raises:
        ValueError: a shape, dtype, device or index does not fit.
    """
    y: Tensor = torch.ops.dsm.moe_combine(
        rows.contiguous(),
        row_of_slot.contiguous(),
        None if weights is None else weights.contiguous(),
        None if shared is None else shared.contiguous(),
    )
    return y


def moe_ffn(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w13: Tensor | QTensor,
    w2: Tensor | QTensor,
    shared_w13: Tensor | QTensor | None = None,
    shared_w2: Tensor | QTensor | None = None,
    swiglu_limit: float | None = None,
    activation_format: ActivationFormat | None = None,
) -> Tensor:
    """All experts in one operator, tile by tile: no permuted x or y is ever made.

    ``y[token] = Σ_slot weights · swiglu(x[token] · w13[e]ᵀ) · w2[e]ᵀ``, e the slot's expert, by increasing expert, plus
    the shared expert, which every token visits with weight 1. Differentiable in x, weights and all four matrices; kept
    for that are the inputs and the pre-activations ``x · w13ᵀ`` in x's dtype, nothing else.

    With ``activation_format="fp8"`` the roundings are those of the DeepSeek-V4 reference code: R to x's dtype, and Q to
    FP8 per token and 128 channels (:func:`ds_flashdmla_moe.ops.fp8_linear`)::

        z = R(Q(x[token]) · w13[e]ᵀ)
        y[token] = R(Σ_slot R(Q(R(weights · swiglu(z))) · w2[e]ᵀ))         (+ the shared expert's, with weight 1)

    with swiglu, its product with the weight and the sum in wide. Gradients pass all roundings straight through; those
    of the matrices are taken with the rounded activations.

    Args:
        x: ``[tokens, hidden]``, any floating dtype.
        weights: ``[tokens, topk]`` wide.
        indices: ``[tokens, topk]`` int32, below the number of experts; negative: dropped.
        w13: ``[experts, 2 * intermediate, hidden]`` in x's dtype or quantised: gate rows, then up rows.
        w2: ``[experts, hidden, intermediate]``, likewise.
        shared_w13: ``[2 * shared_intermediate, hidden]``, likewise; ``None``: no shared expert.
        shared_w2: ``[hidden, shared_intermediate]``, given exactly when shared_w13 is.
        swiglu_limit: as in :func:`swiglu`.
        activation_format: see above; ``None``: activations as they come.

    Returns:
        ``[tokens, hidden]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype, device or index does not fit.

    Source of the backward pass: SonicMoE, arXiv 2512.14080.
    """
    parts = [None if w is None else parts_of(w) for w in (w13, w2, shared_w13, shared_w2)]
    matrices = [part and part.data for part in parts]
    scales = [tensor for part in parts for tensor in ((part.scales, part.global_scale) if part else (None, None))]
    blocks = [extent for part in parts for extent in (part.block if part else (1, 1))]
    differentiable = (x, weights, *matrices)
    keep_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    y, _, _ = torch.ops.dsm.moe_ffn(
        adjacent(x),
        weights.contiguous(),
        indices.contiguous(),
        *matrices,
        _limit(swiglu_limit),
        keep_z,
        *scales,
        blocks,
        format_name(activation_format),
    )
    return y  # type: ignore[no-any-return]


def _limit(limit: float | None) -> float:
    return math.inf if limit is None else float(limit)


# --- shapes ---


@fake("moe_gate")
def _(logits: Tensor, topk: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], topk)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


@fake("moe_gate_backward")
def _(dweights: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@fake("moe_permute")
def _(x: Tensor, indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = indices.shape[0] * indices.shape[1]
    return (
        x.new_empty(pairs, x.shape[1]),
        indices.new_empty(experts + 1),
        indices.new_empty(indices.shape),
        indices.new_empty(pairs),
    )


@fake("grouped_gemm")
def _(a: Tensor, b: Tensor, expert_offsets: Tensor, transpose_b: bool, *rest: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1 if transpose_b else 2])


@fake("grouped_gemm_backward")
def _(dc: Tensor, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_da, need_db = rest[-2:]
    return a.new_empty(a.shape if need_da else 0), a.new_empty(b.shape if need_db else 0)


@fake("swiglu")
def _(z: Tensor, limit: float) -> Tensor:
    return z.new_empty(z.shape[0], z.shape[1] // 2)


@fake("swiglu_backward")
def _(dy: Tensor, z: Tensor, limit: float) -> Tensor:
    return z.new_empty(z.shape)


@fake("moe_combine")
def _(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None, shared: Tensor | None) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


@fake("moe_combine_backward")
def _(dy: Tensor, rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    dweights = rows.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    return rows.new_empty(rows.shape), dweights


@fake("moe_ffn")
def _(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    swiglu_limit: float,
    keep_z: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    z_rows = indices.shape[0] * indices.shape[1] if keep_z else 0
    shared_columns = 0 if shared_w13 is None else shared_w13.shape[0]
    shared_rows = x.shape[0] if keep_z and shared_w13 is not None else 0
    return x.new_empty(x.shape), x.new_empty(z_rows, w13.shape[1]), x.new_empty(shared_rows, shared_columns)


@fake("moe_ffn_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    def gradient_of(weight: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(weight.shape if weight is not None and wanted else 0)

    *_, routed, shared = rest
    matrices = ((w13, routed), (w2, routed), (shared_w13, shared), (shared_w2, shared))
    return x.new_empty(x.shape), weights.new_empty(weights.shape), *(gradient_of(*pair) for pair in matrices)


# --- derivatives ---


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, _, _, scoring, normalize, routed_scaling_factor, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])
    ctx.settings = scoring, normalize, routed_scaling_factor


def _gate_backward(ctx: Any, dweights: Tensor, dindices: Tensor) -> tuple[Tensor | None, ...]:
    logits, indices = ctx.saved_tensors
    dlogits = torch.ops.dsm.moe_gate_backward(dweights.contiguous(), logits, indices, *ctx.settings)
    return dlogits, *(None,) * 10


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


def _permute_backward(ctx: Any, drows: Tensor, *rest: Tensor) -> tuple[Tensor, None, None]:
    (row_of_slot,) = ctx.saved_tensors
    return torch.ops.dsm.moe_combine(drows.contiguous(), row_of_slot, None, None), None, None


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, expert_offsets, ctx.transpose_b, scales, global_scale, *ctx.formats = inputs
    ctx.save_for_backward(a, b, expert_offsets, scales, global_scale)


def _grouped_backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, ...]:
    need_da, need_db = ctx.needs_input_grad[:2]
    a, b, expert_offsets, *scales = ctx.saved_tensors
    da, db = torch.ops.dsm.grouped_gemm_backward(
        adjacent(dc), a, b, expert_offsets, ctx.transpose_b, *scales, *ctx.formats, need_da, need_db
    )
    return da if need_da else None, db if need_db else None, *(None,) * 6


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, ctx.limit = inputs
    ctx.save_for_backward(z)


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (z,) = ctx.saved_tensors
    return torch.ops.dsm.swiglu_backward(adjacent(dy), z, ctx.limit), None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, row_of_slot, weights, _ = inputs
    ctx.save_for_backward(rows, row_of_slot, weights)


def _combine_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, row_of_slot, weights = ctx.saved_tensors
    drows, dweights = torch.ops.dsm.moe_combine_backward(dy.contiguous(), rows, row_of_slot, weights)
    return drows, None, None if weights is None else dweights, dy if ctx.needs_input_grad[3] else None


def _ffn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, (ctx.limit, ctx.keep_z), scales, ctx.formats = inputs[:7], inputs[7:9], inputs[9:17], inputs[17:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:], *scales)


def _ffn_backward(ctx: Any, dy: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.keep_z:
        raise ValueError("moe_ffn: keep_z must be true where a gradient is wanted, got false")
    tensors, z, scales = ctx.saved_tensors[:7], ctx.saved_tensors[7:9], ctx.saved_tensors[9:]
    routed, shared = any(ctx.needs_input_grad[3:5]), any(ctx.needs_input_grad[5:7])
    dx, dweights, *dmatrices = torch.ops.dsm.moe_ffn_backward(
        adjacent(dy), *tensors, ctx.limit, *z, *scales, *ctx.formats, routed, shared
    )
    needed = [d if need else None for d, need in zip(dmatrices, ctx.needs_input_grad[3:7], strict=True)]
    return dx, dweights, None, *needed, *(None,) * 12


torch.library.register_autograd("dsm::moe_gate", _gate_backward, setup_context=_gate_setup)
torch.library.register_autograd("dsm::moe_permute", _permute_backward, setup_context=_permute_setup)
torch.library.register_autograd("dsm::grouped_gemm", _grouped_backward, setup_context=_grouped_setup)
torch.library.register_autograd("dsm::swiglu", _swiglu_backward, setup_context=_swiglu_setup)
torch.library.register_autograd("dsm::moe_combine", _combine_backward, setup_context=_combine_setup)
torch.library.register_autograd("dsm::moe_ffn", _ffn_backward, setup_context=_ffn_setup)
for _name in ("moe_gate", "grouped_gemm", "swiglu", "moe_combine", "moe_ffn"):
    no_double_backward(f"{_name}_backward")
