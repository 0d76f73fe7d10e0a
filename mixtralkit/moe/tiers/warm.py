"""Before the first step: what is in the places at first, and what misses cost on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mixtralkit.moe.experts import as_matrices
from mixtralkit.moe.tiers.cache import Key
from mixtralkit.moe.tiers.costs import ROWS, Costs
from mixtralkit.ops.runtime import runs_cpu

if TYPE_CHECKING:
    from mixtralkit.moe.tiers.tiers import Tiers


def fill(tiers: Tiers) -> None:
    """Brings the experts that the plan has on the GPU; without tiers in the plan an even share of every layer."""
    device = tiers.context.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the places have been made by then
    ticket = None
    for key in _first(tiers)[: tiers.cache.places]:
        place, _ = tiers.cache.take(key, (), tiers.layers[0])
        ticket = tiers.bring(key, place)
        tiers.tables.note(key)
    tiers.cache.settle()
    if ticket is not None:
        tiers.bus.wait(ticket)


def _first(tiers: Tiers) -> list[Key]:
    """All experts, those that are to be there first in front."""
    plan, slots = tiers.layout.plan, tiers.slots
    keys = [(layer, slot) for layer in tiers.layers for slot in range(slots[layer])]
    held = {layer: tiers.layout.experts(layer) for layer in tiers.layers}

    def order(key: Key) -> tuple:
        layer, slot = key
        turn = (slot + layer + tiers.layout.rank) % slots[layer]  # other slots in each layer
        return bool(plan.on_host_LE[layer, held[layer][slot]]), turn, layer

    return sorted(keys, key=order)


def measure(tiers: Tiers) -> Costs:
    """What misses cost: the best of some, each of another expert."""
    layer = max(tiers.slots, key=tiers.slots.__getitem__)
    slots = tiers.slots[layer]
    if not slots:
        return Costs(0.0)
    place = tiers.setup.places - 1
    before = [part[place].clone() for part in tiers.pool]
    if tiers.context.device.type == "cuda":
        torch.cuda.synchronize(tiers.context.device)  # the bus does not wait for what the GPU has still to read
    fetch_s = min(_seconds(bring_and_wait, tiers, (layer, i % slots), place) for i in range(4))
    for part, values in zip(tiers.pool, before, strict=True):
        part[place] = values
    x_ND = torch.randn(max(ROWS), tiers.columns[0]).to(tiers.dtype)
    if not runs_cpu(x_ND, *as_matrices(tiers.weights, tiers.columns, tiers.hosts[layer].tensors)):
        return Costs(fetch_s)
    products, counts = [], replace(tiers.counts)
    for rows in ROWS:
        given = [(layer, x_ND[:rows], torch.full((rows, 1), i % slots), torch.ones(rows, 1)) for i in range(3)]
        products.append((rows, min(_seconds(tiers.product_on_cpu, *one) for one in given)))
    tiers.counts = counts
    return Costs(fetch_s, tuple(products))


def bring_and_wait(tiers: Tiers, key: Key, place: int) -> None:
    """Copies an expert; the host waits for the bus."""
    ticket = tiers.bring(key, place)
    while not ticket.query():
        time.sleep(0)


def _seconds(call: Callable[..., object], *given: object) -> float:
    started = time.perf_counter()
    call(*given)
    return time.perf_counter() - started
