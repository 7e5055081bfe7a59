# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""grouped_gemm, moe_ffn and the layer with quantised weights and FP8 activations, against float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import moe_truth
import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
import weight_truth
from ds_flashdmla_moe.ops._weights import parts_of
from threads import assert_same_bits
from tolerance import FLOATING, ULP, assert_close, worst_error
from weight_truth import FORMATS

TOKENS, TOPK, EXPERTS, HIDDEN, INTERMEDIATE, SHARED = 13, 2, 4, 160, 192, 64
LAYERS = (dsm.moe_forward_unfused, dsm.moe_megakernel_fwd)
# w13, w2, shared_w13, shared_w2: DeepSeek-V4's, an NVFP4 conversion's, DeepSeek-V3's, and one of each.
MIXTURES = [
    ("mxfp4", "mxfp4", "fp8 128x128 e8m0", "fp8 128x128 e8m0"),
    ("nvfp4 by row", "nvfp4", "plain", "plain"),
    ("fp8 128x128 fp32", "fp8 128x128 fp32", "fp8 128x128 fp32", "fp8 128x128 fp32"),
    ("fp8 32x32 e8m0", "plain", "nvfp4", "mxfp4"),
    ("plain", "plain", "plain", "plain"),
]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To dtype; the derivative passes through."""
    return x + (x.detach().to(dtype).double() - x.detach())


def fp8(x: Tensor) -> Tensor:
    return x + (weight_truth.fp8(x.detach()) - x.detach())


def weight(name: str, dtype: torch.dtype, *shape: int) -> Any:
    """Of a size that keeps results near 1."""
    if name == "plain":
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()
    return FORMATS[name](*shape)


def weights_of(mixture: tuple[str, ...], dtype: torch.dtype) -> list[Any]:
    shapes = [(EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE)]
    shapes += [(2 * SHARED, HIDDEN), (HIDDEN, SHARED)]
    return [weight(name, dtype, *shape) for name, shape in zip(mixture, shapes, strict=True)]


def routing(kind: str) -> Tensor:
    if kind == "one":
        return torch.full((TOKENS, TOPK), 3, dtype=torch.int32)
    if kind == "dropped":
        return torch.full((TOKENS, TOPK), -1, dtype=torch.int32)
    indices = torch.stack([torch.randperm(EXPERTS - 1)[:TOPK] for _ in range(TOKENS)]).int()  # the last one gets none
    return torch.where(torch.rand(TOKENS, TOPK) < 0.2, -1 - indices, indices)


def truth(
    x: Tensor,
    weights: Tensor,
    slots: list[list[int]],
    matrices: list[Tensor],
    limit: float,
    dtype: torch.dtype,
    z: Tensor,
    shared_z: Tensor,
) -> Tensor:
    """The definition of FP8 mode, token by token: roundings in float64, gradients straight through them.

    z by expert, then token, then slot is what the operator stored: another sum's last bit may round to its neighbour.
    """

    def expert(token: Tensor, w13: Tensor, w2: Tensor, score: Tensor | float, stored: Tensor) -> Tensor:
        product = fp8(token) @ w13.T
        assert_close("z", stored, rounded(product.detach(), stored.dtype))
        product = product + (stored.double() - product.detach())
        return rounded(fp8(rounded(score * moe_truth.swiglu(product, limit), dtype)) @ w2.T, dtype)

    w13, w2, shared_w13, shared_w2 = matrices
    order = sorted((e, t, k) for t, row in enumerate(slots) for k, e in enumerate(row) if e >= 0)
    tokens, y = x.unbind(), [torch.zeros(x.shape[1], dtype=torch.float64) for _ in slots]
    for row, (e, t, k) in enumerate(order):
        y[t] = y[t] + expert(tokens[t], w13[e], w2[e], weights[t, k], z[row])
    shared = [expert(token, shared_w13, shared_w2, 1.0, shared_z[t]) for t, token in enumerate(tokens)]
    return torch.stack(y) + torch.stack(shared)


def assert_close_but_for_flips(y: Tensor, expected: Tensor, largest_weight: float) -> None:
    """In half types an activation next to a tie may round to the neighbour, and so may then its FP8 code.

    That moves a token's results by an eighth of the activation times its weights; activations here are below 8.
    """
    if y.dtype in (torch.float32, torch.float64):
        return assert_close("y", y, expected)
    scale = float(expected.detach().abs().max())
    off = [t for t in range(len(y)) if worst_error(y[t], expected[t], scale=scale) > 1]
    worst = float((y.double() - expected).detach().abs().max())
    print(f"tokens with a flip: {off}; worst error {worst / scale:.2e} of the largest")
    assert len(off) <= 2
    assert worst <= largest_weight + 2 * ULP[y.dtype] * scale
    return None


@pytest.mark.parametrize("kind", ["random", "one", "dropped"])
@pytest.mark.parametrize("activation_format", [None, "fp8"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("mixture", MIXTURES, ids=" ".join)
def test_fused_matches_float64(mixture: Any, dtype: torch.dtype, activation_format: Any, kind: str) -> None:
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    pairs = torch.rand(TOKENS, TOPK, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    matrices, indices = weights_of(mixture, dtype), routing(kind)
    dy = torch.randn(TOKENS, HIDDEN).to(dtype)
    plain = [m for m in matrices if isinstance(m, Tensor)]
    routed = all(isinstance(m, Tensor) for m in matrices[:2])
    wanted = [x, pairs, *(matrices[:2] if routed else [])]
    if len(plain) == 2 and not routed:
        wanted += [m for m in matrices[2:] if isinstance(m, Tensor)]
    for m in plain:
        m.requires_grad_(any(m is w for w in wanted))

    parts = [tuple(parts_of(m)) for m in matrices]
    scales = [tensor for _, *pair, _ in parts for tensor in pair]
    blocks = [extent for *_, block in parts for extent in block]
    y, z, shared_z = torch.ops.dsm.moe_ffn(
        x, pairs, indices, *(data for data, *_ in parts), 2.0, True, *scales, blocks, activation_format or "none"
    )
    assert torch.equal(y, dsm.ops.moe_ffn(x, pairs, indices, *matrices, 2.0, activation_format))
    gradients = torch.autograd.grad(y, wanted, dy)

    numbers = [weight_truth.numbers(m).requires_grad_() for m in matrices]
    wide_x, wide_pairs = moe_truth.wide(x), moe_truth.wide(pairs)
    wide = [wide_x, wide_pairs, *(n for m, n in zip(matrices, numbers, strict=True) if any(m is w for w in wanted))]
    slots = indices.tolist()
    if activation_format is None:
        expected = moe_truth.experts(wide_x, wide_pairs, slots, *numbers, limit=2.0)
        assert_close("y", y, expected)
        # The backward pass starts from the pre-activations as they are stored.
        expected = moe_truth.experts(wide_x, wide_pairs, slots, *numbers, limit=2.0, z=z, shared_z=shared_z)
    else:
        expected = truth(wide_x, wide_pairs, slots, numbers, 2.0, dtype, z, shared_z)
        assert_close_but_for_flips(y, expected, max(float(n.detach().abs().max()) for n in numbers[1::2]))
    truths = torch.autograd.grad(expected, wide, dy.double(), materialize_grads=True)
    flips = activation_format and dtype in (torch.float16, torch.bfloat16)
    names = ("dx", "dweights", "dw13") if flips else ("dx", "dweights", "dw13", "dw2")
    for name, gradient, exact in zip(names, gradients, truths, strict=False):
        assert_close(name, gradient, exact)


@pytest.mark.parametrize("activation_format", [None, "fp8"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("mixture", MIXTURES, ids=" ".join)
def test_layers_agree(mixture: Any, dtype: torch.dtype, activation_format: Any) -> None:
    """Unfused and fused, with V4's gate, capacity drops and clamp: the same bits in float32 and float64."""
    X = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    gate = (torch.randn(EXPERTS, HIDDEN) / HIDDEN**0.5).requires_grad_()
    w13, w2, *shared = [m.detach() if isinstance(m, Tensor) else m for m in weights_of(mixture, dtype)]
    parameters = dsm.MoEWeights(gate, w13, w2, torch.randn(EXPERTS) / 10, *shared)
    options = {"topk": TOPK, "scoring": "sqrtsoftplus", "routed_scaling_factor": 1.5, "capacity": 0.75}
    options |= {"swiglu_limit": 2.0, "activation_format": activation_format}
    dy = torch.randn(TOKENS, HIDDEN).to(dtype)
    results = []
    for function in LAYERS:
        Y = function(X, parameters, **options)
        results.append([Y.detach(), *torch.autograd.grad(Y, (X, gate), dy)])
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(results[0][0], results[1][0])
    allowed = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * ULP[dtype])
    for name, one, other in zip(("Y", "dX", "dgate"), *results, strict=True):
        worst = float((one - other).abs().max() / one.abs().max())
        print(f"{name}: {worst:.2e} of the largest")
        assert worst <= allowed, name


