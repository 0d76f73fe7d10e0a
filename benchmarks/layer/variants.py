"""The variants of ``MoELayer`` that ``bench_moe_layer.py`` compares, each as a whole and in phases."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from benchmarks.layer.baselines import FastMoEBaseline, LoopBaseline, PaddedBaseline, Phase, Unavailable, Variant
from benchmarks.layer.cases import INPUT_SETS, Case, GivenGate
from benchmarks.layer.counts import Counts, computing_ranks, traffic
from mixtralkit.config import MoEOptions, ParallelConfig
from mixtralkit.layout import RankLayout
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch import Dispatchers
from mixtralkit.moe.dispatch.schedule import num_chunks, run_in_chunks
from mixtralkit.moe.layer import MoELayer, MoEReport, StepRows
from mixtralkit.moe.router import Routing
from mixtralkit.moe.shadow import Shadows, shadow_room
from mixtralkit.moe.store import ExpertStore
from mixtralkit.moe.two_phase import TwoPhase
from mixtralkit.ops.capacity import CapacityRule
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.dispatchers import IN_GRAPHS, ROWS_TRAVEL
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.policies.balanced import balanced
from mixtralkit.planning.policies.hot_cold import hot_cold
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.popularity import PathPopularity
from mixtralkit.planning.trace import RoutingTrace

ALL = (
    "contiguous", "contiguous+exact", "contiguous+static", "contiguous+symmetric", "contiguous+schedule",
    "hot_cold", "hot_cold+exact", "hot_cold+capacity1.0", "hot_cold+capacity0.5", "hot_cold+capacity0.5+reroute",
    "balanced", "balanced+exact", "everywhere", "shadow", "two_phase", "coherent", "tensor_parallel",
    "tensor_parallel+gathered",
)  # fmt: skip
PLANS = ("contiguous", "hot_cold", "balanced", "everywhere")
BASELINES = {"loop_over_experts": LoopBaseline, "padded_all_gather": PaddedBaseline, "fastmoe": FastMoEBaseline}
NAMED_ONLY = ("fastmoe",)  # not among "all": the real library is seldom there
SETTLING_STEPS = 3  # of counts, after which shadows are those of the steady state


@dataclass(frozen=True)
class Setting:
    """A way to run ``MoELayer``, from its name: PLAN, or shadow, two_phase, coherent, tensor_parallel; then words.

    Attributes:
        plan: contiguous, hot_cold (the busiest expert of the profile on every rank), balanced (EPLB's policy with a
            slot a rank more than the experts need) or everywhere.
        exchange: ``exact``, ``static`` or ``symmetric`` where that is forced; None for what ``choose_dispatcher`` says.
        attention, experts: as in ``ParallelConfig``: what rows a rank has, and what part of which experts.
        capacity, overflow: ``capacityF``, and ``reroute`` instead of dropping.
        schedule: the smart schedule, on an exact exchange.
        shadow: copies of hot experts, decided between calls until they are steady.
        two_phase: copies for the next call while a call computes.
    """

    plan: str = "contiguous"
    exchange: str | None = None
    attention: str = "dp"
    experts: str = "ep"
    capacity: float | None = None
    overflow: str = "drop"
    schedule: bool = False
    shadow: bool = False
    two_phase: bool = False

    @classmethod
    def parse(cls, name: str) -> Setting:
        """ValueError for a word that is none, and for words that would measure something else than they say."""
        first, *words = name.split("+")
        setting = {"shadow": cls(shadow=True), "two_phase": cls(two_phase=True), "coherent": cls(attention="coherent"),
                   "tensor_parallel": cls(attention="tp", experts="tp")}.get(first)  # fmt: skip
        if setting is None:
            if first not in PLANS:
                raise ValueError(f"variants ({name}) must be among {', '.join((*ALL, *BASELINES))}, or PLAN+WORD")
            setting = cls(first)
        for word in words:
            if word in ("exact", "static", "symmetric"):
                change = {"exchange": word}
            elif re.fullmatch(r"capacity\d+(\.\d+)?", word):
                change = {"capacity": float(word.removeprefix("capacity"))}
            else:
                change = {"reroute": {"overflow": "reroute"}, "schedule": {"schedule": True},
                          "coherent": {"attention": "coherent"}, "gathered": {"attention": "dp"}}.get(word)  # fmt: skip
            if change is None:
                raise ValueError(
                    f"variants ({name}): {word!r} must be exact, static, symmetric, schedule, capacityF, reroute, "
                    "coherent or gathered"
                )
            if "exchange" in change and setting.exchange is not None:
                raise ValueError(f"variants ({name}) must force one exchange")
            setting = replace(setting, **change)
        setting._check(name, words)
        return setting

    def _check(self, name: str, words: list[str]) -> None:
        coherent, split = self.attention == "coherent", self.experts == "tp"
        for is_wrong, rule in (
            (self.overflow == "reroute" and self.capacity is None, "must have a capacity with reroute"),
            ("gathered" in words and not split, "must be tensor_parallel with gathered"),
            (split and coherent, "must have whole experts with coherent"),
            (split and self.capacity is not None, "must have whole experts with a capacity"),
            (split and (self.schedule or self.exchange is not None), "must have whole experts for rows to travel to"),
            (coherent and (self.schedule or self.exchange == "static"), "must be without schedule and static"),
            (self.schedule and self.exchange not in (None, "exact"), "must be exact with schedule"),
        ):
            if is_wrong:
                raise ValueError(f"variants ({name}) {rule}")

    def plan_for(self, case: Case) -> ExpertPlan:
        """The plan, made from the case's profile."""
        config, world = case.bench.config, case.bench.context.world_size
        layers, experts = config.n_layers, config.num_experts
        match self.plan:
            case "contiguous":
                plan = contiguous(layers, experts, world)
            case "hot_cold":
                plan = hot_cold(case.profile_loads_LE, world, hot_experts=1)
            case "balanced":
                slots = min(experts, -(-experts // world) + 1)
                plan = balanced(case.profile_loads_LE, world, Budget(slots_per_rank=slots))
            case "everywhere":
                plan = everywhere(layers, experts, world)
        return replace(plan, cold_capacity_factor=self.capacity, overflow=self.overflow)


def check_name(name: str) -> None:
    """ValueError for a name of no variant."""
    if name not in BASELINES:
        Setting.parse(name)


def variant_of(name: str, case: Case) -> Variant:
    """The variant or baseline of that name. Collective.

    Raises:
        Unavailable: it cannot run here.
        ValueError: fastmoe without the library.
    """
    return BASELINES[name](case) if name in BASELINES else LayerVariant(case, Setting.parse(name))


class LayerVariant:
    """``MoELayer``: a layer for each set of weights, or for each call where layers follow one another.

    Rows come normalised with a stream of zeros to add to, as a model's do, and the sums are normalised for what
    follows; coherent rows come by themselves.
    """

    def __init__(self, case: Case, setting: Setting) -> None:
        bench, world = case.bench, case.bench.context.world_size
        self.case, self.setting, self.context = case, setting, bench.context
        if (setting.two_phase or setting.shadow) and world == 1:
            raise Unavailable("copies for other ranks need several ranks")
        parallel = ParallelConfig(setting.attention, setting.experts)
        self.layout = RankLayout(bench.config, parallel, setting.plan_for(case), bench.context.rank)
        self.inputs, self.routings = case.inputs, case.routings
        coherent, rank = setting.attention == "coherent", bench.context.rank
        symmetric = self._symmetric(setting.exchange == "exact" or setting.schedule) is not None
        if setting.attention == "tp" or (coherent and symmetric):  # every rank has a place for each row
            self.inputs = [_of_all_ranks(case, x_TD) for x_TD in case.inputs]
            self.routings = [Routing(*(_of_all_ranks(case, t) for t in vars(r).values())) for r in case.routings]
        number_R = torch.arange(case.rows * world, device=bench.context.device)
        is_own_R = number_R // case.rows == rank
        self.ids_T = number_R[is_own_R] if coherent and not symmetric else None
        self.valid_T = is_own_R.long() - 1 if coherent and symmetric else None
        self.rule = CapacityRule.of(self.layout.plan) if setting.experts == "ep" else None
        self.none = torch.zeros((), dtype=torch.int64, device=bench.context.device)
        self.norm = (torch.ones_like(self.inputs[0][0]), 1e-5)
        self.layers, shadows = self._make_layers(INPUT_SETS if setting.two_phase else len(bench.weights))
        self.name = self.layers[0].dispatchers.name(True, coherent)
        self.dispatcher = self.layers[0].dispatchers.by_name[self.name]
        still = self.name in IN_GRAPHS or self.valid_T is not None
        self.captures = still and not (setting.schedule or setting.two_phase)
        self.rows = StepRows(len(self.inputs[0]), decode=coherent)
        self.phases_ahead = self._two_phase(shadows) if setting.two_phase else None
        self._flight = None
        if setting.shadow:
            self._settle(shadows)

    def _make_layers(self, count: int) -> tuple[list[MoELayer], Shadows | None]:
        setting, bench = self.setting, self.case.bench
        copies = setting.shadow or setting.two_phase
        faster = replace(bench.faster, schedule=setting.schedule, schedule_force=True, shadow=copies)
        exact = setting.exchange == "exact" or setting.schedule
        options = MoEOptions(faster, "exact" if exact else "static" if setting.exchange == "static" else "auto")
        room = shadow_room(self.layout, self.context, bench.dtype, options)
        store = ExpertStore(self.layout, self.context, bench.dtype, room, range(count))
        dispatchers = Dispatchers.create(self.layout, self.context, options, self._sums(), self._symmetric(exact))
        one_holder = dispatchers.name(True, False) in ("symmetric", "static")
        shadows = Shadows(store, options.faster, one_holder) if room else None
        layers = []
        for number in range(count):
            layer = MoELayer(number, self.context, store, dispatchers, options, shadows)
            w13_EGD, w2_EDF = bench.weights[number % len(bench.weights)]
            mine, part = list(self.layout.experts(number)), slice(*self.layout.hidden)
            w1, w3 = w13_EGD[mine].chunk(2, dim=1)
            layer.experts.w13.copy_(torch.cat([w1[:, part], w3[:, part]], dim=1))
            layer.experts.w2.copy_(w2_EDF[mine][:, :, part])
            layer.gate = GivenGate(self.routings, bench.config.num_experts_per_tok, bench.gate_ED)
            layers.append(layer)
        return layers, shadows

    def _sums(self):
        return self.case.bench.sums if self.setting.attention == "tp" and self.context.world_size > 1 else None

    def _symmetric(self, exact: bool):
        """Memory between GPUs where rows may go through it; on CPUs, where that is slower, if it is forced."""
        setting, bench = self.setting, self.case.bench
        travels = self.context.world_size > 1 and setting.experts == "ep" and setting.attention != "tp"
        if not travels or exact or (setting.exchange is None and self.context.device.type == "cpu"):
            return None
        if bench.symmetric.memory is None and self.context.device.type == "cuda":
            if setting.exchange == "symmetric":
                raise Unavailable("the ranks' GPUs cannot reach each other's memory")
            return None
        return bench.symmetric

    def _two_phase(self, shadows: Shadows) -> TwoPhase:
        """Estimates by popularity alone: the calls of a round are one layer's, so paths say nothing."""
        config = self.case.bench.config
        profile_NLK = self.case.profile_NK.numpy()[:, None].repeat(config.n_layers, axis=1)
        return TwoPhase(shadows, PathPopularity.fit(RoutingTrace(profile_NLK, config.num_experts), path_length=0))

    def _settle(self, shadows: Shadows) -> None:
        """Copies what the calls' counts ask for, as an engine does between its steps. Collective."""
        loads_LE = [self.case.loads_CE[number :: len(self.layers)].mean(0) for number in range(len(self.layers))]
        for _ in range(SETTLING_STEPS):
            shadows.between_steps(loads_LE)

    def _at(self, number: int) -> tuple[MoELayer, Hidden, StepRows]:
        """Layer and rows of a call. A flight of two phases begins with call 0."""
        layer, x_TD = self.layers[number % len(self.layers)], self.inputs[number]
        layer.gate.turn = number
        if self.phases_ahead is not None and number == 0:
            self._flight = self.phases_ahead.begin()
        stream_TD = None if self.rows.decode else torch.zeros_like(x_TD)
        hidden = Hidden(stream_TD, x_TD, self.norm, self.ids_T, self.valid_T)
        return layer, hidden, replace(self.rows, flight=self._flight)

    def call(self, number: int) -> Hidden:
        layer, hidden, rows = self._at(number)
        return layer(hidden, rows, self.norm)[0]

    def phases(self, number: int) -> list[Phase]:
        layer, hidden, rows = self._at(number)
        dispatcher, table, s = self.dispatcher, layer.table, SimpleNamespace()

        def gate() -> None:
            s.routing, s.hidden = layer.gate(hidden)

        def dispatch() -> None:
            if rows.flight is not None:
                rows.flight.at(layer.layer, s.routing.experts_TK)
            cut = self._cut(layer, s.routing)
            s.rows, s.handle = dispatcher.dispatch(s.hidden, cut, table, rows.per_rank)

        def experts() -> None:
            s.y_RD = layer.experts(s.rows)

        def combine() -> None:
            s.out = dispatcher.combine(s.y_RD, s.handle, self.norm)
            if rows.flight is not None:
                rows.flight.ahead(layer.layer)

        def chunks() -> None:
            cut, count = self._cut(layer, s.routing), self._chunks
            s.out, _ = run_in_chunks(dispatcher, layer.experts, s.hidden, cut, table, count, self.norm)

        if self.setting.schedule:
            return [("gate", gate), ("permute+dispatch+experts+combine", chunks)]
        travels = self.name in ROWS_TRAVEL or self.name == "gathered"
        name = "permute+dispatch" if travels else "permute"
        return [("gate", gate), (name, dispatch), ("experts", experts), ("combine", combine)]

    @property
    def _chunks(self) -> int:
        group = self.layers[0].options.faster.group_size
        return num_chunks(self.context.world_size, group) if self.setting.schedule else 1

    def finished(self, result: Hidden, number: int) -> torch.Tensor:
        rows, rank = self.case.rows, self.context.rank
        if result.valid_T is not None:
            whole_RD = result.normed_TD.masked_fill((result.valid_T < 0)[:, None], 0)
            return self.context.all_reduce(whole_RD)[rows * rank : rows * (rank + 1)]
        if result.ids_T is not None:
            whole_RD = result.normed_TD.new_zeros(rows * self.context.world_size, self.inputs[0].shape[1])
            whole_RD = self.context.all_reduce(whole_RD.index_copy_(0, result.ids_T, result.normed_TD))
            return whole_RD[rows * rank : rows * (rank + 1)]
        sums_TD = result.normed_TD if result.x_TD is None else result.x_TD
        return sums_TD[rows * rank : rows * (rank + 1)] if self.setting.attention == "tp" else sums_TD

    def expected(self, number: int) -> Routing:
        if self.setting.capacity is None:
            return self.case.routings[number]
        cut = self._cut(self._at(number)[0], self.routings[number])
        return Routing(cut.experts_TK, cut.weights_TK, self.routings[number].logits_TE)

    def _cut(self, layer: MoELayer, routing: Routing) -> CutRouting:
        return CutRouting.of(routing, layer.table.local_E, self.rule, None, self.none)

    def counts(self, number: int) -> Counts:
        if self.setting.experts == "tp" and self.context.world_size > 1:
            return self._counts_of_parts()
        layer, hidden, rows = self._at(number)
        report: MoEReport = layer(hidden, rows, self.norm)[1]
        cut, context, table = self._cut(layer, self.routings[number]), self.context, layer.table
        name = self.name if self.valid_T is None else "coherent+symmetric"
        parts = [cut.take(rows_N) for rows_N in torch.arange(len(hidden)).tensor_split(self._chunks)]
        ranks_TK = torch.cat([computing_ranks(name, part, table, self.case.rows) for part in parts])
        experts_TK = self.routings[number].experts_TK
        if self.valid_T is not None:  # of the places those with this rank's rows
            ranks_TK, experts_TK = ranks_TK[self.valid_T >= 0], experts_TK[self.valid_T >= 0]
        moved = traffic(name, ranks_TK, context, self.inputs[number][0].nbytes)
        copies_E = torch.from_numpy((table.replicas.slots_WE >= 0).sum(0)).to(context.device)
        at_home_TK = (ranks_TK == context.rank) & (copies_E > 1)[experts_TK]
        shadows = report.shadows
        return Counts(
            *moved, ranks_TK.numel(), int(at_home_TK.sum()), int(cut.dropped),
            0 if shadows is None else shadows.bytes_broadcast, () if shadows is None else shadows.experts,
        ).over_ranks(context)  # fmt: skip

    def _counts_of_parts(self) -> Counts:
        """Every rank computes a part of every choice."""
        case, context = self.case, self.context
        top_k, row = case.bench.config.num_experts_per_tok, case.inputs[0][0].nbytes
        computed_W = torch.full((context.world_size,), float(case.rows * top_k), dtype=torch.float64)
        ranks_TK = torch.empty(case.rows, top_k)
        _, bytes_WW = traffic(
            self.name, ranks_TK, context, row, case.bench.sums if self.name == "split_width" else None
        )
        return Counts(computed_W, bytes_WW, case.rows * top_k).over_ranks(context)


def _of_all_ranks(case: Case, values: torch.Tensor) -> torch.Tensor:
    return case.bench.context.all_gather(values).flatten(0, 1)
