"""The models that bench_model.py measures, random prompts for them, and a tokenizer that never ends an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.model.check import GREEDY
from benchmarks.model.variants import Variant, make_plan, profiled_loads, trace_loads
from mixtralkit.automatic import find_hardware, with_free_memory
from mixtralkit.checkpoint import CheckpointReader, load_into
from mixtralkit.config import EngineConfig, FasterOptions, ModelConfig, shipped
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.plan_policies import make_policy
from mixtralkit.engine.requests import Request
from mixtralkit.mixtral import choose_layout
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.hardware import Hardware

PROFILED, PROFILED_TOKENS = 64, 16  # sequences and new tokens that a plan is made from, without a trace


class RandomWords:
    """A tokenizer of any vocabulary whose end token never comes, so that every answer has its full length."""

    bos_id, eos_id, pad_id, end_ids = 0, -1, -1, frozenset()
    drops_first_space = False

    def __init__(self, vocab_size: int) -> None:
        self.n_words = vocab_size
        self.piece_bytes = [f" {token}".encode() for token in range(vocab_size)]

    def check_vocabulary(self, vocab_size: int) -> None:
        assert vocab_size == self.n_words


def random_requests(words: RandomWords, count: int, length: int, new_tokens: int, seed: int) -> list[Request]:
    """Prompts of random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(words.n_words, (count, length), generator=generator).tolist()
    return [Request(i, tuple(ids), new_tokens, GREEDY) for i, ids in enumerate(prompts)]


@dataclass(frozen=True)
class Source:
    """Where models come from that differ in their plan alone; collective."""

    config: ModelConfig
    reader: CheckpointReader | None
    context: RankContext
    dtype: torch.dtype
    engine: EngineConfig
    seed: int

    def build(self, variant: Variant, loads_LE: np.ndarray | None) -> Transformer:
        """The model with its weights, its experts as the variant's plan says."""
        context, placed, options = self.context, variant.plan, self.engine.moe
        if "shadow" in variant.extras:
            options = replace(options, faster=self.faster(options.faster))
        engine = with_free_memory(self.engine.but(plan=placed), context)
        with context.agreed():
            if placed not in (None, "auto"):
                engine = engine.but(plan=make_plan(placed, self.config, context.world_size, loads_LE))
            layout = choose_layout(self.config, context, engine)
        model = Transformer(replace(layout, plan=variant.cut(layout.plan)), context, self.dtype, options)
        if self.reader is None:
            model.initialize(self.seed)
        else:
            load_into(model.named_tensors(), layout, self.reader, context, False)
        return model

    def faster(self, options: FasterOptions) -> FasterOptions:
        """With shadows, chosen by the figures of ``--hardware`` where that is given."""
        options = replace(options, shadow=True)
        if self.engine.parallel.hardware is None:
            return options
        machine = Hardware.load(shipped("hardware", self.engine.parallel.hardware))
        return replace(options, net_bandwidth=machine.inside.exchange.bandwidth, gpu_throughput=machine.peak_flops)

    def manager(self, model: Transformer, update_step: int) -> PlanManager:
        """Moves experts where ``balanced`` plans pay by the figures of ``--hardware`` or this device. Collective."""
        machine = find_hardware(self.engine.parallel.hardware, self.context) or Hardware.load(
            shipped("hardware", "cpu-2core")
        )
        judge = MoveJudge.for_model(model, machine, update_step)
        return PlanManager(model, make_policy("balanced", model, judge), update_step, judge)

    def loads(self, variants: list[Variant], prompt_len: int, new_tokens: int) -> tuple[np.ndarray | None, str | None]:
        """Loads [L, E] that plans need, and what they come from; None where no plan does."""
        if not any(variant.needs_loads for variant in variants):
            return None, None
        if self.engine.parallel.trace is not None:
            with self.context.agreed():
                return trace_loads(self.engine.parallel.trace, self.config), "trace"
        model, words = self.build(Variant("contiguous"), None), RandomWords(self.config.vocab_size)
        count = min(PROFILED, self.config.max_batch_size)
        requests = random_requests(words, count, prompt_len, min(new_tokens, PROFILED_TOKENS), 1000 * self.seed)
        return profiled_loads(Engine(model, words, prefill_budget=count * prompt_len), requests), "random prompts"
