"""A run with sequences and experts of each rank, rows going through shared memory by the kernels themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

from mixtralkit.config import MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.runner import Runner
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import MoELayer
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from tests.engine.parts import engine_config, make_model, make_tokenizer
from tests.model.test_batches import unlike_layers
from tests.ops.test_symmetric_exchange import memory_of_files
from tests.ranks import run_ranks

pytest.importorskip("triton")
LAYERS, BATCH = 4, 4
REQUESTS = [
    Request(i, tuple(range(5, 8 + 3 * i)), 8 - i, SamplingOptions(temperature=0.7 * (i % 2), seed=i)) for i in range(6)
]


def _config():
    return engine_config(n_layers=LAYERS, max_batch_size=BATCH)


def _through_memory(context: RankContext, folder: Path, symmetric_rows: int) -> tuple[list[list[int]], int, Counter]:
    """Answers, rows a rank has room for, and how often what was called."""
    counts: Counter = Counter()

    def counted(kind: type, name: str):
        function = getattr(kind, name)

        def call(*args):
            counts[name] += 1
            return function(*args)

        return patch.object(kind, name, call)

    forward = MoELayer.forward

    def in_pieces(layer, hidden, rows, *args):
        counts["pieces"] += -(-rows.per_rank // layer.dispatchers.most_rows)
        return forward(layer, hidden, rows, *args)

    def create(context, rows, dim, top_k, dtype) -> SymmetricExchange:
        return SymmetricExchange(context, memory_of_files(context, folder, rows, dim, top_k), rows, dim, top_k, dtype)

    config = _config()
    layout = RankLayout(config, ParallelConfig("dp", "ep"), unlike_layers(context.world_size), context.rank)
    with (
        patch.object(SymmetricExchange, "create", create),
        counted(Runner, "launch"),
        counted(SymmetricExchange, "combine"),
        patch.object(MoELayer, "forward", in_pieces),
    ):
        model = Transformer(layout, context, options=MoEOptions(symmetric_rows=symmetric_rows))
        model.initialize(3, std=0.15)
        engine = Engine(model, Tokenizer(folder / "tokenizer.model"), prefill_budget=9)
        answers = [completion.tokens for completion in engine.complete(REQUESTS)]
    return answers, model.dispatchers.most_rows, counts


@pytest.mark.parametrize(("world_size", "symmetric_rows"), [(2, 1), (2, 12), (4, 1)])
def test_text_is_that_of_one_rank(tmp_path, world_size, symmetric_rows):
    """Every step goes so: at once where there is room for nine tokens of prompts and all sequences, else in pieces."""
    alone = Engine(make_model(RankContext(), _config()), make_tokenizer(tmp_path))
    wanted = [completion.tokens for completion in alone.complete(REQUESTS)]
    for answers, room, counts in run_ranks(_through_memory, world_size, tmp_path, symmetric_rows):
        assert answers == wanted
        assert room == max(BATCH // world_size, symmetric_rows)
        assert counts["launch"] > 0
        calls = LAYERS * counts["launch"]
        assert counts["combine"] == counts["pieces"]
        assert counts["pieces"] == calls if room >= 9 + BATCH // world_size else counts["pieces"] > calls
