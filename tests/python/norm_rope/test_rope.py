# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math

import pytest
import torch
from rope_truth import rotated
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close

# x's shape and the number of rotated dimensions.
SHAPES = [
    ((5, 2, 8), 8),
    ((3, 4, 24), 16),
    ((1, 1, 7), 2),
    ((2, 6, 3, 64), 64),
    ((300, 2, 80), 64),
    ((2, 1, 5), 0),
    ((0, 2, 8), 4),
    ((4, 0, 8), 4),
]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("shape", "d_rope"), SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_matches_float64(
    shape: tuple[int, ...], d_rope: int, dtype: torch.dtype, interleaved: bool, inverse: bool
) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    positions = torch.randint(0, 1_000_000, shape[:-2])
    inv_freq = dsm.ops.rope_frequencies(d_rope)
    dy = torch.randn(shape).to(dtype)

    y = dsm.ops.rope(x, positions, inv_freq, interleaved, inverse)
    y.backward(dy)

    assert y.dtype == dtype
    assert_close("y", y, rotated(x.detach(), positions, inv_freq, interleaved, inverse))
    assert_close("dx", x.grad, rotated(dy, positions, inv_freq, interleaved, not inverse))


def test_positions_broadcast_over_the_batch() -> None:
    x = torch.randn(3, 5, 2, 8)
    positions = torch.arange(5)
    inv_freq = dsm.ops.rope_frequencies(8)
    y = dsm.ops.rope(x, positions, inv_freq)
    for batch in range(3):
        assert torch.equal(y[batch], dsm.ops.rope(x[batch], positions, inv_freq))


@pytest.mark.parametrize("interleaved", [True, False])
def test_inverse_undoes(interleaved: bool) -> None:
    x = torch.randn(50, 3, 16, dtype=torch.float64)
    positions = torch.randint(-1000, 1000, (50,))
    inv_freq = dsm.ops.rope_frequencies(16)
    turned = dsm.ops.rope(x, positions, inv_freq, interleaved)
    assert_close("x", dsm.ops.rope(turned, positions, inv_freq, interleaved, inverse=True), x)


def test_extreme_positions() -> None:
    # Far beyond any context: the float32 angle is exact to its last bit and its sine must be too.
    positions = torch.tensor([2**24 - 1, 2**31 - 1, -(2**31), 2**40 + 12345, 2**62])
    inv_freq = torch.tensor([1.0, 0.1, 3e-5])
    x = torch.randn(5, 2, 6)
    assert_close("y", dsm.ops.rope(x, positions, inv_freq), rotated(x, positions, inv_freq, True, False))


def test_strided_input() -> None:
    wide = torch.randn(6, 7, 2, 24)
    part = wide.transpose(0, 1)[..., 4:20]
    positions = torch.arange(6)
    inv_freq = dsm.ops.rope_frequencies(8)
    assert torch.equal(dsm.ops.rope(part, positions, inv_freq), dsm.ops.rope(part.contiguous(), positions, inv_freq))


def test_first_dimensions_rotate_through_a_view() -> None:
    """DeepSeek-V3.2's indexer rotates the first dimensions of its heads, half-split."""
    x = torch.randn(7, 3, 20, dtype=torch.float64, requires_grad=True)
    positions, inv_freq = torch.arange(7) * 1000, dsm.ops.rope_frequencies(8)
    y = torch.cat((dsm.ops.rope(x[..., :8], positions, inv_freq, interleaved=False), x[..., 8:]), -1)
    angle = (positions.float()[:, None] * inv_freq).double()[:, None]
    a, b, rest = x.detach().split([4, 4, 12], dim=-1)
    expected = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest)
    assert_close("y", y, torch.cat(expected, -1))
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert_close("dx", dx, 2 * x.detach())  # a rotation keeps lengths


def test_nan_stays_in_its_pair() -> None:
    x = torch.randn(2, 2, 8)
    positions, inv_freq = torch.arange(2), dsm.ops.rope_frequencies(4)
    clean = dsm.ops.rope(x, positions, inv_freq)
    x[1, 0, 4] = float("nan")
    y = dsm.ops.rope(x, positions, inv_freq)
    assert y[1, 0, 4:6].isnan().all()
    y[1, 0, 4:6] = clean[1, 0, 4:6]
    assert torch.equal(y, clean)


