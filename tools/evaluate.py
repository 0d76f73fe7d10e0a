"""Scores a model on a prompt set: ``python tools/evaluate.py -m ckpts --prompts SET.jsonl --output RUN``.

On several ranks: ``torchrun --standalone --nproc_per_node=4 tools/evaluate.py -m ckpts --prompts SET.jsonl``. Two runs
of a set: ``python tools/evaluate.py --compare RUN_A RUN_B``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.cli import run_tool, with_fields
from mixtralkit.config import ModelConfig
from mixtralkit.distributed import RankContext, rank_of
from mixtralkit.engine.generation import PREFILL_BUDGET
from mixtralkit.engine.recorder import RoutingRecorder, together
from mixtralkit.engine.statistics import MoEStatistics
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation import compare as comparison
from mixtralkit.evaluation import summary
from mixtralkit.evaluation.prompt_sets import PromptRecord, read_prompts
from mixtralkit.evaluation.routing_html import ShownSequence, token_texts
from mixtralkit.evaluation.routing_report import check_report, write_report
from mixtralkit.evaluation.run import Ran, Results, fingerprint, run, write_json
from mixtralkit.evaluation.run_record import facts_of_plan
from mixtralkit.evaluation.work import AnswerOptions, Work, make_works
from mixtralkit.mixtral import Mixtral, check_world_size, choose_dtype, choose_layout
from mixtralkit.options import ModelOptions
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.version import __version__

LONGEST_WINDOW = 1024  # tokens of a piece of a text, where nobody asked for more
SHOWN_RECORDS, SHOWN_TOKENS = 3, 600  # of each domain, with their tokens coloured


@with_fields(running=ModelOptions)
def evaluate(
    prompts: Path | None = None,
    model: Path = Path("ckpts"),
    tokenizer: Path | None = None,
    output: Path | None = None,
    routing_report: Path | None = None,
    compare: tuple[Path, ...] = (),
    max_gen_len: int = 256,
    max_seq_len: int | None = None,
    max_batch_size: int = 16,
    window: int | None = None,
    text_context: int | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 1,
    stop: tuple[str, ...] = (),
    *,
    running: ModelOptions,
    cold_capacity_factor: float | None = None,
    overflow: str | None = None,
    cut_order: str | None = None,
    moe_report: bool = False,
    num_gpus: int | None = None,
) -> None:
    """Scores a model on a prompt set and prints a table with confidence intervals, or compares two such runs.

    Args:
        prompts: The set, .jsonl: a record a line with target and metric, choices and answer, or text
            (docs/evaluation.md).
        model: Folder with the checkpoint, of any format that docs/checkpoints.md lists.
        tokenizer: Sentencepiece model; left out, tokenizer.model in the model's folder.
        output: Folder for run.json, results.jsonl and summary.json; one that a stopped run left is continued. With
            compare, a .json file for the comparison.
        routing_report: Folder for a report on which experts the tokens took; runs the whole set, also where results
            are there already.
        compare: Two folders of finished runs of one set; nothing is run then.
        max_gen_len: Most tokens of a generation, where the record does not say.
        max_seq_len: Most tokens of a prompt with its answer; left out, what the set needs and the model can.
        max_batch_size: Sequences that run at a time.
        window: Most tokens of a piece of a text, context and scored ones; left out, 1024 or what the model can.
        text_context: Fewest tokens of context of each scored token, where the text has as many; left out, half the
            window.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from this many likeliest tokens; 0 is all.
        min_p: Draw from tokens with at least this share of the likeliest one's probability.
        seed: The same seed gives the same text.
        stop: Texts that end a generation, beside a record's own.
        cold_capacity_factor: Rows that a cold expert takes, as a multiple of its even share; left out, the plan's.
        overflow: What becomes of the others, drop or reroute; left out, the plan's.
        cut_order: Which rows these are: weight keeps the heaviest choices, arrival the first; left out, the plan's.
        moe_report: Print what each layer routed, dropped, sent and shadowed at the end.
        num_gpus: The number of ranks, for scripts that state it; torchrun decides it.
    """
    if compare:
        if rank_of() == 0:
            _compare(compare, output)
        return
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size ({max_batch_size}) must be at least 1")
    moe = running.moe()
    context = RankContext.start(running.device)
    with context.agreed():
        if prompts is None:
            raise ValueError("prompts is missing: the set to score, a .jsonl file (or --compare RUN_A RUN_B)")
        check_world_size(context.world_size, num_gpus=num_gpus)
        records = read_prompts(prompts, context.world_size)
        reader = open_checkpoint(model)
        sp = Tokenizer.beside(model, tokenizer, reader.config.vocab_size)
        sp.check_vocabulary(reader.config.vocab_size)
        options = _answer_options(
            reader.config, max_seq_len, window, text_context,
            max_gen_len=max_gen_len, stop=tuple(stop), temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            seed=seed,
        )  # fmt: skip
        works = make_works(records, prompts, sp, options)
        if max_seq_len is None:
            max_seq_len = min(reader.config.max_seq_len, max(work.longest for work in works))
        for work in works:
            work.check(max_seq_len)
        dtype = choose_dtype(running.dtype, context.device)
    automatic = running.automatic().resolved(context, dtype, PREFILL_BUDGET)
    with context.agreed():
        config = reader.config.with_limits(max_seq_len, max_batch_size)
        layout = choose_layout(config, context, running.attention, running.experts, running.plan, moe, automatic)
        changes = {"cold_capacity_factor": cold_capacity_factor, "overflow": overflow, "cut_order": cut_order}
        placed = replace(layout.plan, **{name: value for name, value in changes.items() if value is not None})
        facts = fingerprint(
            reader.config, [path for part in reader.found.files for path in part], sp, records, asdict(options),
            str(dtype).removeprefix("torch."), max_seq_len,
            facts_of_plan(placed, context.world_size, layout.parallel.attention, max_batch_size, str(dtype)[6:]),
        )  # fmt: skip
        if routing_report is not None and context.is_first:
            check_report(routing_report)
    with Results(context, records, output, facts) as results:
        if context.is_first and results.done:
            print(f"{output} already has {results.done} of {len(records)} results", file=sys.stderr)
        if not results.is_complete or results.needs_weights or routing_report is not None:
            mixtral = Mixtral.load(
                reader, sp, context, max_seq_len, max_batch_size, seed,
                dtype=dtype, **asdict(layout.parallel), plan=placed, options=moe,
                progress=context.is_first and sys.stderr.isatty(), hashes=results.needs_weights,
            )  # fmt: skip
            results.confirm(mixtral.weight_hash)
            meta = {"model": model.name, "prompts": prompts.name, "version": __version__}
            _answer(mixtral, records, works, options, results, moe_report, routing_report, meta)
        measures = results.finish()
    if context.is_first:
        print(summary.table(measures))
        if any(work.question.kind == "text" for work in works):
            print(f"texts in windows of {options.window} tokens, at least {options.context} of them context")
    context.stop()


def _answer(
    mixtral: Mixtral,
    records: Sequence[PromptRecord],
    works: Sequence[Work],
    options: AnswerOptions,
    results: Results,
    moe_report: bool,
    routing_report: Path | None,
    meta: Mapping[str, str],
) -> None:
    """Runs what has no results, or everything for a routing report, and writes that."""
    is_cut = mixtral.model.layout.plan.cold_capacity_factor is not None
    statistics = MoEStatistics(mixtral.model) if moe_report or is_cut else None
    with (
        _recording(mixtral, statistics, routing_report, meta),
        _progress(mixtral.model.context, len(records), results.done) as bar,
    ):
        sequences = run(mixtral, works, options, results, bar, repeat=routing_report is not None)
    _report_layers(statistics)
    if routing_report is not None:
        _report_routing(mixtral, routing_report, sequences, records)


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


@contextlib.contextmanager
def _recording(
    mixtral: Mixtral, statistics: MoEStatistics | None, folder: Path | None, meta: Mapping[str, str]
) -> Iterator[None]:
    """Inside it the engine counts, and records a trace where a report is wanted."""
    mixtral.engine.observe = statistics
    if folder is None:
        yield
        return
    with RoutingRecorder(mixtral.model, folder / "trace.npz", meta) as recorder:
        mixtral.engine.observe = together(statistics, recorder)
        yield


def _progress(context: RankContext, total: int, done: int) -> tqdm:
    """A bar on rank 0's stderr with rate and remaining time; in a file, a line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=done, unit="record", mininterval=interval, disable=not context.is_first)


