# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ds_flashdmla_moe.config import LanguageModelConfig, TrainSettings
from ds_flashdmla_moe.train import Corpus, load_corpus


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose by threads, much so when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config() -> LanguageModelConfig:
    return LanguageModelConfig(
        layers=2, hidden=16, heads=2, head_dim=8, d_lat=6, experts=4, intermediate=8, shared_intermediate=8, context=16
    )


@pytest.fixture(scope="session")
def settings() -> TrainSettings:
    return TrainSettings(steps=8, batch=2, learning_rate=1e-2, eval_every=4, eval_bytes=64)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    text = tmp_path_factory.mktemp("corpus") / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog, and the dog is not amused.\n" * 40)
    return load_corpus([text])
