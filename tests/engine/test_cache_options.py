"""How much of the cache there is, by the options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtralkit.config import CacheOptions, EngineConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.mixtral import Mixtral, pages_of
from mixtralkit.planning.memory import Room, rank_memory
from mixtralkit.planning.plan import contiguous
from tests.engine.parts import engine_config, make_checkpoint, make_model
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
    assert rank_memory(config, ParallelConfig("tp", "ep"), plan, room).cache == pytest.approx(size / 1e9)


def test_a_share_of_the_gpus_memory_is_that_many_pages(tmp_path, monkeypatch):
    config = engine_config()
    folder = make_checkpoint(tmp_path, config)
    model = make_model(RankContext(), config)
    own = CacheOptions(cache_share=0.5, page_size=16)
    with pytest.raises(ValueError, match=r"cache_share \(0.5\) needs GPUs; cache_tokens says the same in tokens"):
        Mixtral.load(EngineConfig.of(model=folder, cache=own), RankContext())
    with pytest.raises(ValueError, match=r"cache_share \(0.5\) cannot be given with cache_tokens"):
        CacheOptions(cache_share=0.5, cache_tokens=9)
    page = model.allocate_cache(16, 1)
    size = page.keys.nbytes + page.values.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * size, 99 * size))
    model.context = RankContext(device=torch.device("cuda"))
    assert pages_of(own, model) == 5
    assert pages_of(CacheOptions(cache_share=0.01, page_size=16), model) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    assert pages_of(own, model) == 4 * 4  # no more than all sequences can need
