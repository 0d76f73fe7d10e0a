"""Runs step plans on memory that stays where it is: the next step reads on the device what the last one sampled.

::

    host      launch 1 │ launch 2, text of 1 │ launch 3, text of 2 │ …
    device             │ step 1 ───────────► │ step 2 ───────────► │ step 3 …

A step without chunks is a CUDA graph where the model allows it, and nothing goes to the device between two such steps
of the same greedy sequences. A step with chunks is the same forward: a graph as well up to ``MOST_IN_GRAPH`` prompt
tokens, which take the device less time than their launches take the host, and launched kernel by kernel above.

Under attention ``dp`` the ranks have sequences of their own. A step then ends in one small all-gather of what each
sampled, so that rank 0's host reads all answers, a step later as well.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from mixtralkit.distributed import RankContext
from mixtralkit.engine.flight import SAMPLED_SIZE, Flight, unpacked
from mixtralkit.engine.graphs import Graphs, Run
from mixtralkit.engine.requests import MOST_TOP_LOGPROBS
from mixtralkit.engine.sampler import (
    SlotRules,
    draw_key,
    gather_vocabulary,
    logprobs_of,
    sample_each,
    sample_likeliest,
    settings_of,
    uniforms,
)
from mixtralkit.engine.shapes import (
    MOST_IN_GRAPH,
    Prompts,
    Shape,
    all_shapes,
    bucket_sizes,
    fill_rows,
    sampled_of,
    shape_of,
)
from mixtralkit.engine.step_plan import Arrival, Rows, StepPlan
from mixtralkit.model.attention import CachedAttention
from mixtralkit.model.batch import ForwardBatch, Span
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.layer import MoEReport, StepRows
from mixtralkit.moe.tiers import Desk
from mixtralkit.ops.counting import count_keys
from mixtralkit.ops.hidden import Hidden

_NUMPY = {torch.int64: np.int64, torch.float32: np.float32}  # many times faster than torch with lists


class _Memory:
    """What a step reads and leaves. Row i is a sequence, or only fills the shape: slot -1, as all rows at first.

    ``tokens_B`` are a decode step's input and then any step's answer; these and ``logprobs_B`` share memory, so that
    one copy takes both to the host. ``advance_B`` is added to the positions after a decode step: 0 in rows without a
    sequence.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.packed = torch.zeros(SAMPLED_SIZE * rows, dtype=torch.uint8, device=device)
        self.tokens_B, self.logprobs_B = unpacked(self.packed)
        self.positions_B, self.advance_B = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.slots_B = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.settings_4B = torch.zeros(4, rows, device=device)
        self.uniforms_B = torch.zeros(rows, device=device)


@dataclass(frozen=True)
class _Answers:
    """What a step leaves on the device: its layers' reports, what every rank with sequences of its own has sampled and
    scored, packed [W, bytes], and the choices of each expert."""

    reports: list[MoEReport]
    packed: torch.Tensor
    counts_LE: torch.Tensor | None


