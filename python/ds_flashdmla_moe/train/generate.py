# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Text from a trained model, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..nn.language_model import LanguageModel
from ..sampling import check_sampling, sample

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: bytes,
    max_new_bytes: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cached: bool = True,
) -> Iterator[int]:
    """Yield up to ``max_new_bytes`` bytes that continue ``prompt`` (an empty one counts as a line end).

    The model sees the last bytes within its context: when that is full, the older half is dropped and the rest read
    again. ``cached`` keeps latent keys and values between bytes; without it every byte recomputes the whole window,
    which gives the same bytes at temperature 0 (and is there to show that).
    """
    if max_new_bytes < 0:
        raise ValueError(f"generate: max_new_bytes must be at least 0, got {max_new_bytes}")
    check_sampling(temperature, top_p)
    random = torch.Generator().manual_seed(seed)
    context = model.config.context
    window = list(prompt or b"\n")[-context:]
    caches, unread = None, window
    for _ in range(max_new_bytes):
        if len(window) > context:
            window = window[-(context // 2) :]
            caches = None
        if cached and caches is None:
            caches, unread = model.make_cache(), window
        logits = model(torch.tensor([unread if cached else window]), caches)[0, -1]
        byte = sample(logits, temperature, top_p, random)
        window = [*window, byte]
        unread = [byte]
        yield byte
