"""Continues prompts, or chats, with any Mixtral checkpoint: ``python tools/example.py -m ckpts``.

On several ranks: ``torchrun --standalone --nproc_per_node=4 tools/example.py -m ckpts -t ckpts/tokenizer.model``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.cli import run_tool, with_fields
from mixtralkit.distributed import RankContext
from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.plan_policies import make_policy
from mixtralkit.engine.recorder import RoutingRecorder, together
from mixtralkit.engine.requests import Completion, Request, check_prompt
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.statistics import MoEStatistics
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation.prompt_sets import PromptRecord, ResultsWriter, read_prompts
from mixtralkit.evaluation.run_record import RunRecord, claim_output, facts_of_plan, fingerprint
from mixtralkit.mixtral import Mixtral, check_world_size, choose_dtype, encode_prompt
from mixtralkit.options import ModelOptions
from mixtralkit.planning.hardware import Hardware
from mixtralkit.terminal import Session
from mixtralkit.version import __version__

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXAMPLES, MACHINES = CONFIGS / "prompts" / "examples.jsonl", CONFIGS / "hardware"
LONGEST_CHAT = 8192  # tokens, where the model could do more and nobody asked for it
CHAT_TIMEOUT_S = 30 * 24 * 3600.0  # ranks wait for a person


@with_fields(running=ModelOptions)
def generate(
    model: Path = Path("ckpts"),
    tokenizer: Path | None = None,
    prompts: Path | None = None,
    output: Path | None = None,
    max_gen_len: int = 128,
    max_seq_len: int | None = None,
    max_batch_size: int = 8,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 1,
    stop: tuple[str, ...] = (),
    *,
    running: ModelOptions,
    moe_report: bool = False,
    update_step: int | None = None,
    policy: str = "balanced",
    slots_per_rank: int | None = None,
    hot_experts: int | None = None,
    record_routing: Path | None = None,
    num_gpus: int | None = None,
) -> None:
    """Continues prompts and prints them with the model's answers, or writes these to a file.

    Args:
        model: Folder with the checkpoint, of any format that docs/checkpoints.md lists.
        tokenizer: Sentencepiece model; left out, tokenizer.model in the model's folder.
        prompts: Prompts, .jsonl (an object with "prompt" or "messages" a line) or .txt (a prompt a line); left out,
            three examples.
        output: Write results to this .jsonl, in the order of the prompts; a file that a stopped run left is continued.
        max_gen_len: Most tokens to generate for each prompt.
        max_seq_len: Most tokens of a prompt with its answer; left out, what the prompts need and the model can.
        max_batch_size: Prompts that run at a time.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from this many likeliest tokens; 0 is all.
        min_p: Draw from tokens with at least this share of the likeliest one's probability.
        seed: The same seed gives the same text.
        stop: Texts that end an answer.
        moe_report: Print what each layer routed, dropped, sent and shadowed at the end.
        update_step: Make a new plan every so many steps from the loads that were seen, and move experts where that
            pays (docs/plan-manager.md).
        policy: What makes it: contiguous, hot_cold, two_phase, balanced, shadow or auto.
        slots_per_rank: Most experts of a rank in each layer of such a plan; left out, as many as the first plan has.
        hot_experts: Experts of each layer that hot_cold puts on every rank.
        record_routing: Write the experts that every token took to this trace, .npz (docs/traces.md).
        num_gpus: The number of ranks, for scripts that state it; torchrun decides it.
    """
    sampling = SamplingOptions(temperature, top_p, top_k, min_p, seed)
    _check(max_gen_len, max_seq_len, max_batch_size)
    context = RankContext.start(running.device)
    with context.agreed():
        check_world_size(context.world_size, num_gpus=num_gpus)
        records = read_prompts(EXAMPLES if prompts is None else prompts, context.world_size)
        reader = open_checkpoint(model)
        sp = Tokenizer.beside(model, tokenizer, reader.config.vocab_size)
        sp.check_vocabulary(reader.config.vocab_size)
        requests = _requests(sp, records, max_gen_len, sampling, stop)
        needed = max(len(request.prompt) + request.max_gen_len for request in requests)
        max_seq_len = min(reader.config.max_seq_len, needed) if max_seq_len is None else max_seq_len
        for request in requests:
            check_prompt(request.id, request.prompt, max_seq_len, reader.config.vocab_size)
        kind = str(choose_dtype(running.dtype, context.device)).removeprefix("torch.")
        facts = fingerprint(
            reader.config, [path for part in reader.found.files for path in part], sp,
            records,
            {**asdict(sampling), "max_gen_len": max_gen_len, "stop": stop}, kind, max_seq_len,
        )  # fmt: skip
    results = _Results(context, records, output, facts)
    mixtral = Mixtral.load(
        reader, sp, context, max_seq_len, max_batch_size, seed,
        progress=_is_watched(context), hashes=results.needs_weights, **running.load_arguments(),
    )  # fmt: skip
    results.confirm(mixtral)
    statistics = _statistics(mixtral, moe_report)
    mixtral.engine.plan_manager = _plan_manager(
        mixtral, update_step, policy, slots_per_rank, hot_experts, running.hardware
    )
    waiting = requests[results.done :]
    with (
        _recording(mixtral, statistics, record_routing, model, prompts),
        results,
        _progress(context, len(requests), results.done, max_batch_size) as bar,
    ):
        for event in mixtral.engine.run(waiting):
            if event.completion is not None:
                results.add(event.completion)
                bar.update()
    _report(statistics, mixtral.engine.plan_manager)
    mixtral.close()


@with_fields(running=ModelOptions)
def chat(
    model: Path = Path("ckpts"),
    tokenizer: Path | None = None,
    system: str | None = None,
    max_gen_len: int = 512,
    max_seq_len: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 1,
    *,
    running: ModelOptions,
    moe_report: bool = False,
    update_step: int | None = None,
    policy: str = "balanced",
    slots_per_rank: int | None = None,
    hot_experts: int | None = None,
    record_routing: Path | None = None,
) -> None:
    """Talks with the model, in Mistral's chat template.

    A line is a turn, from a terminal or a pipe; /reset forgets, /quit or Ctrl-D leaves, Ctrl-C ends an answer.

    Args:
        model: Folder with the checkpoint, of any format that docs/checkpoints.md lists.
        tokenizer: Sentencepiece model; left out, tokenizer.model in the model's folder.
        system: Instruction that goes before the first question.
        max_gen_len: Most tokens of an answer.
        max_seq_len: Most tokens of the whole conversation; older turns are left out beyond it.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from this many likeliest tokens; 0 is all.
        min_p: Draw from tokens with at least this share of the likeliest one's probability.
        seed: The same seed and the same conversation give the same text.
        moe_report: Print what each layer routed, dropped, sent and shadowed at the end.
        update_step: Make a new plan every so many steps from the loads that were seen, and move experts where that
            pays (docs/plan-manager.md).
        policy: What makes it: contiguous, hot_cold, two_phase, balanced, shadow or auto.
        slots_per_rank: Most experts of a rank in each layer of such a plan; left out, as many as the first plan has.
        hot_experts: Experts of each layer that hot_cold puts on every rank.
        record_routing: Write the experts that every token took to this trace, .npz (docs/traces.md).
    """
    sampling = SamplingOptions(temperature, top_p, top_k, min_p, seed)
    _check(max_gen_len, max_seq_len, 1)
    context = RankContext.start(running.device, timeout_s=CHAT_TIMEOUT_S)
    with context.agreed():
        reader = open_checkpoint(model)
        sp = Tokenizer.beside(model, tokenizer, reader.config.vocab_size)
        max_seq_len = min(reader.config.max_seq_len, LONGEST_CHAT) if max_seq_len is None else max_seq_len
    mixtral = Mixtral.load(
        reader, sp, context, max_seq_len, 1, seed,
        progress=_is_watched(context), **running.load_arguments(),
    )  # fmt: skip
    statistics = _statistics(mixtral, moe_report)
    mixtral.engine.plan_manager = _plan_manager(
        mixtral, update_step, policy, slots_per_rank, hot_experts, running.hardware
    )
    with (
        _recording(mixtral, statistics, record_routing, model),
        Session(context.rank, context.world_size) as session,
    ):
        _converse(mixtral, session, system, max_gen_len, sampling)
    _report(statistics, mixtral.engine.plan_manager)
    mixtral.close()


def _check(max_gen_len: int, max_seq_len: int | None, max_batch_size: int) -> None:
    """Says what is wrong with the options before anything is loaded."""
    for name, value in (
        ("max_gen_len", max_gen_len),
        ("max_seq_len", max_seq_len),
        ("max_batch_size", max_batch_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


def _statistics(mixtral: Mixtral, wanted: bool) -> MoEStatistics | None:
    """Counts what the layers do, where somebody asked for it or rows may be dropped."""
    is_needed = wanted or mixtral.model.layout.plan.cold_capacity_factor is not None
    return MoEStatistics(mixtral.model) if is_needed else None


@contextlib.contextmanager
def _recording(
    mixtral: Mixtral,
    statistics: MoEStatistics | None,
    record_routing: Path | None,
    model: Path,
    prompts: Path | None = None,
) -> Iterator[None]:
    """Inside it the engine counts, and writes the trace where one is wanted."""
    mixtral.engine.observe = statistics
    if record_routing is None:
        yield
        return
    meta = {"model": model.name, "prompts": prompts and prompts.name, "version": __version__}
    with RoutingRecorder(mixtral.model, record_routing, meta) as recorder:
        mixtral.engine.observe = together(statistics, recorder)
        yield


def _plan_manager(
    mixtral: Mixtral,
    update_step: int | None,
    policy: str,
    slots_per_rank: int | None,
    hot_experts: int | None,
    hardware: Path | None,
) -> PlanManager | None:
    """What makes new plans between steps, where that is wanted."""
    if update_step is None:
        return None
    model, context = mixtral.model, mixtral.model.context
    if hardware is None:
        hardware = MACHINES / ("h200.json" if context.device.type == "cuda" else "cpu-2core.json")
    with context.agreed():
        judge = MoveJudge.for_model(model, Hardware.load(hardware), update_step)
        make_plan = make_policy(policy, model, judge, slots_per_rank, hot_experts)
    return PlanManager(model, make_plan, update_step, judge)


def _report(statistics: MoEStatistics | None, plan_manager: PlanManager | None) -> None:
    if statistics is not None:
        table = statistics.table()
        if statistics.context.is_first:
            print(table, file=sys.stderr)
    if plan_manager is not None and plan_manager.context.is_first:
        print(plan_manager.statistics, file=sys.stderr)


def _requests(
    tokenizer: Tokenizer,
    records: list[PromptRecord],
    max_gen_len: int,
    sampling: SamplingOptions,
    stop: tuple[str, ...],
) -> list[Request]:
    requests = []
    for i, record in enumerate(records):
        length = max_gen_len if record.max_gen_len is None else record.max_gen_len
        requests.append(Request(i, encode_prompt(tokenizer, i, record.prompt), length, sampling, stop))
    return requests


class _Results:
    """Prints finished answers, or writes them to the output file, in the order of the prompts; rank 0 does."""

    def __init__(
        self, context: RankContext, records: list[PromptRecord], output: Path | None, facts: dict[str, Any]
    ) -> None:
        self._context, self._records = context, records
        self._held: dict[int, Completion] = {}
        self._writer: ResultsWriter | None = None
        self._record: RunRecord | None = None
        with context.agreed():
            if output is not None and context.is_first:
                self._record = claim_output(output, facts)
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


def _is_watched(context: RankContext) -> bool:
    return context.is_first and sys.stderr.isatty()


def _progress(context: RankContext, total: int, done: int, max_batch_size: int) -> tqdm:
    """A bar on rank 0's stderr, where somebody watches or there is more than one batch."""
    shown = context.is_first and (sys.stderr.isatty() or total > max_batch_size)
    return tqdm(total=total, initial=done, unit="prompt", disable=not shown)


