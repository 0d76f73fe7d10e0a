"""benchmarks/serving: what is counted, under the names of peers, and a whole run of a small model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.model.source import RandomWords
from benchmarks.serving.bench_host import bench_host
from benchmarks.serving.bench_throughput import CASES, bench_throughput
from benchmarks.serving.load import (
    Coming,
    Load,
    Record,
    poisson_starts,
    random_prompts,
    serve_fields,
    throughput_fields,
)
from benchmarks.serving.simulate_steps import simulate_steps, steps_of
from mixtralkit.engine.requests import Progress, Request
from mixtralkit.engine.scheduler import Scheduler, Sequence

ROOT = Path(__file__).resolve().parent.parent


def a_record() -> Record:
    requests = [Request(0, (3,) * 10, 3), Request(1, (4,) * 20, 2)]
    return Record(requests, 4.0, {0: [1.0, 1.5, 3.5], 1: [0.5, 1.0]}, [2, 1], [0.001])


def test_fields_of_peers():
    thorough = throughput_fields(a_record())
    assert thorough == {
        "elapsed_time": 4.0, "num_requests": 2, "total_num_tokens": 35, "requests_per_second": 0.5,
        "tokens_per_second": 8.75, "output_tokens_per_second": 1.25,
    }  # fmt: skip
    served = serve_fields(a_record(), 7.0)
    assert (served["request_rate"], served["completed"], served["output_throughput"]) == (7.0, 2, 1.25)
    assert (served["mean_ttft_ms"], served["median_ttft_ms"]) == (750, 750)
    assert served["mean_tpot_ms"] == mean([1250, 500])
    assert (served["median_itl_ms"], served["mean_itl_ms"]) == (500, 1000)
    assert served["p99_itl_ms"] == pytest.approx(1970)


def test_arrivals_come_when_they_are_due_and_never_again(monkeypatch):
    starts = poisson_starts(2000, 50.0, 0)
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(40, rel=0.1)
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda s: now.__setitem__(0, now[0] + s))
    load = Load([Request(i, (3,), 1) for i in range(3)], [0.0, 0.5, 4.0], began=10.0)
    assert [r.id for r in load.poll(False)] == [0]
    assert load.poll(False) == []
    assert [r.id for r in load.poll(True)] == [1]
    assert load.poll(True) == []  # no longer than a second
    now[0] += 9
    assert [r.id for r in load.poll(False)] == [2]
    assert load.poll(False) is None


def test_some_come_at_once_and_others_one_by_one():
    coming = Coming([Request(i, (3,), 1) for i in range(5)], 3)
    came = [coming.poll(False) for _ in range(12)]
    ids = [None if some is None else [request.id for request in some] for some in came]
    assert ids == [[0, 1, 2], [], [], [3], [], [], [], [4], [], [], [], None]


def test_prompts_are_random_and_the_same_again():
    assert random_prompts([3, 5], 50, 1) == random_prompts([3, 5], 50, 1) != random_prompts([3, 5], 50, 2)


def test_a_whole_run_of_a_small_model(tmp_path):
    output = tmp_path / "serving.json"
    bench_throughput(
        ROOT / "configs" / "models" / "tiny.json", True, sequences=3, prompt_len=9, new_tokens=5, requests=5,
        shortest=2, longest=6, shared=40, sharing=3, cache_tokens=400, page_size=16, layers=1, output=output,
        quantize="int8", device="cpu",
    )  # fmt: skip
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {line["measurement"] for line in lines}
    assert found - {"mixed"} == {"single", "fixed", "equal", "uniform", "poisson", "prefix", "goals"}
    fixed = next(line for line in lines if line["measurement"] == "fixed")
    assert (fixed["num_requests"], fixed["total_num_tokens"]) == (3, 3 * 14)
    reuse = [line for line in lines if line["measurement"] == "prefix"]
    assert [line["reuse"] for line in reuse] == [False, True]
    goals = lines[-1]
    assert sum(isinstance(goal, dict) and "met" in goal for goal in goals.values()) in (8, 9)
    with pytest.raises(ValueError, match=r"cases \(none\) must be some of single, fixed"):
        bench_throughput(random_weights=True, cases="none")
    assert set(CASES) == {"single", "fixed", "mixed", "uniform", "poisson", "prefix"}


def test_the_host_s_part_of_steps(tmp_path):
    output = tmp_path / "host.json"
    bench_host(sequences=3, steps=40, prompt_len=20, vocab_size=64, page_size=16, output=output)
    lines = {line["measurement"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert set(lines) == {"served", "served, drawn", "served, prompts arrive", "list", "list, drawn"}
    assert all(line["turns"] > 20 for name, line in lines.items() if name != "served, prompts arrive")
    assert lines["served, prompts arrive"]["turns"] == 3, "one for each that comes, but for the first turns"


def test_simulated_steps_give_every_token(capsys):
    simulate_steps(mixed_budget="768", sequences=2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == ["fixed", "equal", "uniform", "uniform, as they come"]
    assert [line["steps"] for line in lines[:2]] == [256, 562]
    words, scheduler = RandomWords(100), Scheduler(1, 2, 40, 16, 30, 9, prefix_reuse=False)
    sequences = [Sequence(i, Progress(Request(i, (3,) * 20, 7), 7, words), i) for i in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    slow = [ms for planned, ms in steps_of(scheduler) if planned.plan.has_chunks]
    assert [len(sequence.answer.tokens) for sequence in sequences] == [7] * 5
    assert min(slow) > 18.5, "nearly every expert is read"
