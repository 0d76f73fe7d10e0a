"""Runs: every kind of record against slow scoring, on one rank and two, stopped anywhere and continued."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.evaluation.likelihood import windows
from mixtralkit.evaluation.prompt_sets import read_prompts
from mixtralkit.evaluation.run import RESULTS, RUN, SUMMARY, Results, read_rows, run
from mixtralkit.evaluation.run_record import fingerprint, what_cuts
from mixtralkit.evaluation.work import AnswerOptions, choice_pairs, make_works
from mixtralkit.planning.plan import contiguous
from tests.engine.parts import engine_config
from tests.evaluation.parts import MAX_SEQ_LEN, make_mixtral, slow_logprobs, tokenizer
from tests.ranks import run_ranks

OPTIONS = AnswerOptions(max_gen_len=6, window=16, context=5)
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void."
DIALOG = [{"role": "user", "content": "Who are you?"}]
RECORDS = [
    {"id": "long", "text": TEXT, "domain": "a"},
    {"id": "sum", "prompt": "1 + 1 -> 3, 2 + 2 ->", "target": ["5", "4"], "metric": ["numeric", "contains"]},
    {"prompt": "Who are", "choices": [" you?", " they, then?", " you?"], "answer": " you?", "domain": "a"},
    {"messages": DIALOG, "choices": ["I am a small model.", "Nobody"], "answer": [1], "domain": "b"},
    {"messages": DIALOG, "target": "I am", "metric": "chrf", "max_gen_len": 3, "domain": "b", "stop": "model"},
    {"prompt": "def add(first, second):", "metric": "perplexity"},
    {"id": "e", "prompt": "The earth ", "choices": ["was", "is", "void"], "answer": 0},
    {"text": "I"},
    *({"id": f"g{i}", "prompt": f"{i} + {i} ->", "target": str(i), "metric": "contains"} for i in range(4)),
]


class Stopped(Exception):
    """A kill, as the run sees it."""


class Bar:
    """What ``run`` needs of a bar; stops the run at a number of records."""

    def __init__(self, stop_at: float = math.inf) -> None:
        self.n, self.stop_at = 0, stop_at

    def update(self, count: int = 1) -> None:
        self.n += count
        if self.n >= self.stop_at:
            raise Stopped


def write_set(path: Path, records: list[dict] = RECORDS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluate(
    context: RankContext, folder: Path, prompts: Path, attention: str = "dp", batch: int = 5,
    stop_at: float = math.inf, options: AnswerOptions = OPTIONS, repeat: bool = False, broken: bool = False,
):  # fmt: skip
    """A whole run as the tool does it; chunks of four records."""
    records = read_prompts(prompts)
    works = make_works(records, prompts, tokenizer(), options)
    mixtral = make_mixtral(context, attention, batch)
    if broken:
        with torch.no_grad():
            mixtral.model.named_tensors()["output.weight"].fill_(math.nan)
    facts = fingerprint(mixtral.model.params, [], prompts, prompts, asdict(options), "float32", MAX_SEQ_LEN)
    with Results(context, records, folder, facts) as results:
        ran = run(mixtral, works, options, results, Bar(stop_at), repeat, chunk=4)
        return results.finish(), ran


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "set.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prompts) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    evaluate(RankContext(), folder, prompts)
    return folder


def test_likelihoods_are_those_of_single_sequences(whole, prompts):
    mixtral = make_mixtral(RankContext())
    records, found = read_prompts(prompts), lines(whole)
    assert [result["id"] for result in found] == [record.id for record in records]
    for record, result in zip(records, found, strict=True):
        if record.choices:
            pairs = choice_pairs(tokenizer(), record.prompt, record.choices)
            assert result["choice_logprobs"] == pytest.approx([slow_logprobs(mixtral, *p)[0] for p in pairs], abs=1e-4)
            assert result["choice_tokens"] == [len(continuation) for _, continuation in pairs]
            assert result["choice_bytes"] == [len(choice) for choice in record.choices]
        elif record.is_text or record.more.get("metric") == "perplexity":
            ids = tokenizer().encode(record.prompt, bos=False)
            pieces = windows(ids, tokenizer().bos_id, 16, 5)
            total = sum(slow_logprobs(mixtral, *piece)[0] for piece in pieces)
            assert result["logprob"] == pytest.approx(total, abs=1e-4)
            assert (result["num_tokens"], result["num_bytes"]) == (len(ids), len(record.prompt))
            assert result["scores"]["bits_per_byte"] == pytest.approx(-total / math.log(2) / len(record.prompt))


def test_generations_are_the_models(whole):
    found = {result["id"]: result for result in lines(whole)}
    answer = make_mixtral(RankContext()).complete(["1 + 1 -> 3, 2 + 2 ->"], 6, temperature=0)[0]
    assert (found["sum"]["generation"], found["sum"]["tokens"]) == (answer.text, answer.tokens)
    assert set(found["sum"]["scores"]) == {"numeric", "contains"}
    assert len(found[4]["tokens"]) <= 3
    assert found[2]["scores"]["accuracy"] in (0.0, 1.0)


def test_the_context_of_choices_is_what_all_of_them_share():
    for prompt, choices in (("Who are", [" you?", " they"]), ("The earth ", ["was", "is", "7"]), ("a", ["b", "dd"])):
        pairs = choice_pairs(tokenizer(), prompt, choices)
        assert len({context for context, _ in pairs}) == 1
        for choice, (context, continuation) in zip(choices, pairs, strict=True):
            assert list(context + continuation) == tokenizer().encode(prompt + choice)
            assert continuation
    pairs = choice_pairs(tokenizer(), DIALOG, ["I am", "No"])
    assert [list(continuation) for _, continuation in pairs] == [
        tokenizer().encode(c, bos=False) for c in ("I am", "No")
    ]


@pytest.mark.parametrize(("world", "attention", "batch"), [(1, "tp", 1), (2, "dp", 5), (2, "tp", 1)])
def test_scores_are_the_same_for_any_ranks_and_batches(whole, prompts, tmp_path, world, attention, batch):
    folder = tmp_path / "run"
    if world == 1:
        evaluate(RankContext(), folder, prompts, attention, batch)
    else:
        measures = run_ranks(evaluate_and_forget, world, folder, prompts, attention, batch)
        assert measures[1] == [], "rank 0 sums up"
    for found, expected in zip(lines(folder), lines(whole), strict=True):
        assert close(found, expected)
    assert (folder / RUN).read_bytes() == (whole / RUN).read_bytes()


def evaluate_and_forget(context: RankContext, *args):
    return evaluate(context, *args)[0]


def close(found, expected) -> bool:
    """Equal but for the rounding of numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, abs=1e-4, rel=1e-5) if isinstance(expected, float) else expected)


