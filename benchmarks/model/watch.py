"""How the steps of a model's runs went: when each began, by what it ran, and what a plan manager did between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from mixtralkit.distributed import RankContext
from mixtralkit.engine.plan_manager import PlanManager, with_layer
from mixtralkit.engine.runner import Runner
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import ExpertPlan


class Watch:
    """When each step of an engine began (s), and how it ran: ``mixed`` with prompts, ``launched`` kernel by kernel, or
    ``graph``."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.kinds: list[str] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        launch = Runner.launch

        def watched_launch(*args):
            self.starts.append(time.perf_counter())
            flight = launch(*args)
            self.kinds.append(flight.kind)
            return flight

        with patch.object(Runner, "launch", watched_launch):
            yield


def restore(model: Transformer, plan: ExpertPlan) -> None:
    """Goes back to the slots of ``plan``, which ran before, in every layer. Collective."""
    for layer in range(model.params.n_layers):
        model.adopt(layer, with_layer(model.layout.plan, layer, plan.slots_LWS[layer]))


def manager_fields(manager: PlanManager, context: RankContext) -> dict[str, object]:
    """What the manager moved and how long steps waited, on the rank with the longest pause. Collective."""
    done = manager.statistics
    of_ranks = context.all_gather_objects((done.pauses, done.longest_move_s, done.recapture_s))
    longest = max((pauses for pauses, _, _ in of_ranks), key=lambda pauses: pauses.longest_s)
    return {
        "pauses": {
            "count": longest.count, "longest_ms": ms(longest.longest_s), "mean_ms": ms(longest.mean_s),
            "longest_move_ms": ms(max(move_s for _, move_s, _ in of_ranks)), "histogram": longest.histogram,
        },
        "plans": {"considered": done.considered, "adopted": done.adopted},
        "layers_moved": done.layers_moved, "layers_kept": done.layers_kept,
        "layers_relocated": done.layers_relocated, "experts_moved": done.experts_moved,
        "mb_moved": round(done.bytes_moved / 1e6, 3),
        "recaptures": done.recaptures, "recapture_s": round(max(s for _, _, s in of_ranks), 4),
    }  # fmt: skip


def ms(seconds: float) -> float:
    """Milliseconds, for JSON."""
    return round(1e3 * float(seconds), 3)
