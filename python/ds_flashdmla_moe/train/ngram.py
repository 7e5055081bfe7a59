# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Byte n-gram models: the yardstick a trained model has to beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ngram_bits_per_byte"]


def _codes(text: Tensor, order: int) -> Tensor:
    """Every n-gram as one number, its last byte lowest: int64 [len(text) - order + 1]."""
    text = text.long()
    code = torch.zeros(text.numel() - order + 1, dtype=torch.int64)
    for k in range(order):
        code = (code << 8) | text[k : k + code.numel()]
    return code


def ngram_bits_per_byte(train: Tensor, text: Tensor, order: int) -> float:
    """Bits per byte of text[1:] under the n-gram model of ``order`` (2: bigram, 3: trigram) counted on ``train``.

    Orders are interpolated by Witten-Bell: ``p_n(c|h) = (count(h,c) + types(h)·p_{n-1}(c|h')) / (count(h) + types(h))``
    down to the uniform distribution, where types(h) is the number of different bytes seen after h
    (Witten and Bell 1991, IEEE Trans. IT 37(4)). It has no parameter to tune, and on source text it is slightly
    better than absolute discounting.
    """
    targets = text.numel() - 1
    p = torch.full((targets,), 1 / 256, dtype=torch.float64)
    for n in range(1, order + 1):
        counts = torch.bincount(_codes(train, n), minlength=256**n)
        table = counts.view(-1, 256)
        totals, types = table.sum(1), table.gt(0).sum(1)
        first = max(n - 2, 0)  # the first bytes of text have shorter histories only
        codes = _codes(text, n)[max(2 - n, 0) :]
        total, kinds = totals[codes >> 8], types[codes >> 8]
        mixed = (counts[codes] + kinds * p[first:]) / (total + kinds)
        p[first:] = torch.where(total > 0, mixed, p[first:])
    return -p.log2().mean().item() if targets else math.nan
