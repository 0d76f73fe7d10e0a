"""The same run means the same run: what is another one's is refused, named, and left as it was."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mixtralkit.distributed import RankContext
from mixtralkit.evaluation.prompt_sets import PromptRecord, read_prompts
from mixtralkit.evaluation.run import Results
from mixtralkit.evaluation.run_record import claim_output, facts_of_plan, fingerprint
from mixtralkit.evaluation.work import AnswerOptions
from mixtralkit.planning.plan import contiguous
from tests.engine.parts import engine_config, make_tokenizer

PROMPTS = [PromptRecord(0, "a"), PromptRecord(1, "b")]


@pytest.fixture
def weights(tmp_path) -> list[Path]:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return [path]


def facts_of(tmp_path, weights, prompts=PROMPTS, dtype="float32", batch=8, **options):
    tokenizer = make_tokenizer(tmp_path)
    options = {**asdict(AnswerOptions()), **options}
    placed = facts_of_plan(contiguous(3, 8, 2), 2, "dp", batch, dtype)
    return fingerprint(engine_config(), weights, tokenizer, prompts, options, dtype, 64, placed)


def finished(output: Path, facts: dict, weights: str = "hash") -> None:
    record = claim_output(output, facts)
    record.confirm(weights)
    output.write_text('{"id": 0}\n{"id": 1}')


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": [PromptRecord(0, "a"), PromptRecord(1, "other")]}, "another set"),
        ({"temperature": 2.0}, r"another setting: temperature was 0\.0, is 2\.0"),
        ({"seed": 7}, "another setting: seed was 1, is 7"),
        ({"dtype": "bfloat16"}, "another setting: dtype was 'float32', is 'bfloat16'"),
    ],
)
def test_other_prompts_and_settings_are_refused(tmp_path, weights, change, says):
    """Results of other prompts with the same ids were taken as done, and files were mixed."""
    output = tmp_path / "out.jsonl"
    finished(output, facts_of(tmp_path, weights))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"out\.jsonl: holds a run of {says}; name another output, or replace"):
        claim_output(output, facts_of(tmp_path, weights, **change))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_model_is_seen_by_its_weights(tmp_path, weights):
    output = tmp_path / "out.jsonl"
    finished(output, facts_of(tmp_path, weights), "one")
    assert not claim_output(output, facts_of(tmp_path, weights)).needs_weights, "size and time are as they were"
    os.utime(weights[0], ns=(1, 1))
    again = claim_output(output, facts_of(tmp_path, weights))
    assert again.needs_weights
    with pytest.raises(ValueError, match="another model"):
        again.confirm("two")
    with pytest.raises(ValueError, match="another model"):
        claim_output(output, facts_of(tmp_path, weights)).confirm(None)
    claim_output(output, facts_of(tmp_path, weights)).confirm("one")
    assert not claim_output(output, facts_of(tmp_path, weights)).needs_weights, "the new time is remembered"
    assert output.read_text() == '{"id": 0}\n{"id": 1}'


def test_the_batch_is_part_of_a_run_where_it_changes_texts(tmp_path, weights):
    for dtype, differs in (("float32", False), ("bfloat16", True)):
        output = tmp_path / f"{dtype}.jsonl"
        finished(output, facts_of(tmp_path, weights, dtype=dtype))
        other = facts_of(tmp_path, weights, dtype=dtype, batch=4)
        if differs:
            with pytest.raises(ValueError, match="max_batch_size was 8, is 4"):
                claim_output(output, other)
        else:
            claim_output(output, other)


def test_what_no_run_wrote_is_never_replaced_but_by_overwrite(tmp_path, weights):
    """A file without a last newline, the prompts themselves for one, was emptied."""
    facts, output = facts_of(tmp_path, weights), tmp_path / "mine.jsonl"
    for content in ("no newline", '{"id": 0}\n'):
        output.write_text(content)
        with pytest.raises(ValueError, match=r"mine\.jsonl: is there and mine\.jsonl\.run\.json, which would say"):
            claim_output(output, facts)
        assert output.read_text() == content
    assert claim_output(output, facts, overwrite=True).needs_weights
    assert not output.exists()
    assert claim_output(Path(os.devnull), facts) is None


def test_a_folder_of_something_else_is_no_evaluation(tmp_path, weights):
    """A model's folder was taken as an evaluation's."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"model: has params\.json but no run\.json"):
            Results(RankContext(), PROMPTS, folder, facts_of(tmp_path, weights), overwrite)
    assert [path.name for path in folder.iterdir()] == ["params.json"]


def test_overwrite_replaces_another_runs_files_alone(tmp_path, weights):
    folder = tmp_path / "run"
    with Results(RankContext(), PROMPTS, folder, facts_of(tmp_path, weights)) as results:
        results.confirm("one")
    (folder / "notes.txt").write_text("mine")
    other = facts_of(tmp_path, weights, seed=7)
    with pytest.raises(ValueError, match="seed was 1, is 7"):
        Results(RankContext(), PROMPTS, folder, other)
    (folder / "notes.txt").unlink()
    with Results(RankContext(), PROMPTS, folder, other, overwrite=True) as results:
        results.confirm("one")
    with Results(RankContext(), PROMPTS, folder, other) as results:
        assert not results.needs_weights


def test_pipes_are_read_by_one_rank_and_refused_by_several(tmp_path):
    path = tmp_path / "p.txt"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a pipe"):
        read_prompts(path, ranks=2)
    child = os.fork()
    if child == 0:
        try:
            path.write_text("\ufeffone\r\ntwo\n")
        finally:
            os._exit(0)  # never back into pytest
    assert [record.prompt for record in read_prompts(path)] == ["one", "two"]
    os.waitpid(child, 0)


def test_formats_of_a_plan_are_part_of_the_run(tmp_path, weights):
    """A plan with a precision gives other results, one with tiers the same, as does a record without it."""
    output, plan = tmp_path / "out.jsonl", contiguous(3, 8, 2)
    facts = facts_of(tmp_path, weights)
    finished(output, {name: value for name, value in facts.items() if name != "formats"})
    assert claim_output(output, facts) is not None
    behind = facts_of_plan(replace(plan, tier=[["host"] * 8] * 3), 2, "dp", 8, "float32")
    assert claim_output(output, facts | behind) is not None
    rounded = facts_of_plan(replace(plan, precision=[["int8"] * 8] * 3), 2, "dp", 8, "float32")
    with pytest.raises(ValueError, match="another setting: precision was None, is"):
        claim_output(output, facts | rounded)
