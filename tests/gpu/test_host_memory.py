"""Experts in host memory behind a GPU: the text of all on the GPU, in graphs. Run with ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.model.source import RandomWords
from mixtralkit.config import ModelConfig, TierOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.tiers import Desk, TierSetup
from mixtralkit.moe.weights import parse_weights
from tests.gpu.steps import counted_steps

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(
    dim=512, n_layers=4, head_dim=64, hidden_dim=1024, n_heads=8, n_kv_heads=2, vocab_size=4096, max_seq_len=256,
    max_batch_size=4,
)  # fmt: skip
SAMPLING = (SamplingOptions(0.0), SamplingOptions(0.8, seed=5))
ROUNDING = 1e-3  # of a log-probability in float32: sums in another order, of weights that are packed


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


def build(
    setup: TierSetup | None, weights: str | None, dtype: torch.dtype, batch: int, length: int = 256
) -> Transformer:
    layout = replace(RankLayout.single(CONFIG.with_limits(length, batch)), weights=parse_weights(weights))
    model = Transformer(layout, RankContext.start("cuda"), dtype, tiers=setup)
    model.initialize(3, std=0.05)
    return model


def told(model: Transformer, cuda_graphs: bool = True) -> list[tuple[list[int], list[float]]]:
    engine = Engine(model, RandomWords(CONFIG.vocab_size), prefill_budget=64, cuda_graphs=cuda_graphs)
    requests = [
        Request(i, tuple((7 * i + 3 * j) % 4000 for j in range(5 + 40 * (i % 3))), 20 + i, SAMPLING[i % 2])
        for i in range(6)
    ]
    return [(c.tokens, c.logprobs) for c in engine.complete(requests)]


def check_same(wanted, found, weights: str | None, where: object = "", draws: bool = True) -> None:
    """Log-probabilities of the same tokens in front, and greedy text: with plain weights to the token.

    With packed ones another token may be the best where two are no further apart than ``ROUNDING``: of the tokens that
    either has chosen behind the same ones, the log-probabilities say so. A draw may fall on another one anywhere.
    ``draws``: every second request does.
    """
    for i, ((tokens, logprobs), (own, theirs)) in enumerate(zip(wanted, found, strict=True)):
        same = next((at for at, pair in enumerate(zip(tokens, own, strict=False)) if pair[0] != pair[1]), len(tokens))
        apart = [abs(a - b) for a, b in zip(logprobs, theirs, strict=False)]
        at = max(range(same), key=apart.__getitem__, default=None)
        if at is not None:
            said = f"{logprobs[at]:.6f}, found {theirs[at]:.6f}"
            assert apart[at] < ROUNDING, f"{where}: request {i}, token {at} of {same} that are the same: {said}"
        if same < len(tokens) and not (draws and i % 2):
            said = f"{tokens[same]} ({logprobs[same]:.6f}), found {own[same]} ({theirs[same]:.6f})"
            is_near = weights is not None and apart[same] < ROUNDING
            assert is_near, f"{where}: request {i}, token {same} of {len(tokens)}: {said}"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("weights", [None, "int8", "int4:128", "fp8:channel"])
def test_float32_text_is_that_of_all_on_the_gpu(weights, batch):
    """Greedy text with plain weights, and drawn text where the GPU computes everything; else numbers.

    The CPU's products differ in the last bits, and a draw is between numbers that lie so close to each other.
    """
    wanted = told(build(None, weights, torch.float32, batch))
    setups = [TierSetup(10), TierSetup(21, TierOptions(misses="fetch", expert_cache="frequency"))]
    setups += [TierSetup(14, TierOptions(misses="cpu")), TierSetup(31), TierSetup(12, piece_rows=20)]
    for setup in setups:
        model = build(setup, weights, torch.float32, batch)
        with counted_steps() as kinds:
            found = told(model)
        if setup.options.misses == "fetch":
            assert weights is not None or [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
            assert model.store.tiers.counts.products == 0
        check_same(wanted, found, weights, setup)
        assert kinds["graph"] > 20
        assert not kinds["launched"]
        assert model.store.tiers.counts.misses > 0
    check_same(wanted, told(model, cuda_graphs=False), weights, "launched")


@pytest.mark.parametrize("weights", [None, "int8", "int4:128"])
def test_bfloat16_is_as_near_as_rounding(weights):
    """Log-probabilities of the same greedy tokens, up to where rounding chooses another; what is drawn may differ."""
    wanted = told(build(None, weights, torch.bfloat16, 1))
    model = build(TierSetup(12), weights, torch.bfloat16, 1)
    found = told(model)
    assert model.store.tiers.counts.splits > 0
    for (tokens, logprobs), (own, theirs) in list(zip(wanted, found, strict=True))[::2]:
        same = next((i for i, pair in enumerate(zip(tokens, own, strict=False)) if pair[0] != pair[1]), len(own))
        assert same > 0
        assert all(abs(a - b) < 0.15 for a, b in zip(logprobs[:same], theirs[:same], strict=True))


@pytest.mark.parametrize("weights", [None, "int4:128", "fp8:channel"])
def test_a_batch_of_eight_and_a_prompt_of_2048(weights):
    """Which share the steps: eight short ones decode while the ninth's prompt is read in pieces."""
    requests = [Request(i, tuple((11 * i + 5 * j) % 4000 for j in range(9 + i)), 24, SAMPLING[0]) for i in range(8)]
    requests.append(Request(8, tuple((13 * j) % 4000 for j in range(2048)), 8, SAMPLING[0]))

    def tokens(setup):
        model = build(setup, weights, torch.float32, 8, 2304)
        engine = Engine(model, RandomWords(CONFIG.vocab_size), prefill_budget=512)
        return [(c.tokens, c.logprobs) for c in engine.complete(requests)], model.store.tiers

    wanted = tokens(None)[0]
    for setup in (TierSetup(18), TierSetup(13, TierOptions(misses="fetch"))):
        found, tiers = tokens(setup)
        check_same(wanted, found, weights, draws=False)
        assert tiers.counts.misses > 100
        assert tiers.counts.expected > 0


class BrokenDriver:
    """Of CUDA's calls, those that copy: they fail once somebody says so."""

    def __init__(self, driver):
        self.driver, self.is_broken = driver, False

    def __getattr__(self, name):
        return (lambda *_: 999) if self.is_broken else getattr(self.driver, name)


@pytest.mark.parametrize("during", ["a prompt", "a step"])
def test_a_copy_that_fails_ends_the_run_and_nothing_else(during, monkeypatch):
    """A step that waits for it is let go on; the next run on the same memory is right."""
    model = build(TierSetup(12), "int4:128", torch.float32, 1)
    tiers, serve = model.store.tiers, Desk.serve
    wanted, driver = told(model), BrokenDriver(tiers.bus._driver)
    monkeypatch.setattr(tiers.bus, "_driver", driver)

    def break_and_serve(desk):
        driver.is_broken = True
        serve(desk)

    driver.is_broken = during == "a prompt"
    with monkeypatch.context() as patch:
        if during == "a step":
            patch.setattr(Desk, "serve", break_and_serve)
        with pytest.raises(RuntimeError, match=r"could not be (copied|cleared).*CUDA error 999"):
            told(model)
    driver.is_broken = False
    check_same(wanted, told(model), "int4:128")


def test_other_places_between_runs():
    model = build(TierSetup(20), "int4:128", torch.float32, 2)
    wanted = told(model)
    for places in (11, 27):
        model.store.retier(TierSetup(places), model.layout)
        check_same(wanted, told(model), "int4:128")
