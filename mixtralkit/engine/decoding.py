"""Decode steps on memory that stays where it is: the next step reads on the device what the last one sampled.

::

    host      launch 1 │ launch 2, text of 1 │ launch 3, text of 2 │ …
    device             │ step 1 ───────────► │ step 2 ───────────► │ step 3 …

Nothing goes to the device between two steps of the same greedy sequences.

Under attention ``dp`` the ranks have sequences of their own. A step then ends in one small all-gather of what each
sampled, so that every rank's host reads all answers, a step later as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine.graphs import Graphs, Run
from mixtralkit.engine.requests import Sequence
from mixtralkit.engine.sampler import gather_vocabulary, sample_each, sample_likeliest, settings_of, uniform
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import MoEReport
from mixtralkit.ops.counting import count_keys


def bucket_sizes(most: int) -> list[int]:
    """Numbers of rows that steps are made for, the last one ``most``: 1, 2, … 8, 12, 16, 24, 32, 48, 64, 96, 128, ….

    So few that capturing all takes seconds, and so many that most steps have few rows without a sequence. Up to eight
    rows there are none, for there every row has experts read that no other row needs.
    """
    sizes, power = [*range(1, 9), 12], 16
    while sizes[-1] < most:
        sizes += [power, power + power // 2]
        power *= 2
    return [size for size in sizes if size < most] + [most]


class _Rows:
    """What a step reads and leaves. Row i is a sequence, or only fills the shape: slot -1, as all rows at first.

    ``tokens_B`` are the step's input and then its answer; these and ``logprobs_B`` share memory, so that one copy
    takes both to the host. ``advance_B`` is added to the positions after a step: 0 in rows without a sequence.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.packed = torch.zeros(12 * rows, dtype=torch.uint8, device=device)
        self.tokens_B, self.logprobs_B = unpacked(self.packed)
        self.positions_B, self.advance_B = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.slots_B = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.settings_4B = torch.zeros(4, rows, device=device)
        self.uniforms_B = torch.zeros(rows, device=device)


