"""A run: a model answers a prompt set, line by line into a folder, goes on after a stop, and is summed up.

The folder holds ``run.json`` (what decides the results), ``results.jsonl`` (a line a record, in the set's order) and,
once all are there, ``summary.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mixtralkit.config import ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.requests import Completion
from mixtralkit.evaluation.likelihood import Ids
from mixtralkit.evaluation.prompt_sets import PromptRecord, ResultsWriter
from mixtralkit.evaluation.summary import Measure, Row, as_json, summarise
from mixtralkit.evaluation.work import AnswerOptions, Work
from mixtralkit.mixtral import Mixtral
from mixtralkit.planning.plan import ExpertPlan

FORMAT = 1
RUN, RESULTS, SUMMARY = "run.json", "results.jsonl", "summary.json"
# Records that are sorted and run together: batches of them are full but for the last, and a stop costs no more.
CHUNK_BATCHES, SMALLEST_CHUNK = 16, 64
_END_BYTES = 1 << 16  # of a weight file, from each end: its headers, and in a .pth the tensors' checksums


def fingerprint(
    config: ModelConfig,
    weights: Sequence[Path],
    tokenizer: Path,
    prompts: Path,
    options: AnswerOptions,
    dtype: str,
    max_seq_len: int,
    cut: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What decides a run's results, as JSON values without machine paths.

    The number of ranks, the plan and the batch size are not in it: they do not change results (in float32; rounding
    aside). Only where a capacity below the need may drop rows do they, and then ``cut`` (``what_cuts``) has them.
    """
    model = {"config": _limitless(config), "files": [_file_mark(path) for path in weights]}
    chosen = {**asdict(options), "max_seq_len": max_seq_len, "dtype": dtype}
    facts = {"model": model, "tokenizer": _digest(tokenizer), "prompts": _digest(prompts), "options": chosen}
    return json.loads(json.dumps({"format": FORMAT, **facts, "capacity": cut}))


def what_cuts(plan: ExpertPlan, world_size: int, attention: str, max_batch_size: int) -> dict[str, Any] | None:
    """What decides which rows a plan with a capacity drops; None for a plan without."""
    if plan.cold_capacity_factor is None:
        return None
    return {
        "plan": hashlib.sha256(json.dumps(plan.slots_LWS.tolist()).encode()).hexdigest(),
        "cold_capacity_factor": plan.cold_capacity_factor,
        "cold_token_percent": plan.cold_token_percent,
        "overflow": plan.overflow,
        "cut_order": plan.cut_order,
        "ranks": world_size,
        "attention": attention,
        "max_batch_size": max_batch_size,
    }


def _limitless(config: ModelConfig) -> dict[str, Any]:
    """The model's numbers without those that a caller chooses."""
    return {name: value for name, value in asdict(config).items() if name not in ("max_seq_len", "max_batch_size")}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _file_mark(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read())
    return {"name": path.name, "bytes": size, "sha256_of_ends": digest.hexdigest()}


class Results:
    """Takes results on rank 0, into a folder or into memory alone. Every rank makes the same calls.

    A folder with the beginning of this very run is continued: ``done`` says on every rank how many results it has.
    """

    def __init__(
        self, context: RankContext, records: Sequence[PromptRecord], folder: Path | None, run: Mapping[str, Any]
    ) -> None:
        self._context, self._records, self._folder = context, records, folder
        self._rows: dict[int, Row] = {}
        self._writer: ResultsWriter | None = None
        with context.agreed():
            if folder is not None and context.is_first:
                _claim(folder, run)
                self._writer = ResultsWriter(folder / RESULTS, records)
                self._rows = dict(enumerate(read_rows(folder / RESULTS, self._writer.done)))
        self.done: int = context.broadcast_object(len(self._rows))

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()

    @property
    def is_complete(self) -> bool:
        return self.done == len(self._records)

    def add(self, place: int, make_result: Callable[[], dict[str, Any]]) -> None:
        """Takes the result of record ``place``, made on rank 0; one that is there already stays. Collective, so that
        a full disk or a score that cannot be made stops every rank."""
        with self._context.agreed():
            if not self._context.is_first or place < self.done:
                return
            result = make_result()
            record = self._records[place]
            self._rows[place] = Row.of({**record.more, **result, "id": record.id})
            if self._writer is not None:
                self._writer.add(place, result)

    def finish(self) -> list[Measure]:
        """The summary, which the folder gets too; on rank 0, elsewhere empty. Collective."""
        measures: list[Measure] = []
        with self._context.agreed():
            if self._context.is_first:
                measures = summarise([self._rows[place] for place in range(len(self._records))])
                if self._folder is not None:
                    write_json(self._folder / SUMMARY, {"records": len(self._records), **as_json(measures)})
        return measures


