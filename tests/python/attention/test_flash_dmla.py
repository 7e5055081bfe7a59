# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from attention_truth import attention, attention_gradients, largest
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close


class Case(NamedTuple):
    batch: int
    heads: int
    s_q: int
    s_kv: int
    d_qk: int
    d_v: int
    d_latent: int


class Mode(NamedTuple):
    cache_is_latent: bool
    wk: bool
    wv: bool
    return_latent: bool = False


CASES = [
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(2, 3, 5, 7, 6, 4, 3),
    Case(1, 2, 129, 129, 32, 32, 16),  # one off the tiles of 128
    Case(1, 1, 63, 257, 24, 40, 20),
    Case(2, 2, 1, 300, 32, 32, 16),  # decoding
    Case(1, 1, 1, 4200, 16, 16, 8),
    Case(1, 2, 3, 130, 16, 16, 64),  # the latent space is the larger one
    Case(0, 2, 3, 3, 4, 4, 4),
    Case(2, 2, 0, 3, 4, 4, 4),
    Case(2, 0, 3, 3, 4, 4, 4),
]
MODES = {
    "fly": Mode(False, True, True),
    "fly-latent-out": Mode(False, True, True, True),
    "cache": Mode(True, True, True),
    "cache-latent-q": Mode(True, False, True),
    "cache-latent-out": Mode(True, True, False),
    "cache-latent-out-by-flag": Mode(True, True, True, True),
    "cache-all-latent": Mode(True, False, False),
}
Inputs = dict[str, Tensor]


def draw(case: Case, mode: Mode, dtype: torch.dtype) -> Inputs:
    d_q = case.d_qk if mode.wk else case.d_latent
    d_k, d_v = (case.d_latent, case.d_latent) if mode.cache_is_latent else (case.d_qk, case.d_v)
    rows = (case.batch, case.heads)
    inputs = {
        "Q": torch.randn(*rows, case.s_q, d_q) * 2,
        "K": torch.randn(*rows, case.s_kv, d_k),
        "V": torch.randn(*rows, case.s_kv, d_v),
    }
    if mode.wk:
        inputs["WK"] = torch.randn(case.d_qk, case.d_latent) * case.d_qk**-0.5
    if mode.wv:
        inputs["WV"] = torch.randn(case.d_v, case.d_latent) * case.d_v**-0.5
    return {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}


