"""Experts behind the GPU: which are found in its memory under each rule, and what the others cost. From a trace alone.

A step asks every layer in turn for some experts. Those in the GPU's memory are found. The others are fetched over the
bus or multiplied by the CPU where they lie, both at once, while the GPU multiplies its own. What was asked for may
stay: the GPU's places are one cache over (layer, expert), as many as the plan has residents; ``/layer`` deals them
evenly.

=============  =======================================================================================================
``static``     the plan's residents, for ever
``lru``        the last used
``frequency``  the most used, a use counting ``decay`` of one a step later
``prefetch``   ``lru``, and ahead of each layer the experts that most followed the choices of the layer before, so far
``belady``     those that will be used soonest: nobody can know them, and nothing finds more
=============  =======================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixtralkit.planning.cost import TimeModel
from mixtralkit.planning.hardware import HostRates
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.trace import RoutingTrace

RULES = ("static", "lru", "lru/layer", "frequency", "frequency/layer", "prefetch", "belady")
MOST_CELLS = 1 << 25  # steps · layers · experts that are replayed at most


@dataclass(frozen=True)
class TierResult:
    """What a rule comes to; all but the rate are of a mean step.

    Attributes:
        hit_rate: share of the experts that steps ask for, each once a step, which are in the GPU's memory.
        missing_bytes: weights of the others.
        bus_bytes: of weights over the bus, fetched ahead or when they are missed.
        cpu_s: seconds in which the CPU multiplies.
        step_s: seconds of the step, no fewer than what comes over the bus takes.
        split_step_s: the same where a missing expert's width may be cut, one part fetched, the other the CPU's.
        bound_s: least seconds: all that is found read at the GPU's pace, or all that is missing by bus and CPU at once.
    """

    hit_rate: float
    missing_bytes: float
    bus_bytes: float
    cpu_s: float
    step_s: float
    split_step_s: float
    bound_s: float


def rows_by_step(trace: RoutingTrace, batch: int) -> np.ndarray:
    """Rows of each expert in each step of ``batch`` tokens, [S, L, E] int32; the last, shorter step is left out.

    Of a long trace only the first steps, ``MOST_CELLS`` cells.
    """
    layers, experts = trace.num_layers, trace.num_experts
    steps = min(trace.num_tokens // batch, max(1, MOST_CELLS // (layers * experts)))
    if steps < 1:
        raise ValueError(f"trace: tokens ({trace.num_tokens}) must be at least the {batch} of a step")
    chosen_SBLK = trace.experts[: steps * batch].astype(np.int64).reshape(steps, batch, layers, trace.top_k)
    place = (np.arange(steps)[:, None, None, None] * layers + np.arange(layers)[:, None]) * experts + chosen_SBLK
    return np.bincount(place.ravel(), minlength=steps * layers * experts).astype(np.int32).reshape(steps, layers, -1)


def found_by_step(
    rule: str, rows_SLE: np.ndarray, start_LE: np.ndarray, decay: float = 0.98, ahead: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Experts that are in the GPU's memory when a layer asks, bool [S, L, E], and how many came ahead of it, [S, L].

    Args:
        rule: one of ``RULES`` but ``static``.
        start_LE: bool, those in the memory at first, as many as it has places; ``belady`` has its own.
        decay: of ``frequency``.
        ahead: experts that ``prefetch`` names for a layer.
    """
    steps, layers, experts = rows_SLE.shape
    wanted_SLE, places = rows_SLE > 0, int(start_LE.sum())
    found_SLE, came_SL = np.zeros_like(wanted_SLE), np.zeros((steps, layers), np.int64)
    places_L = None
    if rule.endswith("/layer"):
        rule, places_L = rule.removesuffix("/layer"), places // layers + (np.arange(layers) < places % layers)
    in_LE, score_LE, next_SLE = start_LE.copy(), np.zeros((layers, experts)), None
    if places_L is not None:
        in_LE &= start_LE.cumsum(1) <= places_L[:, None]
    guess = _Followers(rows_SLE, ahead) if rule == "prefetch" else None
    if rule == "belady":
        next_SLE = _next_uses(wanted_SLE)
        score_LE = -(next_SLE[0] * layers + np.arange(layers)[:, None]).astype(float)
        in_LE = _cut(np.ones_like(in_LE), score_LE, places)
    for step in range(steps):
        if rule == "frequency":
            score_LE *= decay
        for layer in range(layers):
            now, wanted_E = float(step * layers + layer + 1), wanted_SLE[step, layer]
            if guess is not None and layer:
                named_E = guess.named(step, layer)
                fresh_E = named_E & ~in_LE[layer]
                if fresh_E.any():
                    score_LE[layer] = np.where(named_E, np.maximum(score_LE[layer], now - 0.5), score_LE[layer])
                    in_LE[layer] |= fresh_E
                    in_LE = _cut(in_LE, score_LE, places)
                    came_SL[step, layer] = (in_LE[layer] & fresh_E).sum()
            found_SLE[step, layer] = in_LE[layer]
            if rule == "belady":
                later_E = -(next_SLE[step + 1, layer] * layers + layer).astype(float)
            elif rule == "frequency":
                later_E = score_LE[layer] + 1
            else:
                later_E = now
            score_LE[layer] = np.where(wanted_E, later_E, score_LE[layer])
            if (wanted_E & ~in_LE[layer]).any():
                in_LE[layer] |= wanted_E
                if places_L is None:
                    in_LE = _cut(in_LE, score_LE, places)
                else:
                    in_LE[layer] = _cut(in_LE[layer], score_LE[layer], places_L[layer])
    return found_SLE, came_SL