def _converse(
    mixtral: Mixtral, session: Session, system: str | None, max_gen_len: int, sampling: SamplingOptions
) -> None:
    """Turns until the input ends; rank 0 reads and prints, the others follow."""
    context = mixtral.model.context
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        line = context.broadcast_object(session.read_line("> ") if context.is_first else None)
        if line is None or line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            messages = list(start)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        ids = _fitting(mixtral, messages, len(start), max_gen_len, context.is_first)
        if ids is None:
            messages.pop()
            continue
        answer = ""
        request = Request(0, ids, max_gen_len, sampling)
        for event in mixtral.engine.run([request], should_stop=session.interrupted):
            answer += event.text
            if context.is_first:
                print(event.text + ("\n" if event.finish_reason else ""), end="", flush=True)
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()


def _fitting(
    mixtral: Mixtral, messages: list[dict[str, str]], start: int, max_gen_len: int, speaks: bool
) -> tuple[int, ...] | None:
    """Token ids of the conversation, its oldest turns taken out of ``messages`` until an answer fits behind it; None
    when the last question alone is too long."""
    longest = mixtral.model.params.max_seq_len
    room = min(max_gen_len, max(1, longest // 4))
    while True:
        ids = encode_prompt(mixtral.tokenizer, 0, messages)
        if len(ids) + room <= longest:
            return ids
        if len(messages) == start + 1:
            if speaks:
                print(f"(the question has {len(ids)} tokens, too many for max_seq_len {longest})", file=sys.stderr)
            return None
        del messages[start : start + 2]
        if speaks:
            print("(the oldest turn is left out: the conversation is too long)", file=sys.stderr)


if __name__ == "__main__":
    run_tool({"generate": generate, "chat": chat}, default="generate", short={"m": "model", "t": "tokenizer"})
