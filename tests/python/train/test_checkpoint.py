# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Checkpoint files: round trip, refusal of everything that is none, and that a failed write harms nothing."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_flashdmla_moe.train import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint


@pytest.fixture
def checkpoint() -> Checkpoint:
    tensors = {
        "model.a": torch.randn(3, 5),
        "model.b": torch.randn(4, 4).t(),  # not contiguous
        "model.half": torch.randn(7).bfloat16(),
        "model.empty": torch.zeros(0, 3),
        "optimizer.a.step": torch.tensor(3.0),
        "rng": torch.get_rng_state(),
    }
    return Checkpoint(tensors, {"step": 3, "text": "ümlaut", "nested": {"x": [1, 2.5, None]}})


@pytest.fixture
def file(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    return path


def test_round_trip(checkpoint: Checkpoint, file: Path) -> None:
    again = load_checkpoint(file)
    assert again.state == checkpoint.state
    assert again.tensors.keys() == checkpoint.tensors.keys()
    for name, value in checkpoint.tensors.items():
        assert again.tensors[name].dtype == value.dtype
        assert torch.equal(again.tensors[name], value)
    assert set(again.part("model")) == {"a", "b", "half", "empty"}
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_truncation_at_every_length_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in {
        0,
        1,
        7,
        8,
        9,
        header // 2,
        header - 1,
        header,
        header + 1,
        (header + len(whole)) // 2,
        len(whole) - 1,
    }:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(file)
        assert "\n" not in str(error.value)
    file.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError):
        load_checkpoint(file)


def test_flipped_bits_are_refused(checkpoint: Checkpoint, file: Path) -> None:
    whole = file.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            again = load_checkpoint(file)
        except CheckpointError:
            noticed += 1
        else:  # in the settings, which no checksum covers: they are checked when used
            assert all(torch.equal(again.tensors[name], checkpoint.tensors[name]) for name in again.tensors)
    assert noticed > 0.9 * len(range(0, len(whole), 7))


@pytest.mark.parametrize("size", [0, 10**6, 2**40, 2**63, 2**64 - 1])
def test_absurd_header_sizes_are_refused(file: Path, size: int) -> None:
    whole = file.read_bytes()
    file.write_bytes(struct.pack("<Q", size) + whole[8:])
    with pytest.raises(CheckpointError):
        load_checkpoint(file)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of dsm train"):
        load_checkpoint(path)
    path.write_text(json.dumps({"this": "is JSON"}))
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load_checkpoint(tmp_path)


WRITER = """
import resource, sys
from pathlib import Path
import torch
from ds_flashdmla_moe.train import Checkpoint, CheckpointError, save_checkpoint
limit = 100_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_checkpoint(Path(sys.argv[1]), Checkpoint({"model.big": torch.zeros(1_000_000)}, {}))
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


def test_failed_write_keeps_the_old_file_and_leaves_nothing(file: Path) -> None:
    """A file size limit fails a write halfway, as a full disk does."""
    before = file.read_bytes()
    assert hasattr(resource, "RLIMIT_FSIZE")
    done = subprocess.run([sys.executable, "-c", WRITER, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith(f"cannot write checkpoint {file}: ")
    assert done.stdout.count("\n") == 1
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_unwritable_place_is_one_sentence(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*(File exists|Not a directory)"):
        save_checkpoint(tmp_path / "file" / "checkpoint.safetensors", checkpoint)
