"""The straight-line decode step against ``Transformer.step``: same logits, same cache, same routing."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.decode import Decoder
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.step import StepBatch
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.configs import random_config, small_config
from tests.moe.layers import random_plan
from tests.ranks import run_ranks

PROMPTS = {2: [1, 17, 4, 33, 8, 2, 41], 0: [1, 9], 3: [1, 30, 12, 5, 22, 7, 7, 7, 16, 44, 3, 28]}  # by slot
STEPS, SLOTS = 4, 5


def compare(context: RankContext, config, parallel: ParallelConfig, plan: ExpertPlan) -> None:
    """Prefills two caches, then decodes a few steps in each way, with rows that only fill the shape."""
    model = Transformer(RankLayout(config, parallel, plan, context.rank), context)
    model.initialize(0, std=0.15)
    caches = [KVCache.allocate(model.layout, SLOTS, 64, model.dtype, context.device) for _ in range(2)]
    last = [torch.tensor([len(ids) - 1 for ids in PROMPTS.values()]).cumsum(0) + torch.arange(len(PROMPTS))]
    pieces = [(slot, 0, [t % config.vocab_size for t in ids]) for slot, ids in PROMPTS.items()]
    logits = [model.step(StepBatch.build(pieces, "cpu"), cache, last[0]) for cache in caches]
    decoder = Decoder.for_model(model, caches[1])
    lengths = {slot: len(ids) for slot, ids in PROMPTS.items()}
    first, end = model.layout.vocab
    for _ in range(STEPS):
        tokens = logits[0].argmax(-1)
        pieces = [(slot, lengths[slot], [int(t)]) for slot, t in zip(lengths, tokens, strict=True)]
        seen = []
        batch = StepBatch.build(pieces, "cpu")
        wanted = model.step(batch, caches[0], torch.arange(3), observe=lambda *step, seen=seen: seen.append(step))
        ((_, reports),) = seen
        filler = torch.zeros(2, dtype=torch.int64)
        got = decoder(
            torch.cat([tokens, filler]),
            torch.cat([torch.tensor(list(lengths.values())), filler]),
            torch.cat([torch.tensor(list(lengths)), filler - 1]),
        )
        torch.testing.assert_close(got.logits_BV[:3], wanted[:, first:end], rtol=1e-4, atol=1e-4)
        assert got.logits_BV.dtype == torch.float32
        for report, routing in zip(reports, got.routings, strict=True):
            assert torch.equal(report.routing.experts_TK, routing.experts_TK[:3])
            torch.testing.assert_close(report.routing.weights_TK, routing.weights_TK[:3], rtol=1e-4, atol=1e-5)
        lengths = {slot: length + 1 for slot, length in lengths.items()}
        logits = [wanted]
    torch.testing.assert_close(caches[1].keys, caches[0].keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[1].values, caches[0].values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_one_rank_any_configuration(seed):
    config = random_config(seed)
    compare(RankContext(), config, ParallelConfig(), contiguous(config.n_layers, config.num_experts, 1))


def test_one_rank_with_a_plan_that_turns_experts_round():
    config = small_config()
    plan = contiguous(config.n_layers, config.num_experts, 1)
    turned = ExpertPlan(plan.slots_LWS[:, :, ::-1].copy(), config.num_experts)
    compare(RankContext(), config, ParallelConfig(), turned)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("experts", ["tp", "ep"])
def test_split_over_ranks(world, experts):
    config = small_config()
    run_ranks(
        compare, world, config, ParallelConfig("tp", experts), contiguous(config.n_layers, config.num_experts, world)
    )


def test_replicas_take_turns():
    config = small_config(n_layers=1)
    for plan in (everywhere(1, config.num_experts, 2), random_plan(3, config.num_experts, 2)):
        run_ranks(compare, 2, config, ParallelConfig("tp", "ep"), plan)


def test_options_that_need_the_plain_step():
    config = small_config()
    model = Transformer(RankLayout.single(config), RankContext())
    cache = KVCache.allocate(model.layout, 2, 16, model.dtype, torch.device("cpu"))
    assert Decoder.for_model(model, cache) is not None
    options = MoEOptions(faster=FasterOptions(shadow=True))
    shadowed = Transformer(RankLayout.single(config), RankContext(), options=options)
    assert (Decoder.for_model(shadowed, cache) is None) == (shadowed.shadow_cache is not None)
    model.layers[0].feed_forward.experts.w13.requires_grad_(True)
    assert Decoder.for_model(model, cache) is None