@pytest.mark.parametrize("activation_format", [None, "fp8"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_grouped_gemm_matches_float64(name: str, dtype: torch.dtype, activation_format: Any) -> None:
    """Empty experts, one that takes nearly everything, and rows behind the last one's."""
    offsets = torch.tensor([0, 0, 1, 22, 22], dtype=torch.int32)
    a = torch.randn(25, 288).to(dtype)
    a[22:] = math.nan
    a.requires_grad_()
    b = FORMATS[name](4, 70, 288)
    dc = torch.randn(25, 70).to(dtype)
    c = dsm.ops.grouped_gemm(a, b, offsets, activation_format=activation_format)
    (da,) = torch.autograd.grad(c, a, dc)
    numbers = weight_truth.numbers(b)
    rows = a.detach()[:22]
    taken = weight_truth.fp8(rows) if activation_format else rows.double()
    expert_of_row = torch.tensor([1] + [2] * 21)
    expected = torch.einsum("rk,rnk->rn", taken, numbers[expert_of_row])
    expected_da = torch.einsum("rn,rnk->rk", dc[:22].double(), numbers[expert_of_row])
    scale = float(torch.einsum("rk,rnk->rn", taken.abs(), numbers.abs()[expert_of_row]).max())
    assert_close("c", c[:22], expected, scale=scale)
    assert_close("da", da[:22], expected_da)
    assert (c[22:] == 0).all()
    assert (da[22:] == 0).all()


@pytest.mark.parametrize("transpose_b", [True, False])
def test_gradients_of_floating_weights_under_rounded_activations(transpose_b: bool) -> None:
    """b's gradient is taken with the rounded a: the derivative of what was computed."""
    offsets = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    a = torch.randn(9, 200, requires_grad=True)
    b = torch.randn((3, 6, 200) if transpose_b else (3, 200, 6), requires_grad=True)
    c = dsm.ops.grouped_gemm(a, b, offsets, transpose_b, "fp8")
    dc = torch.randn_like(c)
    da, db = torch.autograd.grad(c, (a, b), dc)
    taken, wide_b = fp8(a.double()), b.detach().double().requires_grad_()
    parts = [taken[i:j] @ (w.T if transpose_b else w) for i, j, w in zip((0, 2, 2), (2, 2, 7), wide_b, strict=True)]
    expected = torch.cat([*parts, a.new_zeros(2, 6).double()])
    expected_da, expected_db = torch.autograd.grad(expected, (a, wide_b), dc.double())
    assert_close("c", c, expected)
    assert_close("da", da, expected_da)
    assert_close("db", db, expected_db)


def test_weight_before_rounding_by_hand() -> None:
    """One token, one expert: x = 1, gate 1, up 3: silu(1) · 3 · 0.7 = 1.535… -> FP8 1.5; with the weight afterwards
    2.19… would become 2.25, and 2.25 · 0.7 = 1.575."""
    x, pairs, indices = torch.ones(1, 1), torch.tensor([[0.7]]), torch.zeros(1, 1, dtype=torch.int32)
    w13, w2 = torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 1, 1)
    assert dsm.ops.moe_ffn(x, pairs, indices, w13, w2, activation_format="fp8").tolist() == [[1.5]]


def test_mixed_gradients_are_refused_with_a_reason() -> None:
    x, pairs, indices = torch.randn(3, 32), torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    w13, w2 = FORMATS["mxfp4"](2, 64, 32), torch.randn(2, 32, 32, requires_grad=True)
    y = dsm.ops.moe_ffn(x, pairs, indices, w13, w2)
    with pytest.raises(ValueError, match="dw13 must be absent for quantised weights"):
        y.sum().backward()


def test_bad_weights_are_refused() -> None:
    a, offsets = torch.zeros(5, 64), torch.tensor([0, 1, 2], dtype=torch.int32)
    b = FORMATS["mxfp4"](2, 4, 64)
    for call, message in [
        (lambda: dsm.ops.grouped_gemm(a, b, offsets, transpose_b=False), "transpose_b must be true for quantised b"),
        (lambda: dsm.ops.grouped_gemm(a[:, :32], b, offsets), r"b must be \[experts, n, k\], two codes in a byte, ="),
        (lambda: dsm.ops.grouped_gemm(a, b, offsets, activation_format="int8"), "activation_format must be none"),
        (lambda: torch.ops.dsm.grouped_gemm(a, b.packed, offsets, True), r"b must be .* float32, got .* uint8"),
        (
            lambda: torch.ops.dsm.grouped_gemm(a, b.packed, offsets, True, b.scales.view(torch.uint8)[:1]),
            r"b scales must be \[2, 4, 2\]",
        ),
        (lambda: dsm.ops.grouped_gemm(a, FORMATS["mxfp4"](4, 64), offsets), "b must be of 3 dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    w13, w2, *shared = weights_of(MIXTURES[0], torch.float32)
    X, gate = torch.randn(TOKENS, HIDDEN), torch.randn(EXPERTS, HIDDEN)
    for function, (weights, message) in itertools.product(
        LAYERS,
        [
            (
                (w13, FORMATS["mxfp4"](EXPERTS, HIDDEN, 96)),
                r"w2 must be .* = \[4, 160, 192\] float32 or quantised on cpu",
            ),
            ((w13, w2, None, shared[1], shared[0]), "shared_w13 must be"),
            ((w13, w2, None, shared[0]), "shared_w13 and shared_w2 must be given together"),
        ],
    ):
        with pytest.raises(ValueError, match=message):
            function(X, dsm.MoEWeights(gate, *weights), topk=2)


def test_same_bits_for_any_number_of_threads() -> None:
    X = torch.randn(300, HIDDEN, requires_grad=True)
    w13, w2, *shared = weights_of(MIXTURES[0], torch.float32)
    parameters = dsm.MoEWeights(torch.randn(EXPERTS, HIDDEN), w13, w2, None, *shared)

    def run() -> list[Tensor]:
        Y = dsm.moe_megakernel_fwd(X, parameters, topk=2, activation_format="fp8")
        return [Y, *torch.autograd.grad(Y.square().sum(), X)]

    assert_same_bits(run)


@pytest.mark.parametrize("function", LAYERS)
@pytest.mark.parametrize("mixture", MIXTURES[:2], ids=" ".join)
def test_compile(mixture: Any, function: Any) -> None:
    X = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    w13, w2, *shared = [m.detach() if isinstance(m, Tensor) else m for m in weights_of(mixture, torch.float32)]
    parameters = dsm.MoEWeights(torch.randn(EXPERTS, HIDDEN), w13, w2, None, *shared)

    def layer(v: Tensor) -> Tensor:
        return function(v, parameters, topk=2, activation_format="fp8")

    Y = torch.compile(layer, fullgraph=True, backend="aot_eager")(X)
    assert torch.equal(Y, layer(X))
    Y.sum().backward()
    assert X.grad is not None


def test_opcheck() -> None:
    x, pairs = torch.randn(3, 32, requires_grad=True), torch.rand(3, 1, requires_grad=True)
    indices, offsets = torch.zeros(3, 1, dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    w13, w2 = FORMATS["mxfp4"](2, 64, 32), FORMATS["mxfp4"](2, 32, 32)
    s13, s2 = w13.scales.view(torch.uint8), w2.scales.view(torch.uint8)
    arguments = (x, w13.packed, offsets, True, s13, None, [1, 1], "fp8")
    torch.library.opcheck(torch.ops.dsm.grouped_gemm.default, arguments)
    scales = (s13, None, s2, None, None, None, None, None, [1, 1] * 4, "fp8")
    arguments = (x, pairs, indices, w13.packed, w2.packed, None, None, math.inf, True, *scales)
    torch.library.opcheck(torch.ops.dsm.moe_ffn.default, arguments)
