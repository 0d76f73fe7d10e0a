"""Plans that change between steps: the same tokens, moves that pay, one layer a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.config import EngineConfig, FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext, RankFailed
from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.engine.plan_manager import PlanManager, nearest_ranks, nearest_slots, with_layer
from mixtralkit.engine.plan_policies import make_policy
from mixtralkit.engine.plan_statistics import PAUSE_BOUNDS_MS, Pauses, PlanStatistics
from mixtralkit.engine.statistics import MoEStatistics
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.mixtral import Mixtral
from mixtralkit.moe.transfers import transfers
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.dispatchers import Surroundings
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.popularity import PathPopularity
from mixtralkit.planning.synthetic import RoutingProcess
from tests.engine.parts import engine_config, make_checkpoint, make_model, make_tokenizer
from tests.moe.layers import random_plan
from tests.planning.machines import machine
from tests.ranks import run_command, run_ranks

CKPTS = Path(__file__).resolve().parent.parent.parent / "ckpts"
PROMPTS = ["In the beginning", "def read(path):\n", "NAME\n       tar -", "The function returns", "Moses"]
NEW_TOKENS = 9
# Shadows are cheap in this model's eyes, so that the policy takes some.
EAGER = {"net_bandwidth": 1e13, "gpu_throughput": 1e9}


class AnyPlan:
    """A policy that takes another random plan every time: replicas, uneven ranks, hot experts."""

    def __init__(self) -> None:
        self.seed = 0

    def __call__(self, loads_1E: np.ndarray, tokens: int) -> ExpertPlan:
        self.seed += 1
        return random_plan(self.seed, loads_1E.shape[1], self.world_size)

    def on(self, world_size: int) -> AnyPlan:
        self.world_size = world_size
        return self


class AsManySlots(AnyPlan):
    """A policy that takes another random plan every time, with all ranks' slots as many as at first."""

    def __call__(self, loads_1E: np.ndarray, tokens: int) -> ExpertPlan:
        self.seed += 1
        experts = np.random.default_rng(self.seed).permutation(loads_1E.shape[1])
        return ExpertPlan(experts.reshape(1, self.world_size, -1), loads_1E.shape[1])


@dataclass(frozen=True)
class Way:
    attention: str = "dp"
    exchange: str = "auto"
    schedule: bool = False
    shadow: bool = False
    nodes: int | None = None
    batch: int = 8
    symmetric_rows: int | None = None
    popularity: Path | None = None

    def options(self) -> MoEOptions:
        faster, dynamic = FasterOptions(self.schedule, self.shadow, **EAGER), "two_phase" if self.popularity else "none"
        return MoEOptions(faster, self.exchange, self.symmetric_rows, dynamic=dynamic, popularity=self.popularity)


WAYS = [
    Way("tp"),
    Way("tp", batch=2),
    Way(symmetric_rows=1),
    Way(batch=2),
    Way(exchange="static", shadow=True),
    Way(exchange="exact", schedule=True, shadow=True),
    Way(exchange="exact", nodes=2),
]


@cache
def _layers() -> int:
    return open_checkpoint(CKPTS).config.n_layers


def _load(context: RankContext, way: Way) -> Mixtral:
    plan = replace(contiguous(_layers(), 8, context.world_size), ranks_per_node=way.nodes)
    return Mixtral.load(
        EngineConfig.of(
            model=CKPTS, max_seq_len=64, max_batch_size=way.batch, dtype="float32", attention=way.attention,
            experts="ep", plan=plan, moe=way.options(),
        ),
        context,
    )  # fmt: skip


def _tokens(mixtral: Mixtral) -> list[list[int]]:
    return [completion.tokens for completion in mixtral.complete(PROMPTS, NEW_TOKENS, temperature=0)]


def _text(context: RankContext, ways: list[Way]) -> list[tuple[list[list[int]], PlanStatistics, int]]:
    found = []
    for way in ways:
        mixtral = _load(context, way)
        manager = PlanManager(mixtral.model, AnyPlan().on(context.world_size), update_step=2)
        mixtral.engine.plan_manager = manager
        counted = mixtral.engine.observe = None if way.popularity is None else MoEStatistics(mixtral.model)
        answers = _tokens(mixtral)
        layout = mixtral.model.layout
        shapes = {name: tuple(tensor.shape) for name, tensor in mixtral.model.named_tensors().items()}
        assert shapes == layout.shapes()
        assert mixtral.engine._runner is not None
        if counted is not None:
            assert sum(layer.shadows for layer in counted.totals()) > 0
            assert sum(layer.estimates for layer in counted.phases.totals()) > 0
        found.append((answers, manager.statistics, layout.plan.slots_LWS.tolist()))
    return found


