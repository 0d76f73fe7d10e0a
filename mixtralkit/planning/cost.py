"""What a step costs, and what follows from it: which experts are worth shadowing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from mixtralkit.moe.weights import PLAIN, ExpertWeights
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import PRECISIONS, ExpertPlan

if TYPE_CHECKING:
    from mixtralkit.config import ModelConfig

# Ranks and slots of a row's choices, its weights and its number travel beside it (``moe.exchange.pack``).
_PACKED_BYTES = 4


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that cost time.

    Attributes:
        dim, hidden, num_experts, top_k, heads, kv_heads, head_dim, vocab: as in the model's configuration.
        data_bytes: of a number in rows, and in weights that are not of another format.
        weights: format of the experts.
        attention_weights: of attention's projections and the output matrix.
    """

    dim: int
    hidden: int
    num_experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    data_bytes: int = 2
    weights: ExpertWeights = PLAIN
    attention_weights: ExpertWeights = PLAIN

    @classmethod
    def of(
        cls, config: ModelConfig, data_bytes: int = 2, weights: ExpertWeights = PLAIN,
        attention_weights: ExpertWeights = PLAIN,
    ) -> ModelShape:  # fmt: skip
        """The sizes of ``config``, with numbers of ``data_bytes``, and experts and attention in such formats."""
        return cls(
            config.dim, config.hidden_dim, config.num_experts, config.num_experts_per_tok,
            config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size, data_bytes, weights,
            attention_weights,
        )  # fmt: skip

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return self.weights.expert_bytes(self.dim, self.hidden, self.data_bytes)

    def projection_bytes(self, weights: float) -> float:
        """Of so many weights of attention or of the output matrix, whose rows are about ``dim`` long."""
        return weights * self.attention_weights.bytes(self.vocab, self.dim, self.data_bytes) / (self.vocab * self.dim)

    def sizes(self, formats: Sequence[str]) -> np.ndarray:
        """Bytes of an expert in each of these formats of ``plan.PRECISIONS``."""
        return np.array([PRECISIONS[n].expert_bytes(self.dim, self.hidden, self.data_bytes) for n in formats], float)

    def expert_bytes_LE(self, plan: ExpertPlan) -> np.ndarray:
        """int64 [L, E], weights of each expert in the format that the plan gives it."""
        of = {
            w: w.expert_bytes(self.dim, self.hidden, self.data_bytes)
            for w in {PLAIN, self.weights, *PRECISIONS.values()}
        }
        return np.array([[of[weights] for weights in row] for row in plan.formats_LE(self.weights)], np.int64)

    def rank_bytes(self, plan: ExpertPlan) -> tuple[np.ndarray, np.ndarray]:
        """int64 [W] each: experts' weights that every rank has in its GPU's memory, and in the host's."""
        held_LWE = plan.holds_LWE * self.expert_bytes_LE(plan)[:, None]
        host_W = (held_LWE * plan.on_host_LE[:, None]).sum((0, 2))
        return held_LWE.sum((0, 2)) - host_W, host_W

    @property
    def row_bytes(self) -> int:
        """A row, on its way to its expert or back as a sum."""
        return self.dim * self.data_bytes

    @property
    def packed_bytes(self) -> int:
        """What travels beside a row on its way out: rank, slot and weight of each choice."""
        return _PACKED_BYTES * 3 * self.top_k


@dataclass(frozen=True)
class KernelCounts:
    """Kernels of a layer's steps, as the operations of ``MoELayer`` in plain torch are counted.

    ``dispatch`` is of counted rows, ``replicas`` more where those are poured, ``static`` of rows in fixed shapes.
    """

    attention: int = 30
    gate: int = 10
    dispatch: int = 60
    static: int = 17
    replicas: int = 20
    experts: int = 25
    combine: int = 5


