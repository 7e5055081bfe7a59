# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ds_flashdmla_moe as dsm


@pytest.fixture
def unforced() -> Iterator[None]:
    yield
    torch.ops.dsm.force_implementation("rms_norm", "")


def test_records_calls_in_order_and_stops() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with dsm.explain() as choices:
        assert len(choices) == 0
        dsm.ops.rms_norm(x).sum().backward()
        assert [choice.operator for choice in choices] == ["rms_norm", "rms_norm_backward"]
    dsm.ops.swiglu(x)
    assert [choice.operator for choice in choices] == ["rms_norm", "rms_norm_backward"]
    assert choices[0].implementation == "cpu"
    assert choices.of("rms_norm_backward") == choices[1]
    assert choices.of("swiglu") is None
    assert str(choices).splitlines()[0].startswith("rms_norm: cpu")


def test_says_why_better_rows_refused() -> None:
    with dsm.explain() as choices:
        dsm.ops.rms_norm(torch.randn(3, 8))
    for name, reason in choices[0].rejections:
        assert name in ("cuda", "sm90")
        assert reason == "takes CUDA tensors"
        assert f"{name} takes CUDA tensors" in str(choices)


def test_nothing_called() -> None:
    with dsm.explain() as choices:
        pass
    assert str(choices) == "no operator was called"


def test_survives_an_exception_and_cannot_be_nested() -> None:
    with pytest.raises(RuntimeError, match="cannot be nested"), dsm.explain(), dsm.explain():
        pass
    with pytest.raises(ValueError, match="eps"), dsm.explain() as choices:
        dsm.ops.rms_norm(dsm.ops.rms_norm(torch.randn(3, 8)), eps=-1)
    assert len(choices) == 1
    with dsm.explain() as choices:
        dsm.ops.swiglu(torch.randn(3, 8))
    assert [choice.operator for choice in choices] == ["swiglu"]


def test_a_request_that_none_takes_is_recorded(unforced: None) -> None:
    rows = next(entry for entry in dsm._library.operators() if entry["name"] == "rms_norm")["implementations"]
    gpu = [row["name"] for row in rows if row["name"] != "cpu"]
    if not gpu:
        pytest.skip("rms_norm has no implementation that refuses CPU tensors")
    torch.ops.dsm.force_implementation("rms_norm", gpu[0])
    with pytest.raises(ValueError, match="another implementation is forced"), dsm.explain() as choices:
        dsm.ops.rms_norm(torch.randn(3, 8))
    assert choices[0].implementation == ""
    assert dict(choices[0].rejections)["cpu"] == "another implementation is forced"
