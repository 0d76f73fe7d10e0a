"""Text with experts in host memory is that of all in one: any places, prompts, batches, ranks, served or not."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict, replace

import httpx
import pytest
import torch

from mixtralkit.checkpoint import RankFiles, load_into, open_checkpoint, save_checkpoint
from mixtralkit.checkpoint.mapped import MappedLayers
from mixtralkit.config import MoEOptions, ParallelConfig, TierOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.layout import RankLayout, canonical_shapes
from mixtralkit.mixtral import Mixtral
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.tiers import Costs, TierSetup
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.engine.parts import engine_config, make_checkpoint
from tests.ranks import run_ranks
from tests.server.doubles import run as run_server

CONFIG = engine_config(hidden_dim=256, dim=64)
COSTS = Costs(1.0, ((1, 0.9), (2, 1.5), (4, 4.0)))
DRAWN = SamplingOptions(temperature=0.8, seed=5)
REQUESTS = [
    Request(
        i, tuple((7 * i + 3 * j) % 300 + 3 for j in range(5 + 9 * i)), 12, DRAWN if i == 2 else SamplingOptions(0.0)
    )
    for i in range(6)
]


def build(
    setup: TierSetup | None, context: RankContext | None = None, plan: ExpertPlan | None = None,
    parallel: ParallelConfig | None = None, weights: str | None = None, **moe,
) -> Transformer:  # fmt: skip
    context = context or RankContext()
    plan = plan or contiguous(3, 8, context.world_size)
    layout = RankLayout(CONFIG, parallel or ParallelConfig(), plan, context.rank, parse_weights(weights))
    model = Transformer(layout, context, options=MoEOptions(**moe), tiers=setup)
    model.initialize(3, std=0.15)
    return model


def told(model: Transformer, tokenizer: Tokenizer, **options) -> list[tuple]:
    engine = Engine(model, tokenizer, prefill_budget=48, **options)
    return [(c.tokens, c.logprobs, c.text) for c in engine.complete(REQUESTS)]


SETUPS = [
    TierSetup(8, TierOptions(), COSTS),
    TierSetup(11, TierOptions(misses="fetch", expert_cache="frequency"), COSTS, piece_rows=20),
    TierSetup(17, TierOptions(misses="cpu", expert_prefetch=False), COSTS),
    TierSetup(23, TierOptions(), None),
    TierSetup(24, TierOptions(), COSTS),
]


@pytest.mark.parametrize("weights", [None, "int4:64", "fp8:channel"])
def test_any_budget_gives_the_bits_of_none(tokenizer: Tokenizer, weights: str | None) -> None:
    wanted = told(build(None, weights=weights), tokenizer)
    for setup in SETUPS:
        if weights == "fp8:channel":  # torch's product, which takes other rows together otherwise
            setup = replace(setup, piece_rows=None)
        model = build(setup, weights=weights)
        assert told(model, tokenizer) == wanted
        assert (model.store.tiers.counts.misses > 0) == (setup.places < 24)


def test_split_experts_give_the_same_text(tokenizer: Tokenizer) -> None:
    wanted = told(build(None, weights="int8"), tokenizer)
    model = build(TierSetup(10, TierOptions(), Costs(1.0, ((1, 0.9),)), splits=True), weights="int8")
    found = told(model, tokenizer)
    assert [(tokens, text) for tokens, _, text in found] == [(tokens, text) for tokens, _, text in wanted]
    assert model.store.tiers.counts.splits > 10


def test_other_places_between_runs(tokenizer: Tokenizer) -> None:
    model = build(TierSetup(20, TierOptions(), COSTS))
    wanted = told(model, tokenizer)
    for places in (9, 15):
        model.store.retier(TierSetup(places, TierOptions(), COSTS), model.layout)
        assert told(model, tokenizer) == wanted


def _on_two(context: RankContext, folder):
    tokenizer, found = Tokenizer(folder / "tokenizer.model"), []
    copies = ExpertPlan.from_dict(contiguous(3, 8, 2).to_dict() | {"slots": [[[0, 1, 2, 3, 7], [4, 5, 6, 7, 0]]] * 3})
    for attention, experts, plan, more in (
        ("tp", "ep", None, {}),
        ("dp", "ep", copies, {"symmetric_rows": 8}),
        ("dp", "ep", None, {"exchange": "exact"}),
        ("tp", "tp", None, {}),
        ("coherent", "ep", None, {}),
    ):
        at = (context, plan, ParallelConfig(attention, experts))
        wanted = told(build(None, *at, **more), tokenizer)
        most = 8 if experts == "tp" else 5 if plan is copies else 4
        model = build(TierSetup(most + context.rank, TierOptions(), COSTS), *at, **more)
        found.append((told(model, tokenizer) == wanted, model.store.tiers.counts.misses > 0))
    return found


def test_two_ranks_have_each_their_own(folder) -> None:
    assert run_ranks(_on_two, 2, folder) == [[(True, True)] * 5] * 2


def test_a_capacity_cuts_as_ever(tokenizer: Tokenizer) -> None:
    plan = replace(contiguous(3, 8, 1), cold_capacity_factor=0.5)
    model = build(TierSetup(9, TierOptions(), COSTS), plan=plan)
    assert told(model, tokenizer) == told(build(None, plan=plan), tokenizer)


def test_a_server_answers_and_counts(tokenizer: Tokenizer) -> None:
    """The same text by HTTP, and the counters on /metrics and the page."""
    wanted = [text for _, _, text in told(build(None), tokenizer)]
    engine = Engine(build(TierSetup(9, TierOptions(), COSTS)), tokenizer, prefill_budget=48)

    async def work(service, client: httpx.AsyncClient):
        texts = []
        for request in (r for r in REQUESTS if r.sampling.temperature == 0.0):
            asked = {"prompt": list(request.prompt), "max_tokens": 12, "temperature": 0}
            texts.append((await client.post("/v1/completions", json=asked)).json()["choices"][0]["text"])
        for _ in range(400):  # what is told of the engine may be a turn old
            live = (await client.get("/live")).json()
            if live["tiers"] == asdict(engine.model.store.tiers.counts):
                break
            await asyncio.sleep(0.02)
        return texts, (await client.get("/metrics")).text, live

    texts, metrics, live = run_server(work, engine)
    greedy = [i for i, request in enumerate(REQUESTS) if request.sampling.temperature == 0.0]
    assert texts == [wanted[i] for i in greedy]
    counts = engine.model.store.tiers.counts
    assert live["tiers"] == asdict(counts)
    lines = [line.split() for line in metrics.splitlines() if line.startswith("mixtralkit:expert_")]
    counted = {name.split("{")[0].removesuffix("_total"): float(value) for name, value in lines}
    assert counted["mixtralkit:expert_misses"] == counts.misses > 0
    assert counted["mixtralkit:expert_hits"] == counts.hits
    assert counted["mixtralkit:expert_cpu_products"] == counts.products > 0
    assert counted["mixtralkit:expert_fetched_bytes"] == counts.fetched_bytes > 0


def test_a_bus_that_fails_ends_the_run_with_a_sentence(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TierSetup(8, TierOptions(misses="fetch"), COSTS))
    wanted = told(model, tokenizer)

    def fail(moves, urgent=True):
        raise RuntimeError("an expert could not be copied from host memory to the GPU (CUDA error 719)")

    model.store.retier(TierSetup(9, TierOptions(misses="fetch"), COSTS), model.layout)
    told(model, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(model.store.tiers.bus, "copy", fail)
        with pytest.raises(RuntimeError, match="could not be copied from host memory"):
            told(model, tokenizer)
    assert told(model, tokenizer) == wanted, "the next run finds all as it was"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A checkpoint in our format in 4 bits, and one that is plain."""
    root, generator = tmp_path_factory.mktemp("converted"), torch.Generator().manual_seed(1)
    shapes = canonical_shapes(CONFIG)
    tensors = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    for name, weights in (("int4", "int4:64"), ("plain", None)):
        save_checkpoint(root / name, CONFIG, tensors, "mixtralkit", ranks=RankFiles(weights=parse_weights(weights)))
    return root


