"""Checkpoints as other quantisers write them, and what their weights mean by an oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixtralkit.checkpoint import load_into, open_checkpoint, save_checkpoint
from mixtralkit.config import ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.weights import ExpertWeights, PackedWeight
from tests.checkpoint.models import empty_parameters, random_tensors

CONFIG = ModelConfig(
    dim=256, n_layers=2, head_dim=32, hidden_dim=320, n_heads=8, n_kv_heads=2, vocab_size=64, num_experts=2
)
LAYER = "model.layers.1.block_sparse_moe.experts.1.w2"
OURS = "layers.1.feed_forward.experts.1.w2"

# a weight [O, K] -> the tensors of the file by the end of their names, and their numbers
Quantise = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def write(
    folder: Path, quantise: Quantise, stated: dict[str, Any] | None, also: str = "_proj.",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Hugging Face's files of a random model, its experts and layers with ``also`` in their names quantised.

    Returns the numbers by our names.
    """
    whole = random_tensors(CONFIG, dtype)
    random = {name: tensor / 8 if tensor.dim() > 1 else tensor for name, tensor in whole.items()}
    save_checkpoint(folder / "plain", CONFIG, random, "hf", 1)
    tensors, numbers = {}, {}
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        if ".experts." in name or also in name:
            made, numbers[name] = quantise(tensor)
            tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in made.items()}
        else:
            tensors[name] = numbers[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": stated} if stated else {})))
    floats = {name: tensor.float().contiguous() for name, tensor in numbers.items()}
    save_file(floats, folder / "plain" / "model.safetensors")
    with open_checkpoint(folder / "plain") as reader:
        return {name: reader.read(name) for name in reader.shapes()}


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Puts other tensors in the place of those of ``LAYER``, by the end of their names; None takes one away."""
    path = folder / "model.safetensors"
    held = load_file(path)
    for end, tensor in tensors.items():
        held.pop(f"{LAYER}.{end}", None)
        if tensor is not None:
            held[f"{LAYER}.{end}"] = tensor.contiguous()
    save_file(held, path)


def assert_reads(folder: Path, expected: dict[str, torch.Tensor], kept: str, tmp_path: Path) -> None:
    """The same numbers bit for bit: read in any piece, loaded in the format that experts are kept in, converted."""
    with open_checkpoint(folder) as reader:
        assert reader.weights.name == kept
        for name, values in expected.items():
            assert reader.read(name).float().equal(values), name
        assert reader.read(f"{OURS}.weight", (5, 77), (40, 300)).equal(expected[f"{OURS}.weight"][5:77, 40:300])
        for part in reader.weights.parts:
            name = f"{OURS}.{part.name}"
            whole = reader.read(name)
            rows, columns = (whole.shape[0] // 3, whole.shape[0]), (whole.shape[1] // 2, whole.shape[1])
            assert (
                reader.read(name, rows, columns)
                .view(torch.uint8)
                .equal(whole[slice(*rows), slice(*columns)].contiguous().view(torch.uint8))
            )
        layout = RankLayout(CONFIG, *_single(), weights=reader.weights)
        found = empty_parameters(layout)
        load_into(found, layout, reader, RankContext())
        save_checkpoint(tmp_path / "hf", CONFIG, reader, "hf")
    for layer in range(CONFIG.n_layers):
        prefix = f"layers.{layer}.feed_forward."
        up, down = (_floats(found, prefix + matrix, layout.weights) for matrix in ("w13", "w2"))
        for expert in range(CONFIG.num_experts):
            w1, w2, w3 = (expected[f"{prefix}experts.{expert}.{w}.weight"] for w in ("w1", "w2", "w3"))
            assert up[expert].equal(torch.cat([w1, w3]))
            assert down[expert].equal(w2)
    with open_checkpoint(tmp_path / "hf") as reader:
        for name, values in expected.items():
            assert reader.dtype(name) == reader.dtype("norm.weight") == torch.bfloat16
            assert reader.read(name).equal(values.bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def _single():
    layout = RankLayout.single(CONFIG)
    return layout.parallel, layout.plan


def _floats(found: dict[str, torch.Tensor], matrix: str, weights: ExpertWeights) -> torch.Tensor:
    names = [name for name, _ in weights.parameters(matrix)]
    if weights.is_plain:
        return found[matrix]
    columns = CONFIG.dim if matrix.endswith("w13") else CONFIG.hidden_dim
    return PackedWeight(weights, columns, tuple(found[n] for n in names), 2 if matrix.endswith("w13") else 1).float()
