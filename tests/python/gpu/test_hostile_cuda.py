# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""What the shared cases do not reach: odd addresses, huge offsets, NaN, ties, ids out of range, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)
POSITIONS = torch.tensor([0, 1, 77, 4095, 65536, 1_000_000, 2**31 - 1])


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element off every alignment, rows an odd distance apart."""
    *lead, last = tensor.shape
    return torch.full((*lead, last + 3), math.nan, dtype=tensor.dtype, device=tensor.device)[..., 1:-2].copy_(tensor)


def swiglu(z: Tensor) -> Tensor:
    return dsm.ops.swiglu(z, 2.0)


def rope(x: Tensor) -> Tensor:
    return dsm.ops.rope(x, POSITIONS.to(x.device), dsm.ops.rope_frequencies(16).to(x.device))


def rms_norm(x: Tensor) -> Tensor:
    weight = torch.arange(x.shape[-1], device=x.device) % 7 - 2  # exact in every dtype
    return dsm.ops.rms_norm(x, weight.to(x.dtype))


FUNCTIONS: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = [
    (rms_norm, (9, 256)),
    (rope, (7, 3, 32)),
    (swiglu, (9, 256)),
]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("function", "shape"), FUNCTIONS, ids=["rms_norm", "rope", "swiglu"])
def test_addresses_off_alignment(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    aligned = torch.randn(shape, device=CUDA).to(dtype).requires_grad_()
    odd = shifted(aligned.detach()).requires_grad_()
    dy = torch.randn_like(function(aligned))
    for x in (aligned, odd):
        function(x).backward(dy if x is aligned else shifted(dy))
    truth = function(aligned.detach().cpu().double())
    assert_close("aligned", function(aligned).cpu(), truth)
    assert_close("off alignment", function(odd).cpu(), truth)
    assert_close("gradient", odd.grad, aligned.grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_rope_gives_the_bits_of_the_cpu(dtype: torch.dtype, interleaved: bool, heads: int) -> None:
    x = torch.randn(4000, heads, 64).to(dtype)
    positions = torch.randint(-1_000_000, 1_000_000, (4000,))
    positions[: len(POSITIONS)] = POSITIONS
    inv_freq = dsm.ops.rope_frequencies(64)
    on_cpu = dsm.ops.rope(x, positions, inv_freq, interleaved)
    on_gpu = dsm.ops.rope(x.to(CUDA), positions.to(CUDA), inv_freq.to(CUDA), interleaved)
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info(CUDA)[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    rows, hidden = 2**31 // 4096 + 5, 4096
    x = torch.randn(rows, hidden, device=CUDA, dtype=torch.bfloat16)
    last = x[-4:].clone()
    weight = torch.ones(hidden, device=CUDA, dtype=torch.bfloat16)
    assert torch.equal(dsm.ops.rms_norm(x, weight)[-4:], dsm.ops.rms_norm(last, weight))
    assert torch.equal(swiglu(x)[-4:], swiglu(last))
    positions, inv_freq = torch.arange(rows, device=CUDA), dsm.ops.rope_frequencies(64).to(CUDA)
    turned = dsm.ops.rope(x.view(rows, 64, 64), positions, inv_freq)
    assert torch.equal(turned[-4:], dsm.ops.rope(last.view(4, 64, 64), positions[-4:], inv_freq))
    del turned
    ones = torch.ones(rows, 1, device=CUDA, dtype=torch.bfloat16).expand(rows, hidden)
    y, rstd = torch.ops.dsm.rms_norm(x, weight, 1e-6)
    del y
    dx, _ = torch.ops.dsm.rms_norm_backward(ones.contiguous(), x, weight, rstd)
    dx_last, _ = torch.ops.dsm.rms_norm_backward(torch.ones_like(last), last, weight, rstd[-4:])
    assert torch.equal(dx[-4:], dx_last)
    del dx
    dz = torch.ops.dsm.swiglu_backward(ones[:, : hidden // 2].contiguous(), x, math.inf)
    assert torch.equal(dz[-4:], torch.ops.dsm.swiglu_backward(torch.ones_like(last[:, : hidden // 2]), last, math.inf))


@pytest.mark.parametrize(("function", "shape"), FUNCTIONS, ids=["rms_norm", "rope", "swiglu"])
def test_nan_stays_in_its_row(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=CUDA)
    clean = function(x)
    x[3, ..., 5] = math.nan
    dirty = function(x)
    others = [0, 1, 2, *range(4, shape[0])]
    assert torch.equal(clean[others], dirty[others])


# --- moe_gate: the CPU refuses or decides, CUDA must agree ---

GATES: list[dict[str, object]] = [
    {"scoring": scoring, "renormalize": renormalize, "renormalize_after_drop": after, "capacity_rows": capacity}
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus")
    for renormalize, after in ((False, False), (True, False), (False, True))
    for capacity in (None, 0, 37)
] + [{"scoring": "sigmoid", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "capacity_rows": 100}]


def on_both(logits: Tensor, topk: int, **options: object) -> None:
    """Runs the gate on both devices; the indices must be equal and weights and gradients agree."""
    on_gpu = {name: value.to(CUDA) if isinstance(value, Tensor) else value for name, value in options.items()}
    cpu_logits, gpu_logits = logits.clone().requires_grad_(), logits.to(CUDA).requires_grad_()
    weights, indices = dsm.ops.moe_gate(cpu_logits, topk, **options)
    gpu_weights, gpu_indices = dsm.ops.moe_gate(gpu_logits, topk, **on_gpu)
    assert torch.equal(indices, gpu_indices.cpu())
    assert_close("weights", gpu_weights.cpu(), weights.double())
    dweights = torch.randn_like(weights)
    weights.backward(dweights)
    gpu_weights.backward(dweights.to(CUDA))
    assert_close("dlogits", gpu_logits.grad.cpu(), cpu_logits.grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", GATES, ids=lambda options: "-".join(map(str, options.values())))
def test_gate_agrees_with_the_cpu(options: dict[str, object], dtype: torch.dtype) -> None:
    # Few different values, so that no two selection values are closer than the devices' rounding, but for exact ties.
    logits = torch.randn(3000, 64, dtype=dtype).mul(8).round() / 8
    on_both(logits, 6, bias=torch.randint(3, (64,)) / 4, **options)


@pytest.mark.parametrize("experts", [8, 40, 256, 1024])
def test_gate_breaks_ties_as_the_cpu_does(experts: int) -> None:
    logits = torch.randint(-2, 3, (500, experts)).float()
    logits[logits == 0] *= torch.where(torch.rand(int((logits == 0).sum())) < 0.5, -1.0, 1.0)  # -0 is 0
    on_both(logits, 8, scoring="sigmoid")
    on_both(logits, 8, scoring="sigmoid", n_group=4, topk_group=2 if experts > 8 else 4, capacity_rows=50)
    on_both(torch.zeros(70, experts), 8)


def test_gate_with_minus_infinity() -> None:
    logits = torch.randn(50, 16)
    logits[:, ::3] = -math.inf
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        on_both(logits, 12, scoring=scoring)
    bias = torch.zeros(16)
    bias[4:] = -math.inf
    on_both(torch.randn(50, 16), 6, scoring="sigmoid", bias=bias)
    on_both(torch.randn(50, 16), 6, scoring="sigmoid", bias=bias, n_group=4, topk_group=2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_gate_by_hash(dtype: torch.dtype) -> None:
    table = torch.stack([torch.randperm(16)[:4] for _ in range(99)]).to(dtype)
    token_ids = torch.randint(0, 99, (400,))
    for capacity in (None, 60):
        options = {"token_ids": token_ids, "tid2eid": table, "scoring": "sqrtsoftplus", "capacity_rows": capacity}
        on_both(torch.randn(400, 16), 4, **options)


@pytest.mark.parametrize("capacity", [None, 3])
def test_rows_that_cannot_be_scored_give_nan_and_valid_experts(capacity: int | None) -> None:
    logits = torch.randn(6, 8, device=CUDA)
    logits[1, 3] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    clean = dsm.ops.moe_gate(torch.where(logits.isfinite(), logits, 0.0), 2)[0]
    weights, indices = dsm.ops.moe_gate(logits, 2, capacity_rows=capacity)
    experts = torch.where(indices < 0, -1 - indices, indices)
    assert ((experts >= 0) & (experts < 8)).all()
    assert weights[1:4][indices[1:4] >= 0].isnan().all()
    if capacity is None:
        assert torch.equal(weights[[0, 4, 5]], clean[[0, 4, 5]])

    table = torch.tensor([[0, 1], [7, 8], [-1, 2]], device=CUDA)
    token_ids = torch.tensor([0, 1, 2, 3, -1, 2**40], device=CUDA)
    logits = torch.randn(6, 8, device=CUDA)
    weights, indices = dsm.ops.moe_gate(logits, 2, token_ids=token_ids, tid2eid=table, capacity_rows=capacity)
    experts = torch.where(indices < 0, -1 - indices, indices)
    assert ((experts >= 0) & (experts < 8)).all()
    assert weights[0].isfinite().all()
    assert weights[1:][indices[1:] >= 0].isnan().all()


def test_gate_refuses_what_a_warp_cannot_hold() -> None:
    with pytest.raises(ValueError, match="cuda: takes at most 1024 experts"):
        dsm.ops.moe_gate(torch.zeros(2, 1025, device=CUDA), 2)
    with pytest.raises(ValueError, match="cuda: takes a topk of at most 32"):
        dsm.ops.moe_gate(torch.zeros(2, 64, device=CUDA), 33)
    with pytest.raises(ValueError, match="cuda: takes at most 32 groups"):
        dsm.ops.moe_gate(torch.zeros(2, 64, device=CUDA), 2, n_group=64, topk_group=4)


def test_mixed_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be on cuda:0, got .* on cpu"):
        dsm.ops.rms_norm(torch.zeros(2, 8, device=CUDA), torch.ones(8))
    with pytest.raises(ValueError, match="positions must be on cuda:0"):
        dsm.ops.rope(torch.zeros(2, 1, 8, device=CUDA), torch.arange(2), torch.ones(4, device=CUDA))
