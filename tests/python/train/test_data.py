# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Which text is read, how it is split, and which bytes a step sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_flashdmla_moe.train import load_corpus
from ds_flashdmla_moe.train.data import training_batch


def write(folder: Path, **texts: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return folder


def many(folder: Path, count: int = 60) -> Path:
    return write(folder, **{f"file{i}": f"contents of file {i}\n".encode() for i in range(count)})


def files_of(text: torch.Tensor) -> set[str]:
    return set(bytes(text.tolist()).decode().splitlines())


def test_split_by_file_is_fixed_and_disjoint(tmp_path: Path) -> None:
    first = load_corpus([many(tmp_path / "a")])
    again = load_corpus([many(tmp_path / "elsewhere")])
    train, validation = files_of(first.train), files_of(first.validation)
    assert first.fingerprint == again.fingerprint
    assert not train & validation
    assert len(train | validation) == first.files == 60
    assert 1 <= len(validation) <= 15  # about one in ten


def test_another_file_moves_no_file_to_the_other_side(tmp_path: Path) -> None:
    before = load_corpus([many(tmp_path / "a", 60)])
    after = load_corpus([many(tmp_path / "b", 90)])
    assert files_of(before.train) < files_of(after.train)
    assert files_of(before.validation) <= files_of(after.validation)
    assert before.fingerprint != after.fingerprint


def test_single_file_gives_its_last_tenth(tmp_path: Path) -> None:
    write(tmp_path, one=bytes(range(1, 101)))
    corpus = load_corpus([tmp_path / "one"])
    assert corpus.train.tolist() == list(range(1, 91))
    assert corpus.validation.tolist() == list(range(91, 101))


def test_cap_is_kept(tmp_path: Path) -> None:
    corpus = load_corpus([many(tmp_path)], max_bytes=300)
    assert 250 < corpus.train.numel() + corpus.validation.numel() <= 300
    write(tmp_path / "big", one=b"x" * 1000)
    assert load_corpus([tmp_path / "big"], max_bytes=300).train.numel() == 270


def test_hidden_and_binary_files_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, text=b"a" * 100, binary=b"\0" * 100, **{".hidden": b"h" * 100})
    write(tmp_path / ".git", object=b"g" * 100)
    corpus = load_corpus([tmp_path])
    assert corpus.files == 1
    assert set(corpus.train.tolist()) == {ord("a")}


def test_standard_library_is_the_default() -> None:
    corpus = load_corpus(max_bytes=500_000)
    assert 400_000 < corpus.train.numel() + corpus.validation.numel() <= 500_000
    assert b"import" in bytes(corpus.train.tolist())
    assert corpus.fingerprint == load_corpus(max_bytes=500_000).fingerprint


@pytest.mark.parametrize("text", [b"", b"a", b"abc"])
def test_too_little_text_is_refused(tmp_path: Path, text: bytes) -> None:
    write(tmp_path, one=text)
    with pytest.raises(ValueError, match="too little text"):
        load_corpus([tmp_path / "one"])


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        load_corpus([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="too little text"):
        load_corpus([tmp_path])


def test_batch_depends_on_seed_and_step_alone() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    inputs, targets = training_batch(text, 8, 16, seed=3, step=5)
    torch.rand(7)  # the global generator has no part in it
    again, _ = training_batch(text, 8, 16, seed=3, step=5)
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs + 1, targets)  # windows are contiguous
    for seed, step in ((3, 6), (4, 5)):
        assert not torch.equal(inputs, training_batch(text, 8, 16, seed=seed, step=step)[0])


def test_batches_reach_both_ends_of_the_text() -> None:
    text = torch.arange(20, dtype=torch.uint8)
    windows = [training_batch(text, 64, 16, seed=0, step=step) for step in range(4)]
    assert min(int(inputs.min()) for inputs, _ in windows) == 0
    assert max(int(targets.max()) for _, targets in windows) == 19
    with pytest.raises(ValueError, match="longer than context = 20"):
        training_batch(text, 1, 20, seed=0, step=0)


def test_evaluation_span_is_whole_windows(tmp_path: Path) -> None:
    write(tmp_path, one=bytes([65]) * 5000)
    corpus = load_corpus([tmp_path / "one"])  # 500 bytes to validate
    assert corpus.evaluation_span(64, 10_000).numel() == 7 * 64 + 1
    assert corpus.evaluation_span(64, 130).numel() == 2 * 64 + 1
    assert corpus.evaluation_span(64, 1).numel() == 64 + 1  # at least one window
    assert corpus.evaluation_span(4096, 10_000).numel() == 500  # or all there is
