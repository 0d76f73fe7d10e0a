"""What benchmarks of one MoE layer run on: rows, their routing, weights, a profile for plans, and the bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.common.ceilings import Ceilings
from mixtralkit.config import FasterOptions, ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.moe.router import Routing
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.gate import gate
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.trace import RoutingTrace

INPUT_SETS = 4  # inputs take turns, so that none stays in a cache; a round is one call on each
PROFILE_ROWS = 4096  # of another draw, from which plans and estimates are made
SET_SIZES = 3  # a set of weights, the copy in the layer that is timed, and as much again for all else


class GivenGate(nn.Module):
    """Routes the rows as a benchmark wants: one prepared routing after the other, in step with the inputs.

    With ``weight_ED`` the real gate runs on the rows first, so that its time counts; its choice is not used.
    """

    def __init__(self, routings: list[Routing], top_k: int, weight_ED: torch.Tensor | None = None) -> None:
        super().__init__()
        self.routings, self.top_k, self.turn, self.weight_ED = routings, top_k, 0, weight_ED

    def forward(self, hidden: Hidden) -> tuple[Routing, Hidden]:
        if self.weight_ED is not None:
            gate(hidden.rows_TD, self.weight_ED, self.top_k)
        return self.routings[self.turn % len(self.routings)], hidden


@dataclass(frozen=True)
class RoutingKind:
    """How experts are chosen: ``uniform``, ``skew:SHARE`` (injected), or ``trace:FILE`` (real).

    ``share`` is the part of all choices that goes to expert 0. ``trace`` is one layer: int64 [N, K], with float32
    weights [N, K] where the file has them.
    """

    name: str
    skew: str
    share: float = 0.0
    trace: torch.Tensor | None = None
    trace_weights: torch.Tensor | None = None
    trace_layer: int | None = None

    @classmethod
    def parse(cls, text: str, num_experts: int, top_k: int, trace_layer: int | None) -> RoutingKind:
        """ValueError for another word, a share that cannot be, or a trace of another model."""
        kind, _, rest = text.partition(":")
        if text == "uniform":
            return cls(text, "none")
        if kind == "trace" and rest:
            return cls._of_trace(Path(rest), num_experts, top_k, trace_layer)
        try:
            share = float(rest)
        except ValueError:
            share = -1.0
        if kind != "skew" or not 0 <= share * top_k <= 1:
            most = f"at most 1/top_k = {1 / top_k:g}"
            raise ValueError(f"routing ({text!r}) must be uniform, skew:SHARE with {most}, or trace:FILE")
        return cls(text, "injected", share)

    @classmethod
    def _of_trace(cls, path: Path, num_experts: int, top_k: int, trace_layer: int | None) -> RoutingKind:
        trace = RoutingTrace.load(path, num_experts)
        layer = trace.num_layers // 2 if trace_layer is None else trace_layer
        if not 0 <= layer < trace.num_layers:
            raise ValueError(f"trace_layer ({layer}) must lie in 0 … {trace.num_layers - 1}, the layers of {path.name}")
        if not trace.num_tokens or trace.top_k < top_k:
            raise ValueError(
                f"{path}: {trace.num_tokens} tokens with {trace.top_k} choices must be at least 1 with top_k ({top_k})"
            )
        trace = trace.first(top_k)
        weights = None if trace.weights is None else torch.from_numpy(trace.weights[:, layer].astype(np.float32))
        experts = torch.from_numpy(trace.experts[:, layer].astype(np.int64))
        return cls(f"trace:{path.name}", "real", 0.0, experts, weights, layer)

    def draw(
        self, count: int, num_experts: int, top_k: int, generator: torch.Generator, start: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts int64 and weights float32 [count, K], by falling weight; no row has an expert twice.

        ``start`` is where in the trace the rows begin, which goes on from its start when it ends.
        """
        weights_TK = torch.rand(count, top_k, generator=generator).softmax(-1).sort(dim=1, descending=True).values
        if self.trace is not None:
            rows_T = (torch.arange(count) + start) % len(self.trace)
            return self.trace[rows_T], weights_TK if self.trace_weights is None else self.trace_weights[rows_T]
        scores_TE = torch.rand(count, num_experts, generator=generator)
        if self.skew == "injected":
            is_hot_T = torch.rand(count, generator=generator) < self.share * top_k
            scores_TE[:, 0] = torch.where(is_hot_T, 2.0, -1.0)
        return scores_TE.topk(top_k, dim=1).indices, weights_TK


