# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The modules against their formulas in float64, and one model code on two operator sets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_flashdmla_moe import reference
from ds_flashdmla_moe.config import LanguageModelConfig
from ds_flashdmla_moe.nn import DMLAAttention, LanguageModel, MoE, RMSNorm


@pytest.fixture
def config() -> LanguageModelConfig:
    return LanguageModelConfig(
        layers=2,
        hidden=24,
        heads=3,
        head_dim=8,
        d_lat=5,
        experts=6,
        intermediate=10,
        shared_intermediate=12,
        context=32,
    )


def attention_truth(m: DMLAAttention, x: Tensor) -> Tensor:
    """Head by head and query by query, with rotations as complex numbers."""
    batch, tokens, _ = x.shape
    q, k, v = F.linear(x, m.qkv.weight).view(batch, tokens, 3, m.heads, m.head_dim).unbind(2)
    angle = torch.arange(tokens)[:, None] * m.inv_freq
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[None, :, None]
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
    out = torch.zeros_like(v)
    for b in range(batch):
        for h in range(m.heads):
            for i in range(tokens):
                scores = (k[b, : i + 1, h] @ m.wk) @ (q[b, i, h] @ m.wk) * m.head_dim**-0.5
                out[b, i, h] = (scores.softmax(0) @ (v[b, : i + 1, h] @ m.wv)) @ m.wv.T
    return F.linear(out.flatten(2), m.out.weight)


def test_attention_is_its_formula() -> None:
    m = DMLAAttention(16, 2, 8, 5).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    error = (m(x) - attention_truth(m, x)).abs().max()
    print(f"DMLAAttention: {error:.1e}")
    assert error < 1e-7  # the angles are float32 in both


def test_attention_decodes_what_it_attends() -> None:
    m = DMLAAttention(16, 2, 8, 5).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    cache = m.make_cache(2, 11)
    parts = [m.decode(part, cache) for part in x.split([4, 1, 1, 5], dim=1)]
    assert cache.k.shape == cache.v.shape == (2, 2, 11, 5)
    assert (torch.cat(parts, dim=1) - m(x)).abs().max() < 1e-12


def moe_truth(m: MoE, x: Tensor) -> Tensor:
    """Token by token: softmax over all experts, the topk largest scores + bias, weights renormalised."""

    def ffn(token: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        gate, up = (w13 @ token).chunk(2)
        return w2 @ (F.silu(gate) * up)

    y = torch.zeros_like(x)
    for t, token in enumerate(x):
        scores = (m.gate @ token).softmax(0)
        chosen = (scores + m.gate_bias).argsort(descending=True)[: m.topk]
        for e in chosen:
            y[t] += scores[e] / scores[chosen].sum() * ffn(token, m.w13[e], m.w2[e])
        if m.shared_w13 is not None and m.shared_w2 is not None:
            y[t] += ffn(token, m.shared_w13, m.shared_w2)
    return y


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shared", [0, 6])
def test_moe_is_its_formula(fused: bool, shared: int) -> None:
    m = MoE(16, 8, 6, 2, shared_intermediate=shared, fused=fused).double()
    m.gate_bias = torch.tensor([0.0, 0.3, 0.0, -0.2, 0.1, 0.0])
    x = torch.randn(23, 16, dtype=torch.float64)
    truth = moe_truth(m, x)
    error = (m(x) - truth).abs().max() / truth.abs().max()
    print(f"MoE fused={fused}: {error:.1e}")
    assert error < 1e-12
    assert (m(x.view(1, 23, 16)) - m(x)).abs().max() == 0


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_routing_counts_and_balance(scoring: str) -> None:
    m = MoE(16, 8, 6, 2, scoring=scoring)  # type: ignore[arg-type]
    x = torch.randn(3, 50, 16)
    load, loss = m.routing(x)
    assert load.sum() == 300
    assert load.min() >= 0
    assert 1.0 <= loss.item() <= 6.0 / 2
    loss.backward()
    assert m.gate.grad is not None
    assert m.gate.grad.abs().max() > 0
    with torch.no_grad():
        m.gate[:] = 0.0  # all scores equal
    assert m.routing(x).balance_loss.item() == pytest.approx(1.0)


def test_bias_evens_out_the_load() -> None:
    m = MoE(16, 8, 6, 2)
    with torch.no_grad():
        m.gate[0] += 0.5
    x = torch.randn(400, 16) + 0.3
    before = m.routing(x).load
    for _ in range(300):
        m.update_bias(m.routing(x).load, 3e-3)
    after = m.routing(x).load
    print(f"expert load {before.tolist()} -> {after.tolist()}")
    assert before.max() > 2 * after.max() or before.min() * 2 < after.min()
    assert after.max() < 1.3 * 800 / 6


def test_dtype_changes_leave_buffers_alone() -> None:
    m = LanguageModel(LanguageModelConfig(layers=1)).to(torch.bfloat16)
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in m.buffers()} == {torch.float32}
    assert torch.equal(m.blocks[0].attention.inv_freq, DMLAAttention(128, 4, 32, 32).inv_freq)
    logits = m(torch.randint(256, (1, 20)))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_norm_is_its_formula() -> None:
    m = RMSNorm(16, eps=1e-3).double()
    torch.nn.init.uniform_(m.weight)
    x = torch.randn(7, 16, dtype=torch.float64)
    truth = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * m.weight
    assert (m(x) - truth).abs().max() < 1e-14


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("capacity", [None, 0.7])
def test_both_operator_sets_give_one_model(
    config: LanguageModelConfig, scoring: str, tied: bool, capacity: float | None
) -> None:
    """Loss and every gradient, in float64."""
    config = LanguageModelConfig(**{**vars(config), "scoring": scoring, "tied_head": tied, "capacity": capacity})
    models = [LanguageModel(config).double(), LanguageModel(config, ops=reference).double()]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(256, (2, 33))
    for model in models:
        parts = model.loss(tokens[:, :-1], tokens[:, 1:])
        (parts.cross_entropy + 0.1 * parts.balance_loss).backward()
    worst = 0.0
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        worst = max(worst, float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()))
    print(f"worst gradient difference: {worst:.1e}")
    assert worst < 1e-9


