"""What a variant of one MoE layer over the ranks has to offer, and the ones that are not ``MoELayer``'s."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from benchmarks.layer.cases import Case, GivenGate
from benchmarks.layer.counts import Counts, by_choices, by_rows, computed, to_all
from mixtralkit.config import MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.fastmoe.backend import FastMoELayer
from mixtralkit.layout import RankLayout
from mixtralkit.moe.router import Routing
from mixtralkit.moe.store import ExpertStore
from mixtralkit.ops.gate import gate
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.plan import contiguous

Phase = tuple[str, Callable[[], object]]


class Unavailable(RuntimeError):
    """A variant cannot run here, on no rank; the text says why."""


class Variant(Protocol):
    """One variant on one case. Calls are numbered 0 … INPUT_SETS-1, a round; all ranks make the same ones."""

    name: str  # of the dispatcher; the baseline's own where there is none
    captures: bool  # calls and phases may be held by CUDA graphs

    def call(self, number: int) -> object:
        """The whole layer, gate included, on one of the inputs. Collective."""

    def phases(self, number: int) -> list[Phase]:
        """The same call taken apart, to be run in this order; a name with ``+`` is several phases in one. Those of
        one call must have run before the next call's are asked for."""

    def finished(self, result: object, number: int) -> torch.Tensor:
        """This rank's own rows [T, D] of what ``call`` gave. Collective."""

    def expected(self, number: int) -> Routing:
        """What the rows must have been computed by: the routing, without choices that a capacity drops."""

    def counts(self, number: int) -> Counts:
        """What a call moves and computes. Collective."""