def run(inputs: Inputs, mode: Mode, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    out, lse = dsm.flash_dmla_fwd(
        **inputs,
        causal=causal,
        cache_is_latent=mode.cache_is_latent,
        softmax_scale=scale,
        return_lse=True,
        return_latent=mode.return_latent,
    )
    return out, lse


def latents(inputs: Inputs, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (inputs[name].double() for name in "QKV")
    wk, wv = (inputs[name].double() if name in inputs else None for name in ("WK", "WV"))
    if wk is not None:
        q = q @ wk
    if not mode.cache_is_latent:
        k, v = k @ wk, v @ wv
    return q, k, v


def truth(inputs: Inputs, mode: Mode, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The formula in float64; differentiable."""
    out, lse = attention(*latents(inputs, mode), scale, causal)
    return (out @ inputs["WV"].double().T if mode.wv and not mode.return_latent else out), lse


def gradients(
    inputs: Inputs, mode: Mode, latent: Tensor, dout: Tensor, dlse: Tensor, causal: bool, scale: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each gradient by the formula, given the latent output as it was stored, and the sums of its terms' magnitudes."""
    wide = {name: t.detach().double() for name, t in inputs.items()}
    dout, projected = dout.double(), mode.wv and not mode.return_latent
    dlatent = dout @ wide["WV"] if projected else dout
    d = attention_gradients(dlatent, dlse, *latents(wide, mode), latent, scale, causal)
    result = {name: (d[i], d[i + 3]) for i, name in enumerate("QKV")}
    weights: dict[str, list[tuple[Tensor, Tensor]]] = {"WK": [], "WV": []}

    def through(name: str, weight: str) -> None:
        gradient, terms = result[name]
        x, w = wide[name], wide[weight]
        result[name] = gradient @ w.T, terms @ w.T.abs()
        weights[weight].append(((x.mT @ gradient).sum((0, 1)), (x.abs().mT @ terms).sum((0, 1))))

    if mode.wk:
        through("Q", "WK")
    if not mode.cache_is_latent:
        through("K", "WK")
        through("V", "WV")
    if projected:
        latent = latent.double()
        weights["WV"].append(((dout.mT @ latent).sum((0, 1)), (dout.abs().mT @ latent.abs()).sum((0, 1))))
    for name, terms in weights.items():
        if name in inputs:
            zero = torch.zeros_like(wide[name])
            result[name] = sum((t[0] for t in terms), zero), sum((t[1] for t in terms), zero)
    return result


def check_against_truth(inputs: Inputs, mode: Mode, causal: bool, scale: float | None = None) -> None:
    out, lse = run(inputs, mode, causal, scale)
    dtype, scale = inputs["Q"].dtype, inputs["Q"].shape[-1] ** -0.5 if scale is None else scale
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, expected_lse = truth(inputs, mode, causal, scale)
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape).to(lse.dtype)
    torch.autograd.backward((out, lse), (dout, dlse))
    # The projection's terms may cancel, as those of every product.
    projected = mode.wv and not mode.return_latent
    latent, _ = run(inputs, mode._replace(return_latent=True), causal, scale)
    terms = latent.detach().double().abs() @ inputs["WV"].detach().double().abs().T if projected else expected
    assert_close("out", out, expected, scale=largest(terms))
    assert_close("lse", lse, expected_lse)
    for name, (gradient, sums) in gradients(inputs, mode, latent.detach(), dout, dlse, causal, scale).items():
        assert inputs[name].grad is not None
        assert_close(f"d{name}", inputs[name].grad, gradient, scale=largest(sums))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_on_the_fly_matches_float64(case: Case, causal: bool, dtype: torch.dtype) -> None:
    check_against_truth(draw(case, MODES["fly"], dtype), MODES["fly"], causal)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mode", [name for name in MODES if name != "fly"])
def test_other_modes_match_float64(mode: str, causal: bool, dtype: torch.dtype) -> None:
    for case in (Case(2, 3, 5, 7, 6, 4, 3), Case(1, 2, 100, 130, 32, 24, 16), Case(1, 2, 1, 300, 16, 16, 8)):
        check_against_truth(draw(case, MODES[mode], dtype), MODES[mode], causal)


@pytest.mark.parametrize("mode", MODES)
def test_formula_of_gradients_agrees_with_autograd(mode: str) -> None:
    inputs = draw(Case(2, 2, 4, 6, 5, 3, 4), MODES[mode], torch.float64)
    out, lse = truth(inputs, MODES[mode], True, 0.4)
    latent, _ = truth(inputs, MODES[mode]._replace(return_latent=True), True, 0.4)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    autograd = torch.autograd.grad((out, lse), list(inputs.values()), (dout, dlse), allow_unused=True)
    formula = gradients(inputs, MODES[mode], latent.detach(), dout, dlse, True, 0.4)
    for name, a in zip(inputs, autograd, strict=True):
        expected = torch.zeros_like(inputs[name]) if a is None else a
        torch.testing.assert_close(formula[name][0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, causal: bool) -> None:
    inputs = draw(Case(2, 1, 2, 3, 3, 2, 2), MODES[mode], torch.float64)

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(dict(zip(inputs, tensors, strict=True)), MODES[mode], causal)

    assert torch.autograd.gradcheck(f, list(inputs.values()))


@pytest.mark.parametrize("seed", range(16))
def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [0, 1, 2, 17, 63, 64, 100, 128, 190, 260]
    s_q, s_kv = sorted(rng.choices(lengths, k=2))
    dims = [rng.choice([1, 7, 16, 33, 64]) for _ in range(3)]
    case = Case(rng.choice([1, 2]), rng.choice([1, 3]), s_q, s_kv, *dims)
    mode, dtype, causal = rng.choice(list(MODES)), rng.choice(FLOATING), rng.random() < 0.5
    scale = rng.choice([None, 0.1, -0.2, 0.0])
    print(seed, case, mode, dtype, causal, scale)
    inputs = draw(case, MODES[mode], dtype)
    if rng.random() < 0.5:  # [batch, rows, heads, d] in memory, with gaps between rows
        inputs = {
            name: t
            if t.dim() == 2
            else torch.cat([t, t], -1).detach().transpose(1, 2).contiguous().transpose(1, 2)[..., : t.shape[-1]]
            for name, t in inputs.items()
        }
        inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    check_against_truth(inputs, MODES[mode], causal, scale)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_both_modes_agree(causal: bool) -> None:
    """Keys and values projected here or beforehand give the same result."""
    inputs = draw(Case(2, 2, 70, 130, 32, 24, 16), MODES["fly"], torch.float32)
    Q, K, V, WK, WV = inputs.values()
    out, lse = run(inputs, MODES["fly"], causal)
    cached = {"Q": Q, "K": K @ WK, "V": V @ WV, "WK": WK, "WV": WV}
    out_cached, lse_cached = run(cached, MODES["cache"], causal)
    torch.testing.assert_close(out_cached, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_cached, lse, rtol=1e-5, atol=1e-5)
    # A latent Q has lost its width: the scale must be given. The latent output, projected afterwards, is O.
    latent = {"Q": Q @ WK, "K": cached["K"], "V": cached["V"]}
    out_latent, _ = run(latent, MODES["cache-all-latent"], causal, scale=32**-0.5)
    torch.testing.assert_close(out_latent @ WV.T, out, rtol=1e-5, atol=1e-5)


def test_causal_decoding_equals_the_whole_sequence() -> None:
    inputs = draw(Case(1, 2, 90, 90, 16, 16, 8), MODES["cache"], torch.float32)
    whole, _ = run(inputs, MODES["cache"], True)
    for step in (0, 1, 40, 89):
        seen = {name: t if t.dim() == 2 else t[:, :, : step + 1] for name, t in inputs.items()}
        seen["Q"] = inputs["Q"][:, :, step : step + 1]
        one, _ = run(seen, MODES["cache"], True)
        torch.testing.assert_close(one, whole[:, :, step : step + 1], rtol=1e-5, atol=1e-6)


def test_what_a_query_does_not_see_never_counts() -> None:
    at, offset = 40, 30
    inputs = draw(Case(1, 2, 120, 150, 16, 16, 8), MODES["fly"], torch.float32)
    dout = torch.randn(1, 2, 120, 16)
    dout[:, :, at:] = 0  # later queries do see the poisoned key: their gradients are NaN, and not looked at

    def results() -> tuple[Tensor, Tensor]:
        out, _ = run(inputs, MODES["fly"], True)
        return out, torch.autograd.grad(out, inputs["Q"], dout)[0]

    out, dq = results()
    with torch.no_grad():
        inputs["K"][:, :, at + offset] = float("nan")
        inputs["V"][:, :, at + offset] = float("nan")
    poisoned, poisoned_dq = results()
    assert torch.equal(poisoned[:, :, :at], out[:, :, :at])
    assert torch.equal(poisoned_dq[:, :, :at], dq[:, :, :at])
    assert poisoned[:, :, at:].isnan().all()


def test_no_keys() -> None:
    inputs = draw(Case(1, 2, 3, 0, 4, 4, 4), MODES["fly"], torch.float32)
    out, lse = run(inputs, MODES["fly"], False)
    assert torch.equal(out, torch.zeros(1, 2, 3, 4))
    assert (lse == -torch.inf).all()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), list(inputs.values())))


