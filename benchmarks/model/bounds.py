"""What a step of a Mixtral must read and compute at least: the two bounds of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from mixtralkit.layout import RankLayout
from mixtralkit.planning.replicas import ReplicaTable, is_small


def expected_experts(num_experts: int, top_k: int, rows: float) -> float:
    """Experts of a layer that at least one of ``rows`` rows chooses, when every choice is equally likely."""
    return num_experts * (1 - (1 - top_k / num_experts) ** rows)


def decode_bytes(
    layout: RankLayout, experts_L: Sequence[float], contexts_B: Sequence[float], itemsize: int
) -> dict[str, float]:
    """Bytes that a rank reads in a decode step, by part of the model; every one of them once.

    Args:
        experts_L: experts of this rank that the step's rows touch, of each layer.
        contexts_B: tokens that each of the rank's sequences attends to.
    """
    shapes, config = layout.shapes(), layout.config
    sizes = {name: layout.attention_weights.bytes(*size, itemsize) for name, size in layout.projections.items()}
    linear = sizes["output"] + len(experts_L) * (sizes["wqkv"] + sizes["wo"])
    linear += itemsize * len(contexts_B) * config.dim  # the embedding's rows
    gate = sum(prod(shapes[f"layers.{layer}.feed_forward.gate.weight"]) for layer in range(len(experts_L)))
    kv_heads = layout.kv_heads[1] - layout.kv_heads[0]
    attention = 2.0 * config.n_layers * kv_heads * config.head_dim * sum(_seen(config, n) for n in contexts_B)
    experts = sum(experts_L) * layout.weights.expert_bytes(config.dim, layout.hidden[1] - layout.hidden[0], itemsize)
    numbers = {"attention": attention, "gate": gate}
    return {"experts": experts, "linear": linear} | {part: itemsize * count for part, count in numbers.items()}


def prefill_operations(layout: RankLayout, lengths_B: Sequence[int], all_tokens: int | None = None) -> float:
    """Floating-point operations (a multiply-add is two) of a rank for whole prompts and one token after each.

    In the last layer a prompt's last row alone goes on after the attention.

    Args:
        lengths_B: tokens of each of the rank's prompts.
        all_tokens: tokens of all ranks, whose choices the ranks' experts share; None means the rank's own.
    """
    shapes, config = layout.shapes(), layout.config
    tokens = sum(lengths_B)
    heads = layout.heads[1] - layout.heads[0]
    sizes = {name: prod(size) for name, size in layout.projections.items()}
    operations = 2.0 * len(lengths_B) * sizes["output"]
    pairs = sum(_pairs(config, length) for length in lengths_B)
    for layer in range(config.n_layers):
        prefix, own = f"layers.{layer}.", tokens if layer + 1 < config.n_layers else len(lengths_B)
        operations += 2.0 * tokens * sizes["wqkv"]
        operations += 2.0 * own * (sizes["wo"] + prod(shapes[f"{prefix}feed_forward.gate.weight"]))
        operations += 4.0 * pairs * heads * config.head_dim
        share = sum(choice_shares(layout, layer)) / config.num_experts
        everyone = own if all_tokens is None else all_tokens * own / tokens
        operations += 2.0 * everyone * config.num_experts_per_tok * share * _expert_weights(layout)
    return operations


def choice_shares(layout: RankLayout, layer: int, rows: int | None = None) -> list[float]:
    """Of all ranks' choices of each of this rank's experts, the part that it computes.

    Replicas divide them evenly, but in a step of few rows, of all ranks, one holder computes all of them and the
    others do not read the expert; None is a step of many.
    """
    config, plan = layout.config, layout.plan
    if layout.parallel.experts == "tp":
        return [1.0] * config.num_experts
    if rows is not None and is_small(rows, config.num_experts_per_tok, config.num_experts):
        one_E = ReplicaTable.of(plan, layer).small_E
        return [float(one_E[expert] == layout.rank) for expert in layout.experts(layer)]
    copies_E = plan.holds_LWE[layer].sum(0)
    return [1 / float(copies_E[expert]) for expert in layout.experts(layer)]


def computed_experts(layout: RankLayout, layer: int, experts_TK: np.ndarray) -> int:
    """Experts of this rank that compute some of these choices, where every rank has all rows."""
    if layout.parallel.experts == "tp":
        return len(np.unique(experts_TK))
    table, (rows, top_k) = ReplicaTable.of(layout.plan, layer, rows_everywhere=True), experts_TK.shape
    row_TK = np.broadcast_to(np.arange(rows)[:, None], experts_TK.shape)
    small = is_small(rows, top_k, layout.config.num_experts)
    ranks_TK = table.ranks(experts_TK, np.zeros_like(row_TK), row_TK, small)
    return len(np.unique(experts_TK[ranks_TK == layout.rank]))


def _expert_weights(layout: RankLayout) -> int:
    """Numbers in a rank's part of one expert."""
    return 3 * layout.config.dim * (layout.hidden[1] - layout.hidden[0])


def _seen(config, length: float) -> float:
    return length if config.sliding_window is None else min(length, config.sliding_window)


def _pairs(config, length: int) -> int:
    """Queries and keys that meet in a prompt."""
    beyond = 0 if config.sliding_window is None else max(0, length - config.sliding_window)
    return length * (length + 1) // 2 - beyond * (beyond + 1) // 2