def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(whole, prompts, tmp_path):
    expected = contents(whole)
    assert set(expected) == {RUN, RESULTS, SUMMARY}
    for stop_at in range(1, len(RECORDS) + 1):
        folder = tmp_path / f"stopped{stop_at}"
        with pytest.raises(Stopped):
            evaluate(RankContext(), folder, prompts, stop_at=stop_at)
        assert len(lines(folder)) <= stop_at
        assert len(lines(folder)) >= stop_at // 4 * 4, "whole chunks are written"
        evaluate(RankContext(), folder, prompts)
        assert contents(folder) == expected


def test_a_line_torn_by_a_kill_is_written_again(whole, prompts, tmp_path):
    folder = tmp_path / "torn"
    folder.mkdir()
    (folder / RUN).write_bytes((whole / RUN).read_bytes())
    data = (whole / RESULTS).read_bytes()
    for cut in (0, len(data) // 3, len(data) // 2, len(data) - 1):
        (folder / RESULTS).write_bytes(data[:cut])
        evaluate(RankContext(), folder, prompts)
        assert contents(folder) == contents(whole)


def stop_and_go_on(context: RankContext, folder: Path, prompts: Path, stop_at: int) -> None:
    with pytest.raises(Stopped):
        evaluate(context, folder, prompts, stop_at=stop_at)
    evaluate(context, folder, prompts)


def test_two_ranks_go_on_too(prompts, tmp_path):
    run_ranks(evaluate_and_forget, 2, tmp_path / "whole", prompts)
    run_ranks(stop_and_go_on, 2, tmp_path / "stopped", prompts, 6)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_finished_run_is_summed_up_without_running(whole, prompts):
    before = contents(whole)
    start = time.monotonic()
    measures, ran = evaluate(RankContext(), whole, prompts)
    assert (ran, contents(whole)) == ({}, before), f"{time.monotonic() - start:.1f} s"
    rows = read_rows(whole / RESULTS)
    mean = sum(row.scores["accuracy"] for row in rows if "accuracy" in row.scores) / 3
    assert next(m.value for m in measures if m.metric == "accuracy" and m.group is None) == pytest.approx(mean)


def test_what_ran_is_told_by_the_sequences_of_an_observer(whole, prompts):
    """The report on routing needs each sequence's record, and that every one of them runs again."""
    mixtral = make_mixtral(RankContext())
    works = make_works(read_prompts(prompts), prompts, tokenizer(), OPTIONS)
    seen: dict[int, int] = {}

    def observe(batch, reports) -> None:
        for span in batch.spans:
            seen[span.sequence] = max(seen.get(span.sequence, 0), span.position + span.stop - span.start)

    mixtral.engine.observe = observe
    results = Results(RankContext(), read_prompts(prompts), None, {})
    ran = run(mixtral, works, OPTIONS, results, Bar(), chunk=4)
    assert set(ran) == set(seen)
    for sequence, one in ran.items():
        work = works[one.place]
        assert one.ids in work.sequences if work.pairs else one.ids[: one.answer_from] == work.prompt
        assert seen[sequence] in (len(one.ids), len(one.ids) - 1), "the last token that is generated does not run"
    assert {one.place for one in ran.values()} == set(range(len(RECORDS)))
    again = evaluate(RankContext(), whole, prompts, repeat=True)[1]
    assert again == ran


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "other"}, "another model"),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"prompts": "other"}, "another set"),
        ({"options": {"max_gen_len": 7}}, "another setting: max_gen_len was 6, is 7"),
        ({"capacity": {"overflow": "drop"}}, "another setting: overflow was None, is 'drop'"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(whole, prompts, tmp_path, change, says):
    before = contents(whole)
    facts = json.loads((whole / RUN).read_text())
    for name, value in change.items():
        facts[name] = {**facts[name], **value} if name == "options" else value
    with pytest.raises(ValueError, match=f"whole: holds a run of {says}; name another"):
        Results(RankContext(), read_prompts(prompts), whole, facts)
    assert contents(whole) == before


def test_folders_that_are_no_runs_are_refused(prompts, tmp_path):
    records, facts = read_prompts(prompts), {"format": 1}
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / RESULTS).write_text("mine")
    with pytest.raises(ValueError, match=r"loose: has results.jsonl but no run.json"):
        Results(RankContext(), records, tmp_path / "loose", facts)
    assert (tmp_path / "loose" / RESULTS).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: cannot be made a folder"):
        Results(RankContext(), records, tmp_path / "file", facts)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / RUN).write_text("{")
    with pytest.raises(ValueError, match=r"run.json: is not JSON"):
        Results(RankContext(), records, tmp_path / "odd", facts)