class Runner:
    """Launches the steps of a model without waiting for them, those without chunks as CUDA graphs where these are on.

    Collective: every rank launches the same plans, under ``dp`` its own part of them. There all ranks run as many rows
    as the one with most needs, which may be none on this one.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, cuda_graphs: bool = True, counts_choices: bool = False
    ) -> None:
        """``counts_choices``: give every step's ``counts_LE``, as a part of it; shadows always have it."""
        self.model, self.cache, self.context = model, cache, model.context
        self._owners = model.ranks_with_own_sequences
        self._owner = model.context.rank if self._owners > 1 else 0
        # the ranks that have each a part of the vocabulary
        self._parts = model.context if model.sums is not None else RankContext(device=model.context.device)
        self._sizes = bucket_sizes(cache.slots)
        self._own = _Memory(cache.slots, self.context.device)
        self._graphs = Graphs(self.context.device, cuda_graphs and model.in_graphs(True))
        self._pads_prompts = self.context.device.type == "cuda" and model.in_graphs(False)
        self._prompts: dict[Shape, Prompts] = {}
        self._desks: dict[int, Desk] = {}  # by rows
        self._relocations = model.store.relocations
        self._in: dict[int, Arrival] = {}  # by slot
        self._draw_keys_S = np.zeros(cache.slots, np.uint64)
        self._slots_B = self._positions_B = np.zeros(0, np.int64)  # of the newest decode step's rows
        self._filled = 0  # rows that it was made up to
        self._rules: SlotRules | None = None  # from the first request on that asks
        layers, experts = model.params.n_layers, model.params.num_experts
        self._first_key_L11 = torch.arange(layers, device=self.context.device)[:, None, None] * experts
        self.counts_choices = counts_choices
        self._counts = counts_choices or model.counted_shadows is not None

    @torch.no_grad()
    def launch(self, plan: StepPlan, observed: bool = False, may_capture: bool = True) -> Flight:
        """Starts a step.

        Args:
            observed: ``Flight.batch`` is wanted.
            may_capture: False runs a decode step kernel by kernel where it has no graph yet; the same on every rank.
        """
        if self._relocations != self.model.store.relocations:  # what graphs read has other addresses now
            self._graphs.forget()
            self._desks.clear()
            self._relocations = self.model.store.relocations
        tables = plan.tables[self._owner]
        self.cache.place([(slot, at + i, page) for slot, at, pages in tables for i, page in enumerate(pages)])
        mine = [new for new in plan.arrivals if new.owner == self._owner]
        for new in mine:
            self._in[new.slot], self._draw_keys_S[new.slot] = new, draw_key(*new.drawn_by)
        self._heed(plan, mine)
        run = self._mixed if plan.has_chunks else self._decode
        return run(plan, observed, may_capture)

    def _heed(self, plan: StepPlan, mine: list[Arrival]) -> None:
        """What sequences ask of their logits goes to their slots."""
        if self._rules is None and (plan.asks or any(new.asked is not None for new in mine)):
            self._rules = SlotRules(self.cache.slots, self.model.params.vocab_size, self.context.device)
        if self._rules is None:
            return
        for new in mine:
            self._rules.place(new.slot, new.asked)
        if plan.masks and plan.masks[self._owner]:
            slots, masks = zip(*plan.masks[self._owner], strict=True)
            self._rules.allow(slots, np.stack([np.frombuffer(mask, dtype=np.int32) for mask in masks]))

    @torch.no_grad()
    def warm_up(self) -> None:
        """Makes the graphs of all greedy and drawn steps, the largest first, whose memory the others then share; other
        kinds are made when they come. Collective; no step may be in flight. Nothing where there are no graphs."""
        if not self._graphs.is_on:
            return
        self._own.slots_B.fill_(-1)
        shapes = all_shapes(len(self._own.slots_B))
        for draws in (False, True):
            for shape in shapes if self._pads_prompts else ():
                self._run_prompts(shape, draws, True)
            for rows in reversed(self._sizes):
                self._run_decode(rows, (draws, False, False, False), True)

    def observed(self, flight: Flight, surplus: Many[int]) -> tuple[ForwardBatch, list[MoEReport]] | None:
        """This rank's rows as an ``Observe`` takes them, but for those of the slots in ``surplus`` and those that were
        seen before; None for no row.

        To be called before the next step is launched.
        """
        again = {chunk.slot: chunk.again for chunk in flight.plan.chunks[self._owner]}
        spans = []
        for span in flight.batch.spans:
            skipped = again.get(span.slot, 0)
            if span.slot not in surplus and span.start + skipped < span.stop:
                spans.append(replace(span, start=span.start + skipped, position=span.position + skipped))
        if flight.kind == "mixed" and spans == list(flight.batch.spans):
            return flight.batch, flight.reports
        if not spans:
            return None
        rows = [row for span in spans for row in range(span.start, span.stop)]
        ends = np.cumsum([span.stop - span.start for span in spans]).tolist()
        moved = [replace(s, start=end - (s.stop - s.start), stop=end) for s, end in zip(spans, ends, strict=True)]
        rows_T = self._upload(rows, torch.int64)
        batch = replace(flight.batch.take(rows_T), spans=tuple(moved))
        # indexing copies, so that observers may keep what the next step overwrites
        return batch, [
            replace(r, routing=r.routing.take(rows_T), dropped=r.dropped.clone(), rerouted=r.rerouted.clone())
            for r in flight.reports
        ]

    def _decode(self, plan: StepPlan, observed: bool, may_capture: bool) -> Flight:
        if plan.rows is not None:
            self._place(plan)
        else:
            self._positions_B = self._positions_B + 1
        own, rows, batch = self._own, self._filled, None
        if plan.draws:
            self._draw(self._slots_B, self._positions_B)
        if observed:
            kept = (own.tokens_B[:rows], own.positions_B[:rows], own.slots_B[:rows])
            firsts = (self._slots_B.tolist(), self._positions_B.tolist())
            batch = ForwardBatch(*(x.clone() for x in kept), self._spans([1] * len(self._slots_B), *firsts))
        run = self._run_decode(rows, (plan.draws, plan.asks, bool(plan.tops), plan.routed), may_capture)
        return self._flight(plan, "graph" if run.replayed else "launched", run, batch, rows)

    def _run_decode(self, rows: int, kind: tuple[bool, ...], may_capture: bool) -> Run[_Answers]:
        if self.model.store.tiers is not None and self._graphs.replays((rows, *kind), may_capture):
            return self._run_decode_at_desk(rows, kind)
        return self._graphs.run(
            (rows, *kind),
            lambda: self._decoded(self._own, rows, *kind),
            lambda: self._decoded(_Memory(rows, self.context.device), rows, *kind),
            may_capture,
        )

    def _run_decode_at_desk(self, rows: int, kind: tuple[bool, ...]) -> Run[_Answers]:
        """The same where the host answers for experts that are not on the GPU, while the graph runs."""
        tiers = self.model.store.tiers
        if rows not in self._desks:
            self._desks[rows] = Desk(tiers, rows)

        def decoded(of: _Memory, desk: Desk) -> _Answers:
            with tiers.at(desk):
                return self._decoded(of, rows, *kind)

        self._desks[rows].open()
        run = self._graphs.run(
            (rows, *kind),
            lambda: decoded(self._own, self._desks[rows]),
            # rows without a sequence ask for no expert, so that nothing waits
            lambda: decoded(_Memory(rows, self.context.device), Desk(tiers, rows)),
        )
        self._desks[rows].serve()
        return run

    def _place(self, plan: StepPlan) -> None:
        """Gives each of this rank's sequences a row; where its last token is on the device, that moves there."""
        mine, most, own = plan.rows[self._owner], max(len(of.slots) for of in plan.rows), self._own
        rows = next(size for size in self._sizes if size >= most)
        columns_4B = np.zeros((4, rows), np.int64)
        columns_4B[::3] = -1
        columns_4B[:, : len(mine.slots)] = mine.sources, mine.tokens, mine.positions, mine.slots
        _, _, self._positions_B, self._slots_B = columns_4B[:, : len(mine.slots)]
        sources_B, tokens_B, positions_B, slots_B = self._upload(columns_4B, torch.int64)
        own.tokens_B[:rows] = self._first_tokens(sources_B, tokens_B)
        own.positions_B[:rows] = positions_B
        own.slots_B[:rows] = slots_B
        own.advance_B[:rows] = slots_B >= 0
        if plan.draws:
            self._set([self._in[slot] for slot in mine.slots], rows - len(mine.slots))
        self._filled = rows

    def _first_tokens(self, sources_B: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
        """The last step's answers from its rows ``sources_B``; where these are -1, ``tokens_B``."""
        return torch.where(sources_B >= 0, self._own.tokens_B[sources_B.clamp(min=0)], tokens_B)

    def _set(self, rows: list[Arrival], fill: int = 0) -> None:
        settings = [values + [0] * fill for values in settings_of([row.sampling for row in rows])]
        self._own.settings_4B[:, : len(rows) + fill] = self._upload(settings, torch.float32)

    def _draw(self, slots_N: np.ndarray, positions_N: np.ndarray) -> None:
        """Numbers that decide what each row draws behind its position."""
        drawn_N = uniforms(self._draw_keys_S[slots_N], positions_N + 1)
        self._own.uniforms_B[: len(drawn_N)].copy_(self._upload(drawn_N, torch.float32))

    def _decoded(self, of: _Memory, rows: int, draws: bool, asks: bool, tops: bool, routed: bool) -> _Answers:
        batch = self._batch_of(of, rows, routed)
        return self._sampled(of, batch, *self.model.hidden(batch), draws, asks, tops, routed)

    def _batch_of(self, of: _Memory, rows: int, observed: bool = False) -> ForwardBatch:
        batch = ForwardBatch.of_rows(of.tokens_B[:rows], of.positions_B[:rows], of.slots_B[:rows], rows)
        return self.model.attend_to(replace(batch, observed=self._counts or observed), self.cache)

    def _sampled(
        self, of: _Memory, batch: ForwardBatch, hidden: Hidden, reports: list[MoEReport], draws: bool, asks: bool,
        tops: bool, routed: bool,
    ) -> _Answers:  # fmt: skip
        rows = len(batch)
        part_BV = self.model.logits(hidden)
        self._sample(part_BV, of, draws, (batch.slots_T, batch.positions_T) if asks else None)
        of.positions_B[:rows].add_(of.advance_B[:rows])
        counts_LE = self._counted(reports, of.slots_B[:rows]) if self._counts else None
        more = [self._tops(part_BV, len(of.slots_B))] if tops else []
        more += [_routed(reports, rows)] if routed else []
        return self._answers(of, reports, counts_LE, more)

    def _mixed(self, plan: StepPlan, observed: bool, may_capture: bool) -> Flight:
        if (shape := self._shape(plan, observed)) is not None:
            return self._mixed_in_graph(plan, shape, may_capture)
        mine, chunks, own = plan.rows[self._owner], plan.chunks[self._owner], self._own
        lengths = [1] * len(mine.slots) + [len(chunk.ids) for chunk in chunks]
        firsts = (mine.slots + [c.slot for c in chunks], mine.positions + [c.start for c in chunks])
        spans = self._spans(lengths, *firsts)
        rows_3T = np.empty((3, sum(lengths)), np.int64)
        fill_rows(rows_3T, mine, chunks)
        tokens_T, positions_T, slots_T = self._upload(rows_3T, torch.int64)
        self._continue(tokens_T, mine)
        of_chunks = list(zip(chunks, spans[len(mine.slots) :], strict=True))
        sampled = [(s.slot, s.stop - 1, s.position) for s in spans[: len(mine.slots)]]
        sampled += [(s.slot, s.stop - 1, s.end - 1) for chunk, s in of_chunks if chunk.is_sampled]
        scored = [s.start + c.skipped + i for c, s in of_chunks for i in range(len(c.targets))]
        rows_N = self._upload([row for _, row, _ in sampled] + scored, torch.int64)
        most = _most_rows(plan)
        whole = observed or self._counts or plan.routed  # reports of all rows are wanted in the last layer too
        batch = ForwardBatch(tokens_T, positions_T, slots_T, spans, StepRows(most), observed=whole)
        batch = self.model.attend_to(batch, self.cache)
        if plan.draws and sampled:
            self._set([self._in[slot] for slot, _, _ in sampled])
            self._draw(*np.array(sampled)[:, ::2].T)
        part_NV, reports, counts_LE = self._through(batch, rows_N)
        part_BV, part_MV = part_NV[: len(sampled)], part_NV[len(sampled) :]
        asking = None
        if plan.asks:
            asking = self._upload([[s for s, _, _ in sampled], [p for _, _, p in sampled]], torch.int64).unbind()
        self._sample(part_BV, own, plan.draws, asking)
        most_scored = max(sum(len(chunk.targets) for chunk in of) for of in plan.chunks)
        scores_M = torch.zeros(most_scored, device=self.context.device)
        more = [scores_M.view(torch.uint8)]
        if most_scored:
            whole_MV = self._whole(part_MV)
            targets_M = self._upload([t for chunk in chunks for t in chunk.targets], torch.int64)
            scores_M[: len(scored)] = logprobs_of(whole_MV, targets_M)
        if plan.tops:
            more += [self._tops(part_BV, len(own.slots_B)), self._tops(part_MV, most_scored)]
        more += [_routed(reports, most)] if plan.routed else []
        answers = self._answers(own, reports, counts_LE, more)
        return self._flight(plan, "mixed", Run(answers), batch, most, most_scored)

    def _shape(self, plan: StepPlan, observed: bool) -> Shape | None:
        """What a step with chunks is made up to, so that few graphs serve all; None where it runs without one."""
        special = observed or plan.tops or plan.asks or plan.routed
        special = special or any(chunk.targets for of in plan.chunks for chunk in of)
        tokens = max(sum(len(chunk.ids) for chunk in of) for of in plan.chunks)
        if special or not self._pads_prompts or tokens > MOST_IN_GRAPH:
            return None
        shape = shape_of(max(len(of.slots) for of in plan.rows), tokens, len(self._own.slots_B))
        return shape if max(len(of) for of in plan.chunks) <= shape.spans else None

    def _mixed_in_graph(self, plan: StepPlan, shape: Shape, may_capture: bool) -> Flight:
        mine, chunks = plan.rows[self._owner], plan.chunks[self._owner]
        prompts, drawn = self._prompts_of(shape), sampled_of(mine, chunks)
        prompts.packed.copy_(self._upload(prompts.columns(mine, chunks), torch.int64))
        self._continue(prompts.tokens_T, mine)
        if plan.draws and drawn:
            self._set([self._in[slot] for slot, _ in drawn], shape.sampled - len(drawn))
            self._draw(*np.array(drawn).T)
        run = self._run_prompts(shape, plan.draws, may_capture)
        return self._flight(plan, "mixed", run, None, shape.rows + shape.tokens)

    def _prompts_of(self, shape: Shape) -> Prompts:
        if shape not in self._prompts:
            self._prompts[shape] = Prompts(shape, self.context.device)
        return self._prompts[shape]

    def _run_prompts(self, shape: Shape, draws: bool, may_capture: bool) -> Run[_Answers]:
        prompts = self._prompts_of(shape)  # not in the graph, whose replays would make them anew
        device, slots = self.context.device, len(self._own.slots_B)
        return self._graphs.run(
            (shape, draws),
            lambda: self._prompted(self._own, prompts, draws),
            lambda: self._prompted(_Memory(slots, device), Prompts(shape, device), draws),
            may_capture,
        )

    def _prompted(self, of: _Memory, prompts: Prompts, draws: bool) -> _Answers:
        shape, window = prompts.shape, self.model.params.sliding_window
        attend = CachedAttention.of_shape(self.cache, window, shape.rows, shape.tokens, prompts.spans_S4.int())
        rows = StepRows(shape.rows + shape.tokens, valid_T=prompts.slots_T)
        batch = ForwardBatch(prompts.tokens_T, prompts.positions_T, prompts.slots_T, (), rows, attend)
        part_NV, reports, counts_LE = self._through(replace(batch, observed=self._counts), prompts.rows_N)
        self._sample(part_NV, of, draws, None)
        return self._answers(of, reports, counts_LE, [])

    def _through(
        self, batch: ForwardBatch, rows_N: torch.Tensor
    ) -> tuple[torch.Tensor, list[MoEReport], torch.Tensor | None]:
        """This rank's logits of ``rows_N``, the layers' reports, and the choices of each expert where they count."""
        whole = batch.observed or len(rows_N) == len(batch)
        hidden, reports = self.model.hidden(replace(batch, wanted_N=None if whole else rows_N))
        part_NV = self.model.logits(hidden.take(rows_N) if whole else hidden)
        return part_NV, reports, self._counted(reports, batch.slots_T) if self._counts else None

    def _continue(self, tokens_T: torch.Tensor, mine: Rows) -> None:
        """The first rows begin with what the last step left on the device, where ``sources`` say so."""
        if max(mine.sources, default=-1) >= 0:
            held = slice(len(mine.slots))
            tokens_T[held] = self._first_tokens(self._upload(mine.sources, torch.int64), tokens_T[held])

    def _spans(self, lengths: list[int], slots: list[int], positions: list[int]) -> tuple[Span, ...]:
        """Of sequences one after the other, each from its first position."""
        spans, start = [], 0
        for length, slot, position in zip(lengths, slots, positions, strict=True):
            spans.append(Span(slot, position, start, start + length, self._in[slot].number))
            start += length
        return tuple(spans)

    def _sample(
        self, part_BV: torch.Tensor, of: _Memory, draws: bool, asking: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """The next token of each row, into the first of ``of``; nothing waits.

        ``asking``: the rows' slots and positions where some ask something of their logits.
        """
        rows = len(part_BV)
        if draws or asking is not None:  # all ranks with a part of the vocabulary have the same rows
            logits_BV, drawn, adjusted_BV = self._whole(part_BV), (None, None), None
            if draws:
                drawn = (of.settings_4B[:, :rows], of.uniforms_B[:rows])
            if asking is not None:
                adjusted_BV = self._rules.adjusted(logits_BV, *asking)
            tokens_B, logprobs_B = sample_each(logits_BV, *drawn, adjusted_BV)
            if asking is not None:
                self._rules.count(asking[0], tokens_B)
        else:
            tokens_B, logprobs_B = sample_likeliest(part_BV, self.model.layout.vocab[0], self._parts)
        of.tokens_B[:rows].copy_(tokens_B)
        of.logprobs_B[:rows].copy_(logprobs_B)

    def _whole(self, part_NV: torch.Tensor) -> torch.Tensor:
        return gather_vocabulary(part_NV, self.model.params.vocab_size, self._parts)

    def _tops(self, part_NV: torch.Tensor, room: int) -> torch.Tensor:
        """The likeliest tokens of each row and their log-probabilities, as bytes for ``room`` rows."""
        logits_NV = self._whole(part_NV)
        tops_NK, ids_NK = logits_NV.topk(MOST_TOP_LOGPROBS, dim=-1)
        found_N2K = torch.stack([ids_NK.float(), tops_NK - logits_NV.logsumexp(-1, keepdim=True)], dim=1)
        return F.pad(found_N2K, (0, 0, 0, 0, 0, room - len(found_N2K))).flatten().view(torch.uint8)

    def _answers(
        self, of: _Memory, reports: list[MoEReport], counts_LE: torch.Tensor | None, more: list[torch.Tensor]
    ) -> _Answers:
        parts = [of.packed, *more]
        if self.model.counted_shadows is not None:  # what the ranks counted travels with what they sampled
            parts.append(counts_LE.flatten().view(torch.uint8))
        packed = torch.cat(parts) if len(parts) > 1 else of.packed
        packed = self.context.all_gather(packed) if self._owners > 1 else packed.unsqueeze(0)
        return _Answers(reports, packed, counts_LE)

    def _counted(self, reports: list[MoEReport], slots_B: torch.Tensor) -> torch.Tensor:
        """How many rows with a sequence chose each expert: int64 [L, E]."""
        layers, experts = self.model.params.n_layers, self.model.params.num_experts
        keys_LBK = torch.stack([report.routing.experts_TK for report in reports]) + self._first_key_L11
        keys_LBK = keys_LBK.masked_fill((slots_B < 0)[:, None], layers * experts)
        return count_keys(keys_LBK, layers * experts + 1)[:-1].view(layers, experts)

    def _flight(
        self, plan: StepPlan, kind: str, run: Run[_Answers], batch: ForwardBatch | None, rows: int, scored: int = 0
    ) -> Flight:
        packed, done = self._to_host(run.value.packed), None
        if self.context.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        reports = run.value.reports
        if run.replayed and self.model.shadows is not None:  # the graph's are those of its capture
            told = enumerate(reports)
            reports = [replace(report, shadows=self.model.shadows.report(layer)) for layer, report in told]
        routed = (rows, self.model.params.n_layers, self.model.params.num_experts_per_tok)
        return Flight(
            plan, kind, batch, reports, run.value.counts_LE, packed, len(self._own.slots_B), scored, routed, done,
            run.recapture_s,
        )  # fmt: skip

    def _upload(self, values: Many | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """On the device when it gets there; from pinned memory, which torch keeps until then."""
        made = torch.from_numpy(np.asarray(values, _NUMPY[dtype]))
        made = made.pin_memory() if self.context.device.type == "cuda" else made
        return made.to(self.context.device, non_blocking=True)

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        """A copy in memory that the device writes when it gets there."""
        pinned = self.context.device.type == "cuda"
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned).copy_(x, non_blocking=True)


def _most_rows(plan: StepPlan) -> int:
    """Of any rank."""
    each = zip(plan.rows, plan.chunks, strict=True)
    return max(len(rows.slots) + sum(len(chunk.ids) for chunk in of) for rows, of in each)


def _routed(reports: list[MoEReport], rows: int) -> torch.Tensor:
    """Experts of a step's rows and of so many more as make ``rows``: int16 [rows, L, K], as bytes."""
    experts_TLK = torch.stack([report.routing.experts_TK for report in reports], dim=1).to(torch.int16)
    return F.pad(experts_TLK, (0, 0, 0, 0, 0, rows - len(experts_TLK))).flatten().view(torch.uint8)
