"""``mixtralkit generate``: prompts to answers, printed or in a file that a stopped run goes on with."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixtralkit.cli.run import command
from mixtralkit.cli.running import UpdateOptions, WatchOptions, is_watched, requests_of, watched
from mixtralkit.config import EngineConfig, shipped
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.engine.requests import Completion
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.evaluation.prompt_sets import PromptRecord, ResultsWriter, read_prompts
from mixtralkit.evaluation.run_record import RunRecord, claim_output, facts_of_plan, fingerprint
from mixtralkit.mixtral import Mixtral, check_world_size, choose_dtype, open_source, with_weights


@command
def generate(
    prompts: Path = Path("examples"),
    output: Path | None = None,
    max_gen_len: Count = 128,
    stop: tuple[str, ...] = (),
    overwrite: bool = False,
    *,
    sampling: SamplingOptions,
    engine: EngineConfig,
    updates: UpdateOptions,
    watch: WatchOptions,
) -> None:
    """Continues prompts and prints them with the model's answers, or writes these to a file.

    Args:
        prompts: Prompts, .jsonl (an object with "prompt" or "messages" a line) or .txt (a prompt a line), or the name
            of a set in configs/prompts.
        output: Write results to this .jsonl, in the order of the prompts; a file that a stopped run left is continued.
        max_gen_len: Most tokens to generate for each prompt.
        stop: Texts that end an answer.
        overwrite: Replace the output where it is another run's or no run's.
    """
    context = RankContext.start(engine.limits.device)
    with context.agreed():
        engine.parallel.check_auto()
        check_world_size(context.world_size, engine.limits.num_gpus)
        records = read_prompts(shipped("prompts", prompts), context.world_size)
        source = open_source(engine.source)
        engine = with_weights(engine, source[0])
        requests, engine = requests_of(source, records, engine, max_gen_len, sampling, stop)
        answering = {**asdict(sampling), "max_gen_len": max_gen_len, "stop": stop, **engine.limits.formats}
        dtype = str(choose_dtype(engine.limits.dtype, context.device)).removeprefix("torch.")
        files = [path for part in source[0].found.files for path in part]
        facts = fingerprint(source[0].config, files, source[1], records, answering, dtype, engine.cache.max_seq_len)
    results = _Results(context, records, output, facts, overwrite)
    mixtral = Mixtral.load(engine, context, source, is_watched(context), hashes=results.needs_weights)
    results.confirm(mixtral)
    mixtral.engine.plan_manager = manager = updates.manager(mixtral, engine.parallel.hardware)
    with (
        watched(mixtral, watch, {"model": engine.source.model.name, "prompts": prompts.name}),
        results,
        _progress(context, len(requests), results.done, engine.limits.max_batch_size) as bar,
    ):
        for completion in mixtral.generate_many(requests[results.done :]):
            results.add(completion)
            bar.update()
    if manager is not None and context.is_first:
        print(manager.statistics, file=sys.stderr)
    mixtral.close()


class _Results:
    """Prints finished answers, or writes them to the output file, in the order of the prompts; rank 0 does."""

    def __init__(
        self,
        context: RankContext,
        records: list[PromptRecord],
        output: Path | None,
        facts: dict[str, Any],
        overwrite: bool = False,
    ) -> None:
        self._context, self._records = context, records
        self._held: dict[int, Completion] = {}
        self._writer: ResultsWriter | None = None
        self._record: RunRecord | None = None
        with context.agreed():
            if output is not None and context.is_first:
                self._record = claim_output(output, facts, overwrite)
                self._writer = ResultsWriter(output, records)
        wanted = self._record is not None and self._record.needs_weights
        done = self._writer.done if self._writer else 0
        self.done, self.needs_weights = context.broadcast_object((done, wanted))
        if self.done and context.is_first:
            print(f"{output} already has {self.done} of {len(records)} results", file=sys.stderr)

    def confirm(self, mixtral: Mixtral) -> None:
        """Says which weights and plan run; an error where the output is of others. Collective."""
        model, context = mixtral.model, self._context
        with context.agreed():
            if self._record is not None:
                layout, dtype = model.layout, str(model.dtype)[6:]
                batch = model.params.max_batch_size
                placed = facts_of_plan(layout.plan, context.world_size, layout.parallel.attention, batch, dtype)
                self._record.confirm(mixtral.weight_hash, **placed)

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer:
            self._writer.close()

    def add(self, completion: Completion) -> None:
        """Takes an answer; every rank calls this, so that a full disk on rank 0 stops all of them."""
        with self._context.agreed():
            if self._writer:
                self._writer.add(completion.id, _result(completion))
            elif self._context.is_first:
                self._held[completion.id] = completion
                while self.done in self._held:
                    _print_block(self._records[self.done], self._held.pop(self.done))
                    self.done += 1


def _result(completion: Completion) -> dict[str, Any]:
    return {
        "generation": completion.text,
        "tokens": completion.tokens,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }


def _print_block(record: PromptRecord, completion: Completion) -> None:
    prompt = record.prompt
    if not isinstance(prompt, str) and len(prompt) == 1:
        prompt = prompt[0]["content"]
    elif not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    line = "=" * 30
    tqdm.write(f"{line}Example START{line}\n\n[Prompt]:\n{prompt}\n\n[Response]:\n{completion.text}\n")
    tqdm.write(f"{line}Example END{line}\n")
    sys.stdout.flush()


def _progress(context: RankContext, total: int, done: int, max_batch_size: int) -> tqdm:
    """A bar on rank 0's stderr, where somebody watches or there is more than one batch."""
    shown = context.is_first and (sys.stderr.isatty() or total > max_batch_size)
    return tqdm(total=total, initial=done, unit="prompt", disable=not shown)
