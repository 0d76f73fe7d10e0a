"""One forward, many batches: a decode step that only the device knows gives what a step of known sequences gives."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe import experts
from mixtralkit.planning import replicas
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.configs import random_config, small_config
from tests.moe.layers import random_plan
from tests.ranks import run_ranks

PROMPTS = {2: [1, 17, 4, 33, 8, 2, 41], 0: [1, 9], 3: [1, 30, 12, 5, 22, 7, 7, 7, 16, 44, 3, 28]}  # by slot
STEPS, SLOTS = 4, 5
OWN = [(2, 0, 3), (3,), (), (0, 2)]  # the slots that have sequences on each rank that has its own


def compare(context: RankContext, config, parallel: ParallelConfig, plan: ExpertPlan, of: MoEOptions | None = None):
    """Prefills two caches, then decodes a few steps in each way, with rows that only fill the shape.

    The second cache's pages lie anyhow.
    """
    layout = RankLayout(config, parallel, plan, context.rank)
    model = Transformer(layout, context, options=MoEOptions(symmetric_rows=1) if of is None else of)
    model.initialize(0, std=0.15)
    prompts = PROMPTS
    if model.ranks_with_own_sequences > 1:
        prompts = {slot: PROMPTS[slot][context.rank :] for slot in OWN[context.rank]}
        prompts = {slot: ids or [1] for slot, ids in prompts.items()}
    own = len(prompts)
    kind = (model.layout, SLOTS, 64, model.dtype, context.device, 16)
    caches = [KVCache.allocate(*kind), KVCache.allocate(*kind, pages=4 * SLOTS + 1)]
    anyhow = iter(torch.randperm(4 * SLOTS + 1, generator=torch.Generator().manual_seed(0)).tolist())
    caches[1].place([(slot, i, next(anyhow)) for slot in range(SLOTS) for i in range(4)])
    last = torch.tensor([len(ids) - 1 for ids in prompts.values()]).cumsum(0).long() + torch.arange(own)
    pieces = [(slot, 0, [t % config.vocab_size for t in ids]) for slot, ids in prompts.items()]
    logits, _ = (model.step(ForwardBatch.build(pieces, "cpu"), cache, last) for cache in caches)
    lengths = {slot: len(ids) for slot, ids in prompts.items()}
    for _ in range(STEPS):
        tokens = logits.argmax(-1)
        pieces = [(slot, lengths[slot], [int(t)]) for slot, t in zip(lengths, tokens, strict=True)]
        seen = []
        batch = ForwardBatch.build(pieces, "cpu")
        logits = model.step(batch, caches[0], torch.arange(own), observe=lambda *step, seen=seen: seen.append(step))
        ((_, wanted),) = seen
        filler = torch.zeros(5 - own, dtype=torch.int64)
        rows = ForwardBatch.of_rows(
            torch.cat([tokens, filler]),
            torch.cat([torch.tensor(list(lengths.values())).long(), filler]),
            torch.cat([torch.tensor(list(lengths)).long(), filler - 1]),
            rows_per_rank=5,
        )
        with torch.no_grad():
            hidden, reports = model.hidden(model.attend_to(replace(rows, observed=True), caches[1]))
            part_BV = model.logits(hidden)
        torch.testing.assert_close(part_BV[:own], logits[:, slice(*model.layout.vocab)], rtol=1e-4, atol=1e-4)
        assert part_BV.dtype == torch.float32
        for report, other in zip(reports, wanted, strict=True):
            assert torch.equal(report.routing.experts_TK[:own], other.routing.experts_TK)
            torch.testing.assert_close(report.routing.weights_TK[:own], other.routing.weights_TK, rtol=1e-4, atol=1e-5)
            assert int(report.dropped) == int(other.dropped)
        lengths = {slot: length + 1 for slot, length in lengths.items()}
    for memory, wanted in ((caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values)):
        torch.testing.assert_close(memory[:, caches[1].tables_SM.flatten()], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_one_rank_any_configuration(seed):
    config = random_config(seed)
    compare(RankContext(), config, ParallelConfig(), contiguous(config.n_layers, config.num_experts, 1))


def test_one_rank_with_a_plan_that_turns_experts_round():
    config = small_config()
    plan = contiguous(config.n_layers, config.num_experts, 1)
    compare(RankContext(), config, ParallelConfig(), ExpertPlan(plan.slots_LWS[:, :, ::-1].copy(), config.num_experts))


def unlike_layers(world: int, **changes) -> ExpertPlan:
    """Eight experts: contiguous, then the first on every rank, then anyhow, then all everywhere."""
    plain = contiguous(1, 8, world).slots_LWS[0].tolist()
    hot = [sorted({0, *experts}) for experts in plain]
    anyhow = random_plan(4, 8, world).slots_LWS[0].tolist()
    layers = [plain, hot, anyhow, [[*range(8)]] * world]
    return ExpertPlan(np.array([[own + [-1] * (8 - len(own)) for own in layer] for layer in layers]), 8, **changes)


def _over_ranks(context: RankContext) -> None:
    """Heads or sequences divided, experts split or whole, with and without replicas, by every dispatcher of decode."""
    world, small = context.world_size, small_config()
    plain = contiguous(small.n_layers, small.num_experts, world)
    for experts_by in ("tp", "ep"):
        compare(context, small, ParallelConfig("tp", experts_by), plain)
    one = small_config(n_layers=1)
    for small_choices in (0, 64):
        with patch.object(replicas, "SMALL_BATCH_CHOICES", small_choices):
            for plan in (everywhere(1, 8, world), random_plan(3, 8, world)):
                compare(context, one, ParallelConfig("tp", "ep"), plan)
    four = small_config(n_layers=4, max_batch_size=SLOTS * world)
    for options in (MoEOptions(symmetric_rows=1), MoEOptions(), MoEOptions(exchange="exact")):
        compare(context, four, ParallelConfig("dp", "ep"), unlike_layers(world), options)
    compare(context, four, ParallelConfig("dp", "tp"), unlike_layers(world))
    compare(context, four, ParallelConfig("coherent", "ep"), unlike_layers(world))
    for overflow in ("drop", "reroute"):  # counted from the rows that carry a sequence alone
        plan = unlike_layers(world, cold_capacity_factor=0.7, overflow=overflow)
        compare(context, four, ParallelConfig("dp", "ep"), plan)
        compare(context, one, ParallelConfig("tp", "ep"), replace(plan, slots_LWS=plan.slots_LWS[1:2]))


@pytest.mark.parametrize("world", [2, 4])
def test_over_ranks(world):
    run_ranks(_over_ranks, world)


def _counted(context: RankContext, small_choices: int) -> None:
    """Every choice of a sequence is computed once, of rows that fill the shape none.

    No more experts of a rank are read than its share where the batch is small.
    """
    config = small_config(n_layers=4, max_batch_size=SLOTS * context.world_size)
    computed, read, plain, decoding = [], [], experts.expert_sum, [False]

    def counted(x_RD, slots_RK, *args, **more) -> torch.Tensor:
        if decoding[0]:
            computed.append(int((slots_RK >= 0).sum()))
            read.append(len(slots_RK[slots_RK >= 0].unique()))
        return plain(x_RD, slots_RK, *args, **more)

    hidden = Transformer.hidden

    def watched(model: Transformer, batch: ForwardBatch):
        decoding[0] = batch.rows.decode
        return hidden(model, batch)

    with (
        patch.object(experts, "expert_sum", counted),
        patch.object(Transformer, "hidden", watched),
        patch.object(replicas, "SMALL_BATCH_CHOICES", small_choices),
    ):
        compare(context, config, ParallelConfig("dp", "ep"), unlike_layers(context.world_size))
    assert len(computed) == STEPS * config.n_layers
    sequences = sum(map(len, OWN[: context.world_size]))
    everywhere_L = context.all_reduce(torch.tensor(computed))
    assert everywhere_L.tolist() == [sequences * config.num_experts_per_tok] * len(computed)
    if small_choices:
        contiguous_hot_and_everywhere = [read[i] for i in range(len(read)) if i % 4 != 2]
        assert max(contiguous_hot_and_everywhere) <= 8 // context.world_size


@pytest.mark.parametrize("small_choices", [0, 64])
def test_each_choice_is_computed_once(small_choices):
    run_ranks(_counted, 2, small_choices)


def _names(context: RankContext, changes: list[tuple[str, str, MoEOptions, dict]]) -> list[tuple[str, str, bool]]:
    """The dispatcher of a decode step and of a prompt's, and whether decode steps can be graphs."""
    found = []
    for attention, experts_by, options, of_plan in changes:
        config = small_config(max_batch_size=4)
        slots_LWS = contiguous(config.n_layers, config.num_experts, context.world_size).slots_LWS
        plan = ExpertPlan(slots_LWS, config.num_experts, **of_plan)
        layout = RankLayout(config, ParallelConfig(attention, experts_by), plan, context.rank)
        model = Transformer(layout, context, options=options)
        names = (model.dispatchers.name(True, decode) for decode in (True, False))
        found.append((*names, model.in_graphs(True)))
    return found


