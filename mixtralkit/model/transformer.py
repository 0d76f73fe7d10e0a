"""The Mixtral: embedding, blocks of attention and experts, output matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from mixtralkit.config import ModelConfig, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.fastmoe.backend import FastMoELayer
from mixtralkit.layout import RankLayout, canonical_shapes
from mixtralkit.model.attention import Attend, Attention, CachedAttention, FreshAttention
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.norm import RMSNorm
from mixtralkit.model.rope import rotations
from mixtralkit.model.step import StepBatch
from mixtralkit.moe.gate import Routing
from mixtralkit.moe.layer import MoELayer, MoEReport
from mixtralkit.moe.move import MoveReport
from mixtralkit.moe.shadow import ShadowCache
from mixtralkit.moe.two_phase import Flight, TwoPhase
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.plan import ExpertPlan

MANY_ROWS = 2**20  # any prefill's: sums of rows take memory for some thousands and go in pieces beyond
Observe = Callable[[StepBatch, list[MoEReport]], None]


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)).

    Each sum is made together with the norm that follows it, which for the second is another block's.
    """

    def __init__(
        self,
        layer: int,
        layout: RankLayout,
        context: RankContext,
        dtype: torch.dtype,
        options: MoEOptions,
        nodes: tuple[RankContext, RankContext] | None,
        shadow_cache: ShadowCache | None,
    ) -> None:
        super().__init__()
        config = layout.config
        self.attention = Attention(layer, layout, context, dtype)
        moe_layer = FastMoELayer if options.backend == "fastmoe" else MoELayer
        self.feed_forward = moe_layer(layer, layout, context, dtype, options, nodes, shadow_cache)
        self.feed_forward.leaves_parts = layout.parallel.attention == "tp"  # the block adds them
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype, context.device)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype, context.device)

    def forward(
        self,
        x_TD: torch.Tensor,
        normed_TD: torch.Tensor,
        following: RMSNorm,
        rope: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
        sums: RowReducer | None,
        rows_per_rank: int | None,
        flight: Flight | None,
        wanted_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, MoEReport]:
        """Rows and their ``attention_norm`` to the block's rows and their norm by ``following``; what experts did.

        ``sums`` adds what the ranks have each a part of; None where each has the whole. Of all rows keys and values are
        kept, but only ``wanted_N`` go on after that; None means all.
        """
        out_ND = self.attention(normed_TD, rope, attend, wanted_N)
        x_TD, normed_TD = _add(out_ND, x_TD if wanted_N is None else x_TD[wanted_N], self.ffn_norm, sums)
        y_TD, report = self.feed_forward(normed_TD, rows_per_rank, flight)
        return *_add(y_TD, x_TD, following, sums), report