def test_expanded_gradients_and_adjacent_copies() -> None:
    inputs = draw(Case(2, 2, 9, 9, 8, 8, 4), MODES["fly"], torch.float32)
    out, lse = run(inputs, MODES["fly"], True)
    expected = torch.autograd.grad((out, lse), list(inputs.values()), (torch.ones_like(out), torch.ones_like(lse)))
    turned = {n: t.detach().mT.contiguous().mT.requires_grad_() for n, t in inputs.items()}
    out, lse = run(turned, MODES["fly"], True)
    for a, b in zip(torch.autograd.grad(out.sum() + lse.sum(), list(turned.values())), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["fly", "cache"])
@pytest.mark.parametrize("heads", [1, 9])
def test_same_bits_for_any_number_of_threads_and_on_reruns(heads: int, mode: str) -> None:
    inputs = draw(Case(1, heads, 200, 200, 32, 32, 16), MODES[mode], torch.float32)

    def results(threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out, lse = run(inputs, MODES[mode], True)
            return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), list(inputs.values()))
        finally:
            torch.set_num_threads(before)

    first = results(1)
    for threads in (1, 2, 2, 3):
        for a, b in zip(first, results(threads), strict=True):
            assert torch.equal(a, b)


def test_latent_output_of_the_operator_is_differentiable_beside_out() -> None:
    """torch.ops.dsm.flash_dmla gives both outputs; their gradients add up."""
    inputs = draw(Case(1, 2, 4, 5, 3, 3, 2), MODES["fly"], torch.float64)

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.dsm.flash_dmla(*tensors, 0.5, True, False, True)

    assert torch.autograd.gradcheck(f, list(inputs.values()))


