"""The straight-line decode step against ``Transformer.step``: same logits, same cache, same routing."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model import decode
from mixtralkit.model.decode import Decoder
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.step import StepBatch
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning import replicas
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.configs import random_config, small_config
from tests.moe.layers import random_plan
from tests.ranks import run_ranks

PROMPTS = {2: [1, 17, 4, 33, 8, 2, 41], 0: [1, 9], 3: [1, 30, 12, 5, 22, 7, 7, 7, 16, 44, 3, 28]}  # by slot
STEPS, SLOTS = 4, 5
OWN = [(2, 0, 3), (3,), (), (0, 2)]  # the slots that have sequences on each rank that has its own


def compare(context: RankContext, config, parallel: ParallelConfig, plan: ExpertPlan) -> None:
    """Prefills two caches, then decodes a few steps in each way, with rows that only fill the shape."""
    layout = RankLayout(config, parallel, plan, context.rank)
    model = Transformer(layout, context, options=MoEOptions(symmetric_rows=1))
    model.initialize(0, std=0.15)
    prompts, first, end = PROMPTS, *model.layout.vocab
    if model.ranks_with_own_sequences > 1:
        prompts = {slot: PROMPTS[slot][context.rank :] for slot in OWN[context.rank]}
        prompts = {slot: ids or [1] for slot, ids in prompts.items()}
    own = len(prompts)
    caches = [KVCache.allocate(model.layout, SLOTS, 64, model.dtype, context.device) for _ in range(2)]
    last = [torch.tensor([len(ids) - 1 for ids in prompts.values()]).cumsum(0).long() + torch.arange(own)]
    pieces = [(slot, 0, [t % config.vocab_size for t in ids]) for slot, ids in prompts.items()]
    logits = [model.step(StepBatch.build(pieces, "cpu"), cache, last[0]) for cache in caches]
    decoder = Decoder.for_model(model, caches[1])
    lengths = {slot: len(ids) for slot, ids in prompts.items()}
    for _ in range(STEPS):
        tokens = logits[0].argmax(-1)
        pieces = [(slot, lengths[slot], [int(t)]) for slot, t in zip(lengths, tokens, strict=True)]
        seen = []
        batch = StepBatch.build(pieces, "cpu")
        wanted = model.step(batch, caches[0], torch.arange(own), observe=lambda *step, seen=seen: seen.append(step))
        ((_, reports),) = seen
        filler = torch.zeros(5 - own, dtype=torch.int64)
        got = decoder(
            torch.cat([tokens, filler]),
            torch.cat([torch.tensor(list(lengths.values())).long(), filler]),
            torch.cat([torch.tensor(list(lengths)).long(), filler - 1]),
        )
        torch.testing.assert_close(got.logits_BV[:own], wanted[:, first:end], rtol=1e-4, atol=1e-4)
        assert got.logits_BV.dtype == torch.float32
        for report, routing in zip(reports, got.routings, strict=True):
            assert torch.equal(report.routing.experts_TK, routing.experts_TK[:own])
            torch.testing.assert_close(report.routing.weights_TK, routing.weights_TK[:own], rtol=1e-4, atol=1e-5)
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


def _compare_replicas(context: RankContext, few_choices: int) -> None:
    config = small_config(n_layers=1)
    with patch.object(replicas, "SMALL_BATCH_CHOICES", few_choices):
        for plan in (everywhere(1, config.num_experts, 2), random_plan(3, config.num_experts, 2)):
            compare(context, config, ParallelConfig("tp", "ep"), plan)


@pytest.mark.parametrize("few_choices", [0, 64])
def test_replicas_take_turns_or_one_takes_all(few_choices):
    run_ranks(_compare_replicas, 2, few_choices)


def unlike_layers(world: int) -> ExpertPlan:
    """Eight experts: contiguous, then the first on every rank, then anyhow, then all everywhere."""
    plain = contiguous(1, 8, world).slots_LWS[0].tolist()
    hot = [sorted({0, *experts}) for experts in plain]
    anyhow = random_plan(4, 8, world).slots_LWS[0].tolist()
    layers = [plain, hot, anyhow, [[*range(8)]] * world]
    return ExpertPlan(np.array([[own + [-1] * (8 - len(own)) for own in layer] for layer in layers]), 8)


def compare_travelling(context: RankContext, few_choices: int) -> None:
    """Against exact exchanges; and every choice of a sequence is computed once, of rows that fill the shape none.

    No more experts of a rank are read than its share where rows are few.
    """
    config = small_config(n_layers=4, max_batch_size=SLOTS * context.world_size)
    computed, read, plain = [], [], decode.expert_sum

    def counted(x_RD, slots_RK, *args, **more) -> torch.Tensor:
        computed.append(int((slots_RK >= 0).sum()))
        read.append(len(slots_RK[slots_RK >= 0].unique()))
        return plain(x_RD, slots_RK, *args, **more)

    with patch.object(decode, "expert_sum", counted), patch.object(replicas, "SMALL_BATCH_CHOICES", few_choices):
        compare(context, config, ParallelConfig("dp", "ep"), unlike_layers(context.world_size))
    assert len(computed) == STEPS * config.n_layers
    sequences = sum(map(len, OWN[: context.world_size]))
    everywhere_L = context.all_reduce(torch.tensor(computed))
    assert everywhere_L.tolist() == [sequences * config.num_experts_per_tok] * len(computed)
    if few_choices:
        contiguous_hot_and_everywhere = [read[i] for i in range(len(read)) if i % 4 != 2]
        assert max(contiguous_hot_and_everywhere) <= 8 // context.world_size


@pytest.mark.parametrize("few_choices", [0, 64])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_that_travel(world, few_choices):
    run_ranks(compare_travelling, world, few_choices)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_plan_has_tables_of_one_shape(world):
    """The same places as of the plan itself, on every rank; and the rows' turns are kept."""
    for rank, seed in ((0, 1), (world - 1, 2)):
        context = RankContext(rank, world)
        tables = []
        for plan in (contiguous(1, 8, world), random_plan(seed, 8, world), everywhere(1, 8, world)):
            config = small_config(n_layers=1, n_heads=8, n_kv_heads=8, dim=64)
            model = Transformer(
                RankLayout(config, ParallelConfig("dp", "ep"), plan, rank),
                context,
                options=MoEOptions(symmetric_rows=1),
            )
            table_EC = Decoder(model, model.allocate_cache()).tables[False][0]
            tables.append(table_EC)
            wanted = decode.ExpertPlaces.of(plan.slot_of_LWE[0], rank, context.device)
            experts_TK = torch.arange(8).repeat(50, 1)
            found = decode.ExpertPlaces(table_EC).look_up(experts_TK)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted.look_up(experts_TK), strict=True))
        assert len({table.shape for table in tables}) == 1


