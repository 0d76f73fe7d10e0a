"""How many experts a budget leaves room for, and what a person is told where it leaves too little."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mixtralkit.config import EngineConfig, ModelConfig, TierOptions, shipped
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.tiers import room, tier_setup
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.memory import RESERVE_GB, Room, rank_memory

MIXTRAL = ModelConfig.from_file(shipped("models", "mixtral-8x7b"))
GPU = RankContext(device=torch.device("cuda"))


def setup_of(budget: float | None, quantize: str | None = "int4:128", plan=None, host: float | None = None, **limits):
    layout = replace(RankLayout.single(MIXTRAL.with_limits(2048, 1)), weights=parse_weights(quantize))
    layout = layout if plan is None else replace(layout, plan=plan(layout.plan))
    tiers = TierOptions(gpu_memory_gb=budget, host_memory_gb=host)
    return tier_setup(layout, GPU, EngineConfig.of(tiers=tiers, quantize=quantize, **limits), torch.bfloat16)


@pytest.fixture(autouse=True)
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_free_bytes", lambda: int(200e9))


@pytest.mark.parametrize("budget", [6.5, 8.0, 12.0, 16.0, 24.0])
@pytest.mark.parametrize("quantize", ["int4:128", "fp8:channel", None])
def test_places_are_what_the_budget_leaves(budget: float, quantize: str | None) -> None:
    if quantize is None and budget < 8:
        with pytest.raises(ValueError, match=r"gpu_memory_gb \(6\.5\) must be at least 7\.\d+: .* for 10 of these"):
            setup_of(budget, quantize)
        return
    setup = setup_of(budget, quantize, prefill_budget=512)
    weights = parse_weights(quantize)
    size = weights.expert_bytes(MIXTRAL.dim, MIXTRAL.hidden_dim)
    plan = RankLayout.single(MIXTRAL).plan
    nothing = replace(plan, tier=(("host",) * 8,) * 32)
    config = MIXTRAL.with_limits(2048, 1)
    rest = rank_memory(config, RankLayout.single(config).parallel, nothing, Room(1, 2048, 512, None, weights=weights))
    taken = rest.total + setup.places * size / 1e9 + RESERVE_GB
    assert budget - size / 1e9 < taken <= budget
    assert (setup.piece_rows is None) == weights.is_plain


def test_what_fits_is_no_tier_and_a_plan_may_say_it() -> None:
    assert setup_of(40.0) is None
    assert setup_of(None) is None
    tier = (("gpu",) * 3 + ("host",) * 5,) * 32
    assert setup_of(None, plan=lambda plan: replace(plan, tier=tier)).places == 96


def test_experts_of_several_formats_fit_or_are_refused() -> None:
    """17 GB in int4 and 11 in int8, beside 4 of all else."""
    mixed = (("int4:128",) * 6 + ("int8",) * 2,) * 32
    said = r"needs all experts in one format, and the plan's precision has int4:128, int8"
    assert setup_of(40.0, plan=lambda plan: replace(plan, precision=mixed)) is None
    with pytest.raises(ValueError, match=rf"gpu_memory_gb \(24\), below the 3\d\.\d+ of all, {said}"):
        setup_of(24.0, plan=lambda plan: replace(plan, precision=mixed))
    tier = (("gpu",) * 3 + ("host",) * 5,) * 32
    with pytest.raises(ValueError, match=rf"a plan with experts in the host's memory {said}"):
        setup_of(None, plan=lambda plan: replace(plan, precision=mixed, tier=tier))


def test_the_host_must_have_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"host_memory_gb \(20\) must be at least 23\.25, .* or the checkpoint one that"
    ):
        setup_of(16.0, host=20.0)
    assert setup_of(16.0, host=24.0).places > 100
    monkeypatch.setattr(room, "_free_bytes", lambda: int(20e9))
    with pytest.raises(ValueError, match=r"the host has 20 GB free for 1 ranks with 23\.3 GB of experts each"):
        setup_of(16.0)


def test_layers_without_room_stay_in_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    one_rank = SimpleNamespace(found=SimpleNamespace(layouts=(RankLayout.single(MIXTRAL),)))
    foreign = SimpleNamespace(found=SimpleNamespace(layouts=()))
    sizes = dict.fromkeys(range(4), int(10e9))
    assert room._beyond(sizes, None, GPU, one_rank) == []
    assert room._beyond(sizes, 25.0, GPU, one_rank) == [2, 3]
    monkeypatch.setattr(room, "_free_bytes", lambda: int(19e9))
    assert room._beyond(sizes, None, GPU, one_rank) == [1, 2, 3]
    assert room._beyond(sizes, 9.0, GPU, one_rank) == [0, 1, 2, 3]
    for reader in (foreign, None):
        with pytest.raises(ValueError, match="the host has 19 GB free for 1 ranks with 40 GB of experts each"):
            room._beyond(sizes, None, GPU, reader)
    with pytest.raises(ValueError, match=r"host_memory_gb \(30\) must be at least 40"):
        room._beyond(sizes, 30.0, replace(GPU, world_size=2), one_rank)
