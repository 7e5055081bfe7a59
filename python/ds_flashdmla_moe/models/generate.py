# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Generation: prompts are read chunk by chunk, one after another; then every step adds a token to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sampling import check_sampling, sample
from .cache import PageOrder

if TYPE_CHECKING:
    from .language_model import LanguageModel

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: list[Tensor],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Sequence[int],
    callback: Callable[[int, int], None] | None,
    chunk: int,
    page_order: PageOrder = torch.arange,
) -> list[Tensor]:
    """See :meth:`LanguageModel.generate`; ``page_order`` hands out the cache's pages in another order."""
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    if chunk < 1:
        raise ValueError(f"generate: chunk must be at least 1, got {chunk}")
    check_sampling(temperature, top_p)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate: every prompt must have at least one token, got an empty one")
    if max_new_tokens == 0 or not prompts:
        return [prompt.clone() for prompt in prompts]
    device = prompts[0].device
    random = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    cache = model.make_cache([len(prompt) + max_new_tokens - 1 for prompt in prompts], chunk, page_order)

    def advance(requests: list[int], tokens: Tensor) -> Tensor:
        step = cache.extend(requests, tokens.shape[1])
        return model.logits(model.hidden(tokens, step)[:, -1])

    def choose(requests: list[int], logits: Tensor) -> list[int]:
        if temperature == 0.0:
            return logits.argmax(-1).tolist()
        rows = logits.cpu()
        return [sample(row, temperature, top_p, random[i]) for i, row in zip(requests, rows, strict=True)]

    new: list[list[int]] = [[] for _ in prompts]
    active: list[int] = []

    def take(requests: list[int], tokens: list[int]) -> None:
        for i, token in zip(requests, tokens, strict=True):
            new[i].append(token)
            if callback is not None:
                callback(i, token)
            if token not in stop and len(new[i]) < max_new_tokens:
                active.append(i)

    for i, prompt in enumerate(prompts):
        for start in range(0, len(prompt), chunk):
            logits = advance([i], prompt[None, start : start + chunk])
        take([i], choose([i], logits))
    while active:
        requests, active = active, []
        logits = advance(requests, torch.tensor([[new[i][-1]] for i in requests], device=device))
        take(requests, choose(requests, logits))
    filled = [tokens + tokens[-1:] * (max_new_tokens - len(tokens)) for tokens in new]
    return [torch.cat((p, torch.tensor(t, device=device))) for p, t in zip(prompts, filled, strict=True)]