def test_reference_varieties_agree_with_the_library() -> None:
    """What the model does not use of the reference: lse, latent output, groups, hash routing, limits."""
    import ds_flashdmla_moe as dsm

    double = torch.float64
    q, k, v = (torch.randn(2, 3, n, 8, dtype=double) for n in (5, 9, 9))
    wk, wv = torch.randn(8, 4, dtype=double), torch.randn(8, 4, dtype=double)
    for options in ({}, {"causal": True}, {"causal": True, "return_latent": True, "softmax_scale": 0.2}):
        for mine, theirs in zip(
            dsm.flash_dmla_fwd(q, k, v, wk, wv, return_lse=True, **options),
            reference.flash_dmla_fwd(q, k, v, wk, wv, return_lse=True, **options),
            strict=True,
        ):
            assert torch.allclose(mine, theirs, atol=1e-12)
    ours = dsm.flash_dmla_fwd(q, k @ wk, v @ wv, wk, wv, causal=True, cache_is_latent=True)
    assert torch.allclose(
        ours, reference.flash_dmla_fwd(q, k @ wk, v @ wv, wk, wv, causal=True, cache_is_latent=True), atol=1e-12
    )
    for interleaved in (True, False):
        for inverse in (True, False):
            x, frequencies = torch.randn(2, 5, 3, 10, dtype=double), torch.tensor([1.0, 0.1, 0.01])
            arguments = (x, torch.arange(5), frequencies, interleaved, inverse)
            assert torch.allclose(dsm.ops.rope(*arguments), reference.rope(*arguments), atol=1e-6)
    weights = dsm.MoEWeights(*(torch.randn(shape, dtype=double) for shape in ((8, 6), (8, 10, 6), (8, 6, 5))))
    x, ids = torch.randn(31, 6, dtype=double), torch.randint(7, (31,))
    for options in (
        {"n_group": 4, "topk_group": 2, "scoring": "sigmoid", "routed_scaling_factor": 2.5},
        {"token_ids": ids, "tid2eid": torch.stack([torch.randperm(8)[:3] for _ in range(7)])},
        {"capacity": 0.5, "renormalize_after_drop": True, "swiglu_limit": 0.5},
        {"scoring": "sqrtsoftplus", "renormalize": False},
    ):
        mine = dsm.moe_megakernel_fwd(x, weights, topk=3, **options)
        theirs = reference.moe_megakernel_fwd(x, weights, topk=3, **options)
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9), options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"topk": 9}, "topk must be at most experts = 8, got 9"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"capacity": 0.0}, "capacity must be at least"),
        ({"capacity": float("nan")}, "capacity must be at least"),
        ({"scoring": "argmax"}, "scoring must be one of softmax, sigmoid, sqrtsoftplus, got 'argmax'"),
        ({"hidden": "128"}, "hidden must be of type int, got '128'"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**wrong)  # type: ignore[arg-type]
