"""Sorting into blocks and grouped expert kernels against a loop over rows and choices, and the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixtralkit.moe.weights import Fp8, PackedWeight
from mixtralkit.ops import experts
from mixtralkit.ops.experts.reference import expert_sum_reference
from tests.ops.test_experts_small import in_storage

pytest.importorskip("triton")

from mixtralkit.ops.experts import triton_grouped, triton_sorting
from mixtralkit.ops.experts.triton_grouped import candidates, default_settings, expert_sum_grouped

# Padding rows are computed from what memory held.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SMALL = {"block_o": 64, "block_k": 32, "group": 2, "num_warps": 4, "num_stages": 3, "programs": 1}


def _settings(stream: int, block_r: int, **changes: int) -> dict[str, int]:
    parts = {f"{part}_{name}": value for part in ("up", "down") for name, value in SMALL.items()}
    return {"stream": stream, "block_r": block_r, **parts, **changes}


def _inputs(
    rows: int, slots: int, top_k: int, width: int, hidden: int, dtype: torch.dtype, device: str = DEVICE
) -> tuple[torch.Tensor, ...]:
    """Distinct experts of a row, a fifth of them computed elsewhere, the last slot chosen by none (of several)."""
    generator = torch.Generator().manual_seed(rows + slots)
    scores_RS = torch.rand(rows, slots, generator=generator)
    if slots > top_k:
        scores_RS[:, -1] = -1.0
    slots_RK = scores_RS.topk(top_k).indices
    slots_RK[torch.rand(rows, top_k, generator=generator) < 0.2] = -1
    x_RD, residual_RD = (torch.randn(rows, width, generator=generator) for _ in range(2))
    w13_SGD = torch.randn(slots, 2 * hidden, width, generator=generator) * width**-0.5
    w2_SDF = torch.randn(slots, width, hidden, generator=generator) * hidden**-0.5
    weights_RK = torch.rand(rows, top_k, generator=generator)
    x_RD, w13_SGD, w2_SDF, residual_RD = (t.to(device, dtype) for t in (x_RD, w13_SGD, w2_SDF, residual_RD))
    return x_RD, slots_RK.to(device), weights_RK.to(device), w13_SGD, w2_SDF, residual_RD


def _slow(x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD) -> torch.Tensor:
    """Row by row and choice by choice in float64."""
    out_RD = residual_RD.double()
    for row, choice in (slots_RK >= 0).nonzero().tolist():
        slot = slots_RK[row, choice]
        gate_F, up_F = (w13_SGD[slot].double() @ x_RD[row].double()).chunk(2)
        out_RD[row] += weights_RK[row, choice].double() * (w2_SDF[slot].double() @ (F.silu(gate_F) * up_F))
    return out_RD


def _error(got: torch.Tensor, want: torch.Tensor, less: torch.Tensor) -> float:
    """Relative error of what the experts added to ``less``."""
    added = want.double() - less.double()
    return ((got.double() - want.double()).norm() / added.norm()).item()


def test_reference_against_a_loop():
    inputs = _inputs(23, 5, 2, 24, 40, torch.float32)
    assert _error(expert_sum_reference(*inputs), _slow(*inputs), inputs[-1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize(
    ("rows", "slots", "top_k", "width", "hidden", "block_r"),
    [
        (40, 8, 2, 256, 160, 32),  # Mixtral's choices; F no multiple of 128
        (33, 60, 6, 72, 40, 32),  # most blocks nearly empty
        (70, 1, 1, 48, 136, 64),  # one expert
        (50, 16, 4, 64, 200, 32),
    ],
)
def test_against_a_loop(rows, slots, top_k, width, hidden, block_r, stream, dtype):
    inputs = _inputs(rows, slots, top_k, width, hidden, dtype)
    out_RD = torch.full_like(inputs[0], float("nan"))
    got_RD = expert_sum_grouped(*inputs, out_RD=out_RD, settings=_settings(stream, block_r))
    assert got_RD is out_RD
    assert _error(got_RD, _slow(*inputs), inputs[-1]) < TOLERANCE[dtype]


@pytest.mark.parametrize(("stream", "dtype"), [(0, torch.float32), (1, torch.float16)])
def test_slots_lie_anywhere_in_a_storage(stream, dtype):
    inputs = _inputs(40, 6, 2, 64, 72, dtype)
    x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD = inputs
    w13_PGD, w2_PDF, storage_S = in_storage(w13_SGD, w2_SDF)
    stored, settings = (x_RD, slots_RK, weights_RK, w13_PGD, w2_PDF, residual_RD), _settings(stream, 32)
    got_RD = expert_sum_grouped(*stored, storage_S=storage_S, settings=settings)
    assert torch.equal(got_RD, expert_sum_grouped(*inputs, settings=settings))


def test_stores_in_halves_and_without_a_residual():
    inputs = _inputs(40, 4, 2, 320, 64, torch.float32)
    got_RD = expert_sum_grouped(*inputs[:5], settings=_settings(0, 32, down_block_o=256))
    assert _error(got_RD, expert_sum_reference(*inputs[:5]), torch.zeros_like(got_RD)) < 1e-5


@pytest.mark.parametrize("stream", [0, 1])
def test_every_row_at_one_expert(stream):
    x_RD, slots_RK, *rest = _inputs(45, 4, 1, 64, 64, torch.float32)
    inputs = (x_RD, torch.full_like(slots_RK, 2), *rest)
    got_RD = expert_sum_grouped(*inputs, settings=_settings(stream, 32))
    assert _error(got_RD, expert_sum_reference(*inputs), inputs[-1]) < 1e-5


def test_no_choice_is_computed_here():
    x_RD, slots_RK, *rest = _inputs(20, 4, 2, 64, 64, torch.float32)
    for stream in (0, 1):
        got_RD = expert_sum_grouped(x_RD, torch.full_like(slots_RK, -1), *rest, settings=_settings(stream, 32))
        assert torch.equal(got_RD, rest[-1])


def test_widths_that_descriptors_cannot_hold_take_the_reference(monkeypatch):
    monkeypatch.setattr(experts, "runs_triton", lambda *tensors: True)
    inputs = _inputs(20, 4, 2, 36, 20, torch.float32)
    torch.testing.assert_close(experts.expert_sum(*inputs), expert_sum_reference(*inputs))


@pytest.mark.parametrize("one_hot", [8192, 256], ids=["one program", "several"])
@pytest.mark.parametrize(("choices", "slots", "block_r"), [(200, 8, 16), (97, 60, 32), (130, 1, 64), (3, 4, 16)])
def test_sorting(choices, slots, block_r, one_hot, monkeypatch):
    """Every choice has a place of its own in a block of its slot, after the slot's earlier choices."""
    monkeypatch.setattr(triton_sorting, "ONE_HOT", one_hot)
    slots_N = torch.randint(-1, slots, (choices,), generator=torch.Generator().manual_seed(choices)).to(DEVICE)
    order = triton_sorting.sort_rows(slots_N, slots, block_r)
    want, start = torch.full_like(slots_N, -1), 0
    for slot in range(slots):
        mine = (slots_N == slot).nonzero().flatten()
        want[mine] = start * block_r + torch.arange(len(mine), device=DEVICE)
        for block in range(-(-len(mine) // block_r)):
            assert order.slot_B[start + block] == slot
            assert order.rows_B[start + block] == min(len(mine) - block * block_r, block_r)
            assert order.span_B2.view(-1, 2)[start + block].tolist() == [start, -(-len(mine) // block_r)]
        start += -(-len(mine) // block_r)
    assert order.blocks.item() == start <= triton_sorting.most_blocks(choices, slots, block_r) == len(order.slot_B)
    assert order.rows_B[start:].tolist() == [0] * (len(order.rows_B) - start)
    assert torch.equal(order.place_N.long(), want)


@pytest.mark.parametrize("block_r", [32, 64])
def test_rows_lie_at_their_places_and_the_rest_of_a_block_is_zero(block_r):
    x_RD, slots_RK, *_ = _inputs(50, 4, 2, 72, 40, torch.float32)
    order = triton_sorting.sort_rows(slots_RK, 4, block_r)
    x_PD = triton_grouped._spread_rows(x_RD, order, 2)
    want_PD = torch.zeros(order.blocks.item() * block_r, 72, device=DEVICE)
    here_RK = slots_RK >= 0
    want_PD[order.place_N.view_as(slots_RK)[here_RK].long()] = x_RD[here_RK.nonzero()[:, 0]]
    assert torch.equal(x_PD[: len(want_PD)], want_PD)


@pytest.mark.parametrize("rows", [3, 16, 17, 32, 33, 48, 49, 64])
def test_every_quarter_of_a_streamed_block(rows):
    """One expert's block, filled to each side of each quarter; a second block where it overflows."""
    x_RD, slots_RK, *rest = _inputs(rows + 64, 4, 1, 64, 64, torch.float32)
    slots_RK = (torch.arange(rows + 64, device=DEVICE) >= rows).long()[:, None]
    inputs = (x_RD, slots_RK, *rest)
    got_RD = expert_sum_grouped(*inputs, settings=_settings(1, 64))
    assert _error(got_RD, expert_sum_reference(*inputs), inputs[-1]) < 1e-5


@pytest.mark.parametrize("group", [1, 2, 3, 64])
def test_blocks_of_an_expert_in_groups(group):
    """Seven blocks of one expert and two of another, in groups that do not divide them."""
    x_RD, slots_RK, *rest = _inputs(16 * 9, 2, 1, 64, 64, torch.float32)
    slots_RK = (torch.arange(16 * 9, device=DEVICE) >= 16 * 7).long()[:, None]
    inputs = (x_RD, slots_RK, *rest)
    got_RD = expert_sum_grouped(*inputs, settings=_settings(0, 16, up_group=group, down_group=group))
    assert _error(got_RD, expert_sum_reference(*inputs), inputs[-1]) < 1e-5


@pytest.mark.parametrize("rows", [17, 64, 256, 600, 1024, 16384])
def test_candidates_have_the_settings_of_the_default(rows):
    shape = {"slots": 8, "top_k": 2, "width": 4096, "hidden": 14336}
    default = default_settings(rows, **shape)
    assert all(candidate.keys() == default.keys() for candidate in candidates(rows, **shape))


@pytest.mark.parametrize("likely", [5, 16, 24, 64])
def test_few_experts_of_few_rows_have_narrow_tiles(likely):
    """As on a rank of several: there the wide tiles of w2 would be fewer than the multiprocessors."""
    shape = {"top_k": 2, "width": 4096, "hidden": 14336}

    def down(rows: int, slots: int, processors: int = 132) -> tuple[int, int]:
        settings = default_settings(rows, slots=slots, **shape, processors=processors)
        return settings["down_block_o"], settings["down_programs"]

    assert down(likely, 2) == (64, 1)
    assert down(likely, 2, processors=60)[1] == down(4 * likely, 8)[1] == 2


def test_settings_are_for_the_likely_rows_and_slots(monkeypatch):
    asked = []

    def settings(rows: int, *, slots: int, **shape) -> dict[str, int]:
        asked.append((rows, slots))
        return _settings(1, 32)

    monkeypatch.setattr(triton_grouped, "default_settings", settings)
    inputs = _inputs(40, 4, 2, 64, 40, torch.float32)
    for likely in ((None, None), (10, 3)):
        got_RD = expert_sum_grouped(*inputs, likely_rows=likely[0], likely_slots=likely[1])
        assert _error(got_RD, expert_sum_reference(*inputs), inputs[-1]) < 1e-5
    assert asked == [(40, 4), (10, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("rows", "slots", "top_k", "hidden"),
    [(17, 8, 2, 1792), (300, 8, 2, 1792), (2000, 8, 2, 1000), (500, 60, 6, 168), (33, 16, 4, 40), (1500, 4, 1, 512)],
)
def test_default_settings_in_a_graph(rows, slots, top_k, hidden):
    """With the settings of this GPU, captured, replayed on other choices than those at capture."""
    inputs = _inputs(rows, slots, top_k, 512, hidden, torch.bfloat16)
    expert_sum_grouped(*inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got_RD = expert_sum_grouped(*inputs)
    inputs[1].copy_(inputs[1].flip(0))
    got_RD.fill_(float("nan"))
    graph.replay()
    assert _error(got_RD, expert_sum_reference(*(t.float() for t in inputs[:1]), *inputs[1:3],
                  *(t.float() for t in inputs[3:])), inputs[-1]) < TOLERANCE[torch.bfloat16]  # fmt: skip


def _round_rows(x_PI, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    data, scales_P1 = Fp8("channel").quantize(x_PI).tensors
    return data, scales_P1[:, 0]


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize(("rows", "settings"), [(9, (1, 32)), (60, (1, 64)), (60, (0, 64))])
def test_rows_and_weights_in_fp8(scale, rows, settings, monkeypatch):
    """As the sums of the same numbers: rows and hidden values in e4m3 with a scale each.

    They are rounded outside: the interpreter's numbers in e4m3 are not a GPU's.
    """
    monkeypatch.setattr(triton_grouped, "_rounded", _round_rows)
    x_RD, slots_RK, weights_RK, w13_SGD, w2_SDF, residual_RD = _inputs(rows, 3, 2, 128, 192, torch.float16)
    x_RD *= torch.logspace(-3, 1, rows, device=DEVICE)[:, None].half()
    up, down = Fp8(scale).quantize(w13_SGD.unflatten(1, (2, -1))), Fp8(scale).quantize(w2_SDF)
    w13, w2 = PackedWeight(up.weights, 128, tuple(t.flatten(1, 2) for t in up.tensors), stacked=2), down
    storage_S = torch.tensor([2, 0, 1], device=DEVICE)
    found = expert_sum_grouped(
        x_RD, slots_RK, weights_RK, w13, w2, residual_RD, storage_S=storage_S, settings=_settings(*settings)
    )
    expected = expert_sum_reference(
        x_RD.float(), slots_RK, weights_RK, w13, w2, residual_RD.float(), storage_S=storage_S, rounds_rows=True
    )
    exact = expert_sum_reference(x_RD.float(), slots_RK, weights_RK, w13, w2, residual_RD.float(), storage_S=storage_S)
    assert _error(found, expected, residual_RD) < 1e-2 < _error(exact, expected, residual_RD)


def test_rows_become_fp8_as_the_format_says():
    x_RD, slots_RK, *_ = _inputs(60, 3, 2, 200, 192, torch.float16)
    x_RD[3] = 0.0
    order = triton_sorting.sort_rows(slots_RK, 3, 64)
    x_PD = triton_grouped._spread_rows(x_RD, order, 2, 4)
    found = PackedWeight(Fp8("channel"), 200, triton_grouped._rounded(x_PD, order, 4, False))
    expected = Fp8("channel").quantize(x_RD)
    for row, choice in (slots_RK >= 0).nonzero().tolist():
        place = order.place_N.view(-1, 2)[row, choice]
        scale = found.tensors[1][place]
        torch.testing.assert_close(scale, expected.tensors[1][row, 0], rtol=1e-6, atol=0.0)
        found_D, expected_D = found.tensors[0][place].float(), expected.tensors[0][row].float()
        if DEVICE == "cuda":
            assert (found_D == expected_D).float().mean() > 0.95  # else the other number beside it
            torch.testing.assert_close(found_D, expected_D, rtol=0.13, atol=2**-9)
        else:  # the interpreter cuts off, by a step of three bits at most, or loses what it carries into the exponent
            near_D = (found_D - expected_D).abs() <= 2**-3 * expected_D.abs() + 2**-9
            assert near_D.float().mean() > 0.9
