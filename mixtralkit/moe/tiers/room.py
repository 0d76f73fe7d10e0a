"""How many experts a GPU and its host have room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from mixtralkit.checkpoint.mapped import MappedLayers
from mixtralkit.checkpoint.reader import CheckpointReader
from mixtralkit.config import EngineConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.tiers.setup import TierSetup
from mixtralkit.planning.memory import Room, room_for_experts

PIECE_ROWS = 104  # of an expert in the mean, up to which no product unpacks it first (``ops/experts/triton_packed.py``)


def tier_setup(
    layout: RankLayout, context: RankContext, config: EngineConfig, dtype: torch.dtype,
    reader: CheckpointReader | None = None,
) -> TierSetup | None:  # fmt: skip
    """``gpu_setup``; layers for which the host has no room stay in ``reader``'s file.

    Raises:
        ValueError: as there, or the host has no room for all experts and they cannot stay.
    """
    setup = gpu_setup(layout, context, config, dtype)
    if setup is None:
        return None
    beyond = _beyond(_sizes(layout, dtype), config.tiers.host_memory_gb, context, reader)
    return replace(setup, mapped=MappedLayers(reader, layout, beyond, dtype)) if beyond else setup


def gpu_setup(
    layout: RankLayout, context: RankContext, config: EngineConfig, dtype: torch.dtype
) -> TierSetup | None:  # fmt: skip
    """Of the options, or of the plan's tiers where no budget is given; None where all experts are on the device.

    Raises:
        ValueError: the budget has no room for a layer's experts, or not for all of several formats.
    """
    options, plan = config.tiers, layout.plan
    if context.device.type != "cuda" or (options.gpu_memory_gb is None and not plan.on_host_LE.any()):
        return None
    if options.gpu_memory_gb is not None:
        return _within(options.gpu_memory_gb, layout, config, dtype)
    layout.check_one_format("a plan with experts in the host's memory")
    held = [layout.experts(layer) for layer in range(layout.config.n_layers)]
    places = sum(not plan.on_host_LE[layer, expert] for layer, own in enumerate(held) for expert in own)
    return TierSetup(max(places, max(map(len, held)) + layout.config.num_experts_per_tok), options)


def _sizes(layout: RankLayout, dtype: torch.dtype) -> dict[int, int]:
    """Bytes of each layer's experts."""
    width = (layout.config.dim, layout.hidden[1] - layout.hidden[0], dtype.itemsize)
    return {
        layer: sum(layout.formats_LE[layer][expert].expert_bytes(*width) for expert in layout.experts(layer))
        for layer in range(layout.config.n_layers)
    }


def _within(budget_gb: float, layout: RankLayout, config: EngineConfig, dtype: torch.dtype) -> TierSetup | None:
    """As many places as a budget leaves beside all else; None where all experts fit."""
    model, parallel, wanted = layout.config, layout.parallel, sum(_sizes(layout, dtype).values())
    size = layout.weights.expert_bytes(model.dim, layout.hidden[1] - layout.hidden[0], dtype.itemsize)
    room = Room(
        model.max_batch_size, model.max_seq_len, config.limits.prefill_budget, config.moe.symmetric_rows,
        dtype.itemsize, 0.0, config.cache.page_size, config.cache.cache_tokens, layout.weights,
        layout.attention_weights,
    )  # fmt: skip
    slots = max(len(layout.experts(layer)) for layer in range(model.n_layers))
    found = room_for_experts(model, parallel, layout.plan, room, budget_gb)
    in_pieces = not (found.unpacks or layout.weights.is_plain)
    piece_rows = PIECE_ROWS * slots // model.num_experts_per_tok if in_pieces else None
    left_gb = found.left
    if wanted <= left_gb * 1e9:
        return None
    layout.check_one_format(
        f"gpu_memory_gb ({budget_gb:g}), below the {budget_gb - left_gb + wanted / 1e9:.4g} of all,"
    )
    places = int(max(left_gb, 0.0) * 1e9) // size
    least = slots + model.num_experts_per_tok
    if places < least:
        raise ValueError(
            f"gpu_memory_gb ({budget_gb:g}) must be at least {budget_gb - left_gb + least * size / 1e9:.4g}: "
            f"{budget_gb - left_gb:.3g} for all but experts, the rest for {least} of these"
        )
    return TierSetup(places, config.tiers, piece_rows=piece_rows)


def _beyond(
    sizes: Mapping[int, int], most_gb: float | None, context: RankContext, reader: CheckpointReader | None
) -> list[int]:
    """Layers whose experts (bytes by layer) have no room in the host's memory, the last ones.

    Raises:
        ValueError: there are some, and no checkpoint of one rank in which they could stay.
    """
    wanted, free = sum(sizes.values()), _free_bytes()
    room = wanted if free is None else free // context.world_size
    room = room if most_gb is None else min(room, int(most_gb * 1e9))
    beyond, taken = [], 0
    for layer, size in sizes.items():
        taken += size
        if taken > room:
            beyond.append(layer)
    if not beyond or (reader is not None and context.world_size == 1 and reader.found.layouts):
        return beyond
    can_stay = "or the checkpoint one that experts can stay in: one rank's, in the format 'mixtralkit'"
    if most_gb is not None and wanted > most_gb * 1e9:
        raise ValueError(
            f"host_memory_gb ({most_gb:g}) must be at least {wanted / 1e9:.4g}, the size of the rank's experts, "
            f"{can_stay}"
        )
    raise ValueError(
        f"the host has {free / 1e9:.3g} GB free for {context.world_size} ranks with {wanted / 1e9:.3g} GB of experts "
        f"each: take fewer bits (quantize), more ranks, {can_stay}"
    )


def _free_bytes() -> int | None:
    """Of the host; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