def _claim(folder: Path, run: Mapping[str, Any]) -> None:
    """Makes the folder this run's, or ValueError where it is another's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made a folder ({error.strerror})") from None
    if (folder / RUN).exists():
        difference = _difference(read_json(folder / RUN), run)
        if difference:
            raise ValueError(f"{folder}: holds a run of {difference}; name another output folder, or remove this one")
        return
    if (folder / RESULTS).exists():
        raise ValueError(f"{folder}: has {RESULTS} but no {RUN} that says of what; name another output folder")
    write_json(folder / RUN, run)


def _difference(old: Any, new: Mapping[str, Any]) -> str:
    """How a found run differs from the wanted one, in words; empty where it does not."""
    if not isinstance(old, dict) or old.get("format") != new["format"]:
        return "another format"
    for name, words in (("model", "another model"), ("tokenizer", "another tokenizer"), ("prompts", "another set")):
        if old.get(name) != new[name]:
            return words
    for part in ("options", "capacity"):
        before, now = old.get(part) or {}, new[part] or {}
        for name in dict.fromkeys((*now, *before)):
            if before.get(name) != now.get(name):
                return f"another setting: {name} was {before.get(name)!r}, is {now.get(name)!r}"
    return ""


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError names it."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{path}: is not JSON") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None


def read_rows(path: Path, count: int | None = None) -> list[Row]:
    """What counts of the first ``count`` lines of results (None: of all); ValueError names file and line."""
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if count is not None and number > count:
                    break
                try:
                    rows.append(Row.of(json.loads(line)))
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"{path}, line {number}: is not a scored result") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return rows


@dataclass(frozen=True)
class Ran:
    """A sequence that ran: the place of its record, its token ids, and where in them an answer or a choice begins."""

    place: int
    ids: Ids
    answer_from: int | None


def run(
    mixtral: Mixtral,
    works: Sequence[Work],
    options: AnswerOptions,
    results: Results,
    bar: tqdm,
    repeat: bool = False,
    chunk: int | None = None,
) -> dict[int, Ran]:
    """Answers what has no result yet, and gives each answer to ``results``. Collective.

    Records run in chunks, the longest of a chunk first. A run that goes on begins with the chunk it was stopped in, so
    every batch is the one of an unbroken run, and every bit of its results too.

    Args:
        bar: moves by one for each record that was run.
        repeat: run the records that have results as well, for what else the run is watched for.
        chunk: records of a chunk; None for ``CHUNK_BATCHES`` batches.

    Returns:
        What ran, by sequence as an engine's observer and so a routing trace numbers them.
    """
    if results.is_complete and not repeat:
        return {}
    size = chunk or max(SMALLEST_CHUNK, CHUNK_BATCHES * mixtral.model.params.max_batch_size)
    first_ids = [0, *accumulate(len(work.sequences) for work in works)]
    sequences: dict[int, Ran] = {}
    sequences_before = 0
    for begin in range(0 if repeat else results.done // size * size, len(works), size):
        places = range(begin, min(begin + size, len(works)))
        bar.update(begin - bar.n)
        ran = _run_chunk(mixtral, works, places, first_ids, options, results, bar)
        sequences.update({sequences_before + id: one for id, one in ran.items()})
        sequences_before += max(ran) + 1
    return sequences


def _run_chunk(
    mixtral: Mixtral,
    works: Sequence[Work],
    places: Sequence[int],
    first_ids: Sequence[int],
    options: AnswerOptions,
    results: Results,
    bar: tqdm,
) -> dict[int, Ran]:
    """What ran, by id of the request."""
    requests = [request for place in places for request in works[place].requests(mixtral, first_ids[place], options)]
    requests.sort(key=lambda request: (-len(request.prompt) - request.max_gen_len, request.id))
    owner = {id: place for place in places for id in range(first_ids[place], first_ids[place + 1])}
    found: dict[int, dict[int, Completion]] = {place: {} for place in places}
    ran: dict[int, Ran] = {}
    for event in mixtral.engine.run(requests):
        if event.completion is None:
            continue
        place = owner[event.id]
        work = works[place]
        ran[event.id] = Ran(place, *work.ran(event.id - first_ids[place], event.completion))
        found[place][event.id] = event.completion
        if len(found[place]) == len(work.sequences):
            completions = [done for _, done in sorted(found.pop(place).items())]
            results.add(place, lambda work=work, done=completions: work.result(mixtral, done))
            bar.update()
    return ran
