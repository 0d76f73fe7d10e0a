"""The variants of ``MoELayer`` that ``bench_moe_layer.py`` compares, each as a whole and in phases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from layer_cases import INPUT_SETS, Case, GivenGate
from layer_counts import Counts, by_rows, computed, members, there_and_back, to_all
from layer_ways import FastMoEWay, LoopWay, PaddedWay, Phase, Unavailable, Way

from mixtralkit.config import MoEOptions, ParallelConfig
from mixtralkit.layout import RankLayout
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.coherent import CoherentDispatch
from mixtralkit.moe.dispatch import ExchangedDispatch, StaticDispatch, for_rank, start_rows
from mixtralkit.moe.gate import Routing
from mixtralkit.moe.layer import MoELayer
from mixtralkit.moe.schedule import num_chunks, run_in_chunks
from mixtralkit.moe.shadow import ShadowCache
from mixtralkit.moe.two_phase import TwoPhase
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.runtime import tuned
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.policies.balanced import balanced
from mixtralkit.planning.policies.hot_cold import hot_cold
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.popularity import PathPopularity
from mixtralkit.planning.trace import RoutingTrace


@dataclass(frozen=True)
class Variant:
    """A way to run ``MoELayer``.

    Attributes:
        plan: contiguous, hot_cold (the busiest expert of the profile on every rank), balanced (EPLB's policy with a
            slot more than the experts need) or everywhere.
        exchange: exact, static, peer (the GPUs' memory) or coherent (rows stay where they are computed).
        experts: ep, or tp; with ``rows_everywhere`` every rank has all ranks' rows, as attention tp leaves them.
    """

    plan: str = "contiguous"
    exchange: str = "exact"
    experts: str = "ep"
    rows_everywhere: bool = False
    capacity: float | None = None
    schedule: bool = False
    shadow: bool = False
    two_phase: bool = False

    @property
    def captures(self) -> bool:
        """Whether no part of it waits for the host."""
        return self.exchange in ("static", "peer") or self.rows_everywhere


VARIANTS = {
    "contiguous": Variant(),
    "contiguous+schedule": Variant(schedule=True),
    "contiguous+static": Variant(exchange="static"),
    "contiguous+peer": Variant(exchange="peer"),
    "contiguous+coherent": Variant(exchange="coherent"),
    "hot_cold": Variant("hot_cold"),
    "hot_cold+schedule": Variant("hot_cold", schedule=True),
    "hot_cold+static": Variant("hot_cold", "static"),
    "hot_cold+peer": Variant("hot_cold", "peer"),
    "hot_cold+coherent": Variant("hot_cold", "coherent"),
    "hot_cold+capacity1.0": Variant("hot_cold", capacity=1.0),
    "hot_cold+capacity0.5": Variant("hot_cold", capacity=0.5),
    "balanced": Variant("balanced"),
    "balanced+schedule": Variant("balanced", schedule=True),
    "balanced+static": Variant("balanced", "static"),
    "balanced+peer": Variant("balanced", "peer"),
    "shadow": Variant(shadow=True),
    "shadow+schedule": Variant(shadow=True, schedule=True),
    "two_phase": Variant(shadow=True, two_phase=True),
    "everywhere": Variant("everywhere"),
    "everywhere+peer": Variant("everywhere", "peer"),
    "tensor_parallel": Variant(experts="tp"),
    "tensor_parallel+sums": Variant(experts="tp", rows_everywhere=True),
}
BASELINES = ("loop_over_experts", "padded_all_gather")
NAMED_ONLY = ("fastmoe",)  # not among "all": the real library is seldom there


def way_of(name: str, case: Case) -> Way:
    """The variant or baseline of that name. Collective.

    Raises:
        Unavailable: it cannot run here.
        ValueError: fastmoe without the library.
    """
    others = {"loop_over_experts": LoopWay, "padded_all_gather": PaddedWay, "fastmoe": FastMoEWay}
    return others[name](case) if name in others else LayerWay(case, VARIANTS[name])


def plan_of(case: Case, variant: Variant) -> ExpertPlan:
    """The variant's plan, made from the case's profile."""
    config, world = case.bench.config, case.bench.context.world_size
    layers, experts = config.n_layers, config.num_experts
    match variant.plan:
        case "contiguous":
            plan = contiguous(layers, experts, world)
        case "hot_cold":
            plan = hot_cold(case.profile_loads_LE, world, hot_experts=1)
        case "balanced":
            slots = min(experts, -(-experts // world) + 1)
            plan = balanced(case.profile_loads_LE, world, Budget(slots_per_rank=slots))
        case "everywhere":
            plan = everywhere(layers, experts, world)
    return replace(plan, cold_capacity_factor=variant.capacity)


class LayerWay:
    """``MoELayer``: a layer for each set of weights, or for each call where layers follow one another."""

    def __init__(self, case: Case, variant: Variant) -> None:
        bench, world = case.bench, case.bench.context.world_size
        self.case, self.variant, self.context = case, variant, bench.context
        self.captures = variant.captures
        if variant.exchange == "peer" and bench.context.device.type == "cuda" and bench.peers.memory is None:
            raise Unavailable("the ranks' GPUs cannot reach each other's memory")
        if variant.two_phase and world == 1:
            raise Unavailable("copies for other ranks need several ranks")
        attention = "tp" if variant.rows_everywhere else "dp"
        self.layout = RankLayout(
            bench.config, ParallelConfig(attention, variant.experts), plan_of(case, variant), bench.context.rank
        )
        self.inputs, self.routings = case.inputs, case.routings
        if variant.rows_everywhere:
            self.inputs = [_of_all_ranks(case, x_TD) for x_TD in case.inputs]
            self.routings = [Routing(*(_of_all_ranks(case, t) for t in vars(r).values())) for r in case.routings]
        self.rows_per_rank = case.rows if variant.exchange in ("static", "peer") else None
        self.ids_T = case.rows * bench.context.rank + torch.arange(case.rows, device=bench.context.device)
        self.layers = self._make_layers(INPUT_SETS if variant.two_phase else len(bench.weights))
        self.phases_ahead = self._two_phase() if variant.two_phase else None
        self._current = None

    def _make_layers(self, count: int) -> list[MoELayer]:
        variant, bench = self.variant, self.case.bench
        faster = replace(bench.faster, schedule=variant.schedule, schedule_force=True, shadow=variant.shadow)
        exact = variant.exchange in ("exact", "coherent")
        options = MoEOptions(faster, "exact" if exact else "static")
        cache = ShadowCache.for_model(self.layout, self.context, bench.dtype, options)
        peers = bench.peers if variant.exchange == "peer" else None
        layers = []
        for number in range(count):
            layer = MoELayer(number, self.layout, self.context, bench.dtype, options, shadow_cache=cache, peers=peers)
            w13_EGD, w2_EDF = bench.weights[number % len(bench.weights)]
            mine, part = list(self.layout.experts(number)), slice(*self.layout.hidden)
            w1, w3 = w13_EGD[mine].chunk(2, dim=1)
            layer.experts.w13.copy_(torch.cat([w1[:, part], w3[:, part]], dim=1))
            layer.experts.w2.copy_(w2_EDF[mine][:, :, part])
            layer.gate = GivenGate(self.routings, bench.config.num_experts_per_tok, bench.gate_ED)
            layer.leaves_parts = variant.rows_everywhere
            layers.append(layer)
        return layers

    def _two_phase(self) -> TwoPhase:
        """Estimates by popularity alone: the calls of a round are one layer's, so paths say nothing."""
        config = self.case.bench.config
        profile_NLK = self.case.profile_NK.numpy()[:, None].repeat(config.n_layers, axis=1)
        popularity = PathPopularity.fit(RoutingTrace(profile_NLK, config.num_experts), path_length=0)
        return TwoPhase(self.layers, popularity, self.context)

    def _at(self, number: int) -> tuple[MoELayer, torch.Tensor]:
        layer = self.layers[number % len(self.layers)]
        layer.gate.turn = number
        return layer, self.inputs[number]

    def _flight(self, number: int):
        """Of the round under way, which begins with call 0; None but with two phases."""
        if self.phases_ahead is not None and number == 0:
            self._current = self.phases_ahead.begin()
        return self._current

    def call(self, number: int) -> object:
        layer, x_TD = self._at(number)
        if self.variant.exchange == "coherent":
            return layer.forward_moving(x_TD, self.ids_T)
        y_TD, _ = layer(x_TD, self.rows_per_rank, self._flight(number))
        return self.case.bench.sums.sum(y_TD) if self.variant.rows_everywhere else y_TD

    def phases(self, number: int) -> list[Phase]:
        layer, x_TD = self._at(number)
        flight, s, rank = self._flight(number), SimpleNamespace(), self.context.rank
        sums = self.case.bench.sums if self.variant.rows_everywhere else None

        def gate() -> None:
            s.routing = layer.gate(x_TD)

        def arrange() -> None:
            s.way, s.home, s.cut = layer.arrange(x_TD, s.routing, self.rows_per_rank, flight)

        def sort() -> None:
            arrange()
            s.rows = start_rows(x_TD, s.cut, s.home.assigner, even=isinstance(s.way, ExchangedDispatch))
            if isinstance(s.way, ExchangedDispatch):
                s.sorted = s.way.exchange.sort(s.rows, s.rows.ranks_RK)

        def cross() -> None:
            here, s.handle = s.way.exchange.cross(s.sorted)
            s.rows = for_rank(here, rank)

        def gather() -> None:
            s.rows, s.handle = for_rank(s.way.exchange.send(s.rows, self.rows_per_rank), rank), len(x_TD)

        def dispatch() -> None:
            arrange()
            s.rows, s.handle = s.way.dispatch(s.home.x_TD, s.cut, s.home.assigner)

        def move() -> None:
            arrange()
            s.way = CoherentDispatch(self.context)
            s.rows, s.handle = s.way.dispatch(s.home.x_TD, s.cut, s.home.assigner, self.ids_T)

        def experts() -> None:
            s.y_RD = s.home.experts(s.rows)

        def combine() -> None:
            s.out = s.way.combine(s.y_RD, s.handle) if sums is None else sums.sum(s.y_RD)

        def chunks() -> None:
            count = num_chunks(self.context.world_size, layer.options.faster.group_size)
            s.out, _ = run_in_chunks(s.way, s.home.experts, s.home.x_TD, s.cut, s.home.assigner, count)

        last = [("experts", experts), ("combine", combine)]
        if self.variant.schedule:
            return [("gate", gate), ("permute", arrange), ("dispatch+experts+combine", chunks)]
        if self.variant.exchange == "coherent":
            return [("gate", gate), ("permute+dispatch", move), *last]
        if self.variant.exchange == "peer" or self.variant.experts == "tp":
            name = "permute" if self.variant.rows_everywhere else "permute+dispatch"
            return [("gate", gate), (name, dispatch), *last]
        return [("gate", gate), ("permute", sort), ("dispatch", gather if self.rows_per_rank else cross), *last]

    def finished(self, result: object, number: int) -> torch.Tensor:
        rows, rank = self.case.rows, self.context.rank
        if self.variant.exchange == "coherent":
            y_MD, ids_M = result
            whole_RD = y_MD.new_zeros(rows * self.context.world_size, y_MD.shape[1])
            result = self.context.all_reduce(whole_RD.index_copy_(0, ids_M, y_MD))
        elif not self.variant.rows_everywhere:
            return result
        return result[rows * rank : rows * (rank + 1)]

    def expected(self, number: int) -> Routing:
        layer, x_TD = self._at(number)
        routing = self.routings[number]
        if self.variant.capacity is None:
            return self.case.routings[number]
        cut = layer.arrange(x_TD, routing)[2]
        return Routing(cut.experts_TK, cut.weights_TK, routing.logits_TE)

    def counts(self, number: int) -> Counts:
        if self.variant.experts == "tp":
            return self._counts_of_parts()
        layer, x_TD = self._at(number)
        routing, context = self.routings[number], self.context
        way, home, cut = layer.arrange(x_TD, routing, self.rows_per_rank, self._flight(number))
        ranks_TK = self._ranks(layer, way, home, cut)
        row = x_TD[0].nbytes
        packed = row + 4 * (3 * ranks_TK.shape[1] + 1)  # ranks, slots, weights and number, as ``exchange.pack`` has it
        if self.variant.exchange == "static":
            computed_W, bytes_WW = computed(ranks_TK, context.world_size), to_all(context, len(x_TD) * (packed + row))
        elif self.variant.exchange == "peer":
            computed_W, bytes_WW = by_rows(ranks_TK, context, row, row)
            bytes_WW += to_all(context, 8 * ranks_TK.numel())  # a word for each choice, to every rank
        else:
            computed_W, bytes_WW = by_rows(ranks_TK, context, packed, row)
        if self.variant.exchange == "coherent":
            bytes_WW = self._bytes_of_moves(ranks_TK, packed, row)
        is_hot_E = home.assigner.copies_E > 1
        at_home_TK = (ranks_TK == context.rank) & is_hot_E[routing.experts_TK]
        report = home.report
        return Counts(
            computed_W, bytes_WW, ranks_TK.numel(), int(at_home_TK.sum()), int(cut.dropped),
            0 if report is None else report.bytes_broadcast, () if report is None else report.experts,
        ).over_ranks(context)  # fmt: skip

    def _ranks(self, layer: MoELayer, way, home, cut: CutRouting) -> torch.Tensor:
        """Where each choice is computed, -1 where it was dropped."""
        if self.variant.exchange == "peer":
            return way.places.look_up(cut.experts_TK)[0]
        even = not isinstance(way, StaticDispatch)
        chunks = num_chunks(self.context.world_size, layer.options.faster.group_size) if self.variant.schedule else 1
        parts = [replace(cut, experts_TK=part) for part in cut.experts_TK.tensor_split(chunks)]
        return torch.cat([home.assigner.assign(part, even).ranks_TK for part in parts])

    def _bytes_of_moves(self, ranks_TK: torch.Tensor, packed: int, row: int) -> torch.Tensor:
        """Rows go to the ranks of their choices; from there, parts to the rank of the heaviest, where the row stays."""
        context = self.context
        goes_TW = members(ranks_TK, context.world_size)
        bytes_WW = there_and_back(goes_TW.sum(0), context, packed, 0)
        for home in range(context.world_size):
            bytes_WW[:, home] += row * goes_TW[ranks_TK[:, 0] == home].sum(0).double().cpu()
        return bytes_WW.fill_diagonal_(0)

    def _counts_of_parts(self) -> Counts:
        """Every rank computes a part of every choice. Sums over W·T rows: 2·(W-1)/W of them leave each rank."""
        context, rows = self.context, self.case.rows
        row, top_k = self.case.inputs[0][0].nbytes, self.case.routings[0].experts_TK.shape[1]
        bytes_WW = to_all(context, 2 * rows * row)
        if not self.variant.rows_everywhere:
            bytes_WW += to_all(context, rows * (row + 12 * top_k))  # the rows, their experts and weights
        elif _in_one_trip(self.case.bench.sums, rows * context.world_size):
            bytes_WW = to_all(context, rows * context.world_size * row)
        computed_W = torch.full((context.world_size,), float(rows * top_k), dtype=torch.float64)
        return Counts(computed_W, bytes_WW, rows * top_k).over_ranks(context)


def _of_all_ranks(case: Case, values: torch.Tensor) -> torch.Tensor:
    return case.bench.context.all_gather(values).flatten(0, 1)


def _in_one_trip(sums: RowReducer, rows: int) -> bool:
    """Whether every rank sends all its parts to every other, as the kernel does with few rows."""
    if sums.memory is None or rows > sums.memory.one_trip:
        return False
    from mixtralkit.ops.all_reduce.triton import default_settings

    ranks, device = sums.context.world_size, sums.context.device
    settings = tuned("all_reduce", device, rows, dim=sums.dim, ranks=ranks)
    return not (settings or default_settings(rows, sums.dim, ranks, sums.dtype.itemsize))["two_trips"]
