# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""DeepSeek-V3 against transformers: logits, tokens and gradients of several shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_folders import V3_SHAPES, v3

from ds_flashdmla_moe.models import load_model


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got - want).abs().max() / want.abs().max()).detach())


@pytest.mark.parametrize("shape", V3_SHAPES)
def test_logits_tokens_and_gradients(shape: str, tmp_path: Path) -> None:
    reference = v3(**V3_SHAPES[shape])
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    ids = torch.randint(0, model.config.vocab, (2, 33))
    want, got = reference(ids).logits, model(ids)
    assert got.dtype == torch.float32
    assert relative(got, want) < 1e-5
    everything = torch.ones_like(ids)  # or it would take some tokens for padding
    tokens = reference.generate(ids, attention_mask=everything, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, 8), tokens)

    names = {name for name, _ in reference.named_parameters()}
    assert {name for name, _ in model.train().named_parameters()} == names
    for logits in (want, got):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    for name, weight in reference.named_parameters():
        assert gradients[name] is not None, name
        assert torch.linalg.norm(gradients[name] - weight.grad) < 1e-4 * torch.linalg.norm(weight.grad), name


def test_bfloat16_is_as_near_to_float32_as_the_reference(tmp_path: Path) -> None:
    reference = v3(first_k_dense_replace=2, n_group=1, topk_group=1, num_experts_per_tok=8).bfloat16()
    reference.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 40))
    truth = load_model(tmp_path, dtype=torch.float32)(ids)
    model = load_model(tmp_path)
    assert model.lm_head.weight.dtype == torch.bfloat16
    ours, theirs = model(ids), reference(ids).logits.float()
    assert ours.dtype == torch.float32
    assert torch.linalg.norm(ours - truth) < 1.2 * torch.linalg.norm(theirs - truth)


def test_odd_lengths_and_empty_batches(tmp_path: Path) -> None:
    reference = v3()
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    one = torch.tensor([[5]])
    assert relative(model(one), reference(one).logits) < 1e-5
    assert model(one[:0]).shape == (0, 1, 97)
    assert model(one[:, :0]).shape == (1, 0, 97)


def test_double_precision_is_carried_through(tmp_path: Path) -> None:
    v3().save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (1, 20))
    single, double = load_model(tmp_path)(ids), load_model(tmp_path, dtype=torch.float64)(ids)
    assert double.dtype == torch.float64
    assert 0 < relative(single, double) < 1e-5


def test_bad_tokens(tmp_path: Path) -> None:
    v3().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    for ids in (torch.tensor([[97]]), torch.tensor([[-1]]), torch.tensor([1]), torch.tensor([[1]], dtype=torch.int32)):
        with pytest.raises(ValueError, match="input_ids must be"):
            model(ids)
        with pytest.raises(ValueError, match="input_ids must be"):
            model.generate(ids, 1)