def _report_layers(statistics: MoEStatistics | None) -> None:
    if statistics is not None:
        table = statistics.table()
        if statistics.context.is_first:
            print(table, file=sys.stderr)


def _report_routing(
    mixtral: Mixtral, folder: Path, sequences: Mapping[int, Ran], records: Sequence[PromptRecord]
) -> None:
    """Writes the report from the trace; collective."""
    context, layout = mixtral.model.context, mixtral.model.layout
    with context.agreed():
        if context.is_first:
            names = {sequence: _domain(records[ran.place]) for sequence, ran in sequences.items()}
            domains = names if set(names.values()) != {""} else None
            write_report(
                folder,
                RoutingTrace.load(folder / "trace.npz"),
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


def _compare(folders: Sequence[Path], output: Path | None) -> None:
    if len(folders) != 2:
        raise ValueError(f"compare needs two folders of finished runs, not {len(folders)}")
    if output is not None and output.suffix != ".json":
        raise ValueError(f"output ({output}) must be a .json file with compare")
    differences = comparison.compare(*folders)
    print(f"a: {folders[0]}\nb: {folders[1]}\n{comparison.table(differences)}")
    if output is not None:
        write_json(output, comparison.as_json(differences))


if __name__ == "__main__":
    run_tool(evaluate, short={"m": "model", "t": "tokenizer"})