@dataclass(frozen=True)
class TimeModel:
    """Predicts seconds of a layer's steps on every rank from what the rank has to do.

    Arrays end in the ranks W; any dimensions before it are kept. ``docs/cost-model.md`` has the formulas.
    """

    shape: ModelShape
    hardware: Hardware
    world_size: int = 1
    ranks_per_node: int | None = None
    kernels: KernelCounts = KernelCounts()

    def __post_init__(self) -> None:
        self.hardware.networks(self.world_size, self.ranks_per_node)

    def product_s(self, rows: np.ndarray | float, weights: float, size: np.ndarray | float | None = None) -> np.ndarray:
        """A product of ``rows`` rows with a matrix of so many ``weights``: the slower of arithmetic and reading.

        ``size`` is the bytes of the matrix; None those of numbers like the rows'.
        """
        rows = np.asarray(rows, float)
        with np.errstate(invalid="ignore", divide="ignore"):
            arithmetic = np.where(rows > 0, 2 * weights * rows / self.hardware.matrix_rate(rows), 0.0)
        reading = (weights * self.shape.data_bytes if size is None else size) / self.hardware.memory_bandwidth
        return np.where(rows > 0, np.maximum(arithmetic, reading), 0.0)

    def projection_s(self, rows: np.ndarray | float, weights: float) -> np.ndarray:
        """A product with so many weights of attention or of the output matrix."""
        return self.product_s(rows, weights, self.shape.projection_bytes(weights))

    def expert_s(self, rows: np.ndarray | float, split: int = 1, size: np.ndarray | float | None = None) -> np.ndarray:
        """One expert, or its ``split``-th part, on one rank for ``rows`` choices; 0 for none.

        Its three matrices, and the copies of its rows: gathered, 2F wide and F wide between the products, summed.
        ``size`` is the bytes of its weights; None those of the model's format.
        """
        shape, hidden = self.shape, self.shape.hidden / split
        copies = (4 * shape.dim + 6 * hidden) * shape.data_bytes / self.hardware.memory_bandwidth
        size = shape.expert_bytes if size is None else size
        product_s = self.product_s(rows, 3 * shape.dim * hidden, size / split)
        return product_s + np.asarray(rows, float) * copies

    def experts_s(
        self, rows_WE: np.ndarray, split: int = 1, size_E: np.ndarray | None = None, formats: int = 1
    ) -> np.ndarray:
        """All experts of each rank, one after the other: rows [..., W, E] → seconds [..., W].

        ``size_E`` is as in ``expert_s``; ``formats`` are those of the layer's experts, each with kernels of its own.
        """
        rows_WE = np.asarray(rows_WE)
        mean_rows_W = rows_WE.sum(-1) / np.maximum((rows_WE > 0).sum(-1), 1)
        return formats * self.experts_start_s(mean_rows_W) + self.expert_s(rows_WE, split, size_E).sum(-1)

    def experts_start_s(self, mean_rows: np.ndarray | float) -> np.ndarray | float:
        """What a rank's experts take beside their products; ``mean_rows`` are those of an expert that has any."""
        return self.launches_s(self.kernels.experts)

    def gate_s(self, tokens_W: np.ndarray) -> np.ndarray:
        """Norm and gate of so many tokens."""
        return self.launches_s(self.kernels.gate) + self.product_s(tokens_W, self.shape.dim * self.shape.num_experts)

    def attention_s(
        self,
        tokens_W: np.ndarray,
        context: float,
        span: int = 1,
        split: int = 1,
        passed_on_W: np.ndarray | None = None,
    ) -> np.ndarray:
        """Attention without its all-reduce.

        Args:
            tokens_W: tokens of the step on each rank.
            context: tokens of each sequence that are in the cache already.
            span: tokens of the step that belong to one sequence; 1 in decode.
            split: ranks that share the heads.
            passed_on_W: rows that go through the output projection; None is all.
        """
        shape, tokens_W = self.shape, np.asarray(tokens_W, float)
        heads, kv_heads = shape.heads / split, max(shape.kv_heads / split, 1)
        last_W = tokens_W if passed_on_W is None else np.asarray(passed_on_W, float)
        products = self.projection_s(tokens_W, shape.dim * shape.head_dim * (heads + 2 * kv_heads))
        products = products + self.projection_s(last_W, shape.dim * shape.head_dim * heads)
        cache = tokens_W / span * (context + span) * 2 * kv_heads * shape.head_dim * shape.data_bytes
        flop = 4 * tokens_W * (context + (span + 1) / 2) * heads * shape.head_dim
        reading, arithmetic = cache / self.hardware.memory_bandwidth, flop / self.hardware.peak_flops
        launches = self.launches_s(self.kernels.attention)
        return launches + products + np.maximum(reading, arithmetic)

    def head_s(self, rows_W: np.ndarray, split: int = 1) -> np.ndarray:
        """The output matrix for ``rows_W`` rows, the vocabulary shared by ``split`` ranks, logits gathered."""
        shape, rows_W = self.shape, np.asarray(rows_W, float)
        seconds = self.projection_s(rows_W, shape.dim * shape.vocab / split)
        if split > 1:
            seconds = seconds + self.all_gather_s(float(rows_W.max(initial=0)) * shape.vocab / split * 4)
        return seconds

    def host_s(self) -> list[float]:
        """Least seconds of attention, gate, dispatch, experts and combine where the host launches every kernel.

        ``TimeModel`` counts those launches in each of them already.
        """
        return [0.0] * 5

    def symmetric_exchange_s(self, out_W: np.ndarray, into_W: np.ndarray) -> np.ndarray:
        """Rows to the ranks that compute them and sums back, bytes [..., W] one way of the two, on one node."""
        if len(self._networks) > 1:
            raise ValueError("dispatcher 'symmetric' needs all ranks on one node")
        return 2 * self.exchange_s([out_W], [into_W])

    def between_steps_s(self) -> float:
        """From one step's end to the next one's beginning."""
        return 0.0

    def launches_s(self, kernels: int) -> float:
        """So many kernels that have nothing to do."""
        return kernels * self.hardware.launch_s

    def captured_s(self, kernels: int) -> float:
        """So many small kernels of a step that a graph holds; plain torch launches it like any other."""
        return self.launches_s(kernels)

    def exchange_s(self, out_NW: Sequence[np.ndarray], into_NW: Sequence[np.ndarray], messages: int = 1) -> np.ndarray:
        """Rows between ranks: over before the busiest rank's busier direction is, on the slower of the networks.

        Args:
            out_NW, into_NW: for each network in use (inside, across) bytes [..., W] that leave and reach each rank.
            messages: collectives that carry them.
        """
        seconds, latency = 0.0, 0.0
        for (network, members), out_W, into_W in zip(self._networks, out_NW, into_NW, strict=True):
            busiest = np.maximum(out_W, into_W).max(-1)
            seconds = np.maximum(seconds, busiest / network.exchange.bandwidth)
            latency = max(latency, network.latency_s("exchange", members))
        return seconds + messages * latency

    def all_reduce_s(self, size: np.ndarray | float) -> np.ndarray | float:
        """The sum over all ranks of ``size`` bytes, as a ring: 2·(W-1)/W of them leave each rank."""
        slowest = min(network.all_reduce.bandwidth for network, _ in self._networks)
        latencies = [network.latency_s("all_reduce", members) for network, members in self._networks]
        return size * ring_share(self.world_size) / slowest + sum(latencies)

    def all_gather_s(self, size: np.ndarray | float) -> np.ndarray | float:
        """Every rank's ``size`` bytes to every other, straight."""
        (_, here), *_ = self._networks
        peers = (here - 1, self.world_size - here)[: len(self._networks)]
        seconds = [
            size * count / network.exchange.bandwidth for (network, _), count in zip(self._networks, peers, strict=True)
        ]
        latencies = [network.latency_s("exchange", members) for network, members in self._networks]
        return np.maximum.reduce(seconds) + max(latencies)

    @property
    def _networks(self):
        return self.hardware.networks(self.world_size, self.ranks_per_node)


