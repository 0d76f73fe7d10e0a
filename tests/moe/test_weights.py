"""Formats of expert weights: how they round, what they hold, what it takes."""

from __future__ import annotations

import math

import pytest
import torch

from mixtralkit.moe.weights import FORMATS, PLAIN, PackedWeight, parse_weights
from mixtralkit.moe.weights.int4 import pack_bits, pack_pairs, unpack_bits
from mixtralkit.ops.experts.reference import expert_sum_reference
from tests.ops.test_cpu_products import experts_float64, random_tensor

NAMES = [name for name in FORMATS if name not in ("int4", "fp8")]


def steps_of(packed: PackedWeight) -> torch.Tensor:
    """The distance of neighbouring numbers at each weight, [O, K]."""
    group = getattr(packed.weights, "group", packed.columns)
    return packed.tensors[1].float().abs().repeat_interleave(group, 1)[:, : packed.columns]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("int")])
def test_integers_are_the_nearest_steps(name: str) -> None:
    weights = parse_weights(name)
    w_OK = random_tensor(5, 200, dtype=torch.float32, seed=0)
    w_OK[0] = 0.0
    w_OK[1, :128] = w_OK[1, :128].abs()  # groups without negative weights
    packed = weights.quantize(w_OK)
    found, steps = packed.float(), steps_of(packed)
    assert found[0].eq(0).all()
    assert found.shape == packed.shape == w_OK.shape
    # without zero points the 16 steps are -8 … 7: the opposite of the largest weight may be a whole step away
    furthest = 0.5 if name == "int8" else 1.0
    assert ((found - w_OK).abs() <= furthest * steps * 1.01).all()
    assert ((found - w_OK).abs() <= 0.5 * steps * 1.01).float().mean() > 0.95


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("fp8")])
def test_floating_point_keeps_four_bits_of_each_weight(name: str) -> None:
    w_OK = random_tensor(130, 200, dtype=torch.float32, seed=0)
    w_OK[0] = 0.0
    w_OK[3, 7] = 1e4  # what it takes from its neighbours, it takes from no other scale's
    found = parse_weights(name).quantize(w_OK).float()
    assert found.isfinite().all()
    assert found[0].eq(0).all()
    assert found[3, 7] == pytest.approx(1e4, rel=1e-6)
    alone = {"fp8:tensor": slice(0), "fp8:channel": slice(4, None), "fp8:block": slice(128, None)}[name]
    rest = w_OK[alone].abs() > 0.05
    assert ((found - w_OK)[alone].abs() <= w_OK[alone].abs() / 15.9)[rest].all()


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_dimensions_stacks_and_blocks_of_rows(name: str) -> None:
    weights = parse_weights(name)
    w_SOK = random_tensor(3, 256, 136, dtype=torch.bfloat16, seed=1)
    w_SOK[:, 5, :64] = 0.5
    w_SOK[:, 5, 64:] = -0.5  # weights of one size and both signs: which is the largest does not depend on the shape
    whole = weights.quantize(w_SOK)
    halves = [weights.quantize(half) for half in w_SOK.chunk(2, dim=1)]
    stacked = PackedWeight(
        weights, 136, tuple(torch.cat(t, 1) for t in zip(*(h.tensors for h in halves), strict=True)), 2
    )
    for slot in range(3):
        one = weights.quantize(w_SOK[slot])
        assert all(
            a.view(torch.uint8).equal(b[slot].view(torch.uint8))
            for a, b in zip(one.tensors, whole.tensors, strict=True)
        )
        assert whole[slot].take(128, 256).float().equal(one.float()[128:])
        assert stacked[slot].unstacked()[1].float().equal(stacked.float()[slot, 128:])
    assert stacked.float().equal(torch.cat([half.float() for half in halves], 1))
    if weights.height is not None:
        assert stacked.float().equal(whole.float())
    for part, tensor in zip(weights.parts, stacked.tensors, strict=True):
        assert tuple(tensor.shape) == (3, *weights.shape(part, 128, 136, 2))
        assert tensor.dtype == getattr(torch, part.dtype)
    assert stacked.nbytes == 6 * weights.bytes(128, 136)


def test_bytes_of_mixtrals_experts() -> None:
    sizes = {name: weights.expert_bytes(4096, 14336) * 8 / (3 * 4096 * 14336) for name, weights in FORMATS.items()}
    assert PLAIN.expert_bytes(4096, 14336, 4) == 12 * 4096 * 14336
    assert sizes["int4"] == sizes["int4:32"] == 4.5
    assert (sizes["int4:128"], sizes["int4:128:zeros"]) == (4.125, 4.1875)
    for name in ("int8", "fp8:channel", "fp8:tensor", "fp8:block"):
        assert math.isclose(sizes[name], 8, rel_tol=1e-3)


def test_four_bits_lie_where_the_page_says() -> None:
    data = pack_bits((torch.arange(64) % 16).to(torch.uint8)[None])
    words = data.view(torch.int16)[0].to(torch.int32) & 0xFFFF
    assert all((words[i] >> 4 * j) & 15 == (16 * j + i) % 16 for i in range(16) for j in range(4))
    bits = torch.randint(16, (3, 2, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert unpack_bits(pack_bits(bits)).equal(bits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tile", [128, 1024])
def test_reference_is_the_sum_with_the_rounded_weights(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtralkit.ops.linear.reference.TILE", tile)
    weights = parse_weights(name)
    matrices = [random_tensor(2, 130, 136, dtype=torch.float32, seed=seed, scale=0.1) for seed in (1, 2, 3)]
    w1, w3 = (weights.quantize(w) for w in matrices[:2])
    w13 = PackedWeight(weights, 136, tuple(torch.cat(t, 1) for t in zip(w1.tensors, w3.tensors, strict=True)), 2)
    w2 = weights.quantize(matrices[2].transpose(1, 2))
    x_RD, slots_RK = (
        random_tensor(5, 136, dtype=torch.float32, seed=4),
        torch.tensor([[0, 1], [1, -1], [0, 0], [-1, -1], [1, 0]]),
    )
    weights_RK = torch.rand(5, 2, generator=torch.Generator().manual_seed(5))
    found = expert_sum_reference(x_RD, slots_RK, weights_RK, w13, w2)
    torch.testing.assert_close(
        found.double(), experts_float64(x_RD, slots_RK, weights_RK, w13.float(), w2.float()), rtol=1e-4, atol=1e-4
    )


def test_names_are_read_back_and_others_refused() -> None:
    assert parse_weights(None) is PLAIN
    for name in NAMES:
        assert parse_weights(name).name == name
    assert (parse_weights("int4"), parse_weights("fp8")) == (parse_weights("int4:32"), parse_weights("fp8:channel"))
    for text in ("int3", "int8:32", "int4:16", "int4:32:zero", "plain", ""):
        with pytest.raises(ValueError, match=r"quantize \('.*'\) must be one of int4, fp8, int8"):
            parse_weights(text)


def test_pairs_of_neighbours_are_packed_as_their_bits() -> None:
    bits_OK = torch.randint(0, 16, (3, 5, 192), dtype=torch.uint8)
    assert pack_pairs(bits_OK[..., ::2] | bits_OK[..., 1::2] << 4).equal(pack_bits(bits_OK))
