"""What rank 0 decides: who begins, which step is next, who ends. It knows tokens alone; ``tell`` makes text of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from math import isfinite

from mixtralkit.engine.control import Control
from mixtralkit.engine.flight import Flight, Values
from mixtralkit.engine.grammar import Grammars
from mixtralkit.engine.requests import Abort, Progress, Request, Top
from mixtralkit.engine.runs import EngineSnapshot, Run, Told
from mixtralkit.engine.scheduler import Planned, Scheduler, Sequence
from mixtralkit.engine.step_plan import Message, News, Took
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.model.transformer import Transformer

Ended = tuple[Run, int, Exception | None]


class Leader:
    """Plans a step a turn from the open runs, and gives the oldest one's values to their sequences.

    Args:
        check: ValueError where a request can never run.
        tell: makes the text of what a step gave to runs; (run, key, error) of those that ended with it.
        runs: those that are open, by number.
        flights: steps that were launched and not taken, with what they were planned as.

    Attributes:
        scheduler: made for the model's cache; None before the first step.
        next_number: what observers will know the next request by, behind those of all runs before.
        busy_since: as in ``EngineSnapshot``.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, grammars: Grammars, check: Callable[[Request], None],
        tell: Callable[[Took], list[Ended]], runs: dict[int, Run], flights: deque[tuple[Flight, Planned | None]],
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self._grammars, self._check, self._tell = model, tokenizer, grammars, check, tell
        self.runs, self.flights = runs, flights
        self.scheduler: Scheduler | None = None
        self.next_number = self._next_key = self._prompted = self._generated = 0
        self._step_s = 0.0
        self._taken_at: float | None = None
        self.busy_since: float | None = None

    def snapshot(self) -> EngineSnapshot:
        """What the engine does at the moment. Any thread may ask."""
        scheduler = self.scheduler
        totals = EngineSnapshot(
            prompt_tokens=self._prompted, generation_tokens=self._generated, step_s=self._step_s,
            busy_since=self.busy_since,
        )  # fmt: skip
        if self.model.store.tiers is not None:
            totals = replace(totals, tiers=replace(self.model.store.tiers.counts))
        if scheduler is None:  # before the first step
            cache, owners = self.model.cache, self.model.ranks_with_own_sequences
            if cache is None:
                return totals
            return replace(totals, pages=owners * cache.pages, page_size=cache.page_size)
        pools = [owner.pool for owner in scheduler.owners]
        pages, free = sum(pool.pages for pool in pools), sum(pool.free for pool in pools)
        return replace(
            totals,
            running=sum(len(owner.running) for owner in scheduler.owners), waiting=len(scheduler.waiting),
            pages=pages, pages_used=pages - free, page_size=scheduler.page_size,
            pages_reusable=sum(pool.reusable for pool in pools), prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits, preemptions=scheduler.preemptions, steps=scheduler.step,
        )  # fmt: skip

    def drop(self, run: Run) -> None:
        """Takes out the sequences of a run that nobody reads any more."""
        for sequence in run.sequences.values():
            sequence.answer.ended = True
            self.scheduler.leave(sequence)

    def decide(self, control: Control, watched: bool, moves: bool) -> tuple[Message, Planned | None]:
        """What all ranks have to know of this turn, and the step that it launches.

        Args:
            watched: somebody looks at all tokens of steps.
            moves: experts are to move before the next step, so that none may be in flight.
        """
        self.busy_since = time.monotonic()
        message, flights = Message(), self.flights
        news = message.news
        if len(flights) == 2:
            self._take(message, control)
        if flights and watched:
            message.surplus = flights[-1][1].surplus
        for run in list(self.runs.values()):
            self._ask(run, news)
        in_flight = len(flights) - (message.took is not None)
        planned = None if moves and in_flight else self.scheduler.plan()
        if planned is None and in_flight and message.took is None:
            self._take(message, control)
            in_flight -= 1
        for run in list(self.runs.values()):
            self._interrupt(run, news)
            is_last = len(self.runs) == 1  # which leaves nothing in flight
            if run.exhausted and not run.sequences and not (is_last and (in_flight or planned)):
                run.ended = True
                news.ended_runs.append(run.number)
        if planned is not None:
            message.plan = planned.plan
            for sequence in planned.cached:
                self._news_of(sequence.run, news).cached.append((sequence.key, sequence.answer.cached_tokens))
        for run in self.runs.values():
            if run.serves and run.told:
                run.events.append(run.told)
                run.told = Told()
        return message, planned

    def _take(self, message: Message, control: Control) -> None:
        """Gives the oldest step's values to their sequences. Waits for the step."""
        flight, planned = self.flights[0]
        control.wait_for(flight)
        values = [flight.values(owner) for owner in range(len(planned.sampled))]
        now = time.monotonic()
        self._step_s = now - (self._taken_at or now)
        self._taken_at = now
        self.scheduler.step_ended()
        message.took, news = Took(), message.news
        for own, scored, routed in zip(values, planned.scored, planned.routed, strict=True):
            at = 0
            for sequence, count in scored:
                scores, tops = own.scores[at : at + count], _cut(own.score_tops[at : at + count], sequence)
                at += count
                if not sequence.answer.ended:
                    self._took_of(sequence.run, message).scored.append((sequence.key, scores, tops))
            for sequence, row, position, count in routed:
                answer = sequence.answer
                known = max(0, answer.routed - position)  # it was preempted, and is computed again
                if not answer.ended and known < count:
                    experts = own.experts_TLK[row + known : row + count].tobytes()
                    self._took_of(sequence.run, message).routed.append((sequence.key, experts))
                    answer.routed += count - known
        for own, sampled in zip(values, planned.sampled, strict=True):
            self._accept(sampled, own, message)
        for sequence in planned.ending:
            if not sequence.answer.ended:
                self._end(sequence, "length", news)
        for run, key, error in self._tell(message.took):
            if error is not None and run.number in self.runs:
                self._lose_run(run, error, news)
            elif key in run.sequences:
                self._leave(run.sequences[key])

    def _accept(self, sampled: list[Sequence], values: Values, message: Message) -> None:
        """Gives sequences their next tokens, and frees the places of those that end with them."""
        if self._all_go_on(sampled, values, message):
            return
        run = took = None
        tops = values.tops or [()] * len(sampled)
        for sequence, token, logprob, top in zip(sampled, values.tokens, values.logprobs, tops, strict=False):
            answer = sequence.answer
            if answer.ended:
                continue
            if not isfinite(logprob):
                error = RuntimeError(
                    f"the model gave no finite logits for prompt {answer.request.id} at position "
                    f"{answer.length} in {self.model.dtype}; float16 overflows where bfloat16 does not"
                )
                self._lose(sequence, error, message.news)
                continue
            answer.take(token)
            if sequence.grammar is not None and not answer.ended:
                try:
                    sequence.mask = sequence.grammar.allowed(answer.tokens).tobytes()
                except Exception as error:
                    self._lose(sequence, error, message.news)
                    continue
            if sequence.run is not run:
                run = sequence.run
                took = self._took_of(run, message)
            self._generated += 1
            took.keys.append(sequence.key)
            took.tokens.append(token)
            took.logprobs.append(logprob)
            took.tops.append(top[: answer.request.top_logprobs] if top else top)
            if answer.ended:
                self._leave(sequence)

    def _all_go_on(self, sampled: list[Sequence], values: Values, message: Message) -> bool:
        """Takes a step's tokens where none of them ends or bounds an answer of the only run, as in most steps."""
        if values.tops or not sampled:
            return False
        run = sampled[0].run
        for sequence, token, logprob in zip(sampled, values.tokens, values.logprobs, strict=False):
            answer = sequence.answer
            is_last = token in answer.ends or len(answer.tokens) + 1 >= answer.limit
            if is_last or answer.ended or sequence.run is not run or sequence.mask is not None or not isfinite(logprob):
                return False
        for sequence, token in zip(sampled, values.tokens, strict=False):
            sequence.answer.tokens.append(token)
        took, count = self._took_of(run, message), len(sampled)
        self._generated += count
        took.keys += [sequence.key for sequence in sampled]
        took.tokens += values.tokens[:count]
        took.logprobs += values.logprobs[:count]
        took.tops += [()] * count
        return True

    def _end(self, sequence: Sequence, reason: str, news: News, error: str | None = None) -> None:
        """Ends an answer for another reason than its tokens."""
        self._news_of(sequence.run, news).ends.append((sequence.key, reason, error))
        self._leave(sequence)

    def _lose(self, sequence: Sequence, error: Exception, news: News) -> None:
        """What fails in one request ends that request where an engine serves, and else its run."""
        if sequence.run.serves:
            self._end(sequence, "error", news, str(error) or type(error).__name__)
        else:
            self._lose_run(sequence.run, error, news)

    def _lose_run(self, run: Run, error: Exception, news: News) -> None:
        run.error = error
        self.runs.pop(run.number, None)
        for sequence in list(run.sequences.values()):
            self._leave(sequence)
        news.failed_runs.append((run.number, str(error)))

    def _leave(self, sequence: Sequence) -> None:
        sequence.answer.ended = True
        del sequence.run.sequences[sequence.key]
        self.scheduler.leave(sequence)

    @staticmethod
    def _took_of(run: Run, message: Message) -> Took:
        """Where what a step gave to a run is told: to all ranks, but what is served to its one reader."""
        return run.told.took if run.serves else message.took

    @staticmethod
    def _news_of(run: Run, news: News) -> News:
        return run.told.news if run.serves else news

    def _ask(self, run: Run, news: News) -> None:
        """Takes the requests that have come."""
        if run.arrivals is not None:
            self._poll(run, news)
            return
        try:
            while not run.exhausted:
                if run.is_lazy and len(self.scheduler.waiting) >= self.model.params.max_batch_size:
                    break
                request = next(run.requests, None)
                if request is None:
                    run.exhausted = True
                    break
                if run.is_lazy:
                    self._check(request)
                news.began.append((run.number, self._begin(run, request).key))
                run.begun.append(request)
            if run.should_stop is not None and not run.stops and run.should_stop():
                run.stops = run.exhausted = True
                self._interrupt(run, news)
        except Exception as error:
            self._lose_run(run, error, news)

    def _poll(self, run: Run, news: News) -> None:
        """Takes what has come to a serving engine; waits for it where there is nothing to do."""
        if run.exhausted:
            return
        is_idle = not self.flights and not self.scheduler.has_work and len(self.runs) == 1
        if is_idle:
            self.busy_since = self._taken_at = None
        came = run.arrivals.poll(is_idle)
        self.busy_since = time.monotonic()
        if came is None:
            run.exhausted = True
            return
        for one in came:
            if isinstance(one, Abort):
                for sequence in [s for s in run.sequences.values() if s.answer.request.id == one.id]:
                    self._leave(sequence) if one.untold else self._end(sequence, "aborted", news)
                continue
            try:
                self._check(one)
                self._begin(run, one)
            except Exception as error:
                run.told.began.append((self._next_key, one, 0))
                run.told.news.ends.append((self._next_key, "error", str(error)))
                self._next_key += 1

    def _begin(self, run: Run, request: Request) -> Sequence:
        number = run.numbers_from + request.id
        answer = Progress(request, self.most_tokens(request), self.tokenizer)
        sequence = Sequence(self._next_key, answer, number, run)
        if request.bound is not None:
            sequence.grammar = self._grammars.begin(*request.bound)
            sequence.mask = sequence.grammar.allowed(()).tobytes()
        self._next_key += 1
        self.next_number = max(self.next_number, number + 1)
        self._prompted += len(request.prompt)
        run.sequences[sequence.key] = sequence
        self.scheduler.add(sequence)
        if run.serves:
            run.told.began.append((sequence.key, request, answer.limit))
        return sequence

    def most_tokens(self, request: Request) -> int:
        """Of its answer, by the request, the model and the cache; the same on every rank."""
        cache = self.model.cache
        longest = min(self.model.params.max_seq_len, cache.pages * cache.page_size)
        return min(request.max_gen_len, longest - len(request.prompt))

    def _interrupt(self, run: Run, news: News) -> None:
        """Ends what is left of a run that is to stop, when the tokens in flight have come."""
        if run.stops:
            for sequence in list(run.sequences.values()):
                self.scheduler.stop(sequence)
                if not sequence.unread:
                    self._end(sequence, "interrupted", news)


def _cut(tops: list[Top], sequence: Sequence) -> list[Top]:
    """As many of the likeliest tokens as the request asks for."""
    return [top[: sequence.answer.request.top_logprobs] for top in tops]
