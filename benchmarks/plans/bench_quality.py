"""What a capacity costs: scores and cut rows over cold capacities, ways to overflow, and orders of the cut.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.plans.bench_quality --output FILE [--plot PNG]
    python -m benchmarks.plans.bench_quality show FILE [--plot PNG]

The model in ckpts/ answers the held-out set in configs/prompts/ in float32, attention dp and experts ep, with hot
experts on every rank. Every run is compared with the one without a capacity, record by record. A unigram model of the
training tokens and chance are the floor.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.machine import describe_run
from benchmarks.plans.plot_quality import capacity_table, domain_table, draw
from mixtralkit.cli.run import run_tool
from mixtralkit.config import EngineConfig, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.engine.statistics import MoEStatistics
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation import compare
from mixtralkit.evaluation.prompt_sets import PromptRecord, read_prompts
from mixtralkit.evaluation.run import Results, run
from mixtralkit.evaluation.run_record import FORMAT
from mixtralkit.evaluation.scoring import score_choices, score_text
from mixtralkit.evaluation.summary import Measure, Row, summarise
from mixtralkit.evaluation.work import AnswerOptions, Work, make_works
from mixtralkit.mixtral import Mixtral
from mixtralkit.planning.plan import CUT_ORDERS, OVERFLOWS, ExpertPlan, contiguous
from mixtralkit.planning.policies.hot_cold import hot_cold
from mixtralkit.training.unigram import Unigram

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "configs" / "prompts"
METRICS = ("accuracy", "bits_per_byte")


@dataclass(frozen=True)
class Setting:
    """A placement with a rule for the rows over its capacity; no factor, no rule."""

    placement: str
    factor: float | None = None
    overflow: str = OVERFLOWS[0]
    order: str = CUT_ORDERS[0]

    def plan(self, placements: dict[str, ExpertPlan]) -> ExpertPlan:
        return replace(
            placements[self.placement],
            cold_capacity_factor=self.factor,
            overflow=self.overflow,
            cut_order=self.order,
        )

    def as_json(self) -> dict[str, Any]:
        rule = {} if self.factor is None else {"overflow": self.overflow, "order": self.order}
        return {"placement": self.placement, "factor": self.factor, **rule}


@dataclass(frozen=True)
class Exam:
    """What every run answers, and how."""

    context: RankContext
    model: Path
    records: Sequence[PromptRecord]
    works: Sequence[Work]
    options: AnswerOptions
    max_batch_size: int
    folder: Path  # of the runs

    def take(self, name: str, plan: ExpertPlan) -> tuple[list[Measure], dict[str, float]]:
        """Scores on rank 0, and the shares of all choices that were dropped and rerouted. Collective."""
        mixtral = Mixtral.load(
            EngineConfig.of(
                model=self.model, max_seq_len=max(work.longest for work in self.works), dtype="float32",
                max_batch_size=self.max_batch_size, attention="dp", experts="ep", plan=plan, moe=MoEOptions(),
            ),
            self.context,
        )  # fmt: skip
        statistics = MoEStatistics(mixtral.model)
        mixtral.engine.observe = statistics
        facts = {"format": FORMAT, "model": {"config": name}}
        with (
            Results(self.context, self.records, self.folder / name, facts) as results,
            tqdm(total=len(self.works), desc=name, leave=False, disable=not self.context.is_first) as bar,
        ):
            run(mixtral, self.works, self.options, results, bar)
            measures = results.finish()
        layers = statistics.totals()
        choices = sum(layer.choices for layer in layers)
        shares = {
            "dropped": sum(layer.dropped for layer in layers) / choices,
            "rerouted": sum(layer.rerouted for layer in layers) / choices,
        }
        return measures, shares


def bench_quality(
    prompts: Path = PROMPTS / "heldout.jsonl",
    counts: Path = PROMPTS / "token-counts.json",
    model: Path = ROOT / "ckpts",
    loads: Path = ROOT / "benchmarks" / "results" / "tiny-training.json",
    factors: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25),
    hot_experts: int = 2,
    max_batch_size: int = 16,
    output: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Prints a table of scores and cut rows; the last line is JSON.

    Args:
        prompts: the set.
        counts: how often each token is in the training text, for the unigram baseline.
        model: the checkpoint.
        loads: results of its training, which say how much each expert is used in each domain.
        factors: cold capacities, as multiples of the even share.
        hot_experts: experts of each layer that every rank has.
        max_batch_size: sequences that run at a time over all ranks; what is cut depends on it.
        output: JSON file for the results.
        plot: picture of them.
    """
    context = RankContext.start("cpu")
    records, options = read_prompts(prompts), AnswerOptions()
    works = make_works(records, prompts, Tokenizer.beside(model), options)
    loads_LE = mean_loads(loads)
    layers, experts = loads_LE.shape
    placements = {
        "hot/cold": hot_cold(loads_LE, context.world_size, hot_experts),
        "contiguous": contiguous(layers, experts, context.world_size),
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(context.broadcast_object(folder))
        exam = Exam(context, model, records, works, options, max_batch_size, folder)
        rows = []
        for i, setting in enumerate(_settings(factors)):
            measures, shares = exam.take(f"run-{i}", setting.plan(placements))
            if context.is_first:
                against = _differences(folder / "run-0", folder / f"run-{i}") if i else {}
                rows.append({**setting.as_json(), **shares, "scores": scores_of(measures), "against_exact": against})
                print(_line(rows[-1]), flush=True)
        context.barrier()
    if context.is_first:
        summary = {
            **describe_run(context),
            "prompts": prompts.name,
            "hot_experts": hot_experts,
            "max_batch_size": max_batch_size,
            "chance": _chance(works),
            "unigram": scores_of(unigram_measures(Unigram.load(counts), records, works)),
            "results": rows,
        }
        if output is not None:
            output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        if plot is not None:
            draw(summary, plot)
        print(json.dumps(summary))
    context.stop()


def show(results: Path, plot: Path | None = None) -> None:
    """Prints the tables of a result, and draws its picture again.

    Args:
        results: JSON file of a run.
        plot: the picture.
    """
    summary = json.loads(results.read_text(encoding="utf-8"))
    print(f"{capacity_table(summary)}\n\n{domain_table(summary)}")
    if plot is not None:
        draw(summary, plot)


def _settings(factors: Sequence[float]) -> Iterator[Setting]:
    """The exact run first, then every rule, and last the plain one without hot copies."""
    yield Setting("hot/cold")
    for overflow in OVERFLOWS:
        for order in CUT_ORDERS:
            yield from (Setting("hot/cold", factor, overflow, order) for factor in factors)
    yield from (Setting("contiguous", factor) for factor in factors)


def mean_loads(path: Path) -> np.ndarray:
    """[L, E], the mean of the domains' shares."""
    domains = json.loads(path.read_text(encoding="utf-8"))["domains"]
    return np.mean([domain["load"] for domain in domains.values()], axis=0)


def unigram_measures(unigram: Unigram, records: Sequence[PromptRecord], works: Sequence[Work]) -> list[Measure]:
    """The scores of a unigram model on the same questions and texts."""
    rows = []
    for record, work in zip(records, works, strict=True):
        logprobs = [unigram.logprob(continuation) for _, continuation in work.pairs]
        tokens = [len(continuation) for _, continuation in work.pairs]
        result: dict[str, Any] = {"id": record.id, **record.more}
        if work.question.kind == "choice":
            result["scores"] = score_choices(work.question, logprobs, tokens, work.sizes)
        else:
            total, count, (size,) = sum(logprobs), sum(tokens), work.sizes
            result |= {"logprob": total, "num_tokens": count, "num_bytes": size}
            result["scores"] = score_text(total, count, size)
        rows.append(Row.of(result))
    return summarise(rows)


def _chance(works: Sequence[Work]) -> float:
    questions = [work.question for work in works if work.question.kind == "choice"]
    return sum(len(question.right) / len(question.choices) for question in questions) / len(questions)


def scores_of(measures: Sequence[Measure]) -> dict[str, dict[str, Any]]:
    """Group → metric → value with its interval and number."""
    groups: dict[str, dict[str, Any]] = {}
    for m in measures:
        found = {"value": m.value, "low": m.low, "high": m.high, "n": m.n}
        groups.setdefault(m.group or "all", {})[m.metric] = found
    return groups


def _differences(exact: Path, other: Path) -> dict[str, dict[str, float]]:
    """What the capacity changed over all records, by metric: difference, interval, p."""
    return {
        d.metric: {"difference": d.difference, "low": d.low, "high": d.high, "p": d.p}
        for d in compare.compare(exact, other)
        if d.group is None and d.metric in METRICS
    }


def _line(row: dict[str, Any]) -> str:
    scores = row["scores"]["all"]
    rule = "no capacity" if row["factor"] is None else f"{row['factor']:g} {row['overflow']} by {row['order']}"
    cut = f"dropped {row['dropped']:6.2%}  rerouted {row['rerouted']:6.2%}"
    return f"{row['placement']:>10}  {rule:24} {cut}  " + "  ".join(f"{m} {scores[m]['value']:.4f}" for m in METRICS)


if __name__ == "__main__":
    run_tool({"bench": bench_quality, "show": show}, default="bench")