def test_same_bits_for_any_number_of_threads() -> None:
    x, positions, inv_freq = torch.randn(500, 4, 32), torch.arange(500), dsm.ops.rope_frequencies(32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = dsm.ops.rope(x, positions, inv_freq)
        torch.set_num_threads(2)
        assert torch.equal(one, dsm.ops.rope(x, positions, inv_freq))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("interleaved", [True, False])
def test_gradcheck(interleaved: bool) -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    positions, inv_freq = torch.tensor([0, 3, 700]), dsm.ops.rope_frequencies(4)
    function = lambda a: dsm.ops.rope(a, positions, inv_freq, interleaved)  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_plain_frequencies() -> None:
    i = torch.arange(32, dtype=torch.float64)
    assert_close("inv_freq", dsm.ops.rope_frequencies(64), 10000.0 ** (-2 * i / 64))


def test_yarn_frequencies_are_the_published_ones() -> None:
    # DeepSeek-V4: base 160000, factor 16, original length 65536.
    golden = [
        1.0, 6.8765602e-01, 4.7287080e-01, 3.2517246e-01, 2.2360680e-01, 1.5376456e-01, 1.0573713e-01, 7.2710772e-02,
        5.0000000e-02, 3.4382801e-02, 2.3643540e-02, 1.6258623e-02, 1.1180340e-02, 7.6882281e-03, 5.2868563e-03,
        3.6355386e-03, 2.2656250e-03, 1.3968013e-03, 8.4968973e-04, 5.0808196e-04, 2.9697778e-04, 1.6817999e-04,
        9.0867843e-05, 4.5444232e-05, 1.9531250e-05, 5.3723127e-06, 3.6943032e-06, 2.5404098e-06, 1.7469281e-06,
        1.2012856e-06, 8.2607130e-07, 5.6805290e-07,
    ]  # fmt: skip
    inv_freq = dsm.ops.rope_frequencies(64, 160000, factor=16, original_length=65536)
    assert torch.allclose(inv_freq.double(), torch.tensor(golden, dtype=torch.float64), rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    ("base", "factor", "length", "low", "high"),
    [(10000, 40, 4096, 10, 23), (160000, 16, 65536, 15, 25)],
    ids=["DeepSeek-V3", "DeepSeek-V4"],
)
def test_yarn_ramps_between_the_published_pairs(base: float, factor: float, length: float, low: int, high: int) -> None:
    def pair_that_turns(turns: float) -> float:
        """i with length · base^(-2i / 64) = 2π · turns"""
        return 64 * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    assert math.floor(pair_that_turns(32)) == low
    assert math.ceil(pair_that_turns(1)) == high
    i = torch.arange(32, dtype=torch.float64)
    ramp, plain = ((i - low) / (high - low)).clamp(0, 1), base ** (-2 * i / 64)
    expected = plain * (1 - ramp) + plain / factor * ramp
    inv_freq = dsm.ops.rope_frequencies(64, base, factor=factor, original_length=length)
    error = float((inv_freq.double() / expected - 1).abs().max())
    print(f"inv_freq: {error:.1e} relative")
    assert error < 4e-7
    kept = dsm.ops.rope_frequencies(64, base)
    assert torch.equal(inv_freq[: low + 1], kept[: low + 1])
    assert torch.equal(inv_freq[high:], kept[high:] / factor)


def test_yarn_softmax_scale() -> None:
    scale = dsm.ops.yarn_softmax_scale(192, 40)
    assert abs(math.sqrt(scale * math.sqrt(192)) - 1.3689) < 5e-5  # DeepSeek-V3's m
    assert abs(scale - 0.135233779) < 1e-9
    assert dsm.ops.yarn_softmax_scale(128, 1.0) == 128**-0.5
    assert dsm.ops.yarn_softmax_scale(64, math.e, mscale=10.0) == 0.5
    for arguments in ((0, 40.0), (192, 0.5), (192, math.nan), (192, math.inf), (192, 40.0, math.nan)):
        with pytest.raises(ValueError, match="yarn_softmax_scale"):
            dsm.ops.yarn_softmax_scale(*arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"x must be \[..., tokens, heads, d\]"),
        ({"x": torch.zeros(3, 2, 8, dtype=torch.int32)}, "x must be .* got .* int32"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, "positions must broadcast"),
        ({"positions": torch.zeros(3)}, "positions must be .* int64"),
        ({"inv_freq": torch.zeros(5)}, "inv_freq must be at most d / 2 = 4 long, got 5"),
        ({"inv_freq": torch.zeros(4, dtype=torch.float64)}, "inv_freq must be .* float32"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changed: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(3, 2, 8), "positions": torch.arange(3), "inv_freq": torch.zeros(4)} | changed
    with pytest.raises(ValueError, match=message):
        dsm.ops.rope(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_rope": 7}, "d_rope must be an even number"),
        ({"d_rope": -2}, "d_rope must be an even number"),
        ({"base": 1.0}, "base must be"),
        ({"base": math.nan}, "base must be"),
        ({"factor": 0.5}, "factor must be"),
        ({"original_length": 0}, "original_length must be"),
        ({"beta_slow": 0}, "beta_slow must be"),
        ({"beta_fast": 0.5}, "beta_fast must be"),
    ],
    ids=str,
)
def test_bad_frequency_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.rope_frequencies(**({"d_rope": 64} | arguments))


def test_opcheck() -> None:
    x = torch.randn(3, 2, 8, requires_grad=True)
    positions, inv_freq = torch.arange(3), dsm.ops.rope_frequencies(4)
    torch.library.opcheck(torch.ops.dsm.rope.default, (x, positions, inv_freq, True, False))
    torch.library.opcheck(torch.ops.dsm.rope.default, (x.detach(), positions, inv_freq, False, True))
    torch.library.opcheck(torch.ops.dsm.rope_frequencies.default, (8, 1e4, 4.0, 4096.0, 32.0, 1.0))


def test_compile_fullgraph() -> None:
    x = torch.randn(2, 3, 2, 8, requires_grad=True)
    positions, inv_freq = torch.arange(3), dsm.ops.rope_frequencies(4)
    compiled = torch.compile(dsm.ops.rope, fullgraph=True, backend="aot_eager")
    y = compiled(x, positions, inv_freq)
    assert torch.equal(y, dsm.ops.rope(x, positions, inv_freq))
    y.sum().backward()
    assert torch.equal(x.grad, dsm.ops.rope(torch.ones_like(x), positions, inv_freq, inverse=True))