@cache
def _alone() -> list[list[int]]:
    return _tokens(_load(RankContext(), Way("tp")))


@pytest.mark.parametrize("world_size", [2, 4])
def test_moving_experts_changes_no_token(world_size, tmp_path):
    """Also where two phases copy experts ahead by an estimate, while others move for good."""
    profile = tmp_path / "popularity.npz"
    trace = RoutingProcess.random(6, 8, seed=1).trace(2000, sequence_length=100, seed=1)
    PathPopularity.fit(trace, 2).save(profile)
    ways = [way for way in WAYS if way.nodes != world_size]
    ways += [Way(exchange="exact", popularity=profile), Way(popularity=profile, batch=2)]
    results = run_ranks(_text, world_size, ways, timeout_s=280)
    for place, way in enumerate(ways):
        answers, statistics, _ = results[0][place]
        assert answers == _alone(), way
        assert statistics.adopted == statistics.considered >= 2
        assert statistics.layers_moved > 6
        assert statistics.experts_moved > 12
        assert statistics.pauses.count == statistics.layers_moved + statistics.layers_kept
        assert statistics.launched_steps > 0
        assert all(of_rank[place] == results[0][place] for of_rank in results), "ranks must do the same"


def small_model(context: RankContext, attention: str = "dp", **changes):
    return make_model(context, engine_config(num_experts=8, num_experts_per_tok=2, **changes), attention)


def _counted(context: RankContext, attention: str, folder: Path):
    """Loads as the policy saw them, against those of every rank's routing, and moves between consecutive steps."""
    mixtral = Mixtral.from_parts(small_model(context, attention), Tokenizer(folder / "tokenizer.model"))
    seen, moved, steps = [], [], []

    def policy(loads_1E: np.ndarray, tokens: int) -> ExpertPlan:
        seen.append(loads_1E[0].tolist())
        return random_plan(len(seen), 8, context.world_size)

    manager = PlanManager(mixtral.model, policy, update_step=4)
    mixtral.engine.plan_manager = manager

    def observe(batch, reports) -> None:
        steps.append([np.bincount(r.routing.experts_TK.flatten().numpy(), minlength=8).tolist() for r in reports])
        moved.append(manager.statistics.layers_moved)

    mixtral.engine.observe = observe
    mixtral.complete([[1, 5 + i, 7] for i in range(6)], 12, temperature=0)
    return seen, moved, steps


@pytest.mark.parametrize("attention", ["dp", "tp"])
def test_loads_are_those_of_all_ranks_and_a_step_waits_for_one_layer(attention, tmp_path):
    make_tokenizer(tmp_path)
    results = run_ranks(_counted, 2, attention, tmp_path)
    seen, moved, _ = results[0]
    steps = np.array([of_rank[2] for of_rank in results])
    layers = steps.shape[2]
    steps = steps.sum(0) if attention == "dp" else steps[0]
    np.testing.assert_array_equal(seen[:layers], steps[:2].sum(0))  # the first half of the first window
    assert len(seen) >= 2 * layers
    assert set(np.diff(moved)) == {0, 1}
    assert results[1][0] == [], "one rank plans"


def _failing(context: RankContext, folder: Path) -> str:
    mixtral = Mixtral.from_parts(small_model(context), Tokenizer(folder / "tokenizer.model"))

    def policy(loads_1E: np.ndarray, tokens: int) -> ExpertPlan:
        raise ValueError("no plan today")

    mixtral.engine.plan_manager = PlanManager(mixtral.model, policy, update_step=2)
    try:
        mixtral.complete([[1, 5, 7]], 12, temperature=0)
    except (ValueError, RankFailed) as error:
        return str(error)
    return "no error"


def test_a_policy_that_fails_stops_all_ranks(tmp_path):
    make_tokenizer(tmp_path)
    assert run_ranks(_failing, 2, tmp_path) == ["no plan today", "rank 0: no plan today"]


MACHINE = machine()
SHAPE = ModelShape(4096, 14336, 8, 2, 32, 8, 128, 32000)
SKEWED = np.array([[40, 30, 5, 5, 5, 5, 5, 5]])
NOW, EVENED = contiguous(1, 8, 4), ExpertPlan(np.array([[[0, 2], [1, 3], [4, 5], [6, 7]]]), 8)


