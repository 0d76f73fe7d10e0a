"""A step whose kernels ask the host and wait for it, in a thread of its own by Triton's interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mixtralkit.config import TierOptions
from mixtralkit.moe.tiers import Costs, Desk, TierSetup
from tests.moe.tier_parts import CPU_COSTS, BrokenBus, SlowBus, make_store, resident, rows_of

SPLIT = TierSetup(12, TierOptions(), Costs(1.0, ((1, 1.0),)), splits=True)
SETUPS = {
    "split": (SPLIT, None, 1),
    "split, packed, least used": (replace(SPLIT, options=TierOptions(expert_cache="frequency")), "int4:64", 1),
    "split, two rows": (SPLIT, "int8", 2),
    "whole, guessed": (TierSetup(9, TierOptions(misses="fetch"), Costs(1.0)), None, 1),
    "whole, guessed, in 4 bits": (
        TierSetup(9, TierOptions(misses="fetch", expert_cache="frequency"), Costs(1.0)),
        "int4:64",
        1,
    ),
    "whole, guessed, fp8, three rows": (TierSetup(14, TierOptions(misses="fetch"), Costs(1.0)), "fp8:channel", 3),
    "CPU": (TierSetup(9, TierOptions(misses="cpu"), Costs(1.0, ((1, 0.9), (2, 1.5)))), "int8", 2),
    "bus and CPU, rows that miss nothing": (TierSetup(16, TierOptions(), CPU_COSTS), None, 10),
    "many rows": (TierSetup(16, TierOptions(), Costs(1.0)), None, 32),
}


class Device:
    """A thread instead of a GPU, with an event that says when it has ended: a step that fails ends the test."""

    def __init__(self, desk: Desk, work: Callable[[], None]) -> None:
        self.thread = threading.Thread(target=work, daemon=True)
        desk._launched = self
        self.thread.start()

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return not self.thread.is_alive()

    def join(self) -> None:
        self.thread.join()


@pytest.mark.parametrize("name", SETUPS)
def test_steps_that_run_beside_the_host(name: str) -> None:
    """The sums of one memory; layers with all they need do not wait, and what is expected comes."""
    setup, weights, count = SETUPS[name]
    store = make_store(setup, weights)
    tiers = store.tiers
    if setup.options.misses == "fetch":
        tiers.bus = SlowBus()
    if "guessed" in name:
        tiers.routers[0] = None
    desk, steps = Desk(tiers, count), 8 if count <= 2 else 3
    for step in range(steps):
        rows = {layer: rows_of(count, 7 * (step % 5) + layer) for layer in store.layers}
        got = []

        def run(rows=rows, got=got, step=step) -> None:
            for layer in store.layers:
                if setup.options.misses == "fetch":
                    following = rows_of(count, 7 * (step % 5) + layer + 1)
                    tiers._guessed = following.slots_RK
                got.append(store.experts[layer](rows[layer]))

        desk.open()
        with tiers.at(desk):
            thread = Device(desk, run)
            desk.serve()
            thread.join()
        assert len(got) == 3
        assert not desk.told_1.any()
        for layer in store.layers:
            wanted = resident(store, layer, rows[layer])
            if setup.options.misses == "fetch":
                assert torch.equal(got[layer], wanted)
            torch.testing.assert_close(got[layer], wanted, rtol=2e-3, atol=2e-4)
        assert all(int(tiers.tables.said_LS[key]) in (place, -1) for key, place in tiers.cache.place_of.items())
        here = {(a, b) for a, b in (tiers.tables.said_LS[:-1] >= 0).nonzero().tolist()}
        assert here <= tiers.cache.place_of.keys(), "a step takes nothing for there that has made way"
    counts = tiers.counts
    assert counts.misses > 5
    assert (counts.splits > 5) == (setup.splits is True)
    assert (counts.products > 5) == bool(setup.costs.product_s)
    if setup.options.misses == "fetch":
        assert counts.expected > 0


def test_a_layer_that_has_all_does_not_wait() -> None:
    """The device has ended before the host looks; a row that only fills the shape asks for nothing."""
    store = make_store(replace(SPLIT, places=26))
    desk, rows, got = Desk(store.tiers, 1), rows_of(1, 0), []
    desk.open()
    with store.tiers.at(desk):
        Device(desk, lambda: got.extend(store.experts[layer](rows) for layer in store.layers)).join()
        desk.serve()
    assert store.tiers.counts.hits == 6
    store = make_store(replace(SPLIT, places=10))
    desk, nobody, found = Desk(store.tiers, 1), replace(rows, slots_RK=torch.tensor([[-1, -1]])), []
    desk.open()
    with store.tiers.at(desk):
        Device(desk, lambda: found.extend(store.experts[layer](nobody) for layer in store.layers)).join()
        desk.serve()
    assert store.tiers.counts.hits == store.tiers.counts.misses == 0
    assert all(torch.equal(y, rows.residual_RD) for y in found)
    for layer in store.layers:
        torch.testing.assert_close(got[layer], resident(store, layer, rows), rtol=2e-3, atol=2e-4)


def test_a_step_is_let_go_on_when_a_copy_fails() -> None:
    """The bus breaks under a step that waits: the step ends, the host tells, and the next step is right."""
    store = make_store(SPLIT, "int8")
    tiers = store.tiers
    desk, bus = Desk(tiers, 1), tiers.bus
    desk.open()
    missing = next(slot for slot in range(8) if (1, slot) not in tiers.cache.place_of)
    rows = replace(rows_of(1, 0), slots_RK=torch.tensor([[missing, (missing + 1) % 8]]))
    for is_broken in (True, False):
        tiers.bus, got = BrokenBus(0) if is_broken else bus, []
        desk.open()
        with tiers.at(desk):
            thread = Device(desk, lambda got=got: got.extend(store.experts[layer](rows) for layer in store.layers))
            if is_broken:
                with pytest.raises(RuntimeError, match="could not be copied"):
                    desk.serve()
            else:
                desk.serve()
            thread.join()
        assert len(got) == 3
    for layer in store.layers:
        torch.testing.assert_close(got[layer], resident(store, layer, rows), rtol=2e-3, atol=2e-4)
