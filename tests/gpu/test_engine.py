"""Decode steps as CUDA graphs on the shipped checkpoint. Run with ``pytest -m gpu``."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.engine.requests import Completion
from mixtralkit.engine.runner import Runner
from tests.gpu.steps import counted_steps

pytestmark = pytest.mark.gpu
CKPTS = Path(__file__).resolve().parents[2] / "ckpts"
PROMPTS = [
    "In the beginning", "def read(path):\n", "NAME\n       tar -", "class", "The function returns", "Moses", "import",
    "And it came to pass", "SYNOPSIS\n", "for i in range(", "Who are you?",
]  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy", 1]}},
    "required": ["a"],
    "additionalProperties": False,
}


def build(dtype: str, batch: int, cuda_graphs: bool = True) -> Mixtral:
    return Mixtral.build(CKPTS, None, 256, batch, device="cuda", dtype=dtype, cuda_graphs=cuda_graphs)


def answers(mixtral: Mixtral, temperature: float = 0.0, count: int = len(PROMPTS), **more) -> list[Completion]:
    """Of different lengths, so that sequences come and go in the middle of others."""
    options = {"temperature": temperature, "seed": 3, **more}
    requests = [mixtral.request(i, p, 24 + 5 * (i % 4), **options) for i, p in enumerate(PROMPTS[:count])]
    return mixtral.engine.complete(requests)


def told(completions: list[Completion]) -> list[tuple]:
    return [(c.tokens, c.text, c.finish_reason) for c in completions]


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 3, 8, 16])
def test_float32_text_is_that_of_steps_without_graphs(batch, temperature):
    """The other run has room for all prompts at once, so that its steps have other rows."""
    plain, ahead = build("float32", len(PROMPTS), False), build("float32", batch)
    wanted = answers(plain, temperature, stop=("\n\n", "and the"))
    with counted_steps() as kinds:
        got = answers(ahead, temperature, stop=("\n\n", "and the"))
    assert kinds["graph"] > 20
    assert not kinds["launched"]
    assert told(got) == told(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_graph_gives_the_bits_of_its_kernels(dtype, temperature):
    wanted, got = (answers(build(dtype, 8, graphs), temperature) for graphs in (False, True))
    assert [(c.tokens, c.logprobs) for c in got] == [(c.tokens, c.logprobs) for c in wanted]


def test_greedy_and_drawn_rows_share_a_step():
    mixtral = build("float32", 8)
    mixed = [mixtral.request(i, prompt, 30, temperature=0.8 * (i % 2), seed=3) for i, prompt in enumerate(PROMPTS[:8])]
    alone = [mixtral.engine.complete([request])[0] for request in mixed]
    assert told(mixtral.engine.complete(mixed)) == told(alone)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_rows_ask_of_their_logits_is_in_graphs(temperature):
    """Beside rows that ask for nothing, whose answers stay; a schema's answers fit it."""
    penalties = {"presence_penalty": 1.0, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {300: 4}}
    asks = [{}, {**penalties, "min_tokens": 9}, {"json_schema": SCHEMA}]
    found = []
    for graphs in (False, True):
        mixtral = build("float32", 8, graphs)
        requests = [
            mixtral.request(i, prompt, 60, temperature=temperature, seed=3, **asks[i % 3])
            for i, prompt in enumerate(PROMPTS)
        ]
        with counted_steps() as kinds:
            found.append(mixtral.engine.complete(requests))
        assert kinds["graph" if graphs else "launched"] > 20
        assert told(mixtral.engine.complete(requests[::3])) == told(found[-1][::3])
    assert told(found[0]) == told(found[1])
    for answer in found[1][2::3]:
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert {answer.finish_reason for answer in found[1][2::3]} >= {"stop"}
    assert all(len(answer.tokens) >= 9 for answer in found[1][1::3])


def test_graphs_are_captured_once_and_serve_in_any_order():
    mixtral = build("bfloat16", 8)
    first = {count: told(answers(mixtral, count=count)) for count in (3, 8, 1)}
    captured = dict(mixtral.engine._runner._graphs._captured)
    assert not any(any(kind) for _, *kind in captured)
    # the answers end in pairs, so that steps have 8, 6, 4 and 2 rows, or 3, 2 and 1; prompts are a step with chunks
    assert {rows for rows, *_ in captured if isinstance(rows, int)} == {1, 2, 3, 4, 6, 8}
    assert {(shape.rows, shape.tokens) for shape, *_ in captured if not isinstance(shape, int)} == {(0, 64)}
    for count in (8, 3, 1, 3, 8):
        assert told(answers(mixtral, count=count)) == first[count]
    assert mixtral.engine._runner._graphs._captured == captured


def test_graphs_made_beforehand_give_the_same_text():
    made_as_wanted, made_before = build("bfloat16", 8), build("bfloat16", 8)
    made_before.engine.warm_up()
    captured = dict(made_before.engine._runner._graphs._captured)
    assert told(answers(made_before)) == told(answers(made_as_wanted))
    assert made_before.engine._runner._graphs._captured == captured


def test_launches_never_wait_for_the_device(monkeypatch):
    mixtral = build("bfloat16", 8)
    requests = [mixtral.request(i, p, 20, temperature=0.5 * (i % 2)) for i, p in enumerate(PROMPTS)]
    wanted = told(mixtral.engine.complete(requests))  # captures
    launch = Runner.launch

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Runner, "launch", watched)
    assert told(mixtral.engine.complete(requests)) == wanted
    kernel_by_kernel = build("bfloat16", 8, cuda_graphs=False)
    monkeypatch.setattr(Runner, "launch", launch)
    kernel_by_kernel.engine.complete(requests)  # compiles
    monkeypatch.setattr(Runner, "launch", watched)
    assert told(kernel_by_kernel.engine.complete(requests)) == wanted


def test_another_cache_takes_other_graphs():
    mixtral = build("bfloat16", 4)
    wanted = told(answers(mixtral))
    mixtral.model.cache = None
    filler = torch.empty(1 << 26, dtype=torch.uint8, device="cuda")  # so that the new cache has another address
    assert told(answers(mixtral)) == wanted
    mixtral.engine.reset()
    assert told(answers(mixtral)) == wanted
    del filler


def test_an_interrupted_stream_and_the_next_one():
    mixtral = build("bfloat16", 4)
    wanted = told(answers(mixtral))
    asked = iter(range(10**6))
    events = mixtral.stream(PROMPTS, 40, should_stop=lambda: next(asked) == 9, temperature=0)
    ends = [event.completion for event in events if event.finish_reason]
    assert {c.finish_reason for c in ends} >= {"interrupted"}
    assert max(len(c.tokens) for c in ends) == 9
    assert told(answers(mixtral)) == wanted