@dataclass(frozen=True)
class Bench:
    """What all cases of a run share: ranks, shape, whole layers' weights on every rank, memory for exchanges.

    ``config`` has ``INPUT_SETS`` layers, one a call of a round; call i uses ``weights[i mod sets]``, pairs of w13
    [E, 2F, D] and w2 [E, D, F]. ``max_rows`` is the most rows of a rank. ``graphs``: on a GPU, what can be captured in
    CUDA graphs is timed so.
    """

    context: RankContext
    config: ModelConfig
    weights: list[tuple[torch.Tensor, torch.Tensor]]
    gate_ED: torch.Tensor
    max_rows: int
    faster: FasterOptions
    graphs: bool
    seed: int

    @classmethod
    def create(
        cls,
        context: RankContext,
        config: ModelConfig,
        dtype: torch.dtype,
        max_rows: int,
        faster: FasterOptions,
        graphs: bool,
        seed: int,
    ) -> Bench:
        """Draws the weights, the same on every rank: on a GPU four sets, or fewer for which there is memory."""
        generator = torch.Generator(context.device).manual_seed(seed)
        like = {"dtype": dtype, "device": context.device, "generator": generator}
        experts, dim, hidden = config.num_experts, config.dim, config.hidden_dim
        weights = [
            (
                torch.randn(experts, 2 * hidden, dim, **like) * dim**-0.5,
                torch.randn(experts, dim, hidden, **like) * hidden**-0.5,
            )
            for _ in range(_sets(context, 3 * experts * dim * hidden * dtype.itemsize))
        ]
        gate_ED = torch.randn(experts, dim, **like) * dim**-0.5
        return cls(context, config, weights, gate_ED, max_rows, faster, graphs and gate_ED.is_cuda, seed)

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_ED.dtype

    @cached_property
    def symmetric(self) -> SymmetricExchange:
        """The exchange through memory that all ranks reach, with room for the rows of all of them on each, as coherent
        steps need. Collective when first asked for."""
        return SymmetricExchange.create(
            self.context, self.max_rows * self.context.world_size, self.config.dim,
            self.config.num_experts_per_tok, self.dtype,
        )  # fmt: skip

    @cached_property
    def sums(self) -> RowReducer:
        """Sums over the ranks, of the rows of all of them. Collective when first asked for."""
        return RowReducer.create(self.context, self.max_rows * self.context.world_size, self.config.dim, self.dtype)


def _sets(context: RankContext, set_bytes: int) -> int:
    """Sets of weights: on a CPU one."""
    if context.device.type != "cuda":
        return 1
    free = min(context.all_gather_objects(torch.cuda.mem_get_info(context.device)[0]))
    return next((sets for sets in (INPUT_SETS, 2) if free > SET_SIZES * sets * set_bytes), 1)


@dataclass(frozen=True)
class Case:
    """Rows [T, D] of this rank and their routing, one for each call of a round.

    ``profile_NK`` are choices of another draw, the same on all ranks (a trace's own, all of them), and
    ``loads_CE`` how often the rows of all ranks choose each expert in each call.
    """

    bench: Bench
    kind: RoutingKind
    inputs: list[torch.Tensor]
    routings: list[Routing]
    profile_NK: torch.Tensor
    loads_CE: np.ndarray

    @classmethod
    def draw(cls, bench: Bench, kind: RoutingKind, count: int) -> Case:
        """``count`` rows a rank. Collective."""
        context, shape = bench.context, (bench.config.num_experts, bench.config.num_experts_per_tok)
        generator = torch.Generator().manual_seed(1000 * bench.seed + context.rank)
        inputs, routings, loads = [], [], []
        for number in range(INPUT_SETS):
            x_TD = torch.randn(count, bench.config.dim, generator=generator)
            inputs.append(x_TD.to(bench.dtype).to(context.device))
            part = number * context.world_size + context.rank
            experts_TK, weights_TK = kind.draw(count, *shape, generator, part * count)
            logits_TE = torch.full((count, shape[0]), -10.0).scatter_(1, experts_TK, weights_TK.log())
            routings.append(Routing(*(t.to(context.device) for t in (experts_TK, weights_TK, logits_TE))))
            loads.append(experts_TK.flatten().bincount(minlength=shape[0]))
        loads_CE = context.all_reduce(torch.stack(loads).to(context.device)).cpu().numpy()
        other = torch.Generator().manual_seed(1000 * bench.seed + 999)
        profile_NK = kind.draw(PROFILE_ROWS, *shape, other)[0] if kind.trace is None else kind.trace
        return cls(bench, kind, inputs, routings, profile_NK, loads_CE)

    @property
    def rows(self) -> int:
        return len(self.inputs[0])

    @property
    def profile_loads_LE(self) -> np.ndarray:
        """float64, the profile's loads, the same in every layer."""
        loads_E = self.profile_NK.flatten().bincount(minlength=self.bench.config.num_experts).double().numpy()
        return np.tile(loads_E, (self.bench.config.n_layers, 1))

    def bound(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds that a call takes at least, whatever the plan, and whether "bytes" or "operations" say so.

        A rank reads its even share of the weights of the experts that the rows of all ranks touch, and computes as
        many choices as its own rows have; the mean over a round.
        """
        config, world = self.bench.config, self.bench.context.world_size
        touched = float((self.loads_CE > 0).sum(1).mean())
        numbers = touched / world * 3 * config.dim * config.hidden_dim
        numbers += config.num_experts * config.dim + 2 * self.rows * config.dim  # the gate, rows in and out
        operations = self.rows * config.dim * (config.num_experts_per_tok * 3 * config.hidden_dim + config.num_experts)
        return ceilings.bound_s(self.bench.dtype.itemsize * numbers, 2.0 * operations)

    def facts(self) -> dict[str, object]:
        """Of the routing, for JSON: where its skew is from, and how uneven experts are in a call, on average."""
        mean_C, max_C = self.loads_CE.mean(1), self.loads_CE.max(1)
        found = {
            "routing": self.kind.name,
            "skew": self.kind.skew,
            "tokens_per_rank": self.rows,
            "touched_experts": float((self.loads_CE > 0).sum(1).mean()),
            "experts_max_over_mean": round(float((max_C / mean_C).mean()), 4),
            "experts_mean_over_max": round(float((mean_C / max_C).mean()), 4),
        }
        return found if self.kind.trace_layer is None else found | {"trace_layer": self.kind.trace_layer}
