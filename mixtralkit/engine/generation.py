"""The engine: requests in, events out. One loop on rank 0, whose messages the other ranks follow.

::

    a turn of rank 0    take the oldest of two steps │ ask for requests │ plan │ tell │ launch │ hand out events
    of another rank                                                       hear │ launch │ hand out the same events

So a step is planned, told and launched while another one runs, whatever comes or goes.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace

from mixtralkit.config import CacheOptions, LimitOptions
from mixtralkit.distributed import RankFailed
from mixtralkit.engine.control import Control
from mixtralkit.engine.expert_rows import ExpertRows
from mixtralkit.engine.grammar import Grammars
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.requests import Abort, Answer, Completion, Request, StreamEvent, Top, check_prompt
from mixtralkit.engine.runner import Flight, Runner
from mixtralkit.engine.runs import Arrivals, EngineSnapshot, Run
from mixtralkit.engine.scheduler import Planned, Scheduler, Sequence
from mixtralkit.engine.step_plan import Message, News
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.model.transformer import Observe, Transformer


class Engine:
    """Runs any number of requests through a model, at most ``max_batch_size`` at a time.

    Under attention ``tp`` every rank runs every sequence. Under ``dp`` a sequence belongs to one rank. Rank 0 decides
    and tells the others each step and what came of the one before, so that all know every answer. Calls are
    collective: every rank makes them with the same requests and takes all events.

    Args:
        prefill_budget: prompt tokens that a rank runs in one step; longer prompts take several steps. Bounds memory.
        observe: called with every step of this rank and its layers' reports. A span's ``sequence`` is the request's
            id, behind those of earlier runs.
        plan_manager: makes new plans from the loads and moves layers between steps.
        cuda_graphs: capture decode steps as CUDA graphs, where the device has them. Without, the same step is launched
            kernel by kernel.
        mixed_budget: prompt tokens of a step while most sequences decode; None for as many as ever.
        prefix_reuse: what is in the cache of earlier requests that began alike is not computed again.

    Attributes:
        expert_rows: where each step counts the experts that its rows chose; on every rank or on none.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prefill_budget: int = LimitOptions.prefill_budget,
        observe: Observe | None = None,
        plan_manager: PlanManager | None = None,
        cuda_graphs: bool = True,
        mixed_budget: int | None = LimitOptions.mixed_budget,
        prefix_reuse: bool = CacheOptions.prefix_reuse,
    ) -> None:
        check_prefill_budget(prefill_budget)
        tokenizer.check_vocabulary(model.params.vocab_size)
        self.model, self.tokenizer, self.context = model, tokenizer, model.context
        self.prefill_budget, self.observe, self.plan_manager = prefill_budget, observe, plan_manager
        self.cuda_graphs, self.mixed_budget, self.prefix_reuse = cuda_graphs, mixed_budget, prefix_reuse
        self._control: Control | None = None
        self._turn = threading.Condition()
        self._grammars = Grammars(tokenizer, model.params.vocab_size)
        self._driver: int | None = None  # the thread that makes a turn
        self._all_know = False  # that a turn has failed
        self._runs: dict[int, Run] = {}
        self._run_of: dict[int, Run] = {}  # by key of a sequence; of ranks that follow
        self._closing: deque[Run] = deque()
        self._next_run = self._next_key = self._next_number = 0
        self._prompted = self._generated = 0
        self._step_s = 0.0
        self._taken_at: float | None = None
        self._busy_since: float | None = None
        self.expert_rows: ExpertRows | None = None
        self.reset()

    def complete(self, requests: Iterable[Request]) -> list[Completion]:
        """Runs the requests to their ends; answers in the order of the requests."""
        requests = list(requests)
        done = {event.id: event.completion for event in self.run(requests) if event.completion}
        return [done[request.id] for request in requests]

    def run(self, requests: Iterable[Request], should_stop: Callable[[], bool] | None = None) -> Iterator[StreamEvent]:
        """Events as text appears, the requests' interleaved.

        Several runs may be open at once, on several ranks if all open and read them in the same order; their requests
        run together.

        Args:
            requests: a list is checked now; of an iterator as many are taken at a time as there is room for.
            should_stop: asked before each step; once it is true on rank 0 all answers end as ``"interrupted"`` on
                every rank. Given on all ranks or on none.

        Raises:
            RuntimeError: over several ranks, which must all run the same, when another thread has a run open.
        """
        is_lazy = not isinstance(requests, Many)
        if not is_lazy:
            for request in requests:
                self.check(request)
            # who begins last ends last: what is long begins first, so that few steps have few sequences
            requests = sorted(requests, key=lambda request: -request.max_gen_len)
        return self._events(requests, is_lazy, should_stop)

    def serve(self, arrivals: Arrivals | None) -> Iterator[list[StreamEvent]]:
        """The events of each step as requests come and go; ends when no more come and all have ended. Collective.

        Rank 0 asks ``arrivals``; the others give None, follow, and get no events. What fails in one request is the
        ``error`` of its last event.
        """
        run = self._open(Run(0, arrivals=arrivals, serves=True))
        try:
            while not run.ended or run.events:
                if events := self._next_events(run):
                    yield events
        finally:
            self._close(run)

    def check(self, request: Request) -> None:
        """ValueError with one sentence where the request can never run. Any thread may ask."""
        params = self.model.params
        check_prompt(request.id, request.prompt, params.max_seq_len, params.vocab_size)
        request.sampling.check_vocabulary(params.vocab_size)
        if request.json_schema is not None:
            self._grammars.check(request.json_schema)
        cache = self.model.cache
        if cache is not None and len(request.prompt) > cache.pages * cache.page_size:
            raise ValueError(
                f"prompt {request.id} has {len(request.prompt)} tokens, more than the cache holds "
                f"({cache.pages * cache.page_size})"
            )

    def snapshot(self) -> EngineSnapshot:
        """What the engine does at the moment; of rank 0. Any thread may ask."""
        scheduler = self._scheduler
        totals = EngineSnapshot(
            prompt_tokens=self._prompted, generation_tokens=self._generated, step_s=self._step_s,
            busy_since=self._busy_since,
        )  # fmt: skip
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

    def reset(self) -> None:
        """Forgets graphs, prefixes and what is running, and gives back their memory; the next run makes new ones.
        Collective."""
        self._runner: Runner | None = None
        self._scheduler: Scheduler | None = None
        self._flights: deque[tuple[Flight, Planned | None]] = deque()

    def warm_up(self) -> None:
        """Makes the graphs that requests would else wait for. Collective; nothing may be running."""
        self._prepare()
        self._runner.warm_up()

    def forget_prefixes(self) -> None:
        """Computes all prompts anew from now on, so that what ran before changes no bit of what comes. Collective."""
        if self._scheduler is not None:
            self._scheduler.forget_prefixes()

    def _events(
        self, requests: Iterable[Request], is_lazy: bool, should_stop: Callable[[], bool] | None
    ) -> Iterator[StreamEvent]:
        run = self._open(Run(0, iter(requests), is_lazy, should_stop))
        try:
            while not run.ended or run.events:
                yield from self._next_events(run)
        finally:
            self._close(run)

    def _open(self, run: Run) -> Run:
        if self.context.world_size > 1 and any(other.thread != run.thread for other in self._runs.values()):
            raise RuntimeError("another thread has a run of this model open: over several ranks one thread may run it")
        with self._turn:
            run.number, run.numbers_from = self._next_run, self._next_number
            self._next_run += 1
            self._runs[run.number] = run
        return run

    def _close(self, run: Run) -> None:
        """Of a run that nobody reads any more; a generator may be thrown away amid a turn, by any thread."""
        self._runs.pop(run.number, None)
        self._closing.append(run)
        if self._turn.acquire(blocking=False):
            try:
                if self._driver is None:
                    self._sweep()
            finally:
                self._turn.release()

    def _sweep(self) -> None:
        """Takes closed runs' sequences out; with the last one nothing stays in flight."""
        while self._closing:
            for key, sequence in self._closing.popleft().sequences.items():
                if self.context.is_first:
                    sequence.answer.ended = True
                    self._scheduler.leave(sequence)
                self._run_of.pop(key, None)
        if not self._runs:
            while self._flights:
                self._flights.popleft()[0].wait()
                if self.context.is_first:
                    self._scheduler.step_ended()

    def _next_events(self, run: Run) -> list[StreamEvent]:
        """The run's events after at least one turn of the loop, which another thread may make."""
        me = threading.get_ident()
        with self._turn:
            if self._driver == me:
                raise RuntimeError("a step of this model is being made by this thread: take no events inside it")
            while self._driver is not None and not run.events and not run.ended and run.error is None:
                self._turn.wait()
            if run.events or run.ended or run.error is not None:
                return self._drained(run)
            self._driver = me
        try:
            self._advance()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._busy_since = None
            with self._turn:
                self._driver = None
                self._turn.notify_all()
        return self._drained(run)

    def _drained(self, run: Run) -> list[StreamEvent]:
        events = []
        while run.events:
            events.append(run.events.popleft())
        if not events and run.error is not None:
            raise run.error
        return events

    def _fail(self, error: BaseException) -> None:
        """Every open run ends with the error; nothing that was begun is left."""
        for run in self._runs.values():
            run.error = RuntimeError(f"the engine has failed: {error}")
            run.sequences.clear()
        self._closing.clear()
        self._run_of.clear()
        self._busy_since = None
        self.reset()

    def _advance(self) -> None:
        """One turn."""
        self._all_know = False
        self._prepare()
        if not self.context.is_first:
            self._follow(self._control.receive())
            return
        try:
            message, planned = self._decide()
            self._control.send(message)
            self._execute(message, planned)
        except Exception as error:
            if not isinstance(error, RankFailed) and not self._all_know:
                self._control.send(Message(failed=str(error) or type(error).__name__))
            raise

    def _prepare(self) -> None:
        """A runner and a scheduler for the model's cache and plan manager as they are now. Collective when made."""
        if self._control is None:
            self._control = Control(self.context)
        if self.model.cache is None:
            self.model.allocate_cache()
        counts = self.plan_manager is not None or self.expert_rows is not None
        cache, runner = self.model.cache, self._runner
        if runner is not None and runner.cache is cache and runner.counts_choices == counts:
            return
        if self._flights or any(run.sequences for run in self._runs.values()):  # what runs needs what it has
            return
        if runner is None or runner.cache is not cache:
            self._scheduler = Scheduler(
                self.model.ranks_with_own_sequences, cache.slots, cache.pages, cache.page_size, self.prefill_budget,
                self.mixed_budget, self.prefix_reuse,
            )  # fmt: skip
        self._scheduler.forget_rows()
        self._runner = Runner(self.model, cache, self.cuda_graphs, counts)

    def _decide(self) -> tuple[Message, Planned | None]:
        """Of rank 0: what the others have to know of this turn, and the step that it launches."""
        self._busy_since = time.monotonic()
        self._sweep()
        message, scheduler = Message(), self._scheduler
        scheduler.prefix_reuse = self.prefix_reuse and self.observe is None  # who looks is to see all tokens
        news = message.news
        if len(self._flights) == 2:
            self._take(message)
        if self._flights and self.observe is not None:
            message.surplus = self._flights[-1][1].surplus
        for run in list(self._runs.values()):
            self._ask(run, news)
        in_flight = len(self._flights) - message.takes
        is_due = self.plan_manager is not None and self.plan_manager.is_due
        planned = None if is_due and in_flight else scheduler.plan()
        if planned is None and in_flight and not message.takes:
            self._take(message)
            in_flight -= 1
        for run in list(self._runs.values()):
            self._interrupt(run, news)
            is_last = len(self._runs) == 1  # which leaves nothing in flight
            if run.exhausted and not run.sequences and not (is_last and (in_flight or planned)):
                run.ended = True
                news.ended_runs.append(run.number)
        if planned is not None:
            message.plan = planned.plan
            news.cached += [(s.key, s.answer.cached_tokens) for s in planned.cached if self._tells(s.run)]
        return message, planned

    def _execute(self, message: Message, planned: Planned | None = None) -> None:
        """What every rank does of a turn."""
        flights, manager, model = self._flights, self.plan_manager, self.model
        if flights and flights[-1][0].batch is not None and self.observe is not None:
            flight = flights[-1][0]
            own = self.context.rank if len(message.surplus) > 1 else 0
            step = self._runner.observed(flight, message.surplus[own] if message.surplus else ())
            flights[-1] = (replace(flight, batch=None), flights[-1][1])
            if step is not None:
                self.observe(*step)
        if message.takes:
            flight, _ = flights.popleft()
            if model.counted_shadows is not None:
                model.shadows.between_steps(flight.loads_LE())
        if message.plan is None:
            return
        if manager is not None:
            self._between_steps(manager)
        # a graph made amid a pass may have to be forgotten with the next layer
        may_capture = manager is None or not manager.in_pass
        flight = self._runner.launch(message.plan, self.observe is not None, may_capture)
        flights.append((flight, planned))
        if self.expert_rows is not None:
            self.expert_rows.add(flight.counts_LE)
        if manager is not None and flight.counts_LE is not None:
            manager.launched(flight)

    def _between_steps(self, manager: PlanManager) -> None:
        try:
            manager.between_steps()
        except Exception:
            self._all_know = True
            raise

    def _take(self, message: Message) -> None:
        """Gives the oldest step's values to their sequences. Waits for the step."""
        flight, planned = self._flights[0]
        message.takes = True
        self._control.wait_for(flight)
        values = [flight.values(owner) for owner in range(len(planned.sampled))]
        now = time.monotonic()
        self._step_s = now - (self._taken_at or now)
        self._taken_at = now
        self._scheduler.step_ended()
        news = message.news
        for own, scored in zip(values, planned.scored, strict=True):
            at = 0
            for sequence, count in scored:
                scores, tops = own.scores[at : at + count], _cut(own.score_tops[at : at + count], sequence)
                at += count
                if sequence.answer.ended:
                    continue
                sequence.answer.prompt_logprobs += scores
                sequence.answer.prompt_top_logprobs += tops
                if self._tells(sequence.run):
                    news.scored.append((sequence.key, scores, tops))
        for own, sampled in zip(values, planned.sampled, strict=True):
            tops = own.tops or [()] * len(sampled)
            for sequence, token, logprob, top in zip(sampled, own.tokens, own.logprobs, tops, strict=False):
                if not sequence.answer.ended:
                    self._accept(sequence, token, logprob, top, news)
        for sequence in planned.ending:
            if not sequence.answer.ended:
                self._end(sequence, "length", news)

    def _accept(self, sequence: Sequence, token: int, logprob: float, top: Top, news: News) -> None:
        """Gives a sequence its next token, and frees its place where that ends it."""
        answer, run = sequence.answer, sequence.run
        try:
            if not math.isfinite(logprob):
                raise RuntimeError(
                    f"the model gave no finite logits for prompt {answer.request.id} at position "
                    f"{answer.length} in {self.model.dtype}; float16 overflows where bfloat16 does not"
                )
            top = top[: answer.request.top_logprobs]
            event = answer.accept(token, logprob, top)
            if sequence.grammar is not None and not answer.ended:
                sequence.mask = sequence.grammar.allowed(answer.tokens).tobytes()
        except Exception as error:
            self._lose(sequence, error, news)
            return
        self._generated += 1
        if self._tells(run):
            news.keys.append(sequence.key)
            news.tokens.append(token)
            news.logprobs.append(logprob)
            news.tops.append(top)
        if event is not None:
            run.events.append(event)
        if answer.ended:
            self._leave(sequence)

    def _end(self, sequence: Sequence, reason: str, news: News, error: str | None = None) -> None:
        """Ends an answer for another reason than its tokens."""
        sequence.run.events.append(_last_event(sequence.answer, reason, error))
        if self._tells(sequence.run):
            news.ends.append((sequence.key, reason, error))
        self._leave(sequence)

    def _lose(self, sequence: Sequence, error: Exception, news: News) -> None:
        """What fails in one request ends that request where an engine serves, and else its run."""
        if sequence.run.serves:
            self._end(sequence, "error", news, str(error) or type(error).__name__)
        else:
            self._lose_run(sequence.run, error, news)

    def _lose_run(self, run: Run, error: Exception, news: News) -> None:
        run.error = error
        self._runs.pop(run.number, None)
        for sequence in list(run.sequences.values()):
            sequence.answer.ended = True
            self._leave(sequence)
        news.failed_runs.append((run.number, str(error)))

    def _leave(self, sequence: Sequence) -> None:
        del sequence.run.sequences[sequence.key]
        self._scheduler.leave(sequence)

    def _tells(self, run: Run) -> bool:
        """Whether other ranks make the run's events too."""
        return self.context.world_size > 1 and not run.serves

    def _ask(self, run: Run, news: News) -> None:
        """Takes the requests that have come."""
        if run.arrivals is not None:
            self._poll(run, news)
            return
        try:
            while not run.exhausted:
                if run.is_lazy and len(self._scheduler.waiting) >= self.model.params.max_batch_size:
                    break
                request = next(run.requests, None)
                if request is None:
                    run.exhausted = True
                    break
                if run.is_lazy:
                    self.check(request)
                news.began.append((run.number, self._begin(run, request).key))
            if run.should_stop is not None and not run.stops and run.should_stop():
                run.stops = run.exhausted = True
                self._interrupt(run, news)
        except Exception as error:
            self._lose_run(run, error, news)

    def _poll(self, run: Run, news: News) -> None:
        """Takes what has come to a serving engine; waits for it where there is nothing to do."""
        if run.exhausted:
            return
        is_idle = not self._flights and not self._scheduler.has_work and len(self._runs) == 1
        if is_idle:
            self._busy_since = self._taken_at = None
        came = run.arrivals.poll(is_idle)
        self._busy_since = time.monotonic()
        if came is None:
            run.exhausted = True
            return
        for one in came:
            if isinstance(one, Abort):
                for sequence in [s for s in run.sequences.values() if s.answer.request.id == one.id]:
                    self._end(sequence, "aborted", news)
                continue
            try:
                self.check(one)
                self._begin(run, one)
            except Exception as error:
                run.events.append(_last_event(Answer(one, 0, self.tokenizer), "error", str(error)))

    def _begin(self, run: Run, request: Request) -> Sequence:
        number = run.numbers_from + request.id
        sequence = Sequence(self._next_key, self._answer(request), number, run)
        if request.json_schema is not None:
            sequence.grammar = self._grammars.begin(request.json_schema)
            sequence.mask = sequence.grammar.allowed(()).tobytes()
        self._next_key += 1
        self._next_number = max(self._next_number, number + 1)
        self._prompted += len(request.prompt)
        run.sequences[sequence.key] = sequence
        self._scheduler.add(sequence)
        return sequence

    def _answer(self, request: Request) -> Answer:
        """With the limit that the request, the model and the cache set."""
        cache = self.model.cache
        longest = min(self.model.params.max_seq_len, cache.pages * cache.page_size)
        return Answer(request, min(request.max_gen_len, longest - len(request.prompt)), self.tokenizer)

    def _interrupt(self, run: Run, news: News) -> None:
        """Ends what is left of a run that is to stop, when the tokens in flight have come."""
        if run.stops:
            for sequence in list(run.sequences.values()):
                sequence.stops = True
                if not sequence.unread:
                    self._end(sequence, "interrupted", news)

    def _follow(self, message: Message) -> None:
        """A turn of another rank, which makes the events of its own runs out of what rank 0 tells."""
        self._execute(message)
        news = message.news
        for number, key in news.began:
            if (run := self._runs.get(number)) is not None:
                run.sequences[key] = self._answer(next(run.requests))
                self._run_of[key] = run
        for key, count in news.cached:
            if (answer := self._told(key)) is not None:
                answer.cached_tokens = count
        for key, scores, tops in news.scored:
            if (answer := self._told(key)) is not None:
                answer.prompt_logprobs += scores
                answer.prompt_top_logprobs += tops
        for key, token, logprob, top in zip(news.keys, news.tokens, news.logprobs, news.tops, strict=True):
            if (answer := self._told(key)) is not None:
                self._tell(key, answer.accept(token, logprob, top))
        for key, reason, error in news.ends:
            if (answer := self._told(key)) is not None:
                self._tell(key, answer.finish(reason, error=error))
        for number in news.ended_runs:
            if (run := self._runs.get(number)) is not None:
                run.ended = True
        for number, words in news.failed_runs:
            if (run := self._runs.pop(number, None)) is not None:
                run.error = RankFailed(f"rank 0: {words}")

    def _told(self, key: int) -> Answer | None:
        """An answer that somebody on this rank reads."""
        run = self._run_of.get(key)
        return None if run is None else run.sequences.get(key)

    def _tell(self, key: int, event: StreamEvent | None) -> None:
        run = self._run_of[key]
        if event is not None:
            run.events.append(event)
        if run.sequences[key].ended:
            del run.sequences[key], self._run_of[key]


def check_prefill_budget(prefill_budget: int) -> None:
    """ValueError unless a step has room for a prompt token."""
    if isinstance(prefill_budget, bool) or not isinstance(prefill_budget, int) or prefill_budget < 1:
        raise ValueError(f"prefill_budget ({prefill_budget!r}) must be a whole number of at least 1")


def _last_event(answer: Answer, reason: str, error: str | None) -> StreamEvent:
    """``Answer.finish``, also where the error was one of making the text."""
    try:
        return answer.finish(reason, error=error)
    except Exception:
        answer.ended = True
        done = Completion(answer.request.id, answer.tokens, answer.logprobs, None, "".join(answer.deltas), reason)
        return StreamEvent(answer.request.id, "", reason, done, error=error)


def _cut(tops: list[Top], sequence: Sequence) -> list[Top]:
    """As many of the likeliest tokens as the request asks for."""
    return [top[: sequence.answer.request.top_logprobs] for top in tops]