def _add(
    y_TD: torch.Tensor, x_TD: torch.Tensor, norm: RMSNorm, sums: RowReducer | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, or x + the ranks' y, and its norm."""
    return norm.after_sum(x_TD, y_TD) if sums is None else sums.add_norm(y_TD, x_TD, norm.weight, norm.eps)


class Transformer(nn.Module):
    """One rank's part of a Mixtral.

    Parameters are uninitialised on ``context.device`` and named as ``layout.shapes()``; a checkpoint or
    ``initialize`` fills them. Under attention ``tp`` all ranks pass the same tokens; under ``dp`` each passes its
    own, and ranks without tokens still call, because the experts of the others wait for their answer.
    """

    def __init__(
        self,
        layout: RankLayout,
        context: RankContext,
        dtype: torch.dtype = torch.float32,
        options: MoEOptions | None = None,
    ) -> None:
        super().__init__()
        config = layout.config
        self.layout, self.context, self.dtype = layout, context, dtype
        self.options = MoEOptions() if options is None else options
        self.cache: KVCache | None = None
        self.relocations = 0
        like = {"dtype": dtype, "device": context.device}
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, _weight=None, **like)
        per_node = layout.plan.ranks_per_node
        self.is_two_stage = bool(per_node) and 1 < per_node < context.world_size
        nodes = context.split_nodes(per_node) if self.is_two_stage else None
        self.shadow_cache = ShadowCache.for_model(layout, context, dtype, self.options)
        self.layers = nn.ModuleList(
            Block(i, layout, context, dtype, self.options, nodes, self.shadow_cache) for i in range(config.n_layers)
        )
        moe_layers = [block.feed_forward for block in self.layers]
        faster = self.options.faster
        travel = context.world_size > 1 and layout.parallel == ParallelConfig("dp", "ep")
        if faster.schedule and travel and not moe_layers[0].in_chunks and context.is_first:
            warnings.warn(
                "the smart schedule is off: these GPUs reach each other's memory, where chunks never paid; "
                "FMOE_FASTER_SCHEDULE_FORCE=1 keeps it on",
                stacklevel=2,
            )
        self.two_phase = TwoPhase.for_model(moe_layers, config, context, self.options)
        self.norm = RMSNorm(config.dim, config.norm_eps, **like)
        self.output = nn.Linear(config.dim, layout.vocab[1] - layout.vocab[0], bias=False, **like)
        self.requires_grad_(False)

    @property
    def params(self) -> ModelConfig:
        return self.layout.config

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's parameters under the names of ``layout.shapes()``."""
        return {name.replace("feed_forward.experts.", "feed_forward."): p for name, p in self.named_parameters()}

    def allocate_cache(self) -> KVCache:
        """Takes this rank's KV cache for sequences of ``params.max_seq_len`` tokens; kept.

        ``params.max_batch_size`` counts sequences over all ranks: under ``dp`` a rank has room for its share.
        """
        slots = self.sequences_per_rank
        self.cache = KVCache.allocate(self.layout, slots, self.params.max_seq_len, self.dtype, self.context.device)
        return self.cache

    @property
    def ranks_with_own_sequences(self) -> int:
        """How many ranks divide the sequences among them: all under attention ``dp``, one under ``tp``."""
        return self.context.world_size if self.layout.parallel.attention == "dp" else 1

    @property
    def sequences_per_rank(self) -> int:
        """Most sequences of a rank at a time: its share of ``params.max_batch_size``."""
        return -(-self.params.max_batch_size // self.ranks_with_own_sequences)

    @cached_property
    def sums(self) -> RowReducer | None:
        """Sums of rows of which every rank has a part; None where no such rows are.

        Takes its memory, collectively, when first asked for: in the first step.
        """
        if self.layout.parallel.attention == "dp" or self.context.world_size == 1:
            return None
        return RowReducer.create(self.context, MANY_ROWS, self.params.dim, self.dtype)

    @cached_property
    def peers(self) -> SymmetricExchange | None:
        """The way of rows to their experts and back in static shapes; None where rows do not travel, or not so.

        Room for a decode step of all sequences, or for ``options.symmetric_rows`` if these are more. Where the ranks'
        GPUs reach each other's memory, the layers' exchanges of static shape go this way too. Takes its memory,
        collectively, when first asked for: in the first step of static shape.
        """
        options, parallel = self.options, self.layout.parallel
        travel = self.context.world_size > 1 and (parallel.attention, parallel.experts) == ("dp", "ep")
        wanted = self.context.device.type == "cuda" if options.symmetric_rows is None else options.symmetric_rows > 0
        ours = options.backend == "mixtralkit" and options.exchange != "exact" and wanted
        if not travel or not ours or self.is_two_stage or self.shadow_cache is not None or self.two_phase is not None:
            return None
        rows = max(self.sequences_per_rank, options.symmetric_rows or 0)
        peers = SymmetricExchange.create(
            self.context, rows, self.params.dim, self.params.num_experts_per_tok, self.dtype
        )
        if peers.memory is not None:
            for block in self.layers:
                block.feed_forward.use_peers(peers)
        return peers

    def adopt(self, layer: int, plan: ExpertPlan) -> MoveReport:
        """Goes over to ``plan``, which differs from the running one in ``layer`` alone, between two steps.

        Collective; see ``MoELayer.adopt``. ``relocations`` counts the times that experts got other addresses.
        """
        layout = replace(self.layout, plan=plan)
        report = self.layers[layer].feed_forward.adopt(layout)
        self.relocations += not report.in_place
        self.layout = layout
        for block in self.layers:
            block.feed_forward.layout = layout
        return report

    @torch.no_grad()
    def step(
        self,
        batch: StepBatch,
        cache: KVCache,
        rows_N: torch.Tensor,
        rows_per_rank: int | None = None,
        observe: Observe | None = None,
    ) -> torch.Tensor:
        """Runs the batch's tokens through the model, extending ``cache``; float32 logits [N, V] of rows ``rows_N``.

        Collective. The rows count among the flattened tokens; every rank of ``tp`` gets the whole vocabulary.

        Args:
            rows_per_rank: a promise that no rank has more tokens in this step, for exchanges of static shape.
            observe: called with the step and every layer's report, the reports' tensors still on the device.
        """
        if rows_per_rank is not None:
            _ = self.peers  # the layers go by it
        attend = CachedAttention(batch, cache, self.params.sliding_window)
        # Of the last block's rows only those asked for matter, unless somebody looks at their experts too, or the rows
        # of an expert that has a capacity would become others.
        few = len(rows_N) < len(batch.tokens_T) and observe is None and self.layout.plan.cold_capacity_factor is None
        wanted_N = rows_N if few else None
        normed_TD, reports = self._hidden(batch.tokens_T, batch.positions_T, attend, rows_per_rank, wanted_N)
        if observe is not None:
            observe(batch, reports)
        return self._logits(normed_TD if few else normed_TD[rows_N])

    @torch.no_grad()
    def forward(self, tokens_BT: torch.Tensor, start_pos: int = 0) -> torch.Tensor:
        """Float32 logits [B, T, V] of every position, the sequences continuing at ``start_pos`` of the own cache.

        The same tokens on every rank. Under ``dp`` each rank runs its share of the sequences.
        """
        batch_size, length = tokens_BT.shape
        if start_pos + length > self.params.max_seq_len:
            raise ValueError(f"tokens up to {start_pos + length} exceed max_seq_len ({self.params.max_seq_len})")
        if batch_size > self.params.max_batch_size:
            raise ValueError(f"batch of {batch_size} sequences exceeds max_batch_size ({self.params.max_batch_size})")
        ranks = self.ranks_with_own_sequences
        share = -(-batch_size // ranks)
        first = share * self.context.rank if ranks > 1 else 0
        own = tokens_BT[first : first + share].tolist()
        batch = StepBatch.build([(i, start_pos, ids) for i, ids in enumerate(own)], self.context.device)
        cache = self.cache if self.cache is not None else self.allocate_cache()
        logits = self.step(batch, cache, torch.arange(len(batch.tokens_T), device=self.context.device))
        logits = logits.unflatten(0, (len(own), length)) if own else logits.new_zeros(0, length, logits.shape[-1])
        if ranks == 1:
            return logits
        padded = torch.cat([logits, logits.new_zeros(share - len(own), *logits.shape[1:])])
        return self.context.all_gather(padded).flatten(0, 1)[:batch_size]

    def train_logits(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
        """Logits [B, T, V] with gradients and without a cache, and every layer's routing, for training."""
        batch_size, length = tokens_BT.shape
        positions_T = torch.arange(length, device=tokens_BT.device).repeat(batch_size)
        attend = FreshAttention(batch_size, self.params.sliding_window)
        normed_TD, reports = self._hidden(tokens_BT.flatten(), positions_T, attend)
        logits_BTV = self.output(normed_TD).unflatten(0, (batch_size, length))
        return logits_BTV, [report.routing for report in reports]

    def _hidden(
        self,
        tokens_T,
        positions_T,
        attend: Attend,
        rows_per_rank: int | None = None,
        wanted_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[MoEReport]]:
        """The last norm of every token [T, D], or of ``wanted_N`` alone, and what each layer did."""
        rope = rotations(positions_T, self.params.head_dim, self.params.rope_theta)
        flight = None if self.two_phase is None else self.two_phase.begin()
        x_TD, reports = self.tok_embeddings(tokens_T), []
        norms = [*(block.attention_norm for block in self.layers), self.norm]
        normed_TD = norms[0](x_TD)
        ways = (rope, attend, self.sums, rows_per_rank, flight)
        for block, following in zip(self.layers, norms[1:], strict=True):
            wanted = wanted_N if following is self.norm else None
            x_TD, normed_TD, report = block(x_TD, normed_TD, following, *ways, wanted)
            reports.append(report)
        return normed_TD, reports

    def _logits(self, normed_ND: torch.Tensor) -> torch.Tensor:
        logits = self.output(normed_ND).float()
        if self.layout.parallel.attention == "dp" or self.context.world_size == 1:
            return logits
        vocab, world = self.params.vocab_size, self.context.world_size
        widest = -(-vocab // world)
        parts_WNV = self.context.all_gather(F.pad(logits, (0, widest - logits.shape[1])))
        widths = [vocab * (w + 1) // world - vocab * w // world for w in range(world)]
        return torch.cat([part[:, :width] for part, width in zip(parts_WNV, widths, strict=True)], dim=1)

    @torch.no_grad()
    def initialize(self, seed: int, std: float = 0.02) -> None:
        """Random weights, normal(0, std), norms 1: the same whole model however it is cut over ranks."""
        tensors = self.named_tensors()
        shapes = canonical_shapes(self.params)
        numbers = {name: number for number, name in enumerate(shapes)}
        for piece in self.layout.pieces():
            target = tensors[piece.target][piece.at]
            if piece.columns is None:
                target.fill_(1.0)
                continue
            generator = torch.Generator(self.context.device).manual_seed(seed * len(numbers) + numbers[piece.source])
            whole = torch.empty(shapes[piece.source], dtype=target.dtype, device=target.device)
            whole.normal_(0.0, std, generator=generator)
            target.copy_(whole[slice(*piece.rows), slice(*piece.columns)])
