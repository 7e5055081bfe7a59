# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The indexer of DeepSeek sparse attention: a small scorer that chooses, for every query, the keys to attend to.

Queries and keys are rotated and quantised (:func:`hadamard_quantize`), scored (:func:`indexer_logits`,
:func:`paged_indexer_logits`), the best keys selected (:func:`indexer_topk`); in training the scorer learns to predict
the attention (:func:`indexer_kl_loss`). "Wide" is float32, float64 for float64 tensors.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ._register import accumulator_dtype, adjacent, fake, no_double_backward

IndexerFormat = Literal["none", "fp4", "fp8"]


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _require_rank(operation: str, **tensors: tuple[Tensor, int]) -> None:
    """The ranks that a wrapper itself relies on; the operator checks everything else."""
    for argument, (tensor, rank) in tensors.items():
        if tensor.dim() != rank:
            raise ValueError(
                f"{operation}: {argument} must be of {rank} dimensions, got {list(tensor.shape)} {tensor.dtype}"
            )


# --- hadamard_quantize ---


def hadamard_quantize(x: Tensor, format: IndexerFormat = "none", rotate: bool = True) -> Tensor | tuple[Tensor, Tensor]:
    """Rotates vectors by a Hadamard matrix and quantises them: ``y = (x · H) · d^-0.5``.

    ``H[i][j] = (-1)^popcount(i & j)``. Computed in wide and rounded to x's dtype, then

    * ``"none"``: left so. Differentiable: the rotation is its own inverse and transpose.
    * ``"fp4"``: each 32 values become E2M1 with the scale ``2^ceil(log2(amax / 6))`` and are decoded again, in x's
      dtype: what the DeepSeek-V4 reference simulates.
    * ``"fp8"``: each vector becomes E4M3 with the scale ``2^ceil(log2(max(amax, 1e-4) / 448))``: what indexer caches
      hold.

    Ties go to the even code. A NaN or infinity makes its whole block NaN. Quantised results carry no gradient.

    Args:
        x: ``[..., d]``, any floating dtype; quantised: float32 or bfloat16. d is a power of two if rotated, a multiple
            of 32 for ``"fp4"``.
        format: see above.
        rotate: ``False``: only quantise.

    Returns:
        y of x's shape and dtype; for ``"fp8"`` (values ``[..., d]`` float8_e4m3fn, scale ``[...]`` float32).

    Raises:
        ValueError: a shape, dtype or the format does not fit.

    Source: DeepSeek-V3.2 and V4 reference code.
    """
    if x.dim() == 0:
        raise ValueError("hadamard_quantize: x must have at least one dimension, got a scalar")
    rows = adjacent(x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0))
    y, scale = torch.ops.dsm.hadamard_quantize(rows, format, rotate)
    if format == "fp8":
        return y.view(x.shape), scale.view(x.shape[:-1])
    return y.view(x.shape)  # type: ignore[no-any-return]


@fake("hadamard_quantize")
def _(x: Tensor, format: str, rotate: bool) -> tuple[Tensor, Tensor]:
    fp8 = format == "fp8"
    y = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    return y, x.new_empty(x.shape[0] if fp8 else 0, dtype=torch.float32)


def _hadamard_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, format, ctx.rotate = inputs
    ctx.mark_non_differentiable(*(output if format != "none" else output[1:]))


