"""``mixtralkit chat``: a conversation in the terminal or through a pipe."""

from __future__ import annotations

import sys

from mixtralkit.cli.run import command
from mixtralkit.cli.running import UpdateOptions, WatchOptions, is_watched, watched
from mixtralkit.config import EngineConfig, LimitOptions
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.mixtral import Mixtral, encode_prompt, open_source
from mixtralkit.terminal import Session

LONGEST_CHAT = 8192  # tokens, where the model could do more and nobody asked for it
CHAT_TIMEOUT_S = 30 * 24 * 3600.0  # ranks wait for a person


@command
def chat(
    system: str | None = None,
    max_gen_len: Count = 512,
    *,
    sampling: SamplingOptions,
    engine: EngineConfig = EngineConfig(limits=LimitOptions(max_batch_size=1)),
    updates: UpdateOptions,
    watch: WatchOptions,
) -> None:
    """Talks with the model, in Mistral's chat template.

    A line is a turn, from a terminal or a pipe; /reset forgets, /quit or Ctrl-D leaves, Ctrl-C ends an answer. Older
    turns are left out beyond max_seq_len.

    Args:
        system: Instruction that goes before the first question.
        max_gen_len: Most tokens of an answer.
    """
    context = RankContext.start(engine.limits.device, timeout_s=CHAT_TIMEOUT_S)
    with context.agreed():
        source = open_source(engine.source)
        if engine.cache.max_seq_len is None:
            engine = engine.but(max_seq_len=min(source[0].config.max_seq_len, LONGEST_CHAT))
    mixtral = Mixtral.load(engine, context, source, progress=is_watched(context))
    mixtral.engine.plan_manager = manager = updates.manager(mixtral, engine.parallel.hardware)
    with (
        watched(mixtral, watch, {"model": engine.source.model.name}),
        Session(context.rank, context.world_size) as session,
    ):
        _converse(mixtral, session, system, max_gen_len, sampling)
    if manager is not None and context.is_first:
        print(manager.statistics, file=sys.stderr)
    mixtral.close()


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
