"""What a step costs, and what follows from it: which experts are worth shadowing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields


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
    """

    d_model: int
    alpha: float
    net_bandwidth: float
    gpu_throughput: float
    data_bytes: int
    matrices: int
    compute_rounds: int
    exchanges: int

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
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
    ) -> ShadowModel:
        """A training step: the paper's form as it stands by default."""
        return cls(d_model, alpha, net_bandwidth, gpu_throughput, data_bytes, matrices, compute_rounds=3, exchanges=4)

    @classmethod
    def for_inference(
        cls,
        d_model: int,
        alpha: float,
        net_bandwidth: float,
        gpu_throughput: float,
        matrices: int = 3,
        data_bytes: int = 2,
    ) -> ShadowModel:
        """A forward pass: Mixtral in 16 bits by default."""
        return cls(d_model, alpha, net_bandwidth, gpu_throughput, data_bytes, matrices, compute_rounds=1, exchanges=2)

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
        return self.matrices * self.alpha * self.d_model**2 * self.data_bytes / self.net_bandwidth

    @property
    def break_even_rows(self) -> float:
        """Rows by which the busiest expert must lead the next for its shadow to pay in one step."""
        return self.s_per_shadow / self.s_per_row

    @property
    def break_even_rows_on_the_wire(self) -> float:
        """The same with compute for free: m·α·H / exchanges, whatever the bandwidth."""
        return self.s_per_shadow / self.exchange_s_per_row


def choose_shadows(
    loads_E: Sequence[float], model: ShadowModel, resident: Collection[int] = (), most: int | None = None
) -> tuple[int, ...]:
    """Experts to compute at home on every rank in this step, by falling load.

    Experts are taken in falling order of load, the lower id first among equals, and shadowed while the predicted time
    falls. Those without rows are never taken.

    Args:
        loads_E: rows of each expert, summed over the ranks the rows come from; of an expert with c replicas, the
            c-th part.
        resident: experts whose weights are on every rank already. Shadowing them costs nothing, so each that has
            rows is taken.
        most: how many others may be taken; None sets no limit.
    """
    order = [e for e in sorted(range(len(loads_E)), key=lambda e: (-loads_E[e], e)) if loads_E[e] > 0]
    away = [e for e in order if e not in resident]
    taken, time = 0, model.s_per_row * _load_at(loads_E, away, 0)
    while taken < len(away) and (most is None or taken < most):
        with_next = model.s_per_row * _load_at(loads_E, away, taken + 1) + (taken + 1) * model.s_per_shadow
        if with_next >= time:
            break
        taken, time = taken + 1, with_next
    left_away = set(away[taken:])
    return tuple(e for e in order if e not in left_away)


def _load_at(loads_E: Sequence[float], order: list[int], place: int) -> float:
    return loads_E[order[place]] if place < len(order) else 0.0