def _hadamard_backward(ctx: Any, dy: Tensor, dscale: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.dsm.hadamard_quantize(adjacent(dy), "none", ctx.rotate)[0], None, None


torch.library.register_autograd("dsm::hadamard_quantize", _hadamard_backward, setup_context=_hadamard_setup)


# --- indexer_logits ---


def indexer_logits(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    k_scale: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Scores of every key for every query: ``logits[i, j] = k_scale[j] * Σ_h weights[i, h] * relu(q[i, h] · k[j])``.

    Query i sees the keys ``starts[i] <= j < ends[i]``, cut to ``[0, s_kv)``; its other logits are -inf, and what stands
    in those keys never reaches a result. Differentiable in q, k and weights when q and k are not FP8.

    Args:
        q: ``[s_q, heads, d]``, any floating dtype or float8_e4m3fn with its scales multiplied into the weights.
        k: ``[s_kv, d]`` in q's dtype or float8_e4m3fn.
        weights: ``[s_q, heads]`` wide.
        k_scale: ``[s_kv]`` float32, for FP8 keys.
        starts: ``[s_q]`` int32; ``None``: 0.
        ends: ``[s_q]`` int32; ``None``: s_kv. For causal scores of compressed keys ``(positions + 1) // ratio``.

    Returns:
        ``[s_q, s_kv]`` wide.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: DeepSeek-V3.2 report; DeepSeek-V4 reference code with float32 scores.
    """
    _require_rank("indexer_logits", q=(q, 3), k=(k, 2), weights=(weights, 2))
    logits: Tensor = torch.ops.dsm.indexer_logits(
        adjacent(q), adjacent(k), adjacent(weights), _dense(k_scale), _dense(starts), _dense(ends)
    )
    return logits


@fake("indexer_logits")
def _(
    q: Tensor, k: Tensor, weights: Tensor, k_scale: Tensor | None, starts: Tensor | None, ends: Tensor | None
) -> Tensor:
    return q.new_empty((q.shape[0], k.shape[0]), dtype=accumulator_dtype(q))


@fake("indexer_logits_backward")
def _(
    dlogits: Tensor, q: Tensor, k: Tensor, weights: Tensor, starts: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), weights.new_empty(weights.shape)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, weights, _, starts, ends = inputs
    ctx.save_for_backward(q, k, weights, starts, ends)


def _logits_backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
    q, k, weights, starts, ends = ctx.saved_tensors
    if torch.float8_e4m3fn in (q.dtype, k.dtype):
        raise NotImplementedError("dsm.indexer_logits has no gradient for FP8 operands; train on the unquantised ones")
    dq, dk, dweights = torch.ops.dsm.indexer_logits_backward(adjacent(dlogits), q, k, weights, starts, ends)
    return dq, dk, dweights, None, None, None


torch.library.register_autograd("dsm::indexer_logits", _logits_backward, setup_context=_logits_setup)
no_double_backward("indexer_logits_backward")


def paged_indexer_logits(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_len: int | None = None,
) -> Tensor:
    """:func:`indexer_logits` over a paged cache: key j of request b is entry ``j % page_size`` of page
    ``block_table[b, j // page_size]``.

    Queries see the first ``context_lens`` keys of their request; the other logits, and those of keys whose page does
    not exist, are -inf. Nothing beyond the context is read, neither in the table nor in the cache. No gradient.

    Args:
        q: ``[batch, s_q, heads, d]`` as in :func:`indexer_logits`.
        cache: ``[pages, page_size, 1, d]`` in q's dtype, or the FP8 cache ``[pages, page_size, 1, d + 4]`` of bytes as
            :func:`indexer_k_insert` fills it: page_size * d of E4M3, then page_size float32 scales. Pages lie any
            distance apart.
        weights: ``[batch, s_q, heads]`` wide.
        context_lens: ``[batch, s_q]`` int32, keys that each query sees, or ``[batch]``: as many for all of a request.
        block_table: ``[batch, max_pages]`` int32.
        max_len: width of the result; ``None``: what the block table covers.

    Returns:
        ``[batch, s_q, max_len]`` wide.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _require_rank(
        "paged_indexer_logits", q=(q, 4), cache=(cache, 4), weights=(weights, 3), block_table=(block_table, 2)
    )
    if context_lens.dim() == 1 and context_lens.shape[0] == q.shape[0]:
        context_lens = context_lens[:, None].expand(q.shape[:2])
    if max_len is None:
        max_len = block_table.shape[1] * cache.shape[1]
    logits: Tensor = torch.ops.dsm.paged_indexer_logits(
        adjacent(q.detach()),
        cache.detach(),
        adjacent(weights.detach()),
        context_lens,
        adjacent(block_table),
        max_len,
    )
    return logits


@fake("paged_indexer_logits")
def _(q: Tensor, cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, max_len: int) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], max_len), dtype=accumulator_dtype(q))


# --- indexer_topk ---


def indexer_topk(logits: Tensor, topk: int, ends: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """The ``topk`` largest logits of each row; of equal ones those of smaller index. -inf and NaN are never selected.

    Args:
        logits: ``[rows, n]`` float32.
        topk: at least 0.
        ends: ``[rows]`` int32: only the columns ``starts <= j < ends``, cut to ``[0, n)``, are candidates; ``None``: n.
        starts: ``[rows]`` int32; ``None``: 0.

    Returns:
        ``[rows, topk]`` int32: columns in ascending order, then -1 where fewer can be selected.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _require_rank("indexer_topk", logits=(logits, 2))
    indices: Tensor = torch.ops.dsm.indexer_topk(adjacent(logits.detach()), topk, _dense(ends), _dense(starts))
    return indices


@fake("indexer_topk")
def _(logits: Tensor, topk: int, ends: Tensor | None, starts: Tensor | None) -> Tensor:
    return logits.new_empty((logits.shape[0], topk), dtype=torch.int32)


# --- indexer_kl_loss ---


def indexer_kl_loss(logits: Tensor, target: Tensor, indices: Tensor | None = None) -> Tensor:
    """What the indexer is trained by: ``KL(target / Σ target ‖ softmax(logits))`` of each row, over the same keys.

    With ``indices`` the keys are the selected ones and ``target`` is aligned with them; without, they are all those
    whose logit is above -inf. A slot without a key (an index outside of ``[0, n)``, a logit of -inf) does not count,
    whatever its target holds; a row without keys, or whose targets add up to 0, gives 0. Differentiable in the logits;
    the target is taken as constant.

    Args:
        logits: ``[rows, n]`` float32 or float64, as from :func:`indexer_logits`.
        target: ``[rows, slots]`` in the same dtype, at least 0: attention probabilities summed over the heads.
        indices: ``[rows, slots]`` int32, as from :func:`indexer_topk`; ``None``: slot s is key s, slots = n.

    Returns:
        ``[rows]`` in the same dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: DeepSeek-V3.2 report: the sum of this over all queries.
    """
    _require_rank("indexer_kl_loss", logits=(logits, 2), target=(target, 2))
    loss: Tensor = torch.ops.dsm.indexer_kl_loss(
        adjacent(logits), adjacent(target.detach()), None if indices is None else adjacent(indices)
    )
    return loss


@fake("indexer_kl_loss")
def _(logits: Tensor, target: Tensor, indices: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape[0])


@fake("indexer_kl_loss_backward")
def _(dloss: Tensor, logits: Tensor, target: Tensor, indices: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape)


def _kl_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _kl_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.dsm.indexer_kl_loss_backward(dloss.contiguous(), *ctx.saved_tensors), None, None


torch.library.register_autograd("dsm::indexer_kl_loss", _kl_backward, setup_context=_kl_setup)
no_double_backward("indexer_kl_loss_backward")