def _cut(in_LE: np.ndarray, score_LE: np.ndarray, places: int) -> np.ndarray:
    """Those of the highest scores, as many as there are places; the first among equals."""
    held_N = np.flatnonzero(in_LE)
    out_LE = np.zeros_like(in_LE)
    out_LE.flat[held_N[np.argsort(-score_LE.flat[held_N], kind="stable")[:places]]] = True
    return out_LE


def _next_uses(wanted_SLE: np.ndarray) -> np.ndarray:
    """The step, from each on, in which each expert is used next; as many as there are steps for never."""
    steps = len(wanted_SLE)
    next_SLE = np.full((steps + 1, *wanted_SLE.shape[1:]), steps, np.int64)
    for step in range(steps - 1, -1, -1):
        next_SLE[step] = np.where(wanted_SLE[step], step, next_SLE[step + 1])
    return next_SLE


class _Followers:
    """How often an expert followed another one layer later, in the steps before."""

    def __init__(self, rows_SLE: np.ndarray, ahead: int) -> None:
        self.rows_SLE, self.ahead = rows_SLE, ahead
        _, layers, experts = rows_SLE.shape
        self.counts = np.zeros((layers, experts, experts))
        self.counted = 0

    def named(self, step: int, layer: int) -> np.ndarray:
        """Bool [E]: the best guesses for a layer, by the choices of the one before it in this step."""
        for rows_LE in self.rows_SLE[self.counted : step]:
            self.counts[1:] += rows_LE[:-1, :, None] * rows_LE[1:, None, :]
        self.counted = step
        score_E = self.rows_SLE[step, layer - 1] @ self.counts[layer]
        return _cut(score_E > 0, score_E, self.ahead)


