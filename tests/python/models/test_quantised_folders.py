# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Quantised folders in bfloat16: the model of the dequantised weights whose activations are rounded to FP8."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import change_config, read, v3, v4, write
from torch import Tensor, nn

from ds_flashdmla_moe import quant
from ds_flashdmla_moe.models import LanguageModel, load_model
from ds_flashdmla_moe.models.weights import rows_of, stacked
from ds_flashdmla_moe.moe import moe_megakernel_fwd

BLOCK = (16, 32)
IDS = torch.arange(40)[None] * 7 % 97


def quantise(folder: Path, plain: Path, fp8: str, fp4: str, scale: str) -> None:
    """Matrices whose names match become codes; in ``plain`` they are the numbers these stand for."""
    quantised, dequantised = {}, {}
    for name, value in read(folder).items():
        quantised[name] = dequantised[name] = value
        scale_name = name.removesuffix("weight") + scale
        if re.search(fp8, name):
            q8 = quant.fp8_block_quantize(value, BLOCK, "ue8m0")
            quantised[name], quantised[scale_name], dequantised[name] = q8.data, q8.scales, q8.dequantize()
        elif fp4 and re.search(fp4, name):
            q4 = quant.mxfp4_quantize(value)
            quantised[name], quantised[scale_name] = q4.packed.view(torch.int8), q4.scales
            dequantised[name] = q4.dequantize()
    shutil.copytree(folder, plain)
    write(plain, dequantised)
    write(folder, quantised)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": list(BLOCK)})


