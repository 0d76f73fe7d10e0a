"""The models that bench_model.py measures, random prompts for them, and a tokenizer that never ends an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from model_check import GREEDY
from model_plans import make_plan, profiled_loads, trace_loads

from mixtralkit.automatic import with_free_memory
from mixtralkit.checkpoint import CheckpointReader, load_into
from mixtralkit.config import EngineConfig, ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.mixtral import choose_layout
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.policies.registry import needs_loads

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

    def build(self, plan: str | None, loads_LE: np.ndarray | None) -> Transformer:
        """The model with its weights, its experts as the plan of this name says."""
        context = self.context
        engine = with_free_memory(self.engine.but(plan=plan), context)
        with context.agreed():
            if plan not in (None, "auto"):
                engine = engine.but(plan=make_plan(plan, self.config, context.world_size, loads_LE))
            layout = choose_layout(self.config, context, engine)
            model = Transformer(layout, context, self.dtype, engine.moe)
        if self.reader is None:
            model.initialize(self.seed)
        else:
            load_into(model.named_tensors(), layout, self.reader, context, False)
        _ = model.peers  # with room for the most sequences of all measurements
        return model

    def loads(self, plans: list[str], prompt_len: int, new_tokens: int) -> tuple[np.ndarray | None, str | None]:
        """Loads [L, E] that plans need, and what they come from; None where no plan does."""
        if not any(needs_loads(plan) for plan in plans):
            return None, None
        if self.engine.parallel.trace is not None:
            with self.context.agreed():
                return trace_loads(self.engine.parallel.trace, self.config), "trace"
        model, words = self.build("contiguous", None), RandomWords(self.config.vocab_size)
        count = min(PROFILED, self.config.max_batch_size)
        requests = random_requests(words, count, prompt_len, min(new_tokens, PROFILED_TOKENS), 1000 * self.seed)
        return profiled_loads(Engine(model, words, prefill_budget=count * prompt_len), requests), "random prompts"
