"""The hash of the weights: one for every way to spread and to read them, another for any other weight."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from mixtralkit.checkpoint import load_into, open_checkpoint, save_checkpoint
from mixtralkit.checkpoint.loader import _counted, _key, _plan_transfers, _reads
from mixtralkit.checkpoint.weight_hash import WeightHash
from mixtralkit.config import ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.weights import PLAIN, parse_weights
from mixtralkit.planning.plan import contiguous, everywhere
from tests.checkpoint.models import CONFIGS, empty_parameters, random_tensors

CONFIG = CONFIGS["grouped"]


def sums_over_ranks(reader, world_size, attention, experts, plan, dtype=torch.float32, weights=PLAIN) -> dict:
    """What all ranks of a layout add up, without any of them being there."""
    total: dict = {}
    for rank in range(world_size):
        layout = RankLayout(CONFIG, ParallelConfig(attention, experts), plan, rank, weights)
        parameters = empty_parameters(layout, dtype)
        transfers, found = _plan_transfers(layout, parameters), WeightHash()
        received = {t.key for t in transfers if t.owner != rank}
        pieces = [piece for piece in layout.pieces() if _key(piece) not in received]
        counted = _counted(layout, reader, transfers)
        for block, weight_hash in _reads(parameters, layout, reader, pieces, counted, found):
            block.read(None, weight_hash)
        for key, value in found._sums.items():
            total[key] = (total.get(key, 0) + value) % 2**64
    return total


@pytest.mark.parametrize("format", ["mistral", "hf", "hf-packed", "mistral-stacked", "mistral-shards"])
def test_every_layout_adds_up_to_the_same(tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), format)
    with open_checkpoint(tmp_path) as reader:
        alone = sums_over_ranks(reader, 1, "tp", "ep", contiguous(2, 4, 1))
        assert len(alone) == len(reader.regions)
        for world_size, attention, experts in ((2, "tp", "ep"), (2, "dp", "ep"), (4, "tp", "tp"), (4, "dp", "ep")):
            for plan in (contiguous(2, 4, world_size), everywhere(2, 4, world_size)):
                for dtype in (torch.float32, torch.bfloat16):
                    assert sums_over_ranks(reader, world_size, attention, experts, plan, dtype) == alone
                for name in (
                    "fp8:channel",
                    "fp8:tensor",
                ):  # rounded while they are read, w2 by whole rows on every rank
                    rounds = torch.float32, parse_weights(name)
                    assert sums_over_ranks(reader, world_size, attention, experts, plan, *rounds) == alone


def hashed(folder: Path) -> str:
    layout = RankLayout.single(CONFIG)
    with open_checkpoint(folder) as reader:
        parameters = {name: torch.empty(shape) for name, shape in layout.shapes().items()}
        return load_into(parameters, layout, reader, RankContext(), hashes=True)


def test_any_other_weight_is_another_hash(tmp_path: Path) -> None:
    """A merged fine-tune of middle layers had the ends of its files in common with the old one, which was enough."""
    tensors = random_tensors(CONFIG)
    save_checkpoint(tmp_path / "a", CONFIG, tensors)
    found = {hashed(tmp_path / "a")}
    for i, (name, tensor) in enumerate(tensors.items()):
        changed = tensor.clone().view(-1)
        changed[len(changed) // 2] += 1
        save_checkpoint(tmp_path / f"{i}", CONFIG, {**tensors, name: changed.view(tensor.shape)})
        found.add(hashed(tmp_path / f"{i}"))
    swapped = {**tensors, "norm.weight": tensors["norm.weight"].flip(0)}
    save_checkpoint(tmp_path / "swapped", CONFIG, swapped)
    found.add(hashed(tmp_path / "swapped"))
    assert len(found) == len(tensors) + 2
    save_checkpoint(tmp_path / "again", CONFIG, tensors)
    assert hashed(tmp_path / "again") in found


def test_it_is_what_its_docstring_says(tmp_path: Path) -> None:
    """By the sum itself, in Python's numbers."""

    def odd(sequence: int, i: int) -> int:
        x = (i + (sequence << 48)) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31 | 1

    tensors = random_tensors(CONFIG)
    save_checkpoint(tmp_path, CONFIG, tensors)
    digest = hashlib.sha256()
    with open_checkpoint(tmp_path) as reader:
        for region in reader.regions:
            tensor, total = tensors[region.name], 0
            for r, row in enumerate(tensor if tensor.dim() > 1 else tensor[:, None]):
                raw = row.contiguous().view(torch.uint8).numpy().tobytes()
                for c in range(0, len(raw), 8):
                    total += odd(1, r) * odd(2, c // 8) * int.from_bytes(raw[c : c + 8], "little")
            total = (total + 2**63) % 2**64 - 2**63
            digest.update(f"{region.name} {region.dtype} {region.shape} {total}\n".encode())
    assert hashed(tmp_path) == digest.hexdigest()
