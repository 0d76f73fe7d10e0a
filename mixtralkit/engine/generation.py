"""The generation loop: admit, run a step, sample, tell the other ranks, hand out text.

Steps with prompts run one after the other. Steps without run ahead: the host takes a step's tokens while the device
is at the next one (``decoding.py``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Many

import torch

from mixtralkit.config import LimitOptions
from mixtralkit.engine.batching import Batcher, Piece
from mixtralkit.engine.decoding import DecodeSteps, Flight
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.recorder import together
from mixtralkit.engine.requests import Completion, Request, Sequence, StreamEvent, check_prompt
from mixtralkit.engine.sampler import logprobs_of, sample, uniform
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.transformer import Observe, Transformer
from mixtralkit.moe.layer import MoEReport
from mixtralkit.ops.counting import count_keys


class Engine:
    """Runs any number of requests through a model, at most ``max_batch_size`` at a time.

    Under attention ``tp`` every rank runs every sequence. Under ``dp`` a sequence belongs to one rank; with each step
    the ranks exchange what they sampled in one small all-gather, so all of them know every answer and take the same
    decisions. Calls are collective: every rank makes them with the same requests and takes all events.

    Args:
        prefill_budget: prompt tokens that a rank runs in one step; longer prompts take several steps. Bounds memory.
        observe: called with every step of this rank and its layers' reports. A span's ``sequence`` is the request's
            id, behind those of earlier runs.
        plan_manager: makes new plans from the loads and moves layers between steps.
        cuda_graphs: capture decode steps as CUDA graphs, where the device has them. Without, the same step is launched
            kernel by kernel.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prefill_budget: int = LimitOptions.prefill_budget,
        observe: Observe | None = None,
        plan_manager: PlanManager | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        check_prefill_budget(prefill_budget)
        tokenizer.check_vocabulary(model.params.vocab_size)
        self.model, self.tokenizer, self.context = model, tokenizer, model.context
        self.prefill_budget, self.observe, self.plan_manager = prefill_budget, observe, plan_manager
        self.cuda_graphs = cuda_graphs
        self._sequences_before = 0
        self._turn, self._runner = threading.Lock(), None
        self.reset()
        self._shares_sequences = model.layout.parallel.attention == "dp" and model.context.world_size > 1

    def complete(self, requests: Many[Request]) -> list[Completion]:
        """Runs the requests to their ends; answers in the order of the requests."""
        done = {event.id: event.completion for event in self.run(requests) if event.completion}
        return [done[request.id] for request in requests]

    def run(self, requests: Many[Request], should_stop: Callable[[], bool] | None = None) -> Iterator[StreamEvent]:
        """Events as text appears, the requests' interleaved. A run that another thread has begun is waited for.

        Args:
            should_stop: asked before each step; once it is true on rank 0 all answers end as ``"interrupted"`` on
                every rank. Given on all ranks or on none.

        Raises:
            RuntimeError: when the first event is asked for and this thread has a run open; over several ranks, which
                must all run the same, also when another thread has.
        """
        params = self.model.params
        for request in requests:
            check_prompt(request.id, request.prompt, params.max_seq_len, params.vocab_size)
        return self._in_turn(requests, should_stop)

    def _in_turn(self, requests: Many[Request], should_stop: Callable[[], bool] | None) -> Iterator[StreamEvent]:
        """The events of a run that has the engine to itself."""
        mine = threading.get_ident()
        if self._runner is not None and (self._runner == mine or self.context.world_size > 1):
            raise RuntimeError("another run of this model is open: take all events of its stream, or close it, first")
        with self._turn:
            self._runner = mine
            try:
                yield from self._loop(self._admitted(requests), should_stop, self._sequences_before)
            finally:
                self._sequences_before += max((request.id + 1 for request in requests), default=0)
                self._runner = None

    def _admitted(self, requests: Many[Request]) -> Batcher:
        if self.model.cache is None:
            self.model.allocate_cache()
        slots, ranks = self.model.sequences_per_rank, self.model.ranks_with_own_sequences
        return Batcher(requests, self.tokenizer, slots, ranks, self.prefill_budget, self.model.params.max_seq_len)

    def reset(self) -> None:
        """Forgets the decode steps and gives back their memory; the next run makes new ones. Collective."""
        self._steps: DecodeSteps | None = None

    def _loop(
        self, batcher: Batcher, should_stop: Callable[[], bool] | None, sequences_before: int
    ) -> Iterator[StreamEvent]:
        while batcher:
            if self.plan_manager is not None:
                self.plan_manager.between_steps()
            batcher.admit()
            if batcher.only_decodes:
                stop = yield from self._run_ahead(self._decode_steps(), batcher, should_stop, sequences_before)
            else:
                stop = yield from self._run_plain(batcher, should_stop, sequences_before)
            if stop:
                yield from _interrupted(batcher)
                return

    def _decode_steps(self) -> DecodeSteps:
        """Steps for the model's cache and plan manager as they are now. Collective when they are made."""
        cache, counts, steps = self.model.cache, self.plan_manager is not None, self._steps
        if steps is None or steps.cache is not cache or steps.counts_choices != counts:
            self._steps = DecodeSteps(self.model, cache, self.cuda_graphs, counts)
        return self._steps

    def _run_ahead(
        self,
        steps: DecodeSteps,
        batcher: Batcher,
        should_stop: Callable[[], bool] | None,
        sequences_before: int,
    ) -> Generator[StreamEvent, None, bool]:
        """Decodes until a prompt can come in or every sequence has ended; whether to stop.

        Each step is launched before the values of the one before are taken. So a sequence that its text ends has a row
        too many in the next step, which is thrown away. Its slot is free at once: what takes the slot is launched
        behind that step. Ends as well where the plan manager wants nothing in flight, after one step at least.
        """
        flight, manager = None, self.plan_manager
        while True:
            is_due = manager is not None and flight is not None and manager.is_due
            sequences, following = [] if is_due else _next_rows(batcher, flight), None
            if sequences:
                wish = None if should_stop is None else should_stop()
                # a graph made amid a pass may have to be forgotten with the next layer
                may_capture = manager is None or not manager.in_pass
                following = steps.launch(sequences, flight is not None, wish, may_capture)
                if manager is not None:
                    manager.launched(following)
            if flight is not None:
                if flight.stops:
                    return True
                for sequence, token, logprob in flight.values():
                    if not sequence.ended:
                        sequence.cached += 1
                        event = self._accept(batcher, sequence, token, logprob)
                        if event is not None:
                            yield event
                if self.model.counted_shadows is not None:
                    self.model.shadows.between_steps(flight.loads_LE())
            if following is None:
                return False
            if self.observe is not None and (step := steps.observed(following, sequences_before)) is not None:
                self.observe(*step)
            flight = following

    def _run_plain(
        self, batcher: Batcher, should_stop: Callable[[], bool] | None, sequences_before: int
    ) -> Generator[StreamEvent, None, bool]:
        """One step of any pieces, and its events; whether to stop."""
        pieces = batcher.plan()
        wish = should_stop is not None and should_stop()
        own = pieces[self.context.rank if self._shares_sequences else 0]
        most = max(sum(piece.stop - piece.start for piece in of_rank) for of_rank in pieces)
        own_values = self._step(own, most, sequences_before)
        stop, values = self._exchange(pieces, wish, own_values, should_stop is not None)
        if not stop:
            for rank_pieces, numbers in zip(pieces, values, strict=True):
                yield from self._take(batcher, rank_pieces, numbers)
        return stop

    def _step(self, pieces: list[Piece], rows_per_rank: int, sequences_before: int) -> torch.Tensor:
        """Runs this rank's pieces; the values of all pieces one after the other, float64 on the device.

        Of each piece: log-probabilities of its scored prompt tokens, then the sampled token and its log-probability.
        Where shadows count them, the choices of each expert in each layer come first.
        """
        device = self.context.device
        batch = ForwardBatch.build(
            [(piece.sequence.slot, piece.start, piece.sequence.ids(piece.start, piece.stop)) for piece in pieces],
            device,
            [sequences_before + piece.sequence.request.id for piece in pieces],
            rows_per_rank,
        )
        scored_rows, sampled_rows, targets = [], [], []
        for piece, span in zip(pieces, batch.spans, strict=True):
            scored_rows += range(span.start, span.start + piece.scored)
            if piece.scored:
                targets += piece.sequence.ids(piece.start + 1, piece.start + piece.scored + 1)
            if piece.is_sampled:
                sampled_rows.append(span.stop - 1)
        rows_N = torch.tensor(scored_rows + sampled_rows, dtype=torch.int64).to(device, non_blocking=True)
        observe, counts = together(self.observe, self.plan_manager), []
        glance = None if self.model.counted_shadows is None else lambda reports: counts.extend(map(_choices, reports))
        logits_NV = self.model.step(batch, self.model.cache, rows_N, observe, glance)
        targets_M = torch.tensor(targets, dtype=torch.int64).to(device, non_blocking=True)
        prompt_logprobs_M = logprobs_of(logits_NV[: len(targets)], targets_M)
        sampled = [piece.sequence for piece in pieces if piece.is_sampled]
        tokens, logprobs = sample(
            logits_NV[len(targets) :],
            [sequence.request.sampling for sequence in sampled],
            [uniform(s.request.sampling.seed, s.request.id, s.length) for s in sampled],
        )
        # float64 holds token ids and float32 values exactly, so one tensor carries both.
        return torch.cat([*counts, prompt_logprobs_M.double(), tokens.double(), logprobs.double()])

    def _exchange(
        self, pieces: list[list[Piece]], wish: bool, own_values: torch.Tensor, interruptible: bool
    ) -> tuple[bool, list[list[float]]]:
        """Whether rank 0 wishes to stop, and the values of every owning rank, on the host (synchronises)."""
        if self.context.world_size == 1:
            return wish, [own_values.tolist()]
        if not self._shares_sequences:
            if interruptible:
                flag = own_values.new_tensor([float(wish)])
                wish = bool(self.context.all_gather(flag)[0].item())
            return wish, [own_values.tolist()]
        shadows, params = self.model.counted_shadows, self.model.params
        first = 1 if shadows is None else 1 + params.n_layers * params.num_experts
        counts = [first + sum(piece.values for piece in own) for own in pieces]
        packed = own_values.new_zeros(max(counts))
        packed[0] = float(wish)
        packed[1 : 1 + len(own_values)] = own_values
        gathered = self.context.all_gather(packed).cpu()
        if shadows is not None:
            shadows.between_steps(gathered[:, 1:first].sum(0).view(params.n_layers, -1).numpy())
        return bool(gathered[0, 0]), [row[first:n] for row, n in zip(gathered.tolist(), counts, strict=True)]

    def _take(self, batcher: Batcher, pieces: list[Piece], numbers: list[float]) -> Iterator[StreamEvent]:
        """Gives one rank's values to its sequences."""
        scored = sum(piece.scored for piece in pieces)
        sampled = sum(piece.is_sampled for piece in pieces)
        prompt_logprobs = iter(numbers[:scored])
        answers = zip(numbers[scored : scored + sampled], numbers[scored + sampled :], strict=True)
        for piece in pieces:
            sequence = piece.sequence
            sequence.cached = piece.stop
            sequence.prompt_logprobs += [next(prompt_logprobs) for _ in range(piece.scored)]
            event = None
            if piece.is_sampled:
                token, logprob = next(answers)
                event = self._accept(batcher, sequence, int(token), logprob)
            elif piece.stop == sequence.length:
                batcher.release(sequence)
                event = sequence.finish("length")
            if event is not None:
                yield event

    def _accept(self, batcher: Batcher, sequence: Sequence, token: int, logprob: float) -> StreamEvent | None:
        """Gives a sequence its next token, and frees its slot where that ends it."""
        if not math.isfinite(logprob):
            raise RuntimeError(
                f"the model gave no finite logits for prompt {sequence.request.id} at position "
                f"{sequence.length} in {self.model.dtype}; float16 overflows where bfloat16 does not"
            )
        event = sequence.accept(token, logprob)
        if sequence.ended:
            batcher.release(sequence)
        return event


