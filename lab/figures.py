"""What the fused kernels take on a machine: the figures of ``planning.hardware.FusedKernels``, measured.

Calls run in CUDA graphs, on all ranks at once, on inputs that no cache holds. What a kernel takes whatever the size of
its weights is told from what their size adds by measuring two sizes. On a CPU the references run, by the clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from lab.timing import captured
from mixtralkit.config import CacheOptions
from mixtralkit.distributed import RankContext
from mixtralkit.model.kv_cache import own_pages
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.attention import decode_attention, rotate_and_store
from mixtralkit.ops.experts import expert_sum
from mixtralkit.ops.gate import gate
from mixtralkit.ops.linear import linear
from mixtralkit.ops.ragged_attention import ragged_attention, span_table
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.hardware import FusedKernels, ProductPoints, WirePoints
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.replicas import ReplicaTable

EPS = 1e-5
BEYOND_CACHES = 2**28  # bytes of weights that take turns: several times the largest L2
SLOTS, TOP_K = 4, 2  # of the experts that are measured
LEAST_S = 0.01  # the two sizes' difference counts at least so much of the larger one's time: noise must not invert it

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: width of rows and of an expert, numbers of rows, tokens of a sequence."""

    dim: int = 4096
    hidden: int = 14336
    dtype: torch.dtype = torch.bfloat16
    rows: tuple[int, ...] = (1, 8, 64, 256, 1024, 4096)
    expert_rows: tuple[int, ...] = (1, 2, 16, 64, 256, 1024, 4096)
    symmetric_rows: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    sequences: int = 64
    length: int = 1024

    @property
    def head_dim(self) -> int:
        return min(128, self.dim)

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 4)


class KernelClock:
    """Seconds of one call: the slowest rank's, the median of five.

    ``turns`` is how often the calls are in a graph, the same on all ranks, because some wait for the other ranks.
    """

    def __init__(self, context: RankContext, say: Callable[[str, float, str], None]) -> None:
        self.context, self.say = context, say

    def __call__(self, calls: Calls, turns: int = 16) -> float:
        replay = self._replay(calls, turns)
        replay()
        times = [self._timed(replay) for _ in range(5)]
        return max(self.context.all_gather_objects(median(times))) / (turns * len(calls))

    def _replay(self, calls: Calls, turns: int) -> Callable[[], None]:
        if self.context.device.type == "cuda":
            for call in calls:
                call()  # compiles
            return captured(calls, turns, self.context.device)

        def run() -> None:
            for _, call in itertools.product(range(turns), calls):
                call()

        return run

    def _timed(self, replay: Callable[[], None]) -> float:
        self._wait()
        self.context.barrier()
        start = time.perf_counter()
        replays = 4 if self.context.device.type == "cuda" else 1  # a graph's own start should not count for much
        for _ in range(replays):
            replay()
        self._wait()
        return (time.perf_counter() - start) / replays

    def _wait(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)


@torch.no_grad()
def measure_fused(
    context: RankContext, memory_bandwidth: float, sizes: Sizes, say: Callable[[str, float, str], None]
) -> FusedKernels:
    """All figures. Collective.

    Args:
        memory_bandwidth: bytes/s of reading, measured already.
        say: takes each figure's name, value and unit, to print it.
    """
    clock = KernelClock(context, say)
    small_s, step_s = _small(clock, sizes)
    attention_bandwidth, attention_flops = _attention(clock, sizes, small_s)
    several = context.world_size > 1
    return FusedKernels(
        memory_bandwidth, small_s, step_s, _linear_points(clock, sizes), _expert_points(clock, sizes),
        attention_bandwidth, attention_flops,
        members=context.world_size if several else None,
        sums=_sum_points(clock, sizes) if several else None,
        exchange=_exchange_points(clock, sizes) if several else None,
    )  # fmt: skip


def _small(clock: KernelClock, sizes: Sizes) -> tuple[float, float]:
    """A gate of one row in a graph, and the pause between two graphs, told apart by graphs of two lengths."""
    x_TD, weight_ED = _normal(clock, sizes, 1, sizes.dim), _normal(clock, sizes, 2 * SLOTS, sizes.dim)
    norm = (torch.ones(sizes.dim, dtype=sizes.dtype, device=clock.context.device), EPS)
    call = [lambda: gate(x_TD, weight_ED, TOP_K, norm)]
    few, many = (turns * clock(call, turns) for turns in (32, 128))
    small_s = max(many - few, LEAST_S * many) / 96
    step_s = max(few - 32 * small_s, 0.0)
    clock.say("small kernel in a graph", small_s * 1e6, "us")
    clock.say("between graphs", step_s * 1e6, "us")
    return small_s, step_s