def test_a_move_pays_only_over_enough_steps():
    judge = MoveJudge(SHAPE, MACHINE, 1, Surroundings("dp", "ep", 4, exchange="exact"))
    gain_s, move_s = judge.gain_s(NOW, EVENED, SKEWED, 256), judge.move_s(NOW, EVENED)
    assert gain_s > 0
    least = int(move_s / gain_s) + 1
    assert least > 1
    for steps, pays in ((least - 1, False), (least, True)):
        assert replace(judge, steps=steps).pays(NOW, EVENED, SKEWED, 256) is pays
    assert not replace(judge, steps=least, margin=2.0).pays(NOW, EVENED, SKEWED, 256)
    even = np.full((1, 8), 10)
    assert not replace(judge, steps=1000).pays(EVENED, ExpertPlan(EVENED.slots_LWS[:, ::-1], 8), even, 256)


def test_the_price_of_a_move_is_the_busiest_ranks_bytes():
    judge = MoveJudge(SHAPE, MACHINE, 1, Surroundings("dp", "ep", 4))
    assert [way.target for way in transfers(NOW.holds_LWE[0], EVENED.holds_LWE[0])] == [1, 0]
    link = MACHINE.inside.exchange
    latency_s = MACHINE.inside.latency_s("exchange", 4)
    copied_s = 2 * SHAPE.expert_bytes / MACHINE.memory_bandwidth  # ranks 0 and 1 get one each, in place
    assert judge.move_s(NOW, EVENED) == pytest.approx(SHAPE.expert_bytes / link.bandwidth + latency_s + copied_s)
    more = ExpertPlan(np.array([[[0, 1, 2], [2, 3, -1], [4, 5, -1], [6, 7, -1]]]), 8)
    copied_s = 2 * 2 * SHAPE.expert_bytes / MACHINE.memory_bandwidth  # all keep two, in new memory
    assert judge.move_s(NOW, more) == pytest.approx(SHAPE.expert_bytes / link.bandwidth + latency_s + copied_s)


@pytest.mark.parametrize("seed", range(10))
def test_ranks_are_matched_so_that_fewest_experts_move(seed):
    old, new = (random_plan(seed + 50 * i, 8, 4) for i in (0, 1))
    holds_WE = new.holds_LWE[0]
    shuffled = new.slots_LWS[0][np.random.default_rng(seed).permutation(4)]
    found = ExpertPlan(nearest_ranks(old.holds_LWE[0], shuffled)[None], 8).holds_LWE[0]
    assert sorted(map(tuple, found)) == sorted(map(tuple, holds_WE))
    assert len(transfers(old.holds_LWE[0], found)) <= len(transfers(old.holds_LWE[0], holds_WE))
    on_nodes = ExpertPlan(nearest_ranks(old.holds_LWE[0], new.slots_LWS[0], 2)[None], 8).holds_LWE[0]
    for node in (slice(0, 2), slice(2, 4)):
        assert sorted(map(tuple, on_nodes[node])) == sorted(map(tuple, holds_WE[node]))


@pytest.mark.parametrize("seed", range(10))
def test_what_a_rank_keeps_stays_in_its_slot(seed):
    old, new = (random_plan(seed + 50 * i, 8, 4) for i in (0, 1))
    found = ExpertPlan(nearest_slots(old.slot_of_LWE[0], new.slots_LWS[0])[None], 8)
    assert (found.holds_LWE == new.holds_LWE).all()
    before_WE, after_WE = old.slot_of_LWE[0], found.slot_of_LWE[0]
    room_WE = before_WE < found.holds_LWE[0].sum(1)[:, None]
    kept_WE = (before_WE >= 0) & (after_WE >= 0) & room_WE
    assert (after_WE == before_WE)[kept_WE].all()


def test_pauses_are_sorted_by_length():
    pauses = Pauses()
    for ms in (0.5, 1.0, 7.0, 5000.0):
        pauses = pauses.with_one(ms / 1e3)
    assert pauses.histogram == (1, 1, 0, 1, *[0] * (len(PAUSE_BOUNDS_MS) - 4), 1)
    assert (pauses.count, pauses.longest_s) == (4, 5.0)
    assert pauses.mean_s == pytest.approx(5.0085 / 4)
    assert Pauses().mean_s == 0.0


def test_one_layer_of_a_plan_is_replaced():
    plan = replace(contiguous(3, 8, 2), cold_capacity_factor=1.5)
    wide = np.array([[0, 1, 2, 3, 4], [4, 5, 6, 7, -1]])
    found = with_layer(plan, 1, wide)
    assert found.slots_LWS[1].tolist() == wide.tolist()
    assert found.experts_of(0, 0) == found.experts_of(2, 0) == (0, 1, 2, 3)
    assert found.cold_capacity_factor == 1.5
    assert with_layer(found, 1, plan.slots_LWS[1]).experts_of(1, 1) == (4, 5, 6, 7)


