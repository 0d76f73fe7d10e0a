"""Decode steps while plans change: graphs go on or are forgotten, the same tokens, choices counted in the step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine import runner
from mixtralkit.engine.graphs import Graphs, Run
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.requests import Request
from mixtralkit.engine.runner import Runner
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.mixtral import Mixtral
from mixtralkit.moe.store import ExpertStore
from tests.engine.parts import make_tokenizer
from tests.engine.test_plan_manager import AnyPlan, AsManySlots, small_model
from tests.ranks import RankError, run_ranks


class AddressGraphs:
    """Graphs as a GPU has them, but for the capture: a replay needs what the steps read to be where it was then."""

    def __init__(self, steps: Callable[[], Runner]) -> None:
        self.steps, self.captured, self.forgotten = steps, {}, set()

    def addresses(self) -> list[tuple]:
        model = self.steps().model
        tables = [t for table in model.store.tables.values() for t in (table.local_E, table.places_2EC, table._own_2EC)]
        tensors = [*model.named_tensors().values(), *tables]
        return [(x.data_ptr(), x.shape, x.stride()) for x in tensors]

    def run(self, key, function, rehearse, may_capture=True) -> Run:
        if key not in self.captured and not may_capture:
            return Run(function())
        again = 0.0
        if key not in self.captured:
            rehearse()
            self.captured[key], again = self.addresses(), float(key in self.forgotten)
        if self.captured[key] != self.addresses():
            raise RuntimeError("replay of a stale graph")
        return Run(function(), True, again)

    def forget(self) -> None:
        self.forgotten |= self.captured.keys()
        self.captured.clear()


def _requests(count: int) -> list[Request]:
    """More than run at a time, of different lengths, so that requests come in all the time."""
    greedy = SamplingOptions(temperature=0)
    return [Request(i, tuple(range(5, 8 + 2 * i)), 12 + 5 * (i % 4), greedy) for i in range(count)]


def _with_graphs(context: RankContext, folder: Path, attention: str, policy: AnyPlan | None, follows: bool = True):
    """Answers, statistics, and kinds of the steps in their order: g for a graph, l for launched, m for mixed."""
    mixtral = Mixtral.from_parts(small_model(context, attention), Tokenizer(folder / "tokenizer.model"))
    engine, kinds = mixtral.engine, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Graphs", lambda device, enabled: AddressGraphs(lambda: engine._runner))
        if not follows:
            adopt = ExpertStore.adopt

            def silent(store: ExpertStore, *moved):
                report = adopt(store, *moved)
                store.relocations = 0
                return report

            patch.setattr(ExpertStore, "adopt", silent)
        if policy is not None:
            engine.plan_manager = PlanManager(mixtral.model, policy.on(context.world_size), update_step=6)
            launched = engine.plan_manager.launched

            def noted(flight) -> None:
                kinds.append(flight.kind[0])
                launched(flight)

            engine.plan_manager.launched = noted
        answers = [completion.tokens for completion in engine.complete(_requests(7))]
    return answers, engine.plan_manager and engine.plan_manager.statistics, "".join(kinds)


WAYS = [(attention, policy) for attention in ("tp", "dp") for policy in (AnyPlan, AsManySlots)]


def _every_way(context: RankContext, folder: Path) -> list[tuple]:
    return [_with_graphs(context, folder, attention, policy()) for attention, policy in WAYS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A folder with the tokenizer, and the answers of one rank whose plan stays."""
    folder = tmp_path_factory.mktemp("graphs")
    make_tokenizer(folder)
    return folder, _with_graphs(RankContext(), folder, "tp", None)[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_graphs_follow_the_plan(world_size, undisturbed):
    """The tokens of an undisturbed run on one rank; no graph is replayed whose memory has moved."""
    folder, wanted = undisturbed
    found = [zip(WAYS, of_rank, strict=True) for of_rank in run_ranks(_every_way, world_size, folder, timeout_s=280)]
    for (attention, policy), (answers, statistics, kinds) in itertools.chain.from_iterable(found):
        assert answers == wanted, (attention, policy)
        assert statistics.graph_steps == kinds.count("g")
        assert statistics.launched_steps == kinds.count("l")
        assert statistics.plain_steps > 2
        assert statistics.considered > 3
        assert statistics.plain_steps == kinds.count("m")
        assert kinds[0] == "m"
        assert kinds.count("g") > 20
        if world_size == 1:
            assert statistics.layers_moved == 0
        elif policy is AnyPlan:
            assert statistics.layers_relocated > 6
            assert statistics.recaptures > 1
            assert "lg" in kinds, "graphs come back behind a pass"
        else:
            assert statistics.layers_moved > 6
            assert statistics.layers_relocated == statistics.recaptures == 0


def test_a_stale_graph_would_be_noticed(tmp_path):
    make_tokenizer(tmp_path)
    with pytest.raises(RankError, match="replay of a stale graph"):
        run_ranks(_with_graphs, 2, tmp_path, "tp", AnyPlan(), False)


def _counts_of_decode_steps(context: RankContext, attention: str, folder: Path) -> tuple[list, list]:
    """What the manager has counted after a run, and what all steps' observers have seen."""
    mixtral = Mixtral.from_parts(small_model(context, attention), Tokenizer(folder / "tokenizer.model"))
    manager = PlanManager(mixtral.model, AnyPlan().on(context.world_size), update_step=1000)
    seen_LE = np.zeros((mixtral.model.params.n_layers, 8), int)

    def observe(batch, reports) -> None:
        for layer, report in enumerate(reports):
            seen_LE[layer] += np.bincount(report.routing.experts_TK.flatten().numpy(), minlength=8)

    mixtral.engine.plan_manager, mixtral.engine.observe = manager, observe
    mixtral.complete([[1, 5 + i, 7] for i in range(5)], 9, temperature=0)
    assert manager.statistics.launched_steps > 8
    return manager._counts_HLE.sum(0).tolist(), seen_LE.tolist()


@pytest.mark.parametrize("attention", ["dp", "tp"])
def test_decode_steps_count_every_sequence_once(attention, tmp_path):
    """And no row that only fills the shape: five sequences take steps of five, and over two ranks of three rows."""
    make_tokenizer(tmp_path)
    for counted, seen in run_ranks(_counts_of_decode_steps, 2, attention, tmp_path):
        assert counted == seen


class _Captured:
    """In place of a CUDA graph."""

    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def replay(self) -> None:
        self.said.append(self.name)


def test_graphs_that_were_forgotten_are_captured_again(monkeypatch):
    said: list[str] = []
    graphs, captures = Graphs(torch.device("cpu")), iter("abc")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(graphs, "is_on", True)
    monkeypatch.setattr(graphs, "_capture", lambda function, rehearse: (_Captured(said, next(captures)), function()))

    def run(may_capture: bool = True) -> Run:
        return graphs.run("key", lambda: said.append("called"), lambda: None, may_capture)

    assert not run(may_capture=False).replayed
    first, second = run(), run(may_capture=False)
    assert first == second == Run(None, True, 0.0)
    graphs.forget()
    assert not run(may_capture=False).replayed
    again = run()
    assert again.replayed
    assert again.recapture_s > 0
    assert run().recapture_s == 0
    assert said == ["called", "called", "a", "a", "called", "called", "b", "b"]