def with_rounded_activations(model: LanguageModel, like: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits of a plain model where the inputs of those matrices that ``like`` has as codes are rounded to FP8."""
    rounded = lambda module, inputs: (quant.fp8_quantize(inputs[0]).dequantize(inputs[0].dtype), *inputs[1:])  # noqa: E731
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and like.get_submodule(name).weight.dtype == torch.float8_e4m3fn:
            module.register_forward_pre_hook(rounded)
            count += 1
    assert count
    for version in ("v3", "v4"):
        fp8_moe = functools.partial(_fp8_moe, moe_megakernel_fwd)
        monkeypatch.setattr(f"ds_flashdmla_moe.models.{version}.moe_megakernel_fwd", fp8_moe)
    return model(IDS)


def _fp8_moe(run: Any, *args: Any, **options: Any) -> Tensor:
    return run(*args, **{**options, "activation_format": "fp8"})


def check(folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(folder, dtype=torch.bfloat16, kv_cache_dtype="bf16")
    codes = {name for name, value in model.state_dict().items() if value.dtype.itemsize == 1}
    assert any("experts" in name for name in codes)
    assert not codes & {name for name, _ in model.named_parameters()}
    assert model.bfloat16().state_dict()[min(codes)].dtype.itemsize == 1  # codes are not numbers to be converted
    logits = model(IDS)
    unquantised = load_model(plain, dtype=torch.bfloat16, kv_cache_dtype="bf16")
    exact = unquantised(IDS)
    want = with_rounded_activations(unquantised, model, monkeypatch)
    distance = torch.linalg.norm(logits - want) / torch.linalg.norm(want)
    effect = torch.linalg.norm(exact - want) / torch.linalg.norm(want)
    with capsys.disabled():
        print(f"\n{folder.parent.name}: quantised product {distance:.2g}, rounding of activations {effect:.2g}")
    assert distance < 0.02 < effect
    monkeypatch.undo()
    steps = model.generate(IDS, 3, eos_token_id=(), chunk=13)
    assert steps.shape == (1, 43)


def test_v3_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # All experts take part, so that no rounding decides between two.
    v3(num_experts_per_tok=8, n_group=1, topk_group=1).save_pretrained(tmp_path / "model")
    quantise(tmp_path / "model", tmp_path / "plain", "_proj", "", "weight_scale_inv")
    check(tmp_path / "model", tmp_path / "plain", monkeypatch, capsys)


def test_v4_in_fp8_and_mxfp4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hash = {"mlp_layer_types": ["hash_moe"] * 4, "index_topk": 100}
    v4(**by_hash, hidden_size=64, moe_intermediate_size=32).save_pretrained(tmp_path / "model")
    fp8 = r"attn\.(w|indexer\.wq_b)|shared_experts"
    quantise(tmp_path / "model", tmp_path / "plain", fp8, r"ffn\.experts\.", "scale")
    check(tmp_path / "model", tmp_path / "plain", monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nvfp4_is_the_dequantised_weights(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """With activations as they come. Written from the two formats' definitions."""
    folder = tmp_path / "model"
    v3(hidden_size=64, moe_intermediate_size=32, q_lora_rank=32, num_experts_per_tok=4).save_pretrained(folder)
    quantised, dequantised = {}, {}
    for name, value in read(folder).items():
        quantised[name] = dequantised[name] = value
        if re.search("experts|q_a_proj|q_b_proj", name):
            q = quant.nvfp4_quantize(value)
            dequantised[name] = q.dequantize()
            del quantised[name]
            quantised[name + "_scale"] = q.scales
            stem = name.removesuffix("weight")
            if kind == "modelopt":
                quantised |= {
                    name: q.packed,
                    name + "_scale_2": q.global_scale,
                    stem + "input_scale": torch.tensor(0.5),
                }
            else:
                divisor = (1 / q.global_scale.double()).float()
                dequantised[name] = dataclasses.replace(q, global_scale=(1 / divisor.double()).float()).dequantize()
                quantised |= {name + "_packed": q.packed, name + "_global_scale": divisor.reshape(1)}
                quantised[stem + "input_global_scale"] = torch.ones(1)
    write(Path(shutil.copytree(folder, tmp_path / "plain")), dequantised)
    write(folder, quantised)
    if kind == "modelopt":
        (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    else:
        recipe = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
        change_config(folder, quantization_config=recipe)
    got = load_model(folder, dtype=dtype)
    want = load_model(tmp_path / "plain", dtype=torch.float32, kv_cache_dtype="fp32")
    if dtype == torch.float32:
        assert all(torch.equal(value, want.state_dict()[name]) for name, value in got.state_dict().items())
    else:
        experts = got.model.layers[1].mlp.experts
        assert experts.gate_up_proj.dtype == torch.uint8
        assert torch.equal(experts.matrix("gate_up_proj").dequantize(), want.model.layers[1].mlp.experts.gate_up_proj)
        x = torch.randn(2, 5, 64).bfloat16()
        projection, like = (model.model.layers[1].self_attn.q_a_proj for model in (got, want))
        exact = torch.nn.functional.linear(x.double(), like.weight.double())
        assert (projection(x) - exact).abs().max() < 2**-8 * exact.abs().max()
        assert got(IDS).isfinite().all()

    name = next(name for name in quantised if name.endswith("_scale"))
    write(folder, {n: t for n, t in quantised.items() if n != name})
    with pytest.raises(ValueError, match=f"missing tensor {name}|{name.removesuffix('_scale')}"):
        load_model(folder)


@pytest.mark.parametrize("rows", [(16, 16), (24, 24), (5, 7), (32, 8)])
def test_codes_below_one_another_stand_for_the_same_numbers(rows: tuple[int, int]) -> None:
    parts = [torch.randn(count, 64) for count in rows]
    for scale_format in ("ue8m0", "fp32"):
        q8 = [quant.fp8_block_quantize(part, BLOCK, scale_format) for part in parts]
        assert torch.equal(rows_of(q8).dequantize(), torch.cat([q.dequantize() for q in q8]))
        assert torch.equal(stacked([q8[0], q8[0]]).dequantize()[1], q8[0].dequantize())
    nv = [quant.nvfp4_quantize(part) for part in parts]
    assert torch.equal(rows_of(nv).dequantize(), torch.cat([q.dequantize() for q in nv]))
    assert torch.equal(stacked([rows_of(nv), rows_of(nv)]).dequantize()[1], rows_of(nv).dequantize())
    q4 = [quant.mxfp4_quantize(part) for part in parts]
    assert torch.equal(rows_of(q4).dequantize(), torch.cat([q.dequantize() for q in q4]))
    assert torch.equal(stacked([q4[0], q4[0]]).dequantize()[1], q4[0].dequantize())