@pytest.mark.parametrize("name", ["contiguous", "hot_cold", "two_phase", "balanced", "shadow", "auto"])
def test_policies_by_name_keep_to_their_slots(name):
    model = _plan_only(contiguous(2, 8, 4))
    policy = make_policy(name, model, MoveJudge.for_model(model, MACHINE, 64), slots_per_rank=3)
    plan = policy(SKEWED, 64)
    plan.check_fits(1, 8, 4)
    assert plan.holds_LWE.sum(2).max() <= 3
    if name == "balanced":
        assert plan.holds_LWE[0, :, 0].sum() > 1


def _plan_only(plan: ExpertPlan):
    """What policy and judge read of a model of several ranks, on one."""
    model = small_model(RankContext(), n_layers=2)
    model.layout = replace(model.layout, plan=plan)
    return model


def test_replicas_need_slots():
    model = _plan_only(contiguous(2, 8, 4))
    make = partial(make_policy, model=model, judge=MoveJudge.for_model(model, MACHINE, 64))
    assert make("balanced")(SKEWED, 64).holds_LWE.sum() == 8
    assert make("hot_cold", hot_experts=2)(SKEWED, 64).holds_LWE[0].all(0).tolist() == [True] * 2 + [False] * 6
    with pytest.raises(ValueError, match="affinity"):
        make("affinity")
    with pytest.raises(ValueError, match=r"slots_per_rank \(1\) must be at least 2"):
        make("balanced", slots_per_rank=1)
    with pytest.raises(ValueError, match=r"hot_experts \(2\) needs policy 'hot_cold'"):
        make("balanced", hot_experts=2)
    with pytest.raises(ValueError, match=r"hot_experts \(9\) must lie in 0"):
        make("hot_cold", hot_experts=9)


def test_what_cannot_be_managed():
    policy = AnyPlan().on(1)
    with pytest.raises(ValueError, match=r"update_step \(1\) must be at least 2"):
        PlanManager(small_model(RankContext()), policy, 1)
    model = make_model(RankContext(), engine_config(), experts="tp")
    with pytest.raises(ValueError, match="update_step needs experts 'ep', not 'tp'"):
        PlanManager(model, policy, 8)
    with pytest.raises(ValueError, match=r"margin \(-1\)"):
        MoveJudge(SHAPE, MACHINE, 8, Surroundings("dp", "ep", 4), margin=-1)


def test_one_rank_has_nothing_to_move(tmp_path):
    mixtral = Mixtral.from_parts(small_model(RankContext()), make_tokenizer(tmp_path))
    model = mixtral.model
    judge = MoveJudge.for_model(model, MACHINE, 4)
    mixtral.engine.plan_manager = manager = PlanManager(model, make_policy("balanced", model, judge), 4, judge)
    mixtral.complete([[1, 5, 7]], 12, temperature=0)
    assert manager.statistics.considered > 0
    assert manager.statistics.layers_moved == 0


@pytest.mark.slow
def test_the_command_says_what_became_of_its_plans(tmp_path, command_line):
    make_checkpoint(tmp_path, engine_config(max_seq_len=256))
    options = ("generate", "-m", tmp_path, "--max_gen_len", 20, "--temperature", 0, "--attention", "dp")
    options += ("--device", "cpu")
    managed, other = run_command(2, *options, "--update_step", 4, "--policy", "balanced", "--slots_per_rank", 5)
    assert managed.returncode == other.returncode == 0, managed.stderr
    assert "plans: " in managed.stderr
    assert managed.stdout == command_line(*options).stdout
    assert other.stdout == ""
    wrong = command_line(*options, "--update_step", 4, "--policy", "best")
    assert wrong.returncode == 1
    assert "policy ('best') must be one of contiguous, hot_cold" in wrong.stderr


def test_a_manager_may_come_after_a_run(tmp_path):
    """Steps made without one did not count choices, and the manager's first step failed."""
    mixtral = Mixtral.from_parts(small_model(RankContext()), make_tokenizer(tmp_path))
    wanted = mixtral.complete([[1, 5, 7]], 6, temperature=0)[0].tokens
    mixtral.engine.plan_manager = PlanManager(mixtral.model, AnyPlan().on(1), update_step=2)
    assert mixtral.complete([[1, 5, 7]], 6, temperature=0)[0].tokens == wanted
    assert mixtral.engine.plan_manager.statistics.launched_steps > 0
