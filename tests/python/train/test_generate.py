# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Generation: the latent cache against full recomputation, and the sampling rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ds_flashdmla_moe.config import LanguageModelConfig, TrainSettings
from ds_flashdmla_moe.nn import LanguageModel
from ds_flashdmla_moe.sampling import sample
from ds_flashdmla_moe.train import Corpus, Trainer, generate


@pytest.fixture(scope="module")
def model(config: LanguageModelConfig, settings: TrainSettings, corpus: Corpus) -> LanguageModel:
    """Trained until the likeliest byte is not always the last one again."""
    trainer = Trainer(config, replace(settings, steps=200), corpus)
    for _ in range(200):
        trainer.train_step()
    return trainer.model


@pytest.mark.parametrize("prompt", [b"", b"t", b"the quick", b"the quick brown fox jumps over"])
def test_cache_gives_the_same_bytes_as_recomputation(model: LanguageModel, prompt: bytes) -> None:
    """60 bytes pass the context of 16 several times; the last prompt is longer than the context by itself."""
    cached = bytes(generate(model, prompt, 60))
    assert cached == bytes(generate(model, prompt, 60, cached=False))
    assert len(set(cached)) > 3, cached


def test_cached_logits_equal_whole_sequence_logits(model: LanguageModel) -> None:
    tokens = torch.randint(256, (3, model.config.context))
    whole = model(tokens)
    for pieces in ([1] * model.config.context, [5, 1, 7, 3], [16]):
        caches = model.make_cache(batch=3)
        parts = [model(part, caches) for part in tokens.split(pieces, dim=1)]
        error = (torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max()
        print(f"latent cache in pieces of {pieces}: {error:.1e} relative to the largest logit")
        assert error < 1e-5


def test_overfull_cache_is_refused(model: LanguageModel) -> None:
    caches = model.make_cache()
    model(torch.zeros(1, 16, dtype=torch.int64), caches)
    with pytest.raises(ValueError, match="capacity is 16 tokens, got 17"):
        model(torch.zeros(1, 1, dtype=torch.int64), caches)


def test_seed_decides_the_text(model: LanguageModel) -> None:
    texts = [bytes(generate(model, b"the", 40, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_follows_the_distribution() -> None:
    logits = torch.full((256,), -torch.inf)
    logits[:3] = torch.tensor([0.5, 0.3, 0.2]).log()
    random = torch.Generator().manual_seed(0)
    counts = Counter(sample(logits, 1.0, 1.0, random) for _ in range(4000))
    assert set(counts) == {0, 1, 2}
    for byte, p in enumerate((0.5, 0.3, 0.2)):
        assert abs(counts[byte] / 4000 - p) < 5 * (p * (1 - p) / 4000) ** 0.5
    assert {sample(logits, 1.0, 0.5, random) for _ in range(200)} == {0}
    assert {sample(logits, 1.0, 0.51, random) for _ in range(200)} == {0, 1}
    assert {sample(logits, 1.0, 1e-9, random) for _ in range(50)} == {0}
    assert {sample(logits, 0.0, 1.0, random) for _ in range(5)} == {0}


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_options_are_refused(model: LanguageModel, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="generate: "):
        next(generate(model, b"x", 1, **wrong))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_bytes"):
        next(generate(model, b"x", -1))