def ring_share(world_size: int) -> float:
    """Of an all-reduced buffer, the part that leaves each rank."""
    return 2 * (world_size - 1) / world_size


@dataclass(frozen=True)
class ShadowModel:
    """FasterMoE's time of a step that shadows r experts (PPoPP'22; terms of §3, decision of §4.1).

    ::

        time(r) = rounds · 2·m · B·α·H² / P  +  exchanges · B·H·b / W  +  r · m·α·H²·b / W

    with B the rows of the busiest expert that is not shadowed. The paper writes 4·B·α·H² for the 2·m·B·α·H² FLOP of
    m = 2 matrices, and takes 3 rounds (forward, and backward twice as much), 4 exchanges and b = 4 bytes. Mixtral's
    experts have m = 3; inference takes 1 round and 2 exchanges.

    Attributes:
        d_model: H, width of a row.
        alpha: α, hidden width of an expert / H.
        net_bandwidth: W, bytes/s.
        gpu_throughput: P, FLOP/s.
        data_bytes: b, of a number in a row and in a weight.
        matrices: m of an expert.
        compute_rounds: products with each matrix, a backward pass counting twice.
        exchanges: times that a row travels.
        broadcast_bandwidth: bytes/s at which weights reach every rank; None, as in the paper, takes W.
        weight_bytes: of a weight; None, as in the paper, takes b.
    """

    d_model: int
    alpha: float
    net_bandwidth: float
    gpu_throughput: float
    data_bytes: int
    matrices: int
    compute_rounds: int
    exchanges: int
    broadcast_bandwidth: float | None = None
    weight_bytes: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("broadcast_bandwidth", "weight_bytes") and value is None:
                continue
            if not 0 < value < float("inf"):
                raise ValueError(f"{f.name} ({value!r}) must be a number above 0")

    @classmethod
    def for_training(
        cls,
        d_model: int,
        alpha: float,
        net_bandwidth: float,
        gpu_throughput: float,
        matrices: int = 2,
        data_bytes: int = 4,
        weight_bytes: float | None = None,
    ) -> ShadowModel:
        """A training step: the paper's form as it stands by default."""
        return cls(
            d_model, alpha, net_bandwidth, gpu_throughput, data_bytes, matrices, compute_rounds=3, exchanges=4,
            weight_bytes=weight_bytes,
        )  # fmt: skip

    @classmethod
    def for_inference(
        cls,
        d_model: int,
        alpha: float,
        net_bandwidth: float,
        gpu_throughput: float,
        matrices: int = 3,
        data_bytes: int = 2,
        weight_bytes: float | None = None,
    ) -> ShadowModel:
        """A forward pass: Mixtral in 16 bits by default."""
        return cls(
            d_model, alpha, net_bandwidth, gpu_throughput, data_bytes, matrices, compute_rounds=1, exchanges=2,
            weight_bytes=weight_bytes,
        )  # fmt: skip

    @classmethod
    def from_hardware(cls, shape: ModelShape, hardware: Hardware) -> ShadowModel:
        """A forward pass on a machine that was measured, all ranks on one node."""
        return cls(
            shape.dim, shape.hidden / shape.dim, hardware.inside.exchange.bandwidth, hardware.peak_flops,
            shape.data_bytes, matrices=3, compute_rounds=1, exchanges=2,
            broadcast_bandwidth=hardware.inside.broadcast.bandwidth,
            weight_bytes=shape.expert_bytes / (3 * shape.dim * shape.hidden),
        )  # fmt: skip

    @property
    def exchange_s_per_row(self) -> float:
        """Seconds that a row spends on the wire."""
        return self.exchanges * self.d_model * self.data_bytes / self.net_bandwidth

    @property
    def s_per_row(self) -> float:
        """Seconds that a row of the busiest expert adds to the step."""
        flop = self.compute_rounds * 2 * self.matrices * self.alpha * self.d_model**2
        return flop / self.gpu_throughput + self.exchange_s_per_row

    @property
    def s_per_shadow(self) -> float:
        """Seconds that the weights of an expert take to every rank."""
        weights = self.matrices * self.alpha * self.d_model**2
        return weights * (self.weight_bytes or self.data_bytes) / (self.broadcast_bandwidth or self.net_bandwidth)


