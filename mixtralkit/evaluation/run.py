"""A run: a model answers a prompt set, line by line into a folder, goes on after a stop, and is summed up.

The folder holds ``run.json`` (what decides the results), ``results.jsonl`` (a line a record, in the set's order) and,
once all are there, ``summary.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mixtralkit.distributed import RankContext
from mixtralkit.engine.requests import Completion
from mixtralkit.evaluation.likelihood import Ids
from mixtralkit.evaluation.prompt_sets import PromptRecord, ResultsWriter
from mixtralkit.evaluation.run_record import RunRecord, write_json
from mixtralkit.evaluation.summary import Measure, Row, as_json, summarise
from mixtralkit.evaluation.work import AnswerOptions, Work
from mixtralkit.json_file import conform, parse_json
from mixtralkit.mixtral import Mixtral

RUN, RESULTS, SUMMARY = "run.json", "results.jsonl", "summary.json"
# Records that are sorted and run together: batches of them are full but for the last, and a stop costs no more.
CHUNK_BATCHES, SMALLEST_CHUNK = 16, 64
_MANY_SEQUENCES = 100  # of one record, from which on the bar counts them


class Results:
    """Takes results on rank 0, into a folder or into memory alone. Every rank makes the same calls.

    A folder with the beginning of this very run is continued: ``done`` says on every rank how many results it has.
    Nothing is written before ``confirm``, and nothing of another run is ever touched.

    Args:
        run: what decides the results (``run_record.fingerprint``).
        overwrite: throws away another run's files that are in the folder.
    """

    def __init__(
        self,
        context: RankContext,
        records: Sequence[PromptRecord],
        folder: Path | None,
        run: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self._context, self._records, self._folder = context, records, folder
        self._rows: dict[int, Row] = {}
        self._writer: ResultsWriter | None = None
        self._record: RunRecord | None = None
        with context.agreed():
            if folder is not None and context.is_first:
                self._record = _claim(folder, run, overwrite)
                self._writer = ResultsWriter(folder / RESULTS, records)
                self._rows = dict(enumerate(read_rows(folder / RESULTS, self._writer.done)))
        wanted = self._record is not None and self._record.needs_weights
        self.done, self.needs_weights = context.broadcast_object((len(self._rows), wanted))

    def confirm(self, weights: str | None = None) -> None:
        """Says the hash of the weights that run; ValueError where the folder's results are another model's. Collective.

        ``add`` and ``finish`` do it without a hash, for callers that know none.
        """
        with self._context.agreed():
            if self._record is not None:
                self._record.confirm(weights)
        self.needs_weights = False

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
        if self.needs_weights:
            self.confirm()
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
        if self.needs_weights:
            self.confirm()
        with self._context.agreed():
            if self._context.is_first:
                measures = summarise([self._rows[place] for place in range(len(self._records))])
                if self._folder is not None:
                    write_json(self._folder / SUMMARY, {"records": len(self._records), **as_json(measures)})
        return measures


def _claim(folder: Path, run: Mapping[str, Any], overwrite: bool) -> RunRecord:
    """The folder's record, of this run or still to be written; ValueError where the folder is anybody else's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made a folder ({error.strerror})") from None
    if overwrite and (folder / RUN).exists():
        for name in (RUN, RESULTS, SUMMARY):
            (folder / name).unlink(missing_ok=True)
    advice = "name another output folder, or replace it with --overwrite"
    if not (folder / RUN).exists():
        held = sorted(path.name for path in folder.iterdir() if path.name != RESULTS or path.stat().st_size)
        if held:
            raise ValueError(f"{folder}: has {held[0]} but no {RUN} that says of what; name another output folder")
    return RunRecord(folder / RUN, run, folder, advice)


def read_rows(path: Path, count: int | None = None) -> list[Row]:
    """What counts of the first ``count`` lines of results (None: of all); ValueError names file and line."""
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if count is not None and number > count:
                    break
                try:
                    rows.append(Row.of(conform(parse_json(line), dict)))
                except ValueError:
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
    mixtral.engine.forget_prefixes()  # so that a chunk is the same to the bit, whatever ran before
    for done in mixtral.generate_many(requests):
        place = owner[done.id]
        work = works[place]
        ran[done.id] = Ran(place, *work.ran(done.id - first_ids[place], done))
        found[place][done.id] = done
        if len(found[place]) == len(work.sequences):
            completions = [one for _, one in sorted(found.pop(place).items())]
            results.add(place, lambda work=work, done=completions: work.result(mixtral, done))
            bar.update()
        elif len(work.sequences) >= _MANY_SEQUENCES:
            bar.set_postfix_str(f"{len(found[place])} of {len(work.sequences)} choices")
    return ran
