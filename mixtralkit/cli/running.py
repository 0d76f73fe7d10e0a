"""What the commands that run a model share: the model with its watchers, prompts to requests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtralkit.checkpoint import CheckpointReader
from mixtralkit.config import EngineConfig, shipped
from mixtralkit.config.options import Count, Natural, Options
from mixtralkit.distributed import RankContext
from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.plan_policies import make_policy
from mixtralkit.engine.recorder import RoutingRecorder, together
from mixtralkit.engine.requests import Request, check_prompt
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.statistics import MoEStatistics
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation.prompt_sets import PromptRecord
from mixtralkit.mixtral import Mixtral, encode_prompt
from mixtralkit.planning.hardware import Hardware
from mixtralkit.version import __version__
from mixtralkit.whole_file import check_free


@dataclass(frozen=True)
class WatchOptions(Options):
    """What is seen of the routing.

    Attributes:
        moe_report: Print what each layer routed, dropped, sent and shadowed at the end.
        record_routing: Write the experts that every token took to this trace, .npz (docs/traces.md).
        overwrite: Replace the trace where it is there already.
    """

    moe_report: bool = False
    record_routing: Path | None = None
    overwrite: bool = False

    def check(self) -> None:
        check_free(self.record_routing, self.overwrite)


@dataclass(frozen=True)
class UpdateOptions(Options):
    """New plans while the model runs (docs/plan-manager.md).

    Attributes:
        update_step: Make a new plan every so many steps from the loads that were seen, and move experts where that
            pays.
        policy: What makes it: contiguous, hot_cold, two_phase, balanced, shadow or auto.
        slots_per_rank: Most experts of a rank in each layer of such a plan; left out, as many as the first plan has.
        hot_experts: Experts of each layer that hot_cold puts on every rank.
    """

    update_step: Count | None = None
    policy: str = "balanced"
    slots_per_rank: Count | None = None
    hot_experts: Natural | None = None

    def check(self) -> None:
        given = {"policy": self.policy, "slots_per_rank": self.slots_per_rank, "hot_experts": self.hot_experts}
        for name, value in given.items() if self.update_step is None else ():
            if value != getattr(UpdateOptions, name):
                raise ValueError(f"{name} ({value!r}) needs update_step, the steps between two plans")

    def manager(self, mixtral: Mixtral, hardware: Path | None) -> PlanManager | None:
        """What makes new plans between steps, where that is wanted; collective."""
        if self.update_step is None:
            return None
        model, context = mixtral.model, mixtral.model.context
        name = hardware or ("h200" if context.device.type == "cuda" else "cpu-2core")
        with context.agreed():
            judge = MoveJudge.for_model(model, Hardware.load(shipped("hardware", name)), self.update_step)
            make_plan = make_policy(self.policy, model, judge, self.slots_per_rank, self.hot_experts)
        return PlanManager(model, make_plan, self.update_step, judge)


def requests_of(
    source: tuple[CheckpointReader, Tokenizer],
    records: Sequence[PromptRecord],
    engine: EngineConfig,
    max_gen_len: int,
    sampling: SamplingOptions,
    stop: tuple[str, ...] = (),
) -> tuple[list[Request], EngineConfig]:
    """A request for each record, and the options with the ``max_seq_len`` that they need; ValueError names a prompt."""
    reader, tokenizer = source
    requests = []
    for i, record in enumerate(records):
        length = max_gen_len if record.max_gen_len is None else record.max_gen_len
        requests.append(Request(i, encode_prompt(tokenizer, i, record.prompt), length, sampling, stop))
    if engine.cache.max_seq_len is None:
        needed = max(len(request.prompt) + request.max_gen_len for request in requests)
        engine = engine.but(max_seq_len=min(reader.config.max_seq_len, needed))
    for request in requests:
        check_prompt(request.id, request.prompt, engine.cache.max_seq_len, reader.config.vocab_size)
    return requests, engine


@contextlib.contextmanager
def watched(mixtral: Mixtral, watch: WatchOptions, meta: dict[str, Any]) -> Iterator[None]:
    """Inside it the engine counts, where somebody asked for it or rows may be dropped, and writes the trace that is
    wanted; at the end rank 0 prints the counts on stderr."""
    is_needed = watch.moe_report or mixtral.model.layout.plan.cold_capacity_factor is not None
    statistics = MoEStatistics(mixtral.model) if is_needed else None
    with contextlib.ExitStack() as files:
        recorder = None
        if watch.record_routing is not None:
            meta = {**meta, "version": __version__}
            recorder = files.enter_context(RoutingRecorder(mixtral.model, watch.record_routing, meta))
        mixtral.engine.observe = together(statistics, recorder)
        yield
    if statistics is not None:
        table = statistics.table()
        if statistics.context.is_first:
            print(table, file=sys.stderr)


def is_watched(context: RankContext) -> bool:
    """Whether this rank shows progress to a person."""
    return context.is_first and sys.stderr.isatty()