class _Baseline:
    """What variants without a plan of their own share: own rows in, own rows out, nothing dropped."""

    name, captures = "none", False

    def __init__(self, case: Case) -> None:
        self.case, self.context = case, case.bench.context
        self.owner_E = torch.zeros(case.bench.config.num_experts, dtype=torch.int64, device=self.context.device)
        plan = contiguous(1, case.bench.config.num_experts, self.context.world_size)
        for rank in range(self.context.world_size):
            self.owner_E[list(plan.experts_of(0, rank))] = rank
        self.mine = list(plan.experts_of(0, self.context.rank))

    def finished(self, result: torch.Tensor, number: int) -> torch.Tensor:
        return result

    def expected(self, number: int) -> Routing:
        return self.case.routings[number]

    def call(self, number: int) -> torch.Tensor:
        return [function() for _, function in self.phases(number)][-1]

    def _gate(self, number: int) -> Callable[[], object]:
        bench = self.case.bench
        return partial(gate, self.case.inputs[number], bench.gate_ED, bench.config.num_experts_per_tok)

    def _weights(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.case.bench.weights[number % len(self.case.bench.weights)]


class LoopBaseline(_Baseline):
    """All experts on every rank, one after the other."""

    def phases(self, number: int) -> list[Phase]:
        rows = (self.case.inputs[number], self.case.routings[number])
        return [("gate", self._gate(number)), ("experts", partial(loop_over_experts, *rows, *self._weights(number)))]

    def counts(self, number: int) -> Counts:
        experts_TK = self.case.routings[number].experts_TK
        ranks_TK = torch.full_like(experts_TK, self.context.rank)
        size = ranks_TK.numel()
        return Counts(*by_rows(ranks_TK, self.context, 0, 0), size, at_home=size).over_ranks(self.context)


class PaddedBaseline(_Baseline):
    """Contiguous experts; every rank's rows go to every rank, the sums are added by an all-reduce."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        sets = [(w13_EGD[self.mine], w2_EDF[self.mine]) for w13_EGD, w2_EDF in case.bench.weights]
        first = self.mine[0] if self.mine else 0
        self.layers = [PaddedAllGather(self.context, w13_SGD, w2_SDF, first) for w13_SGD, w2_SDF in sets]

    def phases(self, number: int) -> list[Phase]:
        layer = self.layers[number % len(self.layers)]
        rest = partial(layer, self.case.inputs[number], self.case.routings[number])
        return [("gate", self._gate(number)), ("permute+dispatch+experts+combine", rest)]

    def counts(self, number: int) -> Counts:
        experts_TK, row = self.case.routings[number].experts_TK, self.case.inputs[number][0].nbytes
        computed_W = computed(self.owner_E[experts_TK], self.context.world_size)
        size = len(experts_TK) * (3 * row + 12 * experts_TK.shape[1])  # rows, experts and weights out; sums, twice
        return Counts(computed_W, to_all(self.context, size), experts_TK.numel()).over_ranks(self.context)


class FastMoEBaseline(_Baseline):
    """The layer through the real library."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        bench = case.bench
        plan = contiguous(bench.config.n_layers, bench.config.num_experts, self.context.world_size)
        layout = RankLayout(bench.config, ParallelConfig("dp", "ep"), plan, self.context.rank)
        store = ExpertStore(layout, self.context, bench.dtype, layers=range(len(bench.weights)))
        options, self.layers = MoEOptions(backend="fastmoe"), []
        for number, (w13_EGD, w2_EDF) in enumerate(bench.weights):
            layer = FastMoELayer(number, self.context, store, options)
            layer.experts.w13.copy_(w13_EGD[self.mine])
            layer.experts.w2.copy_(w2_EDF[self.mine])
            layer.gate = GivenGate(case.routings, bench.config.num_experts_per_tok, bench.gate_ED)
            self.layers.append(layer)

    def phases(self, number: int) -> list[Phase]:
        layer = self.layers[number % len(self.layers)]
        layer.gate.turn = number
        return [
            (
                "gate+permute+dispatch+experts+combine",
                lambda: layer(Hidden(None, self.case.inputs[number]))[0].normed_TD,
            )
        ]

    def counts(self, number: int) -> Counts:
        experts_TK, row = self.case.routings[number].experts_TK, self.case.inputs[number][0].nbytes
        sizes = by_choices(self.owner_E[experts_TK], self.context, row, row)
        return Counts(*sizes, experts_TK.numel()).over_ranks(self.context)


def loop_over_experts(
    x_TD: torch.Tensor, routing: Routing, w13_EGD: torch.Tensor, w2_EDF: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """One expert after the other, each on the rows a mask finds for it, as MixtralKit computes its layer.

    The experts are those from ``first`` on; rows of others add nothing.
    """
    y_TD = torch.zeros_like(x_TD)
    for number in range(w13_EGD.shape[0]):
        rows_N, choice_N = torch.where(routing.experts_TK == first + number)  # host sync
        gate_NF, up_NF = F.linear(x_TD[rows_N], w13_EGD[number]).chunk(2, dim=-1)
        y_ND = F.linear(F.silu(gate_NF) * up_NF, w2_EDF[number])
        y_TD.index_add_(0, rows_N, y_ND * routing.weights_TK[rows_N, choice_N, None].type_as(y_ND))
    return y_TD


class PaddedAllGather:
    """Every rank's rows, padded to equal numbers, go to every rank; each adds its experts' part; one all-reduce."""

    def __init__(self, context: RankContext, w13_SGD: torch.Tensor, w2_SDF: torch.Tensor, first: int) -> None:
        self.context, self.w13_SGD, self.w2_SDF, self.first = context, w13_SGD, w2_SDF, first

    def __call__(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        context, own = self.context, x_TD.shape[0]
        most = int(context.all_gather(torch.tensor([own], device=x_TD.device)).max())  # host sync

        def everyone(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
            padding = values.new_full((most - own, *values.shape[1:]), fill)
            return context.all_gather(torch.cat([values, padding])).flatten(0, 1)

        together = Routing(everyone(routing.experts_TK, -1), everyone(routing.weights_TK), routing.logits_TE)
        y_RD = loop_over_experts(everyone(x_TD), together, self.w13_SGD, self.w2_SDF, self.first)
        start = context.rank * most
        return context.all_reduce(y_RD)[start : start + own]
