"""``mixtralkit evaluate``: scores of a model on a prompt set, and two such runs compared."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mixtralkit.automatic import with_free_memory
from mixtralkit.checkpoint import CheckpointReader
from mixtralkit.cli.run import command
from mixtralkit.cli.running import WatchOptions, is_watched, watched
from mixtralkit.config import EngineConfig, LimitOptions, ModelConfig, shipped
from mixtralkit.config.options import Count, Options, Positive
from mixtralkit.config.ranks import rank_of
from mixtralkit.distributed import RankContext
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation import compare as comparison
from mixtralkit.evaluation import summary
from mixtralkit.evaluation.prompt_sets import PromptRecord, read_prompts
from mixtralkit.evaluation.routing_html import ShownSequence, token_texts
from mixtralkit.evaluation.routing_report import check_report, write_report
from mixtralkit.evaluation.run import Ran, Results
from mixtralkit.evaluation.run import run as run_works
from mixtralkit.evaluation.run_record import facts_of_plan, fingerprint, write_json
from mixtralkit.evaluation.work import AnswerOptions, Work, make_works
from mixtralkit.mixtral import Mixtral, check_world_size, choose_dtype, choose_layout, open_source, with_weights
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import check_free

LONGEST_WINDOW = 1024  # tokens of a piece of a text, where nobody asked for more
SHOWN_RECORDS, SHOWN_TOKENS = 3, 600  # of each domain, with their tokens coloured


@dataclass(frozen=True)
class CutOptions(Options):
    """What becomes of rows over a cold expert's capacity, instead of what the plan says.

    Attributes:
        cold_capacity_factor: Rows that a cold expert takes, as a multiple of its even share; left out, the plan's.
        overflow: What becomes of the others; left out, the plan's.
        cut_order: Which rows these are: weight keeps the heaviest choices, arrival the first; left out, the plan's.
    """

    cold_capacity_factor: Positive | None = None
    overflow: Literal["drop", "reroute"] | None = None
    cut_order: Literal["weight", "arrival"] | None = None

    def applied(self, plan: ExpertPlan) -> ExpertPlan:
        """The plan with what was given."""
        return replace(plan, **{name: value for name, value in asdict(self).items() if value is not None})


@command
def evaluate(
    prompts: Path | None = None,
    output: Path | None = None,
    routing_report: Path | None = None,
    compare: tuple[Path, ...] = (),
    max_gen_len: Count = 256,
    window: Count | None = None,
    text_context: int | None = None,
    stop: tuple[str, ...] = (),
    overwrite: bool = False,
    *,
    sampling: SamplingOptions = SamplingOptions(temperature=0.0),
    engine: EngineConfig = EngineConfig(limits=LimitOptions(max_batch_size=16)),
    cut: CutOptions,
    watch: WatchOptions,
) -> None:
    """Scores a model on a prompt set and prints a table with confidence intervals, or compares two such runs.

    Args:
        prompts: The set, .jsonl: a record a line with target and metric, choices and answer, or text
            (docs/evaluation.md); or the name of a set in configs/prompts.
        output: Folder for run.json, results.jsonl and summary.json; one that a stopped run left is continued. With
            compare, a .json file for the comparison.
        routing_report: Folder for a report on which experts the tokens took. This and record_routing run the whole set,
            also where results are there already.
        compare: Two folders of finished runs of one set; nothing is run then.
        max_gen_len: Most tokens of a generation, where the record does not say.
        window: Most tokens of a piece of a text, context and scored ones; left out, 1024 or what the model can.
        text_context: Fewest tokens of context of each scored token, where the text has as many; left out, half the
            window.
        stop: Texts that end a generation, beside a record's own.
        overwrite: Replace what is there: the run of another model, set or setting in the output folder, an earlier
            report, trace or comparison.
    """
    if compare:
        if rank_of() == 0:
            _compare(compare, output, overwrite)
        return
    run = _Run.prepare(
        prompts, engine, cut, sampling, max_gen_len=max_gen_len, stop=stop, windows=(window, text_context)
    )
    context, trace = run.context, watch.record_routing
    if routing_report is not None:
        with context.agreed():
            if context.is_first:
                check_report(routing_report, overwrite)
        trace = trace or routing_report / "trace.npz"
    with Results(context, run.records, output, run.facts, overwrite) as results:
        if context.is_first and results.done:
            print(f"{output} already has {results.done} of {len(run.records)} results", file=sys.stderr)
        if not results.is_complete or results.needs_weights or trace is not None:
            mixtral, sequences = run.answer(results, replace(watch, record_routing=trace))
            if routing_report is not None:
                _report_routing(mixtral, routing_report, trace, sequences, run.records)
        measures = results.finish()
    if context.is_first:
        print(summary.table(measures))
        if any(work.question.kind == "text" for work in run.works):
            print(f"texts in windows of {run.options.window} tokens, at least {run.options.context} of them context")
    context.stop()


@dataclass(frozen=True)
class _Run:
    """What is answered, by what, and how; ``facts`` say what decides the results."""

    context: RankContext
    engine: EngineConfig
    source: tuple[CheckpointReader, Tokenizer]
    prompts: Path
    records: Sequence[PromptRecord]
    works: Sequence[Work]
    options: AnswerOptions
    facts: Mapping[str, Any]

    @classmethod
    def prepare(
        cls,
        prompts: Path | None,
        engine: EngineConfig,
        cut: CutOptions,
        sampling: SamplingOptions,
        windows: tuple[int | None, int | None],
        **answers: Any,
    ) -> _Run:
        """Reads and checks all but the weights; collective, ValueError that all ranks agree on."""
        context = RankContext.start(engine.limits.device)
        with context.agreed():
            if prompts is None:
                raise ValueError("prompts is missing: the set to score, a .jsonl file (or --compare RUN_A RUN_B)")
            engine.parallel.check_auto()
            prompts = shipped("prompts", prompts)
            check_world_size(context.world_size, engine.limits.num_gpus)
            records = read_prompts(prompts, context.world_size)
            source = reader, tokenizer = open_source(engine.source)
            options = _answer_options(reader.config, engine.cache.max_seq_len, *windows, **answers, **asdict(sampling))
            works = make_works(records, prompts, tokenizer, options)
            if engine.cache.max_seq_len is None:
                engine = engine.but(max_seq_len=min(reader.config.max_seq_len, max(work.longest for work in works)))
            max_seq_len, max_batch_size = engine.cache.max_seq_len, engine.limits.max_batch_size
            for work in works:
                work.check(max_seq_len)
        engine = with_free_memory(with_weights(engine, reader), context)
        with context.agreed():
            model = reader.config.with_limits(max_seq_len, max_batch_size)
            layout = choose_layout(model, context, engine, reader.found.precision)
            chosen = {"plan": cut.applied(layout.plan), "memory_gb": None, "trace": None, "explain": False}
            engine = engine.but(**asdict(layout.parallel), **chosen)
            dtype = str(choose_dtype(engine.limits.dtype, context.device)).removeprefix("torch.")
            placed = facts_of_plan(
                engine.parallel.plan, context.world_size, layout.parallel.attention, max_batch_size, dtype
            )
            files = [path for part in reader.found.files for path in part]
            facts = fingerprint(
                reader.config,
                files,
                tokenizer,
                records,
                asdict(options) | engine.limits.formats,
                dtype,
                max_seq_len,
                placed,
            )
        return cls(context, engine, source, prompts, records, works, options, facts)

    def answer(self, results: Results, watch: WatchOptions) -> tuple[Mixtral, Mapping[int, Ran]]:
        """Loads the model, runs what has no result yet, or all where the routing is recorded; collective."""
        mixtral = Mixtral.load(
            self.engine, self.context, self.source, is_watched(self.context), hashes=results.needs_weights
        )
        results.confirm(mixtral.weight_hash)
        meta = {"model": self.engine.source.model.name, "prompts": self.prompts.name}
        with watched(mixtral, watch, meta), _progress(self.context, len(self.records), results.done) as bar:
            repeat = watch.record_routing is not None
            return mixtral, run_works(mixtral, self.works, self.options, results, bar, repeat)


def _answer_options(
    config: ModelConfig, max_seq_len: int | None, window: int | None, text_context: int | None, **more: object
) -> AnswerOptions:
    """The options with the windows filled in; ValueError names what does not fit."""
    if max_seq_len is not None and not 1 <= max_seq_len <= config.max_seq_len:
        raise ValueError(f"max_seq_len ({max_seq_len}) must lie in 1 … {config.max_seq_len}, the model's")
    longest = config.max_seq_len if max_seq_len is None else max_seq_len
    if window is None:
        window = max(2, min(LONGEST_WINDOW, longest))
    elif window > longest:
        raise ValueError(f"window ({window}) must be at most max_seq_len ({longest})")
    return AnswerOptions(window=window, context=window // 2 if text_context is None else text_context, **more)


def _progress(context: RankContext, total: int, done: int) -> tqdm:
    """A bar on rank 0's stderr with rate and remaining time; in a file, a line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=done, unit="record", mininterval=interval, disable=not context.is_first)


