"""What is counted of the experts while the engine runs, against the rows that the layers really had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.expert_rows import ExpertRows, Figures
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.ops.capacity import CapacityRule
from mixtralkit.ops.capacity.reference import cut_to_capacity_reference
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.server.live import rank_shares
from tests.engine.parts import engine_config
from tests.ranks import run_ranks

LAYERS, EXPERTS = engine_config().n_layers, engine_config().num_experts


class Watch:
    """Counts, on one rank, what layers choose, what a capacity leaves by the reference, and the rows they compute."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.choices_LE = np.zeros((LAYERS, EXPERTS), np.int64)
        self.cut_2L, self.hits_2L = np.zeros((2, LAYERS), np.int64), np.zeros((2, LAYERS), np.int64)
        self.computed_L = np.zeros(LAYERS, np.int64)
        for layer, block in enumerate(model.layers):
            block.feed_forward.experts.register_forward_pre_hook(lambda _, args, layer=layer: self._ran(layer, *args))

    def _ran(self, layer: int, rows) -> None:
        self.computed_L[layer] += int((rows.slots_RK >= 0).sum())

    def __call__(self, batch, reports) -> None:
        plan, rule = self.model.layout.plan, CapacityRule.of(self.model.layout.plan)
        for layer, report in enumerate(reports):
            routing, everywhere = report.routing, plan.holds_LWE[layer].all(0)
            copied = set() if report.shadows is None else set(report.shadows.experts)
            for expert in routing.experts_TK.flatten().tolist():
                self.choices_LE[layer, expert] += 1
                self.hits_2L[0, layer] += everywhere[expert]
                self.hits_2L[1, layer] += expert in copied and not everywhere[expert]
            if rule is not None:
                local_E = self.model.store.tables[layer].local_E
                cut = cut_to_capacity_reference(
                    routing.experts_TK, routing.weights_TK, routing.logits_TE, local_E, rule
                )
                self.cut_2L[:, layer] += cut.dropped.item(), cut.rerouted.item()


def _run(context: RankContext, folder: Path, attention: str, plan: ExpertPlan, options: MoEOptions) -> tuple:
    model = Transformer(RankLayout(engine_config(), ParallelConfig(attention, "ep"), plan, context.rank), context,
                        options=options)  # fmt: skip
    model.initialize(3, std=0.15)
    watch = Watch(model)
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"), observe=watch)
    engine.expert_rows = ExpertRows(model)
    # lengths that no token ends, so that no step has a row too many
    requests = [Request(i, tuple(range(5, 9 + 3 * i)), 9, SamplingOptions(temperature=0), ignore_eos=True)
                for i in range(6)]  # fmt: skip
    engine.complete(requests)
    sums = context.all_gather_objects(engine.expert_rows.read())
    figures = Figures.of(np.array(sums[: model.ranks_with_own_sequences]), LAYERS, EXPERTS)
    computed_LW = np.stack(context.all_gather_objects(watch.computed_L), axis=1)
    seen = context.all_gather_objects((watch.choices_LE, watch.cut_2L, watch.hits_2L))
    return figures, rank_shares(model, figures), computed_LW, seen[: model.ranks_with_own_sequences]


def plan_of(factor: float | None, **more) -> ExpertPlan:
    """Expert 0 on both ranks, expert 1 of layer 1 too; the others on one."""
    slots = np.tile(np.array([[0, 1, 2, 3, -1], [4, 5, 6, 7, 0]]), (LAYERS, 1, 1))
    slots[1, 1, 3] = 1
    slots[1, 0, 4] = 7
    return ExpertPlan(slots, EXPERTS, cold_capacity_factor=factor, **more)


@pytest.mark.parametrize("attention", ["dp", "tp"])
@pytest.mark.parametrize(
    "plan", [plan_of(None), plan_of(0.5), plan_of(0.5, overflow="reroute")], ids=["no limit", "drop", "reroute"]
)
def test_they_are_what_the_layers_did(folder, attention, plan):
    for figures, shares_LW, computed_LW, seen in run_ranks(_run, 2, folder, attention, plan, MoEOptions()):
        choices, cut, hits = (sum(parts) for parts in zip(*seen, strict=True))
        assert (figures.choices_LE == choices).all()
        assert (figures.cut_S2L.sum(0) == cut).all()
        assert (figures.hits_S2L.sum(0) == hits).all()
        assert hits[0].all(), "experts that are everywhere were chosen"
        assert not hits[1].any()
        assert cut.any() == (plan.cold_capacity_factor is not None)
        assert (computed_LW.sum(1) == choices.sum(1) - cut[0]).all(), "what is dropped nobody computes"
        if not cut.any():
            assert shares_LW.sum(1) == pytest.approx(np.ones(LAYERS))
            within = 1e-9 if attention == "dp" else 0.06  # under tp an expert's replicas take turns by row
            assert shares_LW == pytest.approx(computed_LW / choices.sum(1, keepdims=True), abs=within)


def test_hits_of_shadows_are_counted(folder):
    """Copies come and go between steps."""
    faster = FasterOptions(shadow=True, net_bandwidth=1e12, gpu_throughput=1e6)
    options = MoEOptions(exchange="exact", shadow_memory_gb=0.001, faster=faster)
    plan = plan_of(None)
    for figures, _, _, seen in run_ranks(_run, 2, folder, "dp", plan, options):
        hits = sum(each[2] for each in seen)
        assert (figures.hits_S2L.sum(0) == hits).all()
        assert hits[1].any()
