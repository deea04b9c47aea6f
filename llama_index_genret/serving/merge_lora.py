"""Merge two LoRA adapters, one trained on top of the other, into one adapter with the same effect.

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]        s = alpha / rank

Depends on the files of plain LoRA adapters as PEFT stores them; independent of torch, models and indexes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from llama_index_genret.errors import ModelMismatch
from llama_index_genret.files import new_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PLAIN = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}
_UNSET = ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")

Weights = dict[str, NDArray[np.float32]]


def lora_rank(adapter: Path) -> int:
    """Return the rank of a stored adapter."""
    return int(_config(adapter)["r"])


def join_adapters(first: Path, second: Path, out: Path) -> Path:
    """Write an adapter with the combined effect of `first` and `second`, atomically. Its rank is the sum of theirs.

    Args:
        first, second: folders of plain LoRA adapters for the same base model.
        out: a new folder.
    Raises:
        ModelMismatch: the adapters adapt different modules, or one holds more than LoRA matrices.
    """
    folders = (first, second)
    configs, weights = [_config(folder) for folder in folders], [load_file(folder / WEIGHTS) for folder in folders]
    for folder, config, tensors in zip(folders, configs, weights, strict=True):
        more = [name for name, value in _PLAIN.items() if config.get(name, value) != value]
        more += [name for name in _UNSET if config.get(name)]
        more += [name for name in tensors if not name.endswith((_A, _B))]
        if more:
            raise ModelMismatch(f"the adapter in {folder} is no plain LoRA, it has {more[0]}: it cannot be merged.")
    if weights[0].keys() != weights[1].keys():
        other = sorted(weights[0].keys() ^ weights[1].keys())
        raise ModelMismatch(
            f"{first} and {second} adapt different modules ({other[0]} is in only one of them): they cannot be merged."
        )
    rank = sum(config["r"] for config in configs)
    scales = [config["lora_alpha"] / config["r"] for config in configs]
    with new_folder(out) as into:
        save_file(_join(weights, scales), into / WEIGHTS)
        (into / CONFIG).write_text(json.dumps({**configs[0], "r": rank, "lora_alpha": rank}), encoding="utf-8")
    return out


def _join(weights: list[Weights], scales: list[float]) -> Weights:
    """Return A stacked, (r1 + r2, in), and B side by side, (out, r1 + r2), each B times its scale."""
    return {
        name: np.concatenate([tensors[name] for tensors in weights])
        if name.endswith(_A)
        else np.concatenate([scale * tensors[name] for scale, tensors in zip(scales, weights, strict=True)], axis=1)
        for name in weights[0]
    }


def _config(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    return config