def test_bad_arguments_are_refused() -> None:
    x, w = torch.zeros(2, 3, 4, 8), torch.zeros(8, 2)
    latent = torch.zeros(2, 3, 4, 2)
    with pytest.raises(ValueError, match=r"Q, K and V must be \[B, H, T, D\]"):
        dsm.flash_dmla_fwd(x[0], x, x, w, w)
    with pytest.raises(ValueError, match="WK and WV must be given unless"):
        dsm.flash_dmla_fwd(x, x, x)
    with pytest.raises(ValueError, match="WV must be given unless"):
        dsm.flash_dmla_fwd(x, x, x, w)
    with pytest.raises(ValueError, match="d_lat must be 2 as in the tensors, got 3"):
        dsm.flash_dmla_fwd(x, x, x, w, w, d_lat=3)
    with pytest.raises(ValueError, match="d_lat must be 2"):
        dsm.flash_dmla_fwd(latent, latent, latent, d_lat=8, cache_is_latent=True)
    with pytest.raises(ValueError, match="s_q must be at most s_kv = 3 when causal, got 4"):
        dsm.flash_dmla_fwd(x, x[:, :, :3], x[:, :, :3], w, w, causal=True)
    with pytest.raises(ValueError, match=r"k must be \[batch, heads, s_kv, d_qk\] = \[2, 3, any, 8\]"):
        dsm.flash_dmla_fwd(x, x[:, :2], x[:, :2], w, w)
    with pytest.raises(ValueError, match="v must be"):
        dsm.flash_dmla_fwd(x, x, x[:, :, :3], w, w)
    with pytest.raises(ValueError, match=r"k must be \[batch, heads, s_kv, d_latent\]"):
        dsm.flash_dmla_fwd(x, x, x, w, w, cache_is_latent=True)
    with pytest.raises(ValueError, match=r"wv must be \[d_v, d_latent\] = \[8, 2\]"):
        dsm.flash_dmla_fwd(x, x, x, w, torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"wk must be \[d_qk, d_latent\]"):
        dsm.flash_dmla_fwd(x, x, x, torch.zeros(7, 2), w)
    with pytest.raises(ValueError, match=r"wk must be .* got .* float16"):
        dsm.flash_dmla_fwd(x, x, x, w.half(), w)
    with pytest.raises(ValueError, match=r"q must be .* got .* int64"):
        dsm.flash_dmla_fwd(x.long(), x.long(), x.long(), w, w)
    with pytest.raises(ValueError, match="softmax_scale must be finite"):
        dsm.flash_dmla_fwd(x, x, x, w, w, softmax_scale=float("inf"))
    with pytest.raises(ValueError, match="wv must be given for an output projection"):
        torch.ops.dsm.flash_dmla(latent, latent, latent, None, None, 1.0, False, True, True)


def test_second_derivative_is_refused() -> None:
    inputs = draw(Case(1, 1, 3, 3, 4, 4, 2), MODES["fly"], torch.float32)
    out, _ = run(inputs, MODES["fly"], True)
    (grad,) = torch.autograd.grad(out.sum(), inputs["Q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", ["fly", "cache", "cache-all-latent"])
def test_opcheck(mode: str) -> None:
    inputs = draw(Case(1, 2, 4, 5, 6, 6, 3), MODES[mode], torch.float32)
    weights = inputs.get("WK"), inputs.get("WV")
    flags = MODES[mode].cache_is_latent, MODES[mode].wv
    torch.library.opcheck(
        torch.ops.dsm.flash_dmla.default, (inputs["Q"], inputs["K"], inputs["V"], *weights, 0.3, True, *flags)
    )


@pytest.mark.parametrize("mode", ["fly", "cache-all-latent"])
def test_compile_fullgraph(mode: str) -> None:
    inputs = draw(Case(1, 2, 4, 5, 6, 6, 3), MODES[mode], torch.float32)

    def f(inputs: Inputs) -> Tensor:
        out, lse = run(inputs, MODES[mode], True)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), f(inputs))
    leaves = list(inputs.values())
    for a, b in zip(torch.autograd.grad(compiled(inputs), leaves), torch.autograd.grad(f(inputs), leaves), strict=True):
        assert torch.equal(a, b)
