"""The Mixtral: embedding, blocks of attention and experts, output matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from mixtralkit.checkpoint.quantising import put_packed
from mixtralkit.config import CacheOptions, ModelConfig, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.fastmoe.backend import FastMoELayer
from mixtralkit.layout import RankLayout, canonical_shapes
from mixtralkit.model.attention import CachedAttention, FreshAttention
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.block import Block
from mixtralkit.model.coherent import run_coherent
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.norm import RMSNorm
from mixtralkit.model.projection import Projection
from mixtralkit.moe.dispatch import Dispatchers
from mixtralkit.moe.layer import MoELayer, MoEReport
from mixtralkit.moe.router import Routing
from mixtralkit.moe.shadow import Shadows, shadow_room
from mixtralkit.moe.store import ExpertStore
from mixtralkit.moe.tiers import TierSetup
from mixtralkit.moe.transfers import MoveReport
from mixtralkit.moe.two_phase import TwoPhase
from mixtralkit.ops.all_reduce import RowReducer
from mixtralkit.ops.cpu.memory import ask_for_large_pages
from mixtralkit.ops.experts import takes_packed
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.ragged_attention import only_the_device
from mixtralkit.ops.symmetric_exchange import SymmetricExchange
from mixtralkit.planning.dispatchers import IN_GRAPHS
from mixtralkit.planning.plan import ExpertPlan

MOST_SUMMED_ROWS = 2**20  # any prompt's: sums of rows take memory for some thousands and go in pieces beyond
SYMMETRIC_ROWS = 8192  # of a rank that symmetric memory has room for on GPUs unless options say otherwise
Observe = Callable[[ForwardBatch, list[MoEReport]], None]


class Transformer(nn.Module):
    """One rank's part of a Mixtral.

    Parameters are uninitialised on ``context.device`` and named as ``layout.shapes()``; a checkpoint or
    ``initialize`` fills them. Under attention ``tp`` and ``coherent`` all ranks pass the same tokens; under ``dp`` each
    passes its own, and ranks without tokens still call, because the experts of the others wait for their answer.
    """

    def __init__(
        self,
        layout: RankLayout,
        context: RankContext,
        dtype: torch.dtype = torch.float32,
        options: MoEOptions | None = None,
        tiers: TierSetup | None = None,
    ) -> None:
        """Takes the memory between GPUs that the layout's exchanges need. Collective.

        ``tiers`` keeps experts in host memory.
        """
        super().__init__()
        config, options = layout.config, MoEOptions() if options is None else options
        self.layout, self.context, self.dtype, self.options = layout, context, dtype, options
        self.cache: KVCache | None = None
        like = {"dtype": dtype, "device": context.device}
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, _weight=None, **like)
        self.sums = self._take_sums()
        self.dispatchers = Dispatchers.create(layout, context, options, self.sums, self._take_symmetric_memory())
        if tiers is not None and options.backend == "fastmoe":
            raise ValueError("moe_backend ('fastmoe') needs all experts on the GPUs: not with gpu_memory_gb")
        self.store = ExpertStore(layout, context, dtype, shadow_room(layout, context, dtype, options), tiers=tiers)
        one_holder = self.dispatchers.name(True, True) in ("symmetric", "static")
        self.shadows = Shadows(self.store, options.faster, one_holder) if self.store.room else None
        self.two_phase = TwoPhase.for_model(self.shadows, config, options)
        self.layers = nn.ModuleList(
            Block(layer, layout, context, dtype, self._feed_forward(layer)) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, **like)
        self.output = Projection(*layout.projections["output"], layout.attention_weights, **like)
        self.requires_grad_(False)
        ask_for_large_pages(self.parameters())
        if self.store.tiers is not None:
            following = list(self.layers)[1:]
            routers = [(block.ffn_norm.of, block.feed_forward.gate.weight) for block in following]
            self.store.tiers.routers.update(enumerate(routers))
        if options.faster.schedule and context.is_first and self.dispatchers.name(True, False) == "symmetric":
            warnings.warn(
                "the smart schedule is off: these GPUs reach each other's memory, where chunks never paid; "
                "FMOE_FASTER_SCHEDULE_FORCE=1 keeps it on",
                stacklevel=2,
            )

    def _feed_forward(self, layer: int) -> nn.Module:
        if self.options.backend == "fastmoe":
            return FastMoELayer(layer, self.context, self.store, self.options)
        return MoELayer(layer, self.context, self.store, self.dispatchers, self.options, self.shadows)

    def _take_sums(self) -> RowReducer | None:
        """Sums of rows of which every rank has a part; None where no such rows are."""
        if self.layout.parallel.attention != "tp" or self.context.world_size == 1:
            return None
        return RowReducer.create(self.context, MOST_SUMMED_ROWS, self.params.dim, self.dtype)

    def _take_symmetric_memory(self) -> SymmetricExchange | None:
        """Memory for the rows of a step on every rank; None where rows do not travel, or not so.

        Room for a decode step of all sequences, or for ``options.symmetric_rows`` if these are more; larger steps go in
        pieces.
        """
        options, context, config = self.options, self.context, self.params
        rows = options.symmetric_rows
        if rows is None:
            rows = SYMMETRIC_ROWS if context.device.type == "cuda" else 0
        travel = context.group is not None and self.layout.parallel.attention != "tp"
        one_node = self.layout.plan.ranks_per_node in (None, context.world_size)
        force = options.faster.schedule and options.faster.schedule_force
        ours = options.backend == "mixtralkit" and options.exchange == "auto" and not force
        if not (rows and travel and self.layout.parallel.experts == "ep" and one_node and ours):
            return None
        rows = max(self.sequences_per_rank, rows)
        memory = SymmetricExchange.create(context, rows, config.dim, config.num_experts_per_tok, self.dtype)
        return memory if memory.memory is not None or context.device.type == "cpu" else None

    @property
    def params(self) -> ModelConfig:
        return self.layout.config

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's parameters under the names of ``layout.shapes()``."""
        return {name.replace("feed_forward.experts.", "feed_forward."): p for name, p in self.named_parameters()}

    def allocate_cache(self, page_size: int = CacheOptions.page_size, pages: int | None = None) -> KVCache:
        """Takes this rank's KV cache for sequences of ``params.max_seq_len`` tokens; kept.

        ``params.max_batch_size`` counts sequences over all ranks: under ``dp`` a rank has room for its share.
        ``page_size`` and ``pages`` are as in ``KVCache.allocate``.
        """
        kind = (self.dtype, self.context.device, page_size, pages)
        self.cache = KVCache.allocate(self.layout, self.sequences_per_rank, self.params.max_seq_len, *kind)
        return self.cache

    @property
    def ranks_with_own_sequences(self) -> int:
        """How many ranks divide the sequences among them: all under attention ``dp``, one otherwise."""
        return self.context.world_size if self.layout.parallel.attention == "dp" else 1

    @property
    def sequences_per_rank(self) -> int:
        """Most sequences of a rank at a time: its share of ``params.max_batch_size``."""
        return -(-self.params.max_batch_size // self.ranks_with_own_sequences)

    @property
    def counted_shadows(self) -> Shadows | None:
        """Shadows that what a step has counted decides for the next; None also where two phases decide inside it."""
        return self.shadows if self.two_phase is None else None

    def in_graphs(self, decode: bool) -> bool:
        """Whether a step of decodes, or one with prompts, is the same launches on the same addresses whatever the
        routing is."""
        ours = self.options.backend == "mixtralkit" and self.two_phase is None
        hidden = self.layout.hidden
        for weights in self.layout.formats:
            if not weights.is_plain and self.context.device.type == "cuda":  # the reference asks the host
                ours = ours and takes_packed(weights, self.params.dim, hidden[1] - hidden[0])
        trains = any(p.requires_grad for p in self.parameters())
        if self.store.tiers is not None:  # of prompts, and where ranks wait for each other, the host decides in between
            ours = ours and decode and self.context.world_size == 1 and self.layout.plan.cold_capacity_factor is None
        if not decode:
            ours = ours and self.context.world_size == 1 and only_the_device(self.dtype, self.params.head_dim)
        return ours and not trains and self.dispatchers.name(True, decode) in IN_GRAPHS

    def adopt(self, layer: int, plan: ExpertPlan) -> MoveReport:
        """Goes over to ``plan``, which differs from the running one in ``layer`` alone, between two steps.

        Collective; see ``ExpertStore.adopt``. ``store.relocations`` tells whether graphs may go on.
        """
        self.layout = replace(self.layout, plan=plan)
        return self.store.adopt(layer, self.layout)

    def attend_to(self, batch: ForwardBatch, cache: KVCache) -> ForwardBatch:
        """The batch with what its rows attend to: the cache, which they extend."""
        attend = CachedAttention(cache, self.params.sliding_window, batch.spans, self.context.device)
        return replace(batch, attend=attend)

    def hidden(self, batch: ForwardBatch) -> tuple[Hidden, list[MoEReport]]:
        """The stream behind the last block, of ``batch.wanted_N`` alone if given; what each layer did. Collective."""
        if self.layout.parallel.attention == "coherent" and self.context.world_size > 1 and batch.attend.is_cached:
            return run_coherent(self, batch)
        flight = None if self.two_phase is None else self.two_phase.begin()
        batch = replace(batch, rows=replace(batch.rows, flight=flight))
        first = self.layers[0].attention_norm.of
        # Of the last block's rows only those asked for matter, unless a capacity lets others lose their expert.
        early = self.layout.plan.cold_capacity_factor is None
        hidden, reports = self.through_blocks(Hidden(self.tok_embeddings(batch.tokens_T), None, first), batch, early)
        return hidden if early or batch.wanted_N is None else hidden.take(batch.wanted_N), reports

    def through_blocks(
        self, hidden: Hidden, batch: ForwardBatch, early: bool = True, seen: Callable[[Hidden], None] | None = None
    ) -> tuple[Hidden, list[MoEReport]]:
        """All blocks in turn.

        Args:
            early: leave rows that are not wanted behind in the last block's attention.
            seen: called with the rows in front of each block.
        """
        reports = []
        norms = [*(block.attention_norm for block in self.layers), self.norm]
        for block, following in zip(self.layers, norms[1:], strict=True):
            wanted_N = batch.wanted_N if early and following is self.norm else None
            if seen is not None:
                seen(hidden)
            hidden, report = block(hidden, batch, following, self.sums, wanted_N)
            reports.append(report)
        return hidden, reports

    def logits(self, hidden: Hidden) -> torch.Tensor:
        """Float32 logits [N, V of this rank]."""
        return hidden.project(self.output.matrix, out_dtype=torch.float32)

    @torch.no_grad()
    def step(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        rows_N: torch.Tensor,
        observe: Observe | None = None,
        glance: Callable[[list[MoEReport]], None] | None = None,
    ) -> torch.Tensor:
        """Runs the batch's tokens, extending ``cache``; float32 logits [N, V] of rows ``rows_N``. Collective.

        Every rank of ``tp`` gets the whole vocabulary. ``observe`` is called with the step and every layer's report,
        the reports' tensors still on the device; ``glance`` as well, but the last layer's may lack rows for it.
        """
        few = len(rows_N) < len(batch) and observe is None
        batch = replace(batch, wanted_N=rows_N if few else None, observed=observe is not None)
        hidden, reports = self.hidden(self.attend_to(batch, cache))
        if observe is not None:
            observe(batch, reports)
        if glance is not None:
            glance(reports)
        return self._whole_vocabulary(self.logits(hidden if few else hidden.take(rows_N)))

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
        pieces = [(i, start_pos, ids) for i, ids in enumerate(own)]
        batch = ForwardBatch.build(pieces, self.context.device, rows_per_rank=share * length)
        cache = self.cache if self.cache is not None else self.allocate_cache()
        logits = self.step(batch, cache, torch.arange(len(batch), device=self.context.device))
        logits = logits.unflatten(0, (len(own), length)) if own else logits.new_zeros(0, length, logits.shape[-1])
        if ranks == 1:
            return logits
        padded = torch.cat([logits, logits.new_zeros(share - len(own), *logits.shape[1:])])
        return self.context.all_gather(padded).flatten(0, 1)[:batch_size]

    def train_logits(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
        """Logits [B, T, V] with gradients and without a cache, and every layer's routing, for training."""
        batch_size, length = tokens_BT.shape
        positions_T = torch.arange(length, device=tokens_BT.device).repeat(batch_size)
        attend = FreshAttention(batch_size, self.params.sliding_window, self.params.rope_theta)
        tokens_T = tokens_BT.flatten()
        hidden, reports = self.hidden(ForwardBatch(tokens_T, positions_T, positions_T, attend=attend))
        logits_BTV = hidden.project(self.output.matrix).unflatten(0, (batch_size, length))
        return logits_BTV, [report.routing for report in reports]

    def _whole_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        if self.sums is None:
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
            if piece.columns is None:
                tensors[piece.target][piece.at].fill_(1.0)
                continue
            generator = torch.Generator(self.context.device).manual_seed(seed * len(numbers) + numbers[piece.source])
            whole = torch.empty(shapes[piece.source], dtype=self.dtype, device=self.context.device)
            whole.normal_(0.0, std, generator=generator)
            if not piece.weights.is_plain:
                put_packed(tensors, self.layout, piece, whole)
            else:
                tensors[piece.target][piece.at].copy_(whole[slice(*piece.rows), slice(*piece.columns)])
