# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The n-gram yardstick against a dictionary-based evaluation of its formula."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
import torch

from ds_flashdmla_moe.train import ngram_bits_per_byte


def as_tensor(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def witten_bell(train: bytes, text: bytes, order: int) -> float:
    """Exact probabilities by recursion over ever shorter histories."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for n in range(1, order + 1):
        for i in range(len(train) - n + 1):
            counts[train[i : i + n - 1]][train[i + n - 1]] += 1

    def probability(history: bytes, byte: int) -> Fraction:
        shorter = probability(history[1:], byte) if history else Fraction(1, 256)
        seen = counts.get(history)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    bits = [-math.log2(probability(text[max(0, i - order + 1) : i], text[i])) for i in range(1, len(text))]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("text", [b"abracadabra", b"zebra \xff\x00 abra", b"ab"])
def test_equals_the_formula(order: int, text: bytes) -> None:
    train = b"abracadabra, a zebra and another zebra"
    got = ngram_bits_per_byte(as_tensor(train), as_tensor(text), order)
    assert got == pytest.approx(witten_bell(train, text, order), abs=1e-12)


def test_probabilities_sum_to_one() -> None:
    train = as_tensor(b"banana bandana")
    total = sum(
        2.0 ** (-2 * ngram_bits_per_byte(train, torch.tensor([97, 110, byte]), 2))
        / 2.0 ** -ngram_bits_per_byte(train, torch.tensor([97, 110]), 2)
        for byte in range(256)
    )
    assert total == pytest.approx(1.0, abs=1e-9)