def _report_routing(
    mixtral: Mixtral, folder: Path, trace: Path, sequences: Mapping[int, Ran], records: Sequence[PromptRecord]
) -> None:
    """Writes the report from the trace; collective."""
    context, layout = mixtral.model.context, mixtral.model.layout
    with context.agreed():
        if context.is_first:
            names = {sequence: _domain(records[ran.place]) for sequence, ran in sequences.items()}
            domains = names if set(names.values()) != {""} else None
            write_report(
                folder,
                RoutingTrace.load(trace),
                domains=domains and {sequence: name or "other" for sequence, name in domains.items()},
                shown=_shown(mixtral.tokenizer, sequences, records),
                plan=layout.plan if layout.parallel.experts == "ep" else None,
            )
            print(f"{folder} has the routing report", file=sys.stderr)


def _domain(record: PromptRecord) -> str:
    return str(record.more.get("domain", record.more.get("task", "")))


def _shown(tokenizer: Tokenizer, sequences: Mapping[int, Ran], records: Sequence[PromptRecord]) -> list[ShownSequence]:
    """The first records of each domain, one sequence each, cut to a page's length."""
    chosen: dict[int, tuple[int, Ran]] = {}
    taken: dict[str, int] = {}
    for sequence, ran in sorted(sequences.items(), key=lambda item: (item[1].place, item[0])):
        domain = _domain(records[ran.place])
        if ran.place not in chosen and taken.get(domain, 0) < SHOWN_RECORDS and len(ran.ids) <= SHOWN_TOKENS:
            taken[domain] = taken.get(domain, 0) + 1
            chosen[ran.place] = (sequence, ran)
    return [
        ShownSequence(sequence, token_texts(tokenizer, ran.ids), str(records[ran.place].id), ran.answer_from)
        for sequence, ran in chosen.values()
    ]


def _compare(folders: Sequence[Path], output: Path | None, overwrite: bool) -> None:
    if len(folders) != 2:
        raise ValueError(f"compare needs two folders of finished runs, not {len(folders)}")
    if output is not None and output.suffix != ".json":
        raise ValueError(f"output ({output}) must be a .json file with compare")
    check_free(output, overwrite)
    differences = comparison.compare(*folders)
    print(f"a: {folders[0]}\nb: {folders[1]}\n{comparison.table(differences)}")
    if output is not None:
        write_json(output, comparison.as_json(differences))