def test_which_dispatcher_runs():
    symmetric = MoEOptions(symmetric_rows=1)
    changes = [
        ("dp", "ep", symmetric, {}),
        ("dp", "tp", symmetric, {}),
        ("dp", "ep", MoEOptions(symmetric_rows=0), {}),
        ("dp", "ep", MoEOptions(), {}),  # on a CPU the reference would take every row to every rank
        ("dp", "ep", MoEOptions(exchange="exact", symmetric_rows=1), {}),
        ("dp", "ep", MoEOptions(FasterOptions(shadow=True), symmetric_rows=1), {}),
        ("dp", "ep", symmetric, {"ranks_per_node": 1}),
        ("dp", "ep", symmetric, {"cold_capacity_factor": 0.5}),
        ("tp", "tp", MoEOptions(), {}),
        ("tp", "ep", MoEOptions(), {"cold_capacity_factor": 0.5}),
        ("coherent", "ep", symmetric, {}),
    ]
    wanted = [
        ("symmetric", "symmetric", True), ("gathered", "gathered", False), ("static", "exact", True),
        ("static", "exact", True), ("exact", "exact", False), ("symmetric", "symmetric", True),
        ("static", "exact", True), ("symmetric", "symmetric", True), ("split_width", "split_width", True),
        ("replicated", "replicated", True), ("coherent", "symmetric", False),
    ]  # fmt: skip
    assert run_ranks(_names, 2, changes) == [wanted] * 2


def test_a_model_that_trains_has_no_graphs():
    model = Transformer(RankLayout.single(small_config()), RankContext())
    assert model.in_graphs(True)
    model.layers[0].feed_forward.experts.w13.requires_grad_(True)
    assert not model.in_graphs(True)


@pytest.mark.parametrize("rows", [-1, 2.0, True, "4"])
def test_a_bad_number_of_symmetric_rows_is_named(rows):
    with pytest.raises(ValueError, match="symmetric_rows"):
        MoEOptions(symmetric_rows=rows)