def _linear_points(clock: KernelClock, sizes: Sizes) -> ProductPoints:
    shapes = [(max(1, sizes.dim // 4), sizes.dim), (sizes.hidden, sizes.dim)]

    def seconds(rows: int, shape: tuple[int, int]) -> float:
        x_TI = _normal(clock, sizes, rows, shape[1])
        calls = [lambda w=w: linear(x_TI, w) for w in _in_turn(clock, sizes, *shape)]
        return clock(calls, _turns(rows))

    return _points("product", clock, sizes.rows, shapes, seconds)


def _expert_points(clock: KernelClock, sizes: Sizes) -> ProductPoints:
    """Rows are dealt to the experts evenly; a call's weights are those of all of them."""
    shapes = [(SLOTS, 3, sizes.dim, max(1, sizes.hidden // 4)), (SLOTS, 3, sizes.dim, sizes.hidden)]

    def seconds(rows: int, shape: tuple[int, ...]) -> float:
        tokens, hidden = rows * SLOTS // TOP_K, shape[-1]
        device = clock.context.device
        x_TD = _normal(clock, sizes, tokens, sizes.dim)
        slots_TK = (torch.arange(tokens * TOP_K, device=device) % SLOTS).view(tokens, TOP_K)
        weights_TK = torch.full((tokens, TOP_K), 1 / TOP_K, device=device)
        pairs = zip(
            _in_turn(clock, sizes, SLOTS, 2 * hidden, sizes.dim),
            _in_turn(clock, sizes, SLOTS, sizes.dim, hidden),
            strict=False,
        )
        return clock([lambda w=w: expert_sum(x_TD, slots_TK, weights_TK, *w) for w in pairs], _turns(tokens))

    return _points("expert", clock, sizes.expert_rows, shapes, seconds)


def _points(
    name: str, clock: KernelClock, rows: Sequence[int], shapes: Sequence[tuple[int, ...]], seconds: Callable
) -> ProductPoints:
    """(rows, seconds beside the weights', FLOP/s) from two sizes of weights."""
    few, many = (torch.Size(shape).numel() for shape in shapes)
    found = []
    for count in rows:
        short_s, long_s = (seconds(count, shape) for shape in shapes)
        per_weight_s = max(long_s - short_s, LEAST_S * long_s) / (many - few)
        found.append((count, max(short_s - few * per_weight_s, 0.0), 2.0 * count / per_weight_s))
        clock.say(f"{name} of {count} rows: start", found[-1][1] * 1e6, "us")
        clock.say(f"{name} of {count} rows", found[-1][2] / 1e12, "TFLOP/s")
    return tuple(found)


def _attention(clock: KernelClock, sizes: Sizes, small_s: float) -> tuple[float, float]:
    """Bytes/s of keys and values in a decode step, from two lengths; FLOP/s of whole prompts."""
    heads, kv_heads, head_dim, device = sizes.heads, sizes.kv_heads, sizes.head_dim, clock.context.device
    count, length = sizes.sequences, sizes.length
    page, each = CacheOptions.page_size, -(-length // CacheOptions.page_size)
    keys, values = (_normal(clock, sizes, count * each, kv_heads, page, head_dim) for _ in range(2))
    cache = (keys, values, own_pages(count, each).to(device))
    rope_SC = torch.ones(length, head_dim // 2, 2, device=device)
    slots_B = torch.arange(count, device=device)
    qkv_BQ = _normal(clock, sizes, count, (heads + 2 * kv_heads) * head_dim)

    def decoded_s(context: int) -> float:
        at_B = torch.full((count,), context - 1, device=device)
        return clock([lambda: decode_attention(qkv_BQ, *cache, slots_B, at_B, rope_SC, heads)])

    short_s, long_s = decoded_s(length // 2), decoded_s(length)
    more = count * (length - length // 2) * 2 * kv_heads * head_dim * sizes.dtype.itemsize
    bandwidth = more / max(long_s - short_s, LEAST_S * long_s)
    prompts = min(8, count)
    spans = [(slot, 0, length) for slot in range(prompts)]
    table = span_table(spans).to(device)
    qkv_TQ = _normal(clock, sizes, prompts * length, (heads + 2 * kv_heads) * head_dim)
    slots_T = torch.arange(prompts, device=device).repeat_interleave(length)
    at_T = torch.arange(length, device=device).repeat(prompts)

    def prompt() -> None:
        q_THC = rotate_and_store(qkv_TQ, *cache, slots_T, at_T, rope_SC, heads)
        ragged_attention(q_THC, *cache, spans, table)

    flop = 4.0 * heads * head_dim * prompts * length * (length + 1) / 2
    flops = flop / max(clock([prompt], 2) - small_s, 1e-9)
    clock.say("decode attention, keys and values", bandwidth / 1e9, "GB/s")
    clock.say("attention of prompts", flops / 1e12, "TFLOP/s")
    return bandwidth, flops


def _sum_points(clock: KernelClock, sizes: Sizes) -> WirePoints:
    context, found = clock.context, []
    reducer = RowReducer.create(context, max(sizes.rows), sizes.dim, sizes.dtype)
    norm_D = torch.ones(sizes.dim, dtype=sizes.dtype, device=context.device)
    for rows in sizes.rows:
        part_TD, x_TD = (_normal(clock, sizes, rows, sizes.dim) for _ in range(2))
        seconds = clock([lambda p=part_TD, x=x_TD: reducer.add_norm(p, x, norm_D, EPS)], _turns(rows))
        found.append((rows * sizes.dim * sizes.dtype.itemsize, seconds))
        clock.say(f"sum of {rows} rows over the ranks", seconds * 1e6, "us")
    return tuple(found)


def _exchange_points(clock: KernelClock, sizes: Sizes) -> WirePoints:
    """Rows of uniform choices among two experts a rank, out and back."""
    context, found = clock.context, []
    ranks, experts = context.world_size, 2 * context.world_size
    exchange = SymmetricExchange.create(context, max(sizes.symmetric_rows), sizes.dim, TOP_K, sizes.dtype)
    table = ReplicaTable.of(contiguous(1, experts, ranks), layer=0)
    places_EC = torch.from_numpy(table.places_EC(context.rank, small=False)).to(context.device)
    generator = torch.Generator().manual_seed(context.rank)
    for rows in sizes.symmetric_rows:
        x_TD = _normal(clock, sizes, rows, sizes.dim)
        experts_TK = torch.rand(rows, experts, generator=generator).topk(TOP_K, dim=-1).indices
        sends_TW = (experts_TK[..., None] // 2 == torch.arange(ranks)).any(1)
        sends_W = (sends_TW.sum(0) * (torch.arange(ranks) != context.rank)).tolist()
        out_WW = torch.tensor(context.all_gather_objects(sends_W))
        busiest = int(max(out_WW.sum(0).max(), out_WW.sum(1).max())) * sizes.dim * sizes.dtype.itemsize
        experts_TK = experts_TK.to(context.device)
        weights_TK = torch.full((rows, TOP_K), 1 / TOP_K, device=context.device)

        def there_and_back(x=x_TD, choice=experts_TK, weights=weights_TK, rows=rows) -> None:
            arrived = exchange.dispatch(x, choice, weights, places_EC, rows)
            exchange.combine(exchange.sum_buffer(rows), arrived.members_T)

        found.append((busiest, clock([there_and_back], _turns(rows))))
        clock.say(f"{rows} rows a rank through memory and back", found[-1][1] * 1e6, "us")
    return tuple(found)


def _turns(rows: int) -> int:
    return 32 if rows <= 256 else 4


def _in_turn(clock: KernelClock, sizes: Sizes, *shape: int) -> list[torch.Tensor]:
    """Weights of a shape, so many that no cache holds the next ones."""
    beyond = BEYOND_CACHES if clock.context.device.type == "cuda" else 1
    count = min(32, max(2, -(-beyond // (torch.Size(shape).numel() * sizes.dtype.itemsize))))
    return [_normal(clock, sizes, *shape, std=0.02) for _ in range(count)]


def _normal(clock: KernelClock, sizes: Sizes, *shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=sizes.dtype, device=clock.context.device).normal_(0.0, std)
