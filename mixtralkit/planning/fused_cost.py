"""What a step of this project's own kernels costs, launched as one graph: nothing waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtralkit.planning.cost import TimeModel, ring_share
from mixtralkit.planning.hardware import FusedKernels, ProductPoints, WirePoints

# Ranks that reach into each other's memory, on one node (``ops.all_reduce``, ``ops.symmetric_exchange``).
MOST_RANKS = 8
# Embedding, first norm, choice of the token, and its exchange.
SMALL_AT_ENDS = 4
# A norm reads what is added and what it is added to, and writes their sum and its norm.
PASSES_OF_NORM, PASSES_OF_GATE = 4, 2


@dataclass(frozen=True)
class FusedTimeModel(TimeModel):
    """``TimeModel`` of fused kernels: few of them, each with a fixed price that is measured and no launch.

    Where ranks cannot reach into each other's memory, sums are the collectives of ``TimeModel``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hardware.fused is None:
            raise ValueError(f"fused of hardware {self.hardware.name} (null) must be given: its kernels' figures")

    def product_s(self, rows: np.ndarray | float, weights: float, size: np.ndarray | float | None = None) -> np.ndarray:
        """One kernel: ``rows`` rows with a matrix of so many ``weights``."""
        start_s, per_weight_s = _product(self._fused.linear, rows)
        return start_s + self._reading_less(per_weight_s * weights * self._size_of_numbers, weights, size)

    def expert_s(self, rows: np.ndarray | float, split: int = 1, size: np.ndarray | float | None = None) -> np.ndarray:
        """One expert's share of the kernel that computes all of them; 0 for no rows."""
        _, per_weight_s = _product(self._fused.experts, rows)
        weights = 3 * self.shape.dim * self.shape.hidden / split
        size = (self.shape.expert_bytes if size is None else size) / split
        return self._reading_less(per_weight_s * weights * self._size_of_numbers, weights, size)

    def experts_start_s(self, mean_rows: np.ndarray | float) -> np.ndarray | float:
        """Sorting, and the beginning and end of the two products; nothing on a rank that no row reaches."""
        start_s, _ = _product(self._fused.experts, mean_rows)
        return start_s

    def gate_s(self, tokens_W: np.ndarray) -> np.ndarray:
        """Norm and gate, and the passes over the rows of both norms of a layer."""
        passes = 2 * PASSES_OF_NORM + PASSES_OF_GATE
        return self._fused.small_s + self._pass_s(tokens_W, passes)

    def attention_s(
        self,
        tokens_W: np.ndarray,
        context: float,
        span: int = 1,
        split: int = 1,
        passed_on_W: np.ndarray | None = None,
    ) -> np.ndarray:
        """Two products and the attention between them; arguments as ``TimeModel.attention_s`` has them."""
        shape, tokens_W = self.shape, np.asarray(tokens_W, float)
        heads, kv_heads = shape.heads / split, max(shape.kv_heads / split, 1)
        products = self.projection_s(tokens_W, shape.dim * shape.head_dim * (heads + 2 * kv_heads))
        last_W = tokens_W if passed_on_W is None else np.asarray(passed_on_W, float)
        products = products + self.projection_s(last_W, shape.dim * shape.head_dim * heads)
        cache = tokens_W / span * (context + span) * 2 * kv_heads * shape.head_dim * shape.data_bytes
        flop = 4 * tokens_W * (context + (span + 1) / 2) * heads * shape.head_dim
        seconds = cache / self._fused.attention_bandwidth
        if span > 1:
            seconds = np.maximum(cache / self._fused.memory_bandwidth, flop / self._fused.attention_flops)
        return products + self._fused.small_s + seconds

    def head_s(self, rows_W: np.ndarray, split: int = 1) -> np.ndarray:
        """The output matrix, the vocabulary shared by ``split`` ranks, and the small kernels at both ends."""
        ends_s = SMALL_AT_ENDS * self._fused.small_s
        return ends_s + self.projection_s(rows_W, self.shape.dim * self.shape.vocab / split)

    def between_steps_s(self) -> float:
        """From one graph's end to the next one's beginning."""
        return self._fused.step_s

    def all_reduce_s(self, size: np.ndarray | float) -> np.ndarray | float:
        """The kernel that sums ``size`` bytes of rows over the ranks, with residual and norm."""
        if self._fused.sums is None or self.world_size == 1 or not self._reach_each_other:
            return super().all_reduce_s(size)
        alike = np.asarray(size, float) * ring_share(self.world_size) / ring_share(self._fused.members)
        return np.where(alike > 0, _on_wire(self._fused.sums, alike), 0.0)

    def symmetric_exchange_s(self, out_W: np.ndarray, into_W: np.ndarray) -> np.ndarray:
        """Rows to the ranks that compute them and sums back, through memory: bytes [..., W] one way of the two."""
        if self._fused.exchange is None:
            raise ValueError(
                f"fused.exchange of hardware {self.hardware.name} (null) must be given for dispatcher 'symmetric'"
            )
        if not self._reach_each_other:
            raise ValueError(f"dispatcher 'symmetric' needs all ranks on one node, at most {MOST_RANKS}")
        busiest = np.maximum(out_W, into_W).max(-1)
        return np.full(busiest.shape, 0.0) if self.world_size == 1 else _on_wire(self._fused.exchange, busiest)

    def captured_s(self, kernels: int) -> float:
        """So many small kernels, one after the other on the device."""
        return kernels * self._fused.small_s

    def host_s(self) -> list[float]:
        """The host's launches of each phase."""
        counts = self.kernels
        return [self.launches_s(n) for n in (counts.attention, counts.gate, 0, counts.experts, 0)]

    def _reading_less(self, plain_s: np.ndarray, weights: float, size: np.ndarray | float | None) -> np.ndarray:
        """What takes ``plain_s`` with plain weights, of so many bytes; None for those of plain ones.

        Another format saves the reading of the bytes that it lacks, which all of the time can be but what reading the
        rest takes.
        """
        if size is None:
            return plain_s
        bandwidth = self._fused.memory_bandwidth
        saved_s = (weights * self.shape.data_bytes - size) / bandwidth
        return np.where(plain_s > 0, np.maximum(plain_s - saved_s, np.minimum(plain_s, size / bandwidth)), 0.0)

    def _pass_s(self, tokens_W: np.ndarray, passes: int) -> np.ndarray:
        return passes * np.asarray(tokens_W, float) * self.shape.row_bytes / self._fused.memory_bandwidth

    @property
    def _fused(self) -> FusedKernels:
        assert self.hardware.fused is not None
        return self.hardware.fused

    @property
    def _size_of_numbers(self) -> float:
        """Of a weight, against those that were measured."""
        return self.shape.data_bytes / self.hardware.data_bytes

    @property
    def _reach_each_other(self) -> bool:
        return self.world_size <= min(MOST_RANKS, self.ranks_per_node or MOST_RANKS)


def _product(points: ProductPoints, rows: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """(seconds that do not depend on the weights, seconds a weight) of so many rows; 0 for none.

    Between the measured points both lie on lines over the rows; below the first they stay, beyond the last the rate
    does.
    """
    rows = np.asarray(rows, float)
    known_R, start_R, rate_R = np.array(points, float).T
    per_weight_s = np.interp(rows, known_R, 2 * known_R / rate_R) * np.maximum(rows / known_R[-1], 1.0)
    return np.where(rows > 0, np.interp(rows, known_R, start_R), 0.0), np.where(rows > 0, per_weight_s, 0.0)


def _on_wire(points: WirePoints, size: np.ndarray) -> np.ndarray:
    """Seconds of so many bytes, on a line between points; beyond the last at the pace of the last two."""
    known_B, seconds_B = np.array(points, float).T
    seconds = np.interp(size, known_B, seconds_B)
    if len(points) > 1:
        pace = (seconds_B[-1] - seconds_B[-2]) / (known_B[-1] - known_B[-2])
        seconds = seconds + pace * np.maximum(size - known_B[-1], 0.0)
    return seconds
