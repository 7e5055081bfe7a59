# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Every operator with a CUDA implementation, on the shared cases and on awkward sizes of them."""

from __future__ import annotations

import pytest
import torch
from calls import forced, same_bits
from hostile import CUDA
from torch import Tensor

import ds_flashdmla_moe as dsm
from ds_flashdmla_moe import _library
from ds_flashdmla_moe.cases import CASES, Case, Trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# Besides the cases' own sizes: one element, odd ones, rows that a block cannot hold in registers, none at all.
SIZES: dict[str, list[dict[str, int]]] = {
    "rms_norm": [
        {"rows": rows, "hidden": hidden}
        for rows, hidden in [
            (1, 2), (3, 7), (1000, 8), (65, 130), (33, 2048), (17, 7168), (3, 40000), (2, 70001), (0, 64),
        ]
    ],
    "rope": [
        {"tokens": tokens, "heads": heads, "d": d, "d_rope": d_rope}
        for tokens, heads, d, d_rope in [
            (1, 1, 2, 2), (5, 3, 7, 6), (3, 128, 64, 64), (4, 64, 512, 64), (1000, 1, 64, 64), (2, 2, 9000, 9000),
            (3, 5, 24, 8), (4, 2, 16, 0), (0, 2, 8, 8),
        ]
    ],
    "swiglu": [
        {"rows": rows, "intermediate": intermediate}
        for rows, intermediate in [(1, 1), (3, 7), (33, 2048), (100000, 8), (2, 100003), (0, 8)]
    ],
    "moe_gate": [
        {"tokens": tokens, "experts": experts, "topk": topk}
        for tokens, experts, topk in [
            (1, 4, 1), (5, 4, 2), (100, 8, 2), (77, 64, 6), (3000, 256, 8), (40, 300, 7), (19, 1024, 32), (0, 8, 2),
        ]
    ],
    "merge_attention_states": [
        {"parts": parts, "batch": batch, "s_q": s_q, "h_q": h_q, "d_v": d_v}
        for parts, batch, s_q, h_q, d_v in [
            (2, 1, 1, 1, 1), (2, 3, 5, 7, 13), (9, 2, 2, 16, 512), (3, 2, 3, 4, 520),
            (2, 1, 1, 3, 2000), (2, 1, 0, 2, 8),
        ]
    ],
    "mla_decode": [
        dict(zip(("batch", "s_q", "s_kv", "h_q", "h_kv", "d_qk", "d_v", "page_size"), sizes, strict=True))
        for sizes in [
            (1, 1, 1, 1, 1, 1, 1, 1), (2, 1, 300, 16, 1, 576, 512, 64), (2, 2, 333, 16, 1, 576, 512, 64),
            (3, 1, 1000, 128, 1, 576, 512, 64), (2, 3, 77, 5, 1, 40, 40, 7), (1, 2, 70, 2, 1, 700, 600, 16),
            (1, 1, 20000, 16, 1, 576, 512, 64), (2, 1, 129, 6, 3, 512, 512, 1),
        ]
    ],
    "sparse_mla_decode": [
        dict(zip(("batch", "s_q", "h_q", "topk", "d_qk", "d_v", "pages", "page_size"), sizes, strict=True))
        for sizes in [
            (1, 1, 16, 2048, 576, 512, 90, 64), (2, 2, 128, 100, 576, 512, 9, 64), (3, 1, 5, 40, 65, 64, 5, 7),
            (2, 1, 64, 700, 512, 512, 400, 2), (0, 1, 2, 3, 8, 8, 2, 4),
        ]
    ],
    "sparse_mla_prefill": [
        dict(zip(("s_q", "s_kv", "h_q", "h_kv", "d_qk", "d_v", "topk"), sizes, strict=True))
        for sizes in [
            (1, 3, 1, 1, 1, 1, 1), (40, 300, 128, 1, 576, 512, 200), (9, 500, 16, 1, 512, 512, 333),
            (3, 5000, 16, 1, 576, 512, 3000), (7, 60, 6, 3, 33, 20, 40),
        ]
    ],
    # More than 512 tokens take another way to the last of several with the same slot.
    **{
        operator: [
            {"tokens": tokens, "pages": pages, "page_size": page_size}
            for tokens, pages, page_size in [(1, 1, 1), (7, 3, 5), (2049, 40, 64), (0, 2, 4)]
        ]
        for operator in ("kv_gather", "mla_kv_insert", "v4_kv_insert")
    },
    "indexer_k_insert": [
        {"tokens": tokens, "pages": pages, "page_size": page_size, "d": d}
        for tokens, pages, page_size, d in [
            (1, 1, 1, 1), (7, 3, 5, 33), (99, 4, 32, 128), (9, 2, 8, 700), (2049, 40, 64, 128), (0, 2, 4, 8),
        ]
    ],
}  # fmt: skip

CUDA_ROWS = {
    entry["name"]: [row["name"] for row in entry["implementations"] if row["built"] and row["name"] != "cpu"]
    for entry in _library.operators()
}
ON_CUDA = {operator for operator, rows in CUDA_ROWS.items() if "cuda" in rows}
GPU_CASES = [case for case in CASES if ON_CUDA.issuperset(case.operators)]


def every(cases: list[Case], extra: bool) -> list[object]:
    """(case, sizes, dtype) for all cases and dtypes; of the extra sizes those that have all of the case's names."""
    return [
        pytest.param(
            case, sizes, dtype, id=f"{case.operator}-{case.label}-{'x'.join(map(str, sizes.values()))}-{dtype}"
        )
        for case in cases
        for sizes in [dict(case.sizes), *(SIZES[case.operator] if extra else [])]
        if sizes.keys() >= case.sizes.keys()
        for dtype in case.dtypes
    ]