def _needs_plain_steps(context: RankContext, changes: list[tuple[str, MoEOptions, dict]]) -> list[bool]:
    found = []
    for experts, options, of_plan in changes:
        config = small_config(max_batch_size=4)
        slots_LWS = contiguous(config.n_layers, config.num_experts, context.world_size).slots_LWS
        plan = ExpertPlan(slots_LWS, config.num_experts, **of_plan)
        layout = RankLayout(config, ParallelConfig("dp", experts), plan, context.rank)
        model = Transformer(layout, context, options=options)
        found.append(Decoder.for_model(model, model.allocate_cache()) is None)
    return found


def test_ways_of_rows_that_need_the_plain_step():
    changes = [
        ("ep", MoEOptions(symmetric_rows=1), {}),
        ("ep", MoEOptions(symmetric_rows=1), {}),  # fewer than a decode step has
        ("tp", MoEOptions(symmetric_rows=1), {}),
        ("ep", MoEOptions(symmetric_rows=0), {}),
        ("ep", MoEOptions(exchange="exact", symmetric_rows=1), {}),
        ("ep", MoEOptions(FasterOptions(shadow=True), symmetric_rows=1), {}),
        ("ep", MoEOptions(symmetric_rows=1), {"ranks_per_node": 1}),
        ("ep", MoEOptions(symmetric_rows=1), {"cold_capacity_factor": 0.5}),
    ]
    assert run_ranks(_needs_plain_steps, 2, changes) == [[False, False, True, True, True, True, False, True]] * 2


@pytest.mark.parametrize("rows", [-1, 2.0, True, "4"])
def test_a_bad_number_of_symmetric_rows_is_named(rows):
    with pytest.raises(ValueError, match="symmetric_rows"):
        MoEOptions(symmetric_rows=rows)


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


def test_left_out_rows_go_by_collectives_on_a_cpu():
    """There the twin takes every row to every rank: right, and slow."""
    assert run_ranks(_has_peers, 2, None) == [False, False]
    assert run_ranks(_has_peers, 2, 1) == [True, True]


def _has_peers(context: RankContext, rows: int | None) -> bool:
    config = small_config()
    plan = contiguous(config.n_layers, config.num_experts, context.world_size)
    layout = RankLayout(config, ParallelConfig("dp", "ep"), plan, context.rank)
    return Transformer(layout, context, options=MoEOptions(symmetric_rows=rows)).peers is not None