@pytest.mark.parametrize(("name", "weights"), [("int4", "int4:64"), ("plain", None)])
def test_experts_may_stay_in_the_checkpoint(converted, tokenizer: Tokenizer, name: str, weights: str | None) -> None:
    """The same text and hash of the weights; and a file that changes under the run is told."""
    layout = RankLayout(CONFIG, ParallelConfig(), contiguous(3, 8, 1), 0, parse_weights(weights))
    found = []
    with open_checkpoint(converted / name) as reader:
        for layers in ((), (1, 2)):
            mapped = MappedLayers(reader, layout, layers, torch.float32)
            setup = TierSetup(10, TierOptions(), COSTS, mapped=mapped)
            model = Transformer(layout, RankContext(), tiers=setup)
            of_weights = load_into(
                model.named_tensors(), layout, reader, RankContext(), hashes=True, mapped=mapped.names
            )
            found.append((told(model, tokenizer), of_weights))
    assert found[0] == found[1]
    assert len(mapped.names) == 2 * len(model.store.experts[1].tensors)
    path = next((converted / name).glob("*.safetensors"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(RuntimeError, match=rf"{path.name}: the file was changed while its experts were in use"):
        told(model, tokenizer)


def test_experts_stay_only_where_they_lie_as_they_are_used(converted) -> None:
    layout = RankLayout(CONFIG, ParallelConfig(), contiguous(3, 8, 1), 0, parse_weights("int4:64"))
    with open_checkpoint(converted / "int4") as reader:
        for other in (replace(layout, weights=parse_weights("int8")), replace(layout, plan=everywhere(3, 8, 2))):
            with pytest.raises(ValueError, match="for one rank with the same plan and quantize"):
                MappedLayers(reader, other, (1,), torch.float32)
    with open_checkpoint(converted / "plain") as reader:
        plain = replace(layout, weights=parse_weights(None))
        with pytest.raises(ValueError, match=r"must be in dtype torch.bfloat16, .* not torch.float32"):
            MappedLayers(reader, plain, (0,), torch.bfloat16)


def test_without_a_gpu_there_is_one_memory(tmp_path) -> None:
    folder = make_checkpoint(tmp_path, CONFIG)
    plan = contiguous(3, 8, 1).to_dict() | {"version": 2, "tier": [["host"] * 8] * 3}
    options = {"max_seq_len": 40, "max_batch_size": 4, "context": RankContext()}
    wanted = Mixtral.build(folder, **options).complete(["def add("], 8, temperature=0.0)[0].tokens
    for more in ({"gpu_memory_gb": 24.0, "host_memory_gb": 1.0}, {"plan": ExpertPlan.from_dict(plan)}):
        mixtral = Mixtral.build(folder, **options, **more)
        assert mixtral.model.store.tiers is None
        assert mixtral.complete(["def add("], 8, temperature=0.0)[0].tokens == wanted
    with pytest.raises(ValueError, match=r"host_memory_gb .* needs gpu_memory_gb"):
        Mixtral.build(folder, **options, host_memory_gb=1.0)


def test_experts_in_host_memory_do_not_train() -> None:
    model = build(TierSetup(8, TierOptions(), COSTS))
    model.layers[0].feed_forward.experts.w13.requires_grad_(True)
    with pytest.raises(AssertionError, match="do not train"):
        model.train_logits(torch.zeros(1, 4, dtype=torch.int64))