def is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def benchmark_sizes(case: Case) -> dict[str, int]:
    """The case's smallest size for measuring, or its own: large enough for many blocks."""
    return dict(case.benchmark.get("cuda", (case.sizes,))[0])


def forward_and_backward(trial: Trial) -> tuple[Tensor, ...]:
    """The results, as copies: of some operators they are arguments, which later calls change."""
    backward = trial.backward() if trial.case.gradients else ()
    return tuple(result.clone() for result in (*trial.forward(), *backward))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("case", "sizes", "dtype"), every(GPU_CASES, extra=True))
def test_matches_float64(case: Case, sizes: dict[str, int], dtype: torch.dtype) -> None:
    trial = Trial(case, dtype, CUDA, sizes)
    with dsm.explain() as choices:
        errors = {"forward": trial.forward_deviation()}
        if case.gradients:
            errors["backward"] = trial.backward_deviation()
    if trial.forward()[0].numel() and sizes.get("tokens") != 0:
        assert {choice.implementation for choice in choices} <= {"sm90", "cuda"}
    for way, error in errors.items():
        print(f"{case.operator} {way}: {error.ratio:.3f} of the allowed error")
        assert error.ratio <= 1, f"{way}: {error.ratio:.3g} times the allowed error"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("case", "sizes", "dtype"), every([case for case in GPU_CASES if len(CUDA_ROWS[case.operator]) > 1], extra=True)
)
def test_every_row_that_takes_it_matches_float64(case: Case, sizes: dict[str, int], dtype: torch.dtype) -> None:
    trial = Trial(case, dtype, CUDA, sizes)
    truth = trial.truth()
    taken = []
    for row in CUDA_ROWS[case.operator]:
        with forced(case.operator, row):
            try:
                error = trial.forward_deviation(truth)
            except ValueError as refusal:
                if "another implementation is forced" not in str(refusal):
                    raise
                continue
        print(f"{case.operator} {row}: {error.ratio:.3f} of the allowed error")
        assert error.ratio <= 1, f"{row}: {error.ratio:.3g} times the allowed error"
        taken.append(row)
    assert taken


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("case", "sizes", "dtype"), every(GPU_CASES, extra=False))
def test_ten_runs_give_the_same_bits(case: Case, sizes: dict[str, int], dtype: torch.dtype) -> None:
    first = forward_and_backward(Trial(case, dtype, CUDA, benchmark_sizes(case)))
    again = Trial(case, dtype, CUDA, benchmark_sizes(case))
    assert all(same_bits(first, forward_and_backward(again)) for _ in range(9))


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.operator}-{case.label}")
def test_side_stream_beside_a_busy_one(case: Case) -> None:
    trial = Trial(case, torch.float32, CUDA, benchmark_sizes(case))
    source = {name: value.detach().clone() for name, value in trial.inputs.items() if isinstance(value, Tensor)}
    expected = forward_and_backward(trial)
    busy, side = torch.cuda.Stream(), torch.cuda.Stream()
    noise = torch.randn(4096, 4096, device=CUDA)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        for _ in range(20):
            noise = (noise @ noise).clamp(-1, 1)
    with torch.cuda.stream(side), torch.no_grad():
        # The inputs arrive late on this stream; a kernel on another one would read zeros.
        for name in source:
            trial.inputs[name].zero_()
        torch.cuda._sleep(20_000_000)
        for name, value in source.items():
            trial.inputs[name].copy_(value)
        forward = trial.forward()
    with torch.cuda.stream(side):
        backward = trial.of(case.run).backward() if case.gradients else ()
    side.synchronize()
    assert same_bits(expected, (*forward, *backward))
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.operator}-{case.label}")
def test_graph_replays_with_changed_inputs(case: Case) -> None:
    sizes = benchmark_sizes(case)
    trial = Trial(case, torch.float32, CUDA, sizes)
    names = case.gradients or [name for name, value in trial.inputs.items() if is_floating(value)]
    arguments = [trial.inputs[name] for name in names]

    def run() -> tuple[Tensor, ...]:
        outputs = case.run(**trial.inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results = [output.detach().clone() for output in outputs]  # an argument, of some operators
        if case.gradients:
            wanted = [output for output in outputs if output.requires_grad]
            results += torch.autograd.grad(wanted, arguments, [torch.ones_like(output) for output in wanted])
        return tuple(results)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    generator = torch.Generator(CUDA).manual_seed(7)
    for _ in range(3):
        with torch.no_grad():
            for argument in arguments:
                argument.copy_(torch.randn(argument.shape, generator=generator, device=CUDA))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(run(), captured)


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.operator}-{case.label}")
def test_compile_fullgraph(case: Case) -> None:
    torch.compiler.reset()  # the cases share one code object, whose recompilations are limited
    compiled = torch.compile(lambda inputs: case.run(**inputs), fullgraph=True, backend="aot_eager")
    outputs = compiled(Trial(case, torch.float32, CUDA).inputs)
    expected = Trial(case, torch.float32, CUDA).forward()
    assert same_bits(expected, tuple(o.detach() for o in (outputs if isinstance(outputs, tuple) else (outputs,))))


@pytest.mark.parametrize(
    "case", [case for case in CASES if not CUDA_ROWS[case.operator]], ids=lambda case: f"{case.operator}-{case.label}"
)
def test_an_operator_without_a_row_says_so(case: Case) -> None:
    with pytest.raises(ValueError, match="cpu: takes CPU tensors") as error:
        Trial(case, case.dtypes[0], CUDA).forward()
    assert not CUDA_ROWS[str(error.value).split(":")[0]]