def unpacked(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 tokens [B] and float32 log-probabilities [B] in bytes [12 B]."""
    end = len(packed) * 2 // 3
    return packed[:end].view(torch.int64), packed[end:].view(torch.float32)


@dataclass(frozen=True)
class Flight:
    """A step that was launched, and what it gives when it is done.

    ``sequences_W`` are the sequences of each rank that has its own; where all run the same ones there is one list.
    ``own`` is this rank's. ``reports`` are those of its rows, the ones that only fill behind, and ``counts_LE``
    (int64) the choices of each expert by the others, where they are counted; the next launch may overwrite both.
    ``packed`` [W, bytes] and ``wishes`` are on the host, with their values once ``done`` has passed. ``replayed`` and
    ``recapture_s`` are those of ``graphs.Run``.
    """

    sequences_W: list[list[Sequence]]
    own: list[Sequence]
    reports: list[MoEReport]
    counts_LE: torch.Tensor | None
    packed: torch.Tensor
    room: int
    wishes: torch.Tensor
    done: torch.cuda.Event | None
    replayed: bool
    recapture_s: float

    @property
    def sequences(self) -> list[Sequence]:
        """All of them."""
        return [sequence for own in self.sequences_W for sequence in own]

    @property
    def is_running(self) -> bool:
        """Whether the device is still at it; does not wait. On a CPU a launch ends with its step."""
        return self.done is not None and not self.done.query()

    @property
    def stops(self) -> bool:
        """Whether rank 0 wished to stop when the step was launched. Waits for the step."""
        self._wait()
        return bool(self.wishes[0])

    def values(self) -> Iterator[tuple[Sequence, int, float]]:
        """Every sequence with its next token and the token's log-probability. Waits for the step."""
        self._wait()
        for sequences, packed in zip(self.sequences_W, self.packed, strict=True):
            tokens_B, logprobs_B = unpacked(packed[: 12 * self.room].clone())  # it may start where no int64 may
            # rows that fill come last
            yield from zip(sequences, tokens_B.tolist(), logprobs_B.tolist(), strict=False)

    def loads_LE(self) -> np.ndarray:
        """int64 choices of each expert by the rows of all ranks, where they travel with the answers. Waits."""
        self._wait()
        counts_WN = self.packed[:, 12 * self.room :].contiguous().view(torch.int64)
        return counts_WN.sum(0).view(self.counts_LE.shape).numpy()

    def _wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


@dataclass(frozen=True)
class _Answers:
    """What a step leaves on the device: its layers' reports, what every rank with sequences of its own has sampled,
    packed [W, bytes], and the choices of each expert."""

    reports: list[MoEReport]
    packed: torch.Tensor
    counts_LE: torch.Tensor | None


class DecodeSteps:
    """Launches a model's decode steps without waiting for them, as CUDA graphs where these are on.

    At most one launched step may have values that nobody took yet when the next one is launched. Collective: every
    rank launches the same sequences, under ``dp`` those of all ranks, of which it runs its own. There all ranks run as
    many rows as the one with most sequences needs.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        cuda_graphs: bool = True,
        counts_choices: bool = False,
    ) -> None:
        """``counts_choices``: give every step's ``counts_LE``, as a part of it; shadows always have it."""
        self.model, self.cache, self.context = model, cache, model.context
        slots = cache.slots
        self._owners = model.ranks_with_own_sequences
        self._owner = model.context.rank if self._owners > 1 else 0
        # the ranks that have each a part of the vocabulary
        self._parts = model.context if model.sums is not None else RankContext(device=model.context.device)
        self._sizes = bucket_sizes(slots)
        self._own = _Rows(slots, self.context.device)
        self._graphs = Graphs(self.context.device, cuda_graphs and model.decodes_in_graphs)
        self._relocations = model.store.relocations
        self._sequences_W: list[list[Sequence]] = [[] for _ in range(self._owners)]
        self._filled = 0
        self._draws = False
        layers, experts = model.params.n_layers, model.params.num_experts
        self._first_key_L11 = torch.arange(layers, device=self.context.device)[:, None, None] * experts
        self.counts_choices = counts_choices
        self._counts = counts_choices or model.counted_shadows is not None

    def launch(
        self, sequences: list[Sequence], unread: bool, wish: bool | None = None, may_capture: bool = True
    ) -> Flight:
        """Starts the step that gives each sequence its next token.

        Args:
            sequences: with all but their last token in the cache.
            unread: the last token of each comes from the step launched before, whose values are not taken yet; then
                the sequences are some of that step's, in the same order.
            wish: whether to stop, which rank 0 decides for all; None where no rank is ever asked.
            may_capture: False runs the step kernel by kernel where it has no graph yet; the same on every rank.
        """
        if self._relocations != self.model.store.relocations:  # what graphs read has other addresses now
            self._graphs.forget()
            self._relocations = self.model.store.relocations
        if not unread or len(sequences) != sum(map(len, self._sequences_W)):
            self._place(sequences, unread)
        own, rows, draws, mine = self._own, self._filled, self._draws, self._sequences_W[self._owner]
        if draws and mine:
            keys = [(s.request.sampling.seed, s.request.id, s.length + unread) for s in mine]
            own.uniforms_B[: len(keys)].copy_(self._upload([uniform(*key) for key in keys], torch.float32))
        run = self._graphs.run(
            (rows, draws),
            lambda: self._step(own, rows, draws),
            lambda: self._step(_Rows(rows, self.context.device), rows, draws),
            may_capture,
        )
        return self._flight(run, wish)

    def observed(self, flight: Flight, sequences_before: int) -> tuple[ForwardBatch, list[MoEReport]] | None:
        """This rank's rows as an ``Observe`` takes them, without those of sequences that have ended; None for no row.

        To be called after the values of the step before were taken and before the next one is launched.
        """
        rows = [row for row, sequence in enumerate(flight.own) if not sequence.ended]
        if not rows:
            return None
        sequences = [flight.own[row] for row in rows]
        batch = ForwardBatch.build(
            [(s.slot, s.cached, s.tokens[-1:]) for s in sequences],
            self.context.device,
            [sequences_before + s.request.id for s in sequences],
        )
        rows_B = self._upload(rows, torch.int64)
        # indexing copies, so that observers may keep what the next step overwrites
        return batch, [
            replace(r, routing=r.routing.take(rows_B), dropped=r.dropped.clone(), rerouted=r.rerouted.clone())
            for r in flight.reports
        ]

    def _place(self, sequences: list[Sequence], unread: bool) -> None:
        """Gives each of this rank's sequences a row; where its last token is on the device, that moves there."""
        of_W = [[s for s in sequences if s.rank == owner] for owner in range(self._owners)]
        most, mine = max(map(len, of_W)), of_W[self._owner]
        own, rows = self._own, next(size for size in self._sizes if size >= most)
        if unread:
            places = {id(sequence): row for row, sequence in enumerate(self._sequences_W[self._owner])}
            first = [places[id(sequence)] for sequence in mine]
        else:
            first = [sequence.tokens[-1] for sequence in mine]
        fill = [0] * (rows - len(mine))
        columns = [first + fill, [s.cached + unread for s in mine] + fill, [s.slot for s in mine]]
        columns[2] += [-1] * len(fill)
        first_B, positions_B, slots_B = self._upload(columns, torch.int64)
        own.tokens_B[:rows] = own.tokens_B[first_B] if unread else first_B
        own.positions_B[:rows] = positions_B
        own.slots_B[:rows] = slots_B
        own.advance_B[:rows] = slots_B >= 0
        self._draws = any(s.request.sampling.temperature > 0 for s in sequences)  # on any rank, so that all do alike
        if self._draws:
            settings = [values + fill for values in settings_of([s.request.sampling for s in mine])]
            own.settings_4B[:, :rows] = self._upload(settings, torch.float32)
        self._sequences_W, self._filled = of_W, rows

    @torch.no_grad()
    def _step(self, of: _Rows, rows: int, draws: bool) -> _Answers:
        model = self.model
        batch = ForwardBatch.of_rows(of.tokens_B[:rows], of.positions_B[:rows], of.slots_B[:rows], rows)
        batch = replace(batch, observed=self._counts)
        hidden, reports = model.hidden(model.attend_to(batch, self.cache))
        part_BV = model.logits(hidden)
        if draws:
            logits_BV = gather_vocabulary(part_BV, model.params.vocab_size, self._parts)
            tokens_B, logprobs_B = sample_each(logits_BV, of.settings_4B[:, :rows], of.uniforms_B[:rows])
        else:
            tokens_B, logprobs_B = sample_likeliest(part_BV, model.layout.vocab[0], self._parts)
        of.tokens_B[:rows].copy_(tokens_B)
        of.logprobs_B[:rows].copy_(logprobs_B)
        of.positions_B[:rows].add_(of.advance_B[:rows])
        counts_LE = self._counted(reports, of.slots_B[:rows]) if self._counts else None
        packed = of.packed
        if model.counted_shadows is not None:  # what the ranks counted travels with what they sampled
            packed = torch.cat([packed, counts_LE.flatten().view(torch.uint8)])
        packed = self.context.all_gather(packed) if self._owners > 1 else packed.unsqueeze(0)
        return _Answers(reports, packed, counts_LE)

    def _counted(self, reports: list[MoEReport], slots_B: torch.Tensor) -> torch.Tensor:
        """How many rows with a sequence chose each expert: int64 [L, E]."""
        layers, experts = self.model.params.n_layers, self.model.params.num_experts
        keys_LBK = torch.stack([report.routing.experts_TK for report in reports]) + self._first_key_L11
        keys_LBK = keys_LBK.masked_fill((slots_B < 0)[:, None], layers * experts)
        return count_keys(keys_LBK, layers * experts + 1)[:-1].view(layers, experts)

    def _flight(self, run: Run[_Answers], wish: bool | None) -> Flight:
        wishes = torch.tensor([bool(wish)])
        if self.context.world_size > 1 and wish is not None:
            wishes = self._to_host(self.context.all_gather(self._upload([wish], torch.uint8)))
        packed, done = self._to_host(run.value.packed), None
        if self.context.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        reports = run.value.reports
        if run.replayed and self.model.shadows is not None:  # the graph's are those of its capture
            told = enumerate(reports)
            reports = [replace(report, shadows=self.model.shadows.report(layer)) for layer, report in told]
        return Flight(
            self._sequences_W, self._sequences_W[self._owner], reports, run.value.counts_LE, packed,
            len(self._own.slots_B), wishes, done, run.replayed, run.recapture_s,
        )  # fmt: skip

    def _upload(self, values: Many, dtype: torch.dtype) -> torch.Tensor:
        """On the device when it gets there; from pinned memory, which torch keeps until then."""
        pinned = self.context.device.type == "cuda"
        return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(self.context.device, non_blocking=True)

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        """A copy in memory that the device writes when it gets there."""
        pinned = self.context.device.type == "cuda"
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned).copy_(x, non_blocking=True)
