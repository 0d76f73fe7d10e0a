"""How much of the cache there is, by the options."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtralkit.config import EngineConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.mixtral import Mixtral
from mixtralkit.planning.memory import Room, rank_memory
from mixtralkit.planning.plan import contiguous
from tests.engine.parts import engine_config, make_checkpoint
from tests.ranks import run_ranks


def _loaded(context: RankContext, folder: Path, attention: str, options: dict) -> tuple:
    """Pages of the rank's cache, the model's memory for it, an answer, and how often sequences were preempted."""
    config = EngineConfig.of(model=folder, attention=attention, max_batch_size=4, page_size=16, **options)
    mixtral = Mixtral.load(config, context)
    prompts = [[5, 6, 7 + i] for i in range(4)]
    texts = [done.text for done in mixtral.complete(prompts, 60, temperature=0)]
    cache = mixtral.model.cache
    size = sum(x.numel() * x.element_size() for x in (cache.keys, cache.values, cache.tables_SM, cache.rope_SC))
    return cache.pages, size, texts, mixtral.engine.snapshot().preemptions, mixtral.engine.prefix_reuse


def test_cache_tokens_is_the_room_of_all_ranks_together(tmp_path):
    folder = make_checkpoint(tmp_path, engine_config())
    pages, size, texts, preemptions, reuse = _loaded(RankContext(), folder, "tp", {})
    assert (pages, preemptions, reuse) == (4 * 64 // 16, 0, True)
    few, smaller, same, preempted, _ = _loaded(
        RankContext(), folder, "tp", {"cache_tokens": 100, "prefix_reuse": False}
    )
    assert (few, same) == (6, texts)
    assert smaller < size / 2
    assert preempted > 0
    for rank in run_ranks(_loaded, 2, folder, "dp", {"cache_tokens": 160}):
        assert (rank[0], rank[2]) == (5, texts)


@pytest.mark.parametrize("cache_tokens", [None, 100])
def test_the_memory_model_knows(tmp_path, cache_tokens):
    config = engine_config()
    folder = make_checkpoint(tmp_path, config)
    _, size, *_ = _loaded(RankContext(), folder, "tp", {"cache_tokens": cache_tokens})
    room = Room(4, 64, 100, data_bytes=4, page_size=16, cache_tokens=cache_tokens)
    plan = contiguous(config.n_layers, config.num_experts, 1)
    assert rank_memory(config, ParallelConfig("tp", "ep"), plan, room).cache == size
