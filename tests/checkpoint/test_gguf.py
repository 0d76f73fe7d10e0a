"""llama.cpp's files, against its own package ``gguf``: every type bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtralkit.checkpoint.gguf_blocks import BLOCK_TYPES

gguf = pytest.importorskip("gguf")


def random_blocks(kind, count: int) -> np.ndarray:
    """Bytes of blocks with scales that are numbers."""
    blocks = np.random.default_rng(kind.size).integers(0, 256, (count, kind.size), dtype=np.uint8)
    halves = {
        "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
        "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    }  # fmt: skip
    scales = np.random.default_rng(1).normal(0, 0.1, (count, 2)).astype(np.float16)
    for i, place in enumerate(halves[kind.name]):
        blocks[:, place : place + 2] = scales[:, i : i + 1].copy().view(np.uint8)
    return blocks


@pytest.mark.parametrize("number", BLOCK_TYPES, ids=lambda number: BLOCK_TYPES[number].name)
def test_every_type_is_as_llama_cpp_has_it(number: int) -> None:
    kind = BLOCK_TYPES[number]
    theirs = gguf.GGMLQuantizationType(number)
    assert theirs.name == kind.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.weights, kind.size)
    blocks = random_blocks(kind, 64)
    expected = torch.from_numpy(gguf.dequantize(blocks, theirs))
    found = kind.numbers(torch.from_numpy(blocks))
    assert found.shape == expected.shape == (64, kind.weights)
    assert found.view(torch.int32).equal(expected.view(torch.int32))