def simulate_tiers(
    plan: ExpertPlan,
    trace: RoutingTrace,
    model: TimeModel,
    host: HostRates,
    batch: int = 1,
    context: int = 0,
    rules: tuple[str, ...] = RULES,
    decay: float = 0.98,
    ahead: int = 2,
) -> dict[str, TierResult]:
    """Replays a trace on one GPU with the plan's residents, by rule.

    Args:
        plan: of one rank; its ``tier`` says who is resident.
        model: sizes and speeds.
        batch: tokens of a step; ``context`` tokens of each sequence in the cache.
        decay, ahead: as in ``found_by_step``.
    """
    if plan.world_size != 1:
        raise ValueError(f"world_size ({plan.world_size}) must be 1 to replay tiers")
    plan.check_fits(trace.num_layers, trace.num_experts, 1)
    rows_SLE = rows_by_step(trace, batch)
    size_LE, resident_LE = model.shape.expert_bytes_LE(plan).astype(float), ~plan.on_host_LE
    results = {}
    for rule in rules:
        found_SLE, came_SL = np.broadcast_to(resident_LE, rows_SLE.shape), np.zeros(rows_SLE.shape[:2], np.int64)
        if rule != "static":
            found_SLE, came_SL = found_by_step(rule, rows_SLE, resident_LE, decay, ahead)
        came_bytes = float((came_SL * size_LE.mean(1)).sum()) / len(rows_SLE)
        results[rule] = _timed(rows_SLE, found_SLE, size_LE, model, host, batch, context, came_bytes)
    return results


def _timed(
    rows_SLE: np.ndarray, found_SLE: np.ndarray, size_LE: np.ndarray, model: TimeModel, host: HostRates, batch: int,
    context: int, came_bytes: float,
) -> TierResult:  # fmt: skip
    steps, wanted_SLE = len(rows_SLE), rows_SLE > 0
    hit_SLE, miss_SLE = wanted_SLE & found_SLE, wanted_SLE & ~found_SLE
    own_SLE = np.where(hit_SLE, rows_SLE, 0)
    mean_SL = own_SLE.sum(2) / np.maximum(hit_SLE.sum(2), 1)
    gpu_SL = model.experts_start_s(mean_SL) + model.expert_s(own_SLE, size=size_LE).sum(2)
    count_SL, bytes_SL = miss_SLE.sum(2), (miss_SLE * size_LE).sum(2)
    fetched_SL, wait_SL = share_misses(count_SL, bytes_SL, host)
    tokens = np.array([float(batch)])
    around_s = float((model.attention_s(tokens, context) + model.gate_s(tokens)).max()) + model.hardware.sync_s
    ends_s = float(model.head_s(tokens).max()) + model.between_steps_s()
    split_SL = bytes_SL / (host.bus_bandwidth + host.cpu_bandwidth)
    whole_s, split_s = (float(np.maximum(gpu_SL, of_SL).sum() / steps) for of_SL in (wait_SL, split_SL))
    rest_s = len(size_LE) * around_s + ends_s
    missing = float(bytes_SL.sum() / steps)
    read_s = float((hit_SLE * size_LE).sum() / steps) / model.hardware.memory_bandwidth
    return TierResult(
        hit_rate=float(hit_SLE.sum() / wanted_SLE.sum()),
        missing_bytes=missing,
        bus_bytes=came_bytes + float(fetched_SL.sum() / steps),
        cpu_s=float((bytes_SL - fetched_SL).sum() / steps / host.cpu_bandwidth),
        step_s=max(whole_s + rest_s, (came_bytes + float(fetched_SL.sum() / steps)) / host.bus_bandwidth),
        split_step_s=max(split_s + rest_s, came_bytes / host.bus_bandwidth),
        bound_s=max(read_s, missing / (host.bus_bandwidth + host.cpu_bandwidth)),
    )


def share_misses(count: np.ndarray, size: np.ndarray, host: HostRates) -> tuple[np.ndarray, np.ndarray]:
    """Bytes over the bus and seconds until all is there, of ``count`` missing experts of so many bytes in all.

    Whole experts of the mean size, as many over the bus as end soonest together with those of the CPU.
    """
    count = np.asarray(count)
    each = np.asarray(size, float) / np.maximum(count, 1)
    tried = np.arange(int(count.max(initial=0)) + 1)
    over_bus = np.minimum(tried, count[..., None])
    seconds = each[..., None] * np.maximum(
        over_bus / host.bus_bandwidth, (count[..., None] - over_bus) / host.cpu_bandwidth
    )
    best = seconds.argmin(-1)[..., None]
    return each * np.take_along_axis(over_bus, best, -1)[..., 0], np.take_along_axis(seconds, best, -1)[..., 0]