def test_the_mark_of_a_model_sees_its_weights(tmp_path):
    config, options = engine_config(), OPTIONS
    path = tmp_path / "consolidated.00.pth"

    def mark(**changes) -> dict:
        given = {"config": config, "dtype": "float32", "max_seq_len": 64, **changes}
        return fingerprint(weights=[path], tokenizer=path, prompts=path, options=asdict(options), **given)

    path.write_bytes(b"a" * 300_000)
    first = mark()
    assert mark(config=engine_config(max_batch_size=1, max_seq_len=9)) == first, "what a caller chooses is no model"
    assert mark(config=engine_config(rope_theta=7.0))["model"] != first["model"]
    assert mark(dtype="bfloat16")["options"] != first["options"]
    path.write_bytes(b"a" * 299_999 + b"b")
    assert mark()["model"] != first["model"]
    path.write_bytes(b"a" * 300_001)
    assert mark()["model"] != first["model"]
    assert str(tmp_path) not in json.dumps(first), "no machine paths"


def test_only_a_capacity_makes_ranks_and_plan_matter():
    plan = contiguous(3, 8, 2)
    assert what_cuts(plan, 2, "dp", 8) is None
    cut = replace(plan, cold_capacity_factor=0.5)
    assert what_cuts(cut, 2, "dp", 8) != what_cuts(cut, 2, "dp", 4)
    assert what_cuts(cut, 2, "dp", 8) != what_cuts(replace(cut, overflow="reroute"), 2, "dp", 8)


def test_a_model_that_computes_nan_stops_the_run_and_keeps_what_is_there(whole, prompts, tmp_path):
    folder = tmp_path / "nan"
    with pytest.raises(Stopped):
        evaluate(RankContext(), folder, prompts, stop_at=5)
    kept = lines(folder)
    with pytest.raises(RuntimeError, match="no finite"):
        evaluate(RankContext(), folder, prompts, broken=True)
    assert lines(folder) == kept
    assert len(kept) >= 4


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a"}, "line 2: has nothing to score"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, r"line 2: answer \(2\)"),
        ({"prompt": "a", "target": "b", "metric": "bleu"}, r"line 2: metric \('bleu'\)"),
        ({"prompt": "a", "target": "b", "metric": "contains", "stop": [""]}, r"line 2: stop \(\[''\]\)"),
    ],
)
def test_records_that_cannot_be_scored_are_named_with_file_and_line(tmp_path, record, says):
    path = write_set(tmp_path / "bad.jsonl", [RECORDS[0], record])
    with pytest.raises(ValueError, match=f"bad.jsonl, {says}"):
        make_works(read_prompts(path), path, tokenizer(), OPTIONS)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            {"prompt": TEXT, "target": "b", "metric": "contains"},
            r"line 1: the prompt has \d+ tokens, which leaves no room",
        ),
        (
            {"prompt": TEXT, "choices": ["b", "c"], "answer": 0},
            r"line 1: choice 0 has \d+ \+ 1 tokens, more than max_seq",
        ),
        ({"text": TEXT}, r"line 1: piece 0 of the text has 1 \+ 15 tokens"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path, record, says):
    path = write_set(tmp_path / "long.jsonl", [record])
    (work,) = make_works(read_prompts(path), path, tokenizer(), OPTIONS)
    work.check(MAX_SEQ_LEN)
    with pytest.raises(ValueError, match=f"long.jsonl, {says}"):
        work.check(12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_gen_len": 0}, r"max_gen_len \(0\)"),
        ({"temperature": -1.0}, r"temperature \(-1.0\)"),
        ({"window": 1}, r"window \(1\)"),
        ({"context": 0}, r"context \(0\)"),
        ({"window": 8, "context": 8}, r"context \(8\)"),
    ],
)
def test_options_that_cannot_be_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        AnswerOptions(**options)
