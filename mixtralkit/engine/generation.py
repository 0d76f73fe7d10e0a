"""The engine: requests in, events out. One loop on rank 0, whose messages the other ranks follow.

::

    a turn of rank 0    take the oldest of two steps │ ask for requests │ plan │ tell │ launch │ hand out events
    of another rank                                                       hear │ launch │ hand out the same events

So a step is planned, told and launched while another one runs, whatever comes or goes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace

from mixtralkit.config import CacheOptions, LimitOptions
from mixtralkit.distributed import RankFailed
from mixtralkit.engine.control import Control
from mixtralkit.engine.expert_rows import ExpertRows
from mixtralkit.engine.flight import Flight
from mixtralkit.engine.grammar import Grammars
from mixtralkit.engine.leader import Ended, Leader
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.requests import Abort, Answer, Completion, Progress, Request, StreamEvent, check_prompt
from mixtralkit.engine.runner import Runner
from mixtralkit.engine.runs import Arrivals, EngineSnapshot, Run, Told
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.scheduler import Planned, Scheduler, Sequence
from mixtralkit.engine.step_plan import Message, Took
from mixtralkit.engine.tell import Teller, WithEnds
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
        leads: the class that decides on rank 0.
        expert_rows: where each step counts the experts that its rows chose; on every rank or on none.
    """

    leads = Leader

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
        self._run_of: dict[int, Run] = {}  # by key of an answer that this rank makes text of
        self._teller = self.teller()
        self._closing: deque[Run] = deque()
        self._next_run = 0
        self._flights: deque[tuple[Flight, Planned | None]] = deque()
        self._leader = self.leads(model, tokenizer, self._grammars, self.check, self._tell, self._runs, self._flights)
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
        return self._read(Run(0, iter(requests), is_lazy, should_stop))

    def serve(self, arrivals: Arrivals | None) -> Iterator[list[StreamEvent]]:
        """The events of each step as requests come and go; ends when no more come and all have ended. Collective.

        Rank 0 asks ``arrivals``; the others give None, follow, and get no events. What fails in one request is the
        ``error`` of its last event.
        """
        teller = self.teller()
        ending = WithEnds(arrivals, teller)
        for told in self.tokens(None if arrivals is None else ending):
            if events := teller.events(told):
                ending.ends += [Abort(event.id, untold=True) for event in events if event.finish_reason]
                yield events

    def tokens(self, arrivals: Arrivals | None) -> Iterator[Told]:
        """As ``serve``, but before it is text, which a ``teller`` makes in any one thread.

        Whoever makes it sends an ``Abort`` where the text ended an answer.
        """
        return self._read(Run(0, arrivals=arrivals, serves=True))

    def teller(self) -> Teller:
        """Makes events of tokens."""
        params = self.model.params
        return Teller(self.tokenizer, (params.n_layers, params.num_experts_per_tok))

    def check(self, request: Request) -> None:
        """ValueError with one sentence where the request can never run. Any thread may ask."""
        params = self.model.params
        check_prompt(request.id, request.prompt, params.max_seq_len, params.vocab_size)
        request.sampling.check_vocabulary(params.vocab_size)
        if request.bound is not None:
            self._grammars.check(*request.bound)
        cache = self.model.cache
        if cache is not None and len(request.prompt) > cache.pages * cache.page_size:
            raise ValueError(
                f"prompt {request.id} has {len(request.prompt)} tokens, more than the cache holds "
                f"({cache.pages * cache.page_size})"
            )

    def warm_up(self, tokens: int | None = None) -> None:
        """Makes the graphs that requests would else wait for, and one step that takes as much memory as steps ever do.

        Collective; nothing may be running.

        Args:
            tokens: prompt tokens of that step on each rank; None for as many as there may be, on a CPU for few, where
                nothing is compiled and memory is no limit.
        """
        self._prepare()
        self._runner.warm_up()
        cache, owners = self.model.cache, self.model.ranks_with_own_sequences
        if tokens is None:
            tokens = self.prefill_budget if self.context.device.type == "cuda" else cache.slots
        scheduler, drawn = self._new_scheduler(tokens, prefix_reuse=False), SamplingOptions(frequency_penalty=1.0)
        length = min(-(-tokens // cache.slots), self.model.params.max_seq_len - 1)
        for i in range(owners * cache.slots):  # drawn from changed logits, and everything told
            request = Request(i, (0,) * length, 1, drawn, prompt_logprobs=True, top_logprobs=1, routed_experts=True)
            scheduler.add(Sequence(i, Progress(request, 1, self.tokenizer), i))
        self._runner.launch(scheduler.plan().plan).wait()

    def snapshot(self) -> EngineSnapshot:
        """What the engine does at the moment; of rank 0. Any thread may ask."""
        return self._leader.snapshot()

    def reset(self) -> None:
        """Forgets graphs, prefixes and what is running, and gives back their memory; the next run makes new ones.
        Collective."""
        self._runner: Runner | None = None
        self._leader.scheduler = None
        self._flights.clear()

    def forget_prefixes(self) -> None:
        """Computes all prompts anew from now on, so that what ran before changes no bit of what comes. Collective."""
        if self._leader.scheduler is not None:
            self._leader.scheduler.forget_prefixes()

    def _read(self, run: Run) -> Iterator[StreamEvent | Told]:
        self._open(run)
        try:
            while not run.ended or run.events:
                yield from self._next_events(run)
        finally:
            self._close(run)

    def _open(self, run: Run) -> None:
        run.thread = threading.get_ident()
        if self.context.world_size > 1 and any(other.thread != run.thread for other in self._runs.values()):
            raise RuntimeError("another thread has a run of this model open: over several ranks one thread may run it")
        with self._turn:
            run.number, run.numbers_from = self._next_run, self._leader.next_number
            self._next_run += 1
            self._runs[run.number] = run

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
            run = self._closing.popleft()
            if self.context.is_first:
                self._leader.drop(run)
            keys = [key for key, reader in self._run_of.items() if reader is run]
            self._teller.drop(keys)
            for key in keys:
                del self._run_of[key]
        if not self._runs:
            while self._flights:
                self._flights.popleft()[0].wait()
                if self.context.is_first:
                    self._leader.scheduler.step_ended()

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
            self._leader.busy_since = None
            with self._turn:
                self._driver = None
                self._turn.notify_all()
        return self._drained(run)

    def _drained(self, run: Run) -> list[StreamEvent]:
        take, come = run.events.popleft, len(run.events)  # another thread may bring more
        events = [take() for _ in range(come)]
        if not events and run.error is not None:
            raise run.error
        return events

    def _fail(self, error: BaseException) -> None:
        """Every open run ends with the error; nothing that was begun is left."""
        for run in self._runs.values():
            run.error = RuntimeError(f"the engine has failed: {error}")
            run.sequences.clear()
        self._closing.clear()
        self._teller.drop(self._run_of)
        self._run_of.clear()
        self._leader.busy_since = None
        self.reset()

    def _advance(self) -> None:
        """One turn."""
        self._all_know = False
        self._prepare()
        if not self.context.is_first:
            message = self._control.receive()
            self._execute(message)
            if message.took is not None:
                self._tell(message.took)
            self._heed(message)
            return
        try:
            self._sweep()
            # who looks is to see all tokens
            self._leader.scheduler.prefix_reuse = self.prefix_reuse and self.observe is None
            moves = self.plan_manager is not None and self.plan_manager.is_due
            message, planned = self._leader.decide(self._control, self.observe is not None, moves)
            self._control.send(message)
            self._execute(message, planned)
            self._heed(message)
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
        if self._flights or self._run_of or any(run.sequences for run in self._runs.values()):
            return  # what runs needs what it has
        if runner is None or runner.cache is not cache:
            self._leader.scheduler = self._new_scheduler(self.prefill_budget, self.prefix_reuse)
        self._leader.scheduler.forget_rows()
        self._runner = Runner(self.model, cache, self.cuda_graphs, counts)

    def _new_scheduler(self, prefill_budget: int, prefix_reuse: bool) -> Scheduler:
        cache, owners = self.model.cache, self.model.ranks_with_own_sequences
        sizes = (cache.slots, cache.pages, cache.page_size)
        return Scheduler(owners, *sizes, prefill_budget, self.mixed_budget, prefix_reuse)

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
        if message.took is not None:
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
            self.expert_rows.add(flight)
        if manager is not None and flight.counts_LE is not None:
            manager.launched(flight)

    def _between_steps(self, manager: PlanManager) -> None:
        try:
            manager.between_steps()
        except Exception:
            self._all_know = True
            raise

    def _tell(self, took: Took) -> list[Ended]:
        """Makes the events of what a step gave, on every rank alike; (run, key, error) of the answers that ended."""
        return [*self._handed_out(self._teller.of_step(took))]

    def _heed(self, message: Message) -> None:
        """What else happened in a turn, on every rank alike."""
        news = message.news
        for number, key in news.began:
            if (run := self._runs.get(number)) is not None:
                request = run.begun.popleft() if self.context.is_first else next(run.requests)
                self._teller.begin(key, Answer(request, self._leader.most_tokens(request), self.tokenizer))
                self._run_of[key] = run
        for _ in self._handed_out(self._teller.of_news(news)):
            pass
        for number in news.ended_runs:
            if (run := self._runs.get(number)) is not None:
                run.ended = True
        for number, words in news.failed_runs:
            if (run := self._runs.pop(number, None)) is not None:
                run.error = RankFailed(f"rank 0: {words}")

    def _handed_out(self, events: Iterable[tuple[int, StreamEvent]]) -> Iterator[Ended]:
        """Gives each event to its run; those that ended an answer."""
        for key, event in events:
            run = self._run_of[key]
            if event.finish_reason is None:
                run.events.append(event)
                continue
            if event.cause is not None:
                run.error = event.cause
            else:
                run.events.append(event)
            del self._run_of[key]
            yield run, key, event.cause


def check_prefill_budget(prefill_budget: int) -> None:
    """ValueError unless a step has room for a prompt token."""
    if isinstance(prefill_budget, bool) or not isinstance(prefill_budget, int) or prefill_budget < 1:
        raise ValueError(f"prefill_budget ({prefill_budget!r}) must be a whole number of at least 1")
