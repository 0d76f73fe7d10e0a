"""configs/prompts: what the held-out set promises, and that the shipped model beats chance and a unigram model on it.

Also benchmarks/plans/bench_quality.py: a capacity cuts rows and costs quality, the page shows its figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plans import bench_quality as bench
from benchmarks.plans import plot_quality
from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.distributed import RankContext
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation.prompt_sets import PromptRecord, read_prompts
from mixtralkit.evaluation.work import AnswerOptions, make_works
from mixtralkit.training.corpus import Document, split
from mixtralkit.training.questions import SOURCE, Sizes
from mixtralkit.training.unigram import Unigram
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


PROMPTS = ROOT / "configs" / "prompts"
HELDOUT = PROMPTS / "heldout.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "quality.json"
DOMAINS = ("scripture", "python", "docs", "man", "chat")


def _questions(domain: str) -> list[PromptRecord]:
    return [r for r in read_prompts(HELDOUT) if r.more["domain"] == domain and r.choices is not None]


def _texts(domain: str) -> list[PromptRecord]:
    return [r for r in read_prompts(HELDOUT) if r.more["domain"] == domain and r.is_text]


def test_mixtralkits_three_examples_are_there():
    assert [record.prompt for record in read_prompts(PROMPTS / "mixtralkit.jsonl")] == [
        "Who are you?", "1 + 1 -> 3\n2 + 2 -> 5\n3 + 3 -> 7\n4 + 4 -> ", "请问你是什么模型？",
    ]  # fmt: skip


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in PROMPTS.iterdir()) < 300_000


@pytest.mark.parametrize("domain", DOMAINS)
def test_questions_have_four_choices_of_one_length(domain):
    questions = _questions(domain)
    assert len(questions) == 100
    assert len({str(record.prompt) for record in questions}) == 100
    for record in questions:
        assert len(set(record.choices)) == 4
        assert len({len(choice.encode()) for choice in record.choices}) == 1
    answers = [record.answer for record in questions]
    assert all(15 <= answers.count(place) <= 35 for place in range(4))
    assert sum(len(record.prompt.encode()) for record in _texts(domain)) > 5 * Sizes().passage


def test_every_document_is_held_out_by_its_name_and_open():
    sources = {record.more["source"] for record in read_prompts(HELDOUT)} - {SOURCE}
    assert len(sources) > 50
    assert split([Document(source) for source in sources])["train"] == []
    assert all(source.endswith("ssl") for source in sources if source.startswith("man/"))
    assert not any("sqlite3" in source for source in sources)


def test_counts_are_of_the_shipped_tokenizer():
    assert (
        len(Unigram.load(PROMPTS / "token-counts.json").logprobs_V) == Tokenizer(ROOT / "ckpts/tokenizer.model").n_words
    )


def _exam(context: RankContext, records: list[PromptRecord], folder: Path) -> bench.Exam:
    options = AnswerOptions()
    works = make_works(records, HELDOUT, Tokenizer(ROOT / "ckpts" / "tokenizer.model"), options)
    return bench.Exam(context, ROOT / "ckpts", records, works, options, 16, folder)


def test_the_shipped_model_beats_chance_and_a_unigram_model(tmp_path):
    """40 questions of each domain; all of them score 50% (chat) to 78%."""
    records = [record for domain in DOMAINS for record in _questions(domain)[:40]]
    context = RankContext.start("cpu", {})
    exam = _exam(context, records, tmp_path)
    plan = bench.contiguous(open_checkpoint(ROOT / "ckpts").config.n_layers, 8, 1)
    measures, cut = exam.take("run", plan)
    scores = bench.scores_of(measures)
    unigram = bench.scores_of(
        bench.unigram_measures(Unigram.load(PROMPTS / "token-counts.json"), exam.records, exam.works)
    )
    assert cut == {"dropped": 0, "rerouted": 0}
    for domain in DOMAINS:
        for metric in ("accuracy", "accuracy_per_token"):
            own, floor = (found[f"domain={domain}"][metric]["value"] for found in (scores, unigram))
            assert own > 0.25 + 0.1, (domain, metric)
            assert own > floor + 0.05, (domain, metric)
    assert scores["all"]["accuracy"]["value"] > 0.6
    assert 0.15 < unigram["all"]["accuracy"]["value"] < 0.4


def _cut(context: RankContext, folder: Path) -> list[tuple[float, dict[str, float]]]:
    exam = _exam(context, _texts("scripture") + _texts("python"), folder)
    loads_LE = bench.mean_loads(ROOT / "benchmarks" / "results" / "tiny-training.json")
    placements = {"hot/cold": bench.hot_cold(loads_LE, context.world_size, 2)}
    settings = [
        bench.Setting("hot/cold"),
        bench.Setting("hot/cold", 1e6),
        bench.Setting("hot/cold", 0.25),
        bench.Setting("hot/cold", 0.25, "reroute"),
        bench.Setting("hot/cold", 0.25, "drop", "arrival"),
    ]
    found = []
    for i, setting in enumerate(settings):
        measures, cut = exam.take(f"run-{i}", setting.plan(placements))
        bits = bench.scores_of(measures)["all"]["bits_per_byte"]["value"] if context.is_first else 0.0
        found.append((bits, cut))
    return found


def test_a_capacity_costs_quality_and_the_order_of_the_cut_matters(tmp_path):
    exact, roomy, drop, reroute, arrival = run_ranks(_cut, 2, tmp_path, timeout_s=200)[0]
    assert roomy[0] == pytest.approx(exact[0], rel=1e-6)
    assert exact[1] == roomy[1] == {"dropped": 0, "rerouted": 0}
    assert drop[1]["dropped"] > 0.1
    assert drop[0] > 1.05 * exact[0]
    assert arrival[1]["dropped"] == pytest.approx(drop[1]["dropped"], rel=0.02)  # as many rows, but others
    assert arrival[0] > 1.02 * drop[0]
    assert reroute[1]["rerouted"] > 0
    assert reroute[1]["dropped"] < drop[1]["dropped"]


def test_the_page_shows_the_result():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    summary = json.loads(RESULT.read_text(encoding="utf-8"))
    assert plot_quality.capacity_table(summary) in page
    assert plot_quality.domain_table(summary) in page