def check_prefill_budget(prefill_budget: int) -> None:
    """ValueError unless a step has room for a prompt token."""
    if isinstance(prefill_budget, bool) or not isinstance(prefill_budget, int) or prefill_budget < 1:
        raise ValueError(f"prefill_budget ({prefill_budget!r}) must be a whole number of at least 1")


def _choices(report: MoEReport) -> torch.Tensor:
    """float64 [E]: how many rows chose each expert."""
    return count_keys(report.routing.experts_TK, report.routing.logits_TE.shape[1]).double()


def _next_rows(batcher: Batcher, flight: Flight | None) -> list[Sequence]:
    """The sequences of the next decode step; none where that should be a plain step, or nothing is left.

    A token in flight may end a sequence in ways that the host cannot know yet, but for the last of its limit.
    """
    if flight is None:
        return sorted(batcher.running, key=lambda s: s.slot)
    if batcher.waiting and (batcher.has_free_slot or any(s.remaining == 1 for s in flight.sequences)):
        return []
    return [s for s in flight.sequences if s.remaining > 1]


def _interrupted(batcher: Batcher) -> Iterator[StreamEvent]:
    for sequence in batcher.running:
        yield sequence.finish("interrupted")
    for request in batcher.waiting:
        prompt_logprobs = [] if request.prompt_logprobs else None
        yield StreamEvent(
            request.id, "", "interrupted", Completion(request.id, [], [], prompt_logprobs, "", "interrupted")
        )
