"""Memory that a model takes on a rank: weights, keys and values, rows between ranks, and what a step works in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mixtralkit.config import CacheOptions, ModelConfig, ParallelConfig
from mixtralkit.moe.weights import PLAIN, ExpertWeights
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.plan import ExpertPlan, everywhere

# Rows of the memory of ``ops.all_reduce``, which holds for any number of rows.
_FEW_ROWS, _MANY_ROWS = 128, 4096
# Rows of width D that a prompt's step holds at a time beside the experts' middle: residual, norm, queries with keys and
# values, attention, sums.
_ROWS_ALIVE = 8
# On a GPU held to a budget: for the device's context, memory pools of graphs and libraries, in 10⁹ bytes. Assumed.
RESERVE_GB = 0.7
# Of such a budget, up to which a layer's unpacked experts get room beside the packed ones.
UNPACKED_SHARE = 0.05


@dataclass(frozen=True)
class RankMemory:
    """10⁹ bytes on the rank that has most.

    Attributes:
        weights: parameters.
        cache: keys and values, of all the rank's sequences at full length where ``cache_tokens`` says nothing else.
        exchange: memory that other ranks' kernels write, and for copies of their experts.
        working: rows inside a step of prompts, and the logits.
        host: experts in the host's memory, which is no part of the total.
    """

    weights: float
    cache: float
    exchange: float
    working: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.exchange + self.working


@dataclass(frozen=True)
class Room:
    """What a model must have room for.

    Attributes:
        batch: sequences over all ranks.
        max_seq_len: most tokens of one.
        prefill_budget: prompt tokens that a rank runs in one step.
        symmetric_rows: as ``MoEOptions.symmetric_rows``.
        data_bytes: of a number.
        copies_gb: 10⁹ bytes a rank keeps for copies of other ranks' experts (shadows, two phases).
        page_size: positions of a page of the cache.
        cache_tokens: as ``CacheOptions.cache_tokens``.
        weights: format of the experts.
        attention_weights: of attention's projections and the output matrix.
    """

    batch: int
    max_seq_len: int
    prefill_budget: int
    symmetric_rows: int | None = 0
    data_bytes: int = 2
    copies_gb: float = 0.0
    page_size: int = CacheOptions.page_size
    cache_tokens: int | None = None
    weights: ExpertWeights = PLAIN
    attention_weights: ExpertWeights = PLAIN


def rank_memory(config: ModelConfig, parallel: ParallelConfig, plan: ExpertPlan, room: Room) -> RankMemory:
    """What the fullest rank takes, of what torch allocates; the device's own context comes on top.

    Weights, cache and exchange are exact. Working memory is that of the fused kernels at a whole prefill budget.
    """
    world, b = plan.world_size, room.data_bytes
    heads_split = world if parallel.attention == "tp" else 1
    owners = 1 if parallel.attention == "tp" else world
    kv_heads = max(-(-config.n_kv_heads // heads_split), 1)
    sequences, most = -(-room.batch // owners), -(-room.max_seq_len // room.page_size)  # pages of a sequence
    pages = sequences * most
    if room.cache_tokens is not None:
        pages = max(1, room.cache_tokens // (owners * room.page_size))
    cache = 2 * config.n_layers * kv_heads * pages * room.page_size * config.head_dim * b
    cache += sequences * most * 4 + room.max_seq_len * config.head_dim * 4  # tables and angles
    tokens = min(room.prefill_budget, sequences * room.max_seq_len)
    middle = config.hidden_dim / (world if parallel.experts == "tp" else 1) * config.num_experts_per_tok
    working = tokens * (_ROWS_ALIVE * config.dim + middle) * b + 2 * sequences * config.vocab_size * 4
    projections = _projections(config, parallel, world)
    if not room.attention_weights.is_plain:  # many rows are multiplied with the numbers of a layer's, made first
        working += max(outputs * inputs for outputs, inputs in projections[1:]) * b
    if not plan.on_host_LE.any():  # with tiers such products may go in pieces instead (``room_for_experts``)
        working += _unpacked(config, parallel, plan, room)
    exchange = _exchange(config, parallel, world, sequences, room) + room.copies_gb * 1e9
    shape = ModelShape.of(config, b, room.weights)  # of experts
    shape = replace(shape, hidden=-(-config.hidden_dim // world)) if parallel.experts == "tp" else shape
    held = everywhere(config.n_layers, config.num_experts, 1) if parallel.experts == "tp" else plan
    experts_W, host_W = shape.rank_bytes(replace(held, precision=plan.precision, tier=plan.tier))
    ends, *layers = (room.attention_weights.bytes(*size, b) for size in projections)
    weights = ends + config.n_layers * sum(layers) + _rest(config) * b
    sizes = (weights + experts_W.max(), cache, exchange, working, host_W.max())
    return RankMemory(*(float(size) / 1e9 for size in sizes))


@dataclass(frozen=True)
class ExpertRoom:
    """What a GPU's budget leaves for experts, where the others lie in the host's memory; 10⁹ bytes.

    Attributes:
        taken: by all else.
        left: for experts.
        unpacks: whether ``taken`` has room for the numbers of a layer's packed experts, which products of many rows
            make first; where not, such steps go in pieces.
    """

    taken: float
    left: float
    unpacks: bool


def room_for_experts(
    config: ModelConfig, parallel: ParallelConfig, plan: ExpertPlan, room: Room, budget_gb: float
) -> ExpertRoom:
    """The rest of a budget on the fullest rank. Formats are those of the plan; ``left`` may be below 0."""
    all_on_host = ((("host",) * plan.num_experts),) * plan.num_layers
    taken = rank_memory(config, parallel, replace(plan, tier=all_on_host), room).total + RESERVE_GB
    unpacked = _unpacked(config, parallel, replace(plan, tier=None), room) / 1e9
    unpacks = 0 < unpacked <= UNPACKED_SHARE * budget_gb
    taken += unpacked if unpacks else 0.0
    return ExpertRoom(taken, budget_gb - taken, unpacks)


def _unpacked(config: ModelConfig, parallel: ParallelConfig, plan: ExpertPlan, room: Room) -> float:
    """Bytes of the numbers of a layer's packed experts on the GPU, which products of many rows make first."""
    packed_LE = np.array([[not weights.is_plain for weights in row] for row in plan.formats_LE(room.weights)])
    here_LE = packed_LE & ~plan.on_host_LE
    split = plan.world_size if parallel.experts == "tp" else 1
    slots_LW = here_LE.sum(1, keepdims=True) if split > 1 else (plan.holds_LWE & here_LE[:, None]).sum(2)
    return float(slots_LW.max()) * 3 * config.dim * -(-config.hidden_dim // split) * room.data_bytes


def _projections(config: ModelConfig, parallel: ParallelConfig, world: int) -> list[tuple[int, int]]:
    """[O, I] of the output matrix on the rank that has most of it, and of a layer's wqkv and wo."""
    split = world if parallel.attention == "tp" else 1
    heads, kv_heads = config.n_heads // split, max(config.n_kv_heads // split, 1)
    wqkv, wo = ((heads + 2 * kv_heads) * config.head_dim, config.dim), (config.dim, heads * config.head_dim)
    return [(-(-config.vocab_size // split), config.dim), wqkv, wo]


def _rest(config: ModelConfig) -> int:
    """Parameters beside experts and projections: the embedding, norms and routers."""
    return config.dim * (config.vocab_size + 1 + config.n_layers * (2 + config.num_experts))


def _exchange(config: ModelConfig, parallel: ParallelConfig, world: int, sequences: int, room: Room) -> int:
    """Bytes of the sums' memory, or of the rows that travel through memory."""
    if world == 1:
        return 0
    if parallel.attention == "tp":
        places = 2 * world * (_FEW_ROWS + -(-_MANY_ROWS // world)) + 2 * _MANY_ROWS
        return places * config.dim * room.data_bytes
    if parallel.experts == "tp" or room.symmetric_rows == 0:
        return 0
    rows = max(sequences, room.symmetric_rows or 0)
    return 2 * rows * world * (config.dim * room.data_bytes + config.num_experts_per_tok * 8)