def choose_shadows(
    loads_E: Sequence[float],
    model: ShadowModel,
    resident: Collection[int] = (),
    most: int | None = None,
    hidden_s: float = 0.0,
) -> tuple[int, ...]:
    """Experts for every rank to compute for its own rows in this step, by falling load.

    Experts are taken in falling order of load, the lower id first among equals, and shadowed while the predicted time
    falls. Those without rows are never taken.

    Args:
        loads_E: rows of each expert, summed over the ranks the rows come from; of an expert with c replicas, the
            c-th part.
        resident: experts whose weights are on every rank already. Shadowing them costs nothing, so each that has
            rows is taken.
        most: how many others may be taken; None sets no limit.
        hidden_s: seconds during which weights move for nothing, because other work goes on meanwhile.
    """
    order = [e for e in sorted(range(len(loads_E)), key=lambda e: (-loads_E[e], e)) if loads_E[e] > 0]
    away = [e for e in order if e not in resident]
    taken, time = 0, model.s_per_row * _load_at(loads_E, away, 0)
    while taken < len(away) and (most is None or taken < most):
        moving_s = max(0.0, (taken + 1) * model.s_per_shadow - hidden_s)
        with_next = model.s_per_row * _load_at(loads_E, away, taken + 1) + moving_s
        if with_next >= time:
            break
        taken, time = taken + 1, with_next
    left_away = set(away[taken:])
    return tuple(e for e in order if e not in left_away)


def _load_at(loads_E: Sequence[float], order: list[int], place: int) -> float:
    return loads_E[order[place]] if place < len(order) else 0.0
