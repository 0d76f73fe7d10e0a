"""What the recorder writes against the routing of whole sequences run at once."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.recorder import RoutingRecorder, together
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.planning.trace_parts import parts_of
from tests.engine.parts import VOCAB_SIZE, engine_config, make_model, make_tokenizer
from tests.ranks import RankError, run_ranks


def some_requests(count: int = 6) -> list[Request]:
    rng = random.Random(count)
    prompts = [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 30))) for _ in range(count)]
    return [Request(i, prompt, rng.randint(0, 8), SamplingOptions(temperature=0)) for i, prompt in enumerate(prompts)]


def record(context: RankContext, folder: Path, attention: str, path: Path, runs: int = 1) -> list[list[int]]:
    """Runs the requests in small steps, recording; the tokens of each sequence that the model has seen."""
    torch.set_num_threads(1)
    model = make_model(context, engine_config(), attention)
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"), prefill_budget=16)
    requests, seen = some_requests(), []
    with RoutingRecorder(model, path, {"model": "small"}) as engine.observe:
        for _ in range(runs):
            done = engine.complete(requests)
            seen += [[*r.prompt, *c.tokens] for r, c in zip(requests, done, strict=True)]
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def assert_is_routing_of(trace: RoutingTrace, seen: list[list[int]]) -> None:
    """Every sequence's rows are what the whole sequence chooses when it is run at once, without a cache."""
    model = make_model(RankContext(), engine_config())
    np.testing.assert_array_equal(np.unique(trace.sequence), np.arange(len(seen)))
    for number, tokens in enumerate(seen):
        part = trace.take(trace.sequence == number)
        rows = part.num_tokens
        assert len(tokens) - 1 <= rows <= len(tokens)  # the last token of an answer need not be run
        np.testing.assert_array_equal(part.position, np.arange(rows))
        _, routing = model.train_logits(torch.tensor([tokens]))
        experts = torch.stack([layer.experts_TK for layer in routing], 1)[:rows]
        weights = torch.stack([layer.weights_TK for layer in routing], 1)[:rows]
        np.testing.assert_array_equal(part.experts, experts)
        np.testing.assert_allclose(part.weights, weights, atol=1e-3)


@pytest.mark.parametrize(("ranks", "attention"), [(1, "tp"), (1, "dp"), (2, "tp"), (2, "dp"), (4, "dp")])
def test_records_every_token_once(folder, tmp_path, ranks, attention):
    path = tmp_path / "trace.npz"
    seen = run_ranks(record, ranks, folder, attention, path)
    trace = RoutingTrace.load(path)
    assert_is_routing_of(trace, seen[0])
    assert (trace.num_experts, trace.meta) == (8, {"model": "small"})
    assert [found.name for found in tmp_path.iterdir()] == ["trace.npz"]


def test_runs_one_after_the_other_are_other_sequences(folder, tmp_path):
    seen = record(RankContext(), folder, "tp", tmp_path / "trace.npz", runs=2)
    assert_is_routing_of(RoutingTrace.load(tmp_path / "trace.npz"), seen)


def record_until_killed(context: RankContext, folder: Path, path: Path, steps: int) -> None:
    model = make_model(context, engine_config(), "dp")
    recorder = RoutingRecorder(model, path)
    left = steps

    def observe(batch, reports) -> None:
        nonlocal left
        recorder(batch, reports)
        left -= 1
        if not left:
            time.sleep(2 * context.is_first)  # the others hear of the step from rank 0
            os.kill(os.getpid(), signal.SIGKILL)

    Engine(model, Tokenizer(folder / "tokenizer.model"), observe=observe).complete(some_requests())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_keeps_every_step(folder, tmp_path, ranks):
    whole, path = tmp_path / "whole.npz", tmp_path / "killed.npz"
    record(RankContext(), folder, "tp", whole)
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(record_until_killed, ranks, folder, path, 3)
    assert not path.exists()
    killed, whole = RoutingTrace.load(path), RoutingTrace.load(whole)
    rows = {(s, p): i for i, (s, p) in enumerate(zip(whole.sequence, whole.position, strict=True))}
    same = [rows[key] for key in zip(killed.sequence, killed.position, strict=True)]
    np.testing.assert_array_equal(killed.experts, whole.experts[same])
    slots = 4  # max_batch_size; a step runs a whole prompt or a token of each
    assert set(killed.sequence) == set(range(slots))
    lengths = [len(request.prompt) + min(2, request.max_gen_len - 1) for request in some_requests()[:slots]]
    assert [int((killed.sequence == i).sum()) for i in range(slots)] == lengths


def test_an_error_keeps_what_was_recorded(folder, tmp_path):
    model = make_model(RankContext(), engine_config())
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"))

    def run_until_interrupted() -> None:
        with RoutingRecorder(model, tmp_path / "t") as engine.observe:
            for event in engine.run(some_requests()):
                if event.finish_reason:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until_interrupted()
    assert RoutingTrace.load(tmp_path / "t").num_tokens > 0
    assert not parts_of(tmp_path / "t")


def test_refuses_to_mix_runs(folder, tmp_path):
    model = make_model(RankContext(), engine_config())
    (tmp_path / "t.rank3.part").touch()
    with pytest.raises(ValueError, match=r"t.rank3.part: a stopped run left it"):
        RoutingRecorder(model, tmp_path / "t")
    with pytest.raises(ValueError, match="cannot be written"):
        RoutingRecorder(model, tmp_path / "absent" / "t")


def test_together():
    calls = []
    first, second = (lambda *args, name=name: calls.append((name, args)) for name in "ab")
    assert together(None, None) is None
    assert together(None, first) is first
    together(first, None, second)("batch", "reports")
    assert calls == [("a", ("batch", "reports")), ("b", ("batch", "reports"))]
