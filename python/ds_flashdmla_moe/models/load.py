# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""From a folder with config.json and safetensors to a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .config import Fields, V3Config, V32Config, read_json
from .language_model import LanguageModel
from .v3 import DeepseekV3
from .v32 import DeepseekV32

__all__ = ["load_model"]

MODELS: dict[str, tuple[type[V3Config], type[DeepseekV3]]] = {
    "deepseek_v3": (V3Config, DeepseekV3),
    "deepseek_v32": (V32Config, DeepseekV32),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kv_cache_dtype: str = "auto",
) -> LanguageModel:
    """A language model from a folder in Hugging Face's layout: config.json and safetensors, of
    ``deepseek_v3`` or ``deepseek_v32``.

    Weights are float32, bfloat16 or float16, or FP8 E4M3 with a scale per block, which is multiplied in. Files are
    mapped and copied tensor by tensor, so that loading needs little memory beside the model's own.

    Args:
        path: the folder.
        device: where the model shall be; default the CPU.
        dtype: of the parameters: float64, float32, bfloat16 or float16; default that of config.json.
        kv_cache_dtype: of the cache's rows: ``"bf16"``, ``"fp32"``, for V3.2 also ``"fp8"`` (656 bytes, if rows have
            512 + 64 numbers), or ``"auto"``: the parameters' dtype for V3; for V3.2 FP8 where there is such a format,
            else bfloat16. Over whole sequences rows are rounded likewise.

    Returns:
        The model in evaluation mode: ``model(input_ids)`` and ``model.generate(input_ids, max_new_tokens)``.

    Raises:
        ValueError: a file cannot be read, a value of config.json is impossible or not supported, or a tensor is
            missing, not of the model, or of another shape or dtype. The message names it.
    """
    folder = Path(path)
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    config_type, model_type = MODELS[fields.choice("model_type", *MODELS)]
    if dtype not in (None, *DTYPES):
        raise ValueError(f"load_model: dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    config = config_type.read(fields)
    dtype = dtype or getattr(torch, config.dtype)
    checkpoint = Checkpoint(folder)
    # Before anything is made whose size config.json decides.
    least = model_type.tensor_count(config)
    if len(checkpoint.tensors) < least:
        got = f"{len(checkpoint.tensors)} in the files"
        raise ValueError(f"{fields.where}: layers and experts need at least {least} tensors, got {got}")
    with torch.device("meta"):
        model = model_type(config, dtype, kv_cache_dtype)
    _fill(model, checkpoint, torch.device(device or "cpu"))
    return model.eval()


def _fill(model: DeepseekV3, checkpoint: Checkpoint, device: torch.device) -> None:
    """Give a model without memory its parameters and buffers."""
    empty = model.state_dict(keep_vars=True)
    if model.config.tied_head:
        del empty["lm_head.weight"]
    parts = {name: list(model.stored_parts(name)) for name in empty}
    expected = {
        stored: tuple(empty[name][index].shape)
        for name, stored_parts in parts.items()
        for stored, index in stored_parts
    }
    unused = model.unused_tensors() | ({"lm_head.weight"} if model.config.tied_head else set())
    quantization = model.config.quantization
    checkpoint.check(expected, unused, quantization)
    state: dict[str, Tensor] = {}
    for name, stored_parts in parts.items():
        state[name] = torch.empty(empty[name].shape, dtype=empty[name].dtype, device=device)
        for stored, index in stored_parts:
            state[name][index].copy_(checkpoint.read(stored, quantization))
    if model.config.tied_head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()
    model.to(device)
