"""What part of a model one rank holds: parameter shapes, and which piece of which checkpoint tensor goes where.

The model allocates by ``shapes``; the checkpoint loader fills by ``pieces``; the writer reads them backwards. Nobody
else knows how tensors are cut or fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.moe.weights import PLAIN, ExpertWeights
from mixtralkit.planning.plan import ExpertPlan, contiguous


@dataclass(frozen=True)
class Piece:
    """``parameters[target][at] = checkpoint[source][rows, columns]``.

    ``source`` is a name of ``canonical_shapes``. ``rows`` and ``columns`` are
    half-open bounds; columns is None for a vector. ``at`` is (rows,) of a matrix or vector, or (slot, rows) of
    stacked experts, with rows half-open bounds as well. ``weights`` is the format in which it is held here.
    """

    source: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    target: str
    at: tuple[int | slice, ...]
    weights: ExpertWeights = PLAIN

    @property
    def is_expert(self) -> bool:
        """Whether it is of an expert's matrix."""
        return len(self.at) > 1


@dataclass(frozen=True)
class SlotGroup:
    """The slots of a layer on a rank whose experts have one format, in order; ``suffix`` of its parameters' names."""

    weights: ExpertWeights
    slots: tuple[int, ...]
    suffix: str = ""


def expert_of(source: str) -> tuple[int, int]:
    """Layer and expert of an expert's canonical name."""
    _, layer, _, _, expert, *_ = source.split(".")
    return int(layer), int(expert)


def canonical_shapes(
    config: ModelConfig, formats: Mapping[str, ExpertWeights] | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole checkpoint in Mistral's one-file format, in its usual order.

    A matrix that has another format by its name in ``formats`` (``matrix_formats``) has the parts of that in place of
    ``weight``: ``layers.0.feed_forward.experts.0.w1.data`` ….
    """
    formats = {} if formats is None else formats
    dim, hidden = config.dim, config.hidden_dim
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        sizes = {"wq": (q_dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim), "wo": (dim, q_dim)}
        for matrix, size in sizes.items():
            shapes |= _parts(f"{prefix}attention.{matrix}", formats, size)
        shapes[prefix + "attention_norm.weight"] = (dim,)
        shapes[prefix + "ffn_norm.weight"] = (dim,)
        shapes[prefix + "feed_forward.gate.weight"] = (config.num_experts, dim)
        for expert in range(config.num_experts):
            for matrix, size in (("w1", (hidden, dim)), ("w2", (dim, hidden)), ("w3", (hidden, dim))):
                shapes |= _parts(f"{prefix}feed_forward.experts.{expert}.{matrix}", formats, size)
    shapes["norm.weight"] = (dim,)
    return shapes | _parts("output", formats, (config.vocab_size, dim))


def _parts(name: str, formats: Mapping[str, ExpertWeights], size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what holds a matrix."""
    weights = formats.get(name, PLAIN)
    return {f"{name}.{part.name}": weights.shape(part, *size) for part in weights.parts}


def is_projection(source: str) -> bool:
    """Whether a canonical name is of one of attention's matrices or the output's."""
    return ".attention.w" in source or source == "output.weight"


def matrix_formats(
    config: ModelConfig, formats_LE: Sequence[Sequence[ExpertWeights]], attention: ExpertWeights = PLAIN
) -> dict[str, ExpertWeights]:
    """The format of each matrix that may have fewer bits, by its canonical name without ``.weight``."""
    formats = {"output": attention}
    for layer in range(config.n_layers):
        formats |= {f"layers.{layer}.attention.{matrix}": attention for matrix in ("wq", "wk", "wv", "wo")}
        for expert in range(config.num_experts):
            name = f"layers.{layer}.feed_forward.experts.{expert}"
            formats |= {f"{name}.{matrix}": formats_LE[layer][expert] for matrix in ("w1", "w2", "w3")}
    return formats


@dataclass(frozen=True)
class RankLayout:
    """One rank's share of ``config`` under ``parallel`` and ``plan``.

    Parameters of the rank (shapes by ``shapes``)::

        tok_embeddings.weight [V, D]                 layers.i.feed_forward.gate.weight [E, D]
        norm.weight [D]                              layers.i.feed_forward.w13 [S, 2F, D]   w1 above w3
        output.weight [V of rank, D]                 layers.i.feed_forward.w2  [S, D, F]
        layers.i.attention_norm.weight [D]           layers.i.attention.wqkv.weight [(H + 2J)·C, D]
        layers.i.ffn_norm.weight [D]                 layers.i.attention.wo.weight [D, H·C]

    Where ``weights`` is not plain, w13 and w2 are the parts of that format, ``w13_data`` …, of w1 above those of w3.
    Where the plan gives the experts of a layer several formats, each has its own, of the slots that have it:
    ``w13_int8_data``, ``w13_plain`` …. ``weights`` is of those for which the plan has none, or the only one.
    ``attention_weights``, with a scale for each output, is the format of wqkv, wo and output: ``wqkv.data`` ….
    """

    config: ModelConfig
    parallel: ParallelConfig
    plan: ExpertPlan
    rank: int = 0
    weights: ExpertWeights = PLAIN
    attention_weights: ExpertWeights = PLAIN

    def __post_init__(self) -> None:
        config, world = self.config, self.plan.world_size
        self.plan.check_fits(config.n_layers, config.num_experts, world)
        assert 0 <= self.rank < world
        if self.parallel.attention == "tp":
            if config.n_heads % world:
                raise ValueError(
                    f"world size ({world}) must divide n_heads ({config.n_heads}) with attention 'tp'; "
                    "use attention 'dp' or another number of ranks"
                )
            if config.n_kv_heads % world and world % config.n_kv_heads:
                raise ValueError(
                    f"world size ({world}) must divide n_kv_heads ({config.n_kv_heads}) or be a multiple of it "
                    "with attention 'tp'; use attention 'dp' or another number of ranks"
                )
        if self.parallel.experts == "tp" and config.hidden_dim < world:
            raise ValueError(f"hidden_dim ({config.hidden_dim}) must be at least the world size ({world})")
        if len(self.formats) == 1:
            object.__setattr__(self, "weights", self.formats[0])
        for weights in self.formats:
            weights.check_cut("hidden_dim", config.hidden_dim, self.hidden, "quantize", "experts 'ep'")
        width = tuple(bound * config.head_dim for bound in self.heads)
        options = "quantize_attention", "attention 'dp'"
        self.attention_weights.check_cut("n_heads * head_dim", config.n_heads * config.head_dim, width, *options)

    @classmethod
    def single(cls, config: ModelConfig) -> RankLayout:
        """The whole model on one rank."""
        return cls(config, ParallelConfig(), contiguous(config.n_layers, config.num_experts, 1))

    @property
    def world_size(self) -> int:
        return self.plan.world_size

    def _share(self, size: int) -> tuple[int, int]:
        return size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size

    @cached_property
    def heads(self) -> tuple[int, int]:
        """Bounds of this rank's query heads."""
        return self._share(self.config.n_heads) if self.parallel.attention == "tp" else (0, self.config.n_heads)

    @cached_property
    def kv_heads(self) -> tuple[int, int]:
        """Bounds of this rank's key-value heads; with fewer of them than ranks, neighbours hold the same one."""
        if self.parallel.attention != "tp":
            return 0, self.config.n_kv_heads
        if self.config.n_kv_heads >= self.world_size:
            return self._share(self.config.n_kv_heads)
        head = self.rank * self.config.n_kv_heads // self.world_size
        return head, head + 1

    @cached_property
    def vocab(self) -> tuple[int, int]:
        """Bounds of this rank's rows of the output matrix."""
        return self._share(self.config.vocab_size) if self.parallel.attention == "tp" else (0, self.config.vocab_size)

    @cached_property
    def hidden(self) -> tuple[int, int]:
        """Bounds of this rank's part of each expert's hidden width."""
        return self._share(self.config.hidden_dim) if self.parallel.experts == "tp" else (0, self.config.hidden_dim)

    @cached_property
    def formats_LE(self) -> list[list[ExpertWeights]]:
        """The format of each expert."""
        return self.plan.formats_LE(self.weights)

    @cached_property
    def formats(self) -> tuple[ExpertWeights, ...]:
        """Those that any expert has."""
        return tuple(dict.fromkeys(weights for row in self.formats_LE for weights in row))

    @cached_property
    def matrix_formats(self) -> dict[str, ExpertWeights]:
        """The format of each matrix that may have fewer bits, by canonical name (``matrix_formats``)."""
        return matrix_formats(self.config, self.formats_LE, self.attention_weights)

    def check_one_format(self, what: str) -> None:
        """ValueError where experts have several formats, which ``what`` cannot carry."""
        if len(self.formats) > 1:
            names = ", ".join(weights.name for weights in self.formats)
            raise ValueError(f"{what} needs all experts in one format, and the plan's precision has {names}")

    def groups(self, layer: int) -> tuple[SlotGroup, ...]:
        """The layer's slots by format: every format that the layer has on any rank, so some may have no slot here."""
        formats_E = self.formats_LE[layer]
        slots: dict[ExpertWeights, list[int]] = {weights: [] for weights in formats_E}
        for slot, expert in enumerate(self.experts(layer)):
            slots[formats_E[expert]].append(slot)
        several = len(slots) > 1
        return tuple(SlotGroup(w, tuple(own), f"_{w.name}" if several else "") for w, own in slots.items())

    def experts(self, layer: int) -> tuple[int, ...]:
        """Experts this rank holds in ``layer``, in slot order."""
        if self.parallel.experts == "tp":
            return tuple(range(self.config.num_experts))
        return self.plan.experts_of(layer, self.rank)

    @cached_property
    def projections(self) -> dict[str, tuple[int, int]]:
        """[O, I] of this rank's part of ``wqkv`` and ``wo``, and of the ``output`` matrix, in whatever format."""
        config = self.config
        heads, kv_heads, vocab = (b - a for a, b in (self.heads, self.kv_heads, self.vocab))
        wqkv = (heads + 2 * kv_heads) * config.head_dim, config.dim
        return {"wqkv": wqkv, "wo": (config.dim, heads * config.head_dim), "output": (vocab, config.dim)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of this rank's parameters."""
        config, hidden = self.config, self.hidden[1] - self.hidden[0]
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, config.dim)}
        for layer in range(config.n_layers):
            prefix = f"layers.{layer}."
            for matrix in ("wqkv", "wo"):
                name = f"{prefix}attention.{matrix}"
                shapes |= _parts(name, {name: self.attention_weights}, self.projections[matrix])
            shapes[prefix + "attention_norm.weight"] = (config.dim,)
            shapes[prefix + "ffn_norm.weight"] = (config.dim,)
            shapes[prefix + "feed_forward.gate.weight"] = (config.num_experts, config.dim)
            for group in self.groups(layer):
                for matrix, size in (("w13", (hidden, config.dim, 2)), ("w2", (config.dim, hidden))):
                    for name, part in group.weights.parameters(f"{prefix}feed_forward.{matrix}{group.suffix}"):
                        shapes[name] = (len(group.slots), *group.weights.shape(part, *size))
        shapes["norm.weight"] = (config.dim,)
        return shapes | _parts("output", {"output": self.attention_weights}, self.projections["output"])

    def pieces(self) -> Iterator[Piece]:
        """Every piece of the checkpoint this rank needs, each element of its parameters exactly once.

        They are those of the plain format; ``parts`` has what holds them here.
        """
        config = self.config
        whole_dim = (0, config.dim)
        yield _rows("tok_embeddings.weight", (0, config.vocab_size), whole_dim, "tok_embeddings.weight")
        for layer in range(config.n_layers):
            yield from self._attention_pieces(f"layers.{layer}.")
            for name in ("attention_norm.weight", "ffn_norm.weight"):
                yield _rows(f"layers.{layer}.{name}", whole_dim, None, f"layers.{layer}.{name}")
            yield from self._expert_pieces(layer)
        yield _rows("norm.weight", whole_dim, None, "norm.weight")
        yield _rows("output.weight", self.vocab, whole_dim, "output.weight", weights=self.attention_weights)

    def parts(self, piece: Piece) -> tuple[Piece, ...]:
        """The pieces of the format's tensors that hold a piece; of the plain format, itself."""
        weights = piece.weights
        if weights.is_plain:
            return (piece,)
        (*slot, at), found = piece.at, []
        for part in weights.parts:
            rows, columns = weights.bounds(part, piece.rows, piece.columns)
            place = at.start // (at.stop - at.start) * (rows[1] - rows[0])  # w3 behind w1, keys behind queries
            source = f"{piece.source.removesuffix('weight')}{part.name}"
            name = f"{piece.target}_{part.name}" if slot else f"{piece.target.removesuffix('weight')}{part.name}"
            found.append(Piece(source, rows, columns, name, (*slot, slice(place, place + rows[1] - rows[0]))))
        return tuple(found)

    def _attention_pieces(self, prefix: str) -> Iterator[Piece]:
        head_dim, start = self.config.head_dim, 0
        for name, heads in (("wq", self.heads), ("wk", self.kv_heads), ("wv", self.kv_heads)):
            rows = (heads[0] * head_dim, heads[1] * head_dim)
            source, target = f"{prefix}attention.{name}.weight", f"{prefix}attention.wqkv.weight"
            yield _rows(source, rows, (0, self.config.dim), target, start, self.attention_weights)
            start += rows[1] - rows[0]
        columns = (self.heads[0] * head_dim, self.heads[1] * head_dim)
        name = f"{prefix}attention.wo.weight"
        yield _rows(name, (0, self.config.dim), columns, name, weights=self.attention_weights)

    def _expert_pieces(self, layer: int) -> Iterator[Piece]:
        prefix = f"layers.{layer}.feed_forward."
        whole_dim, hidden = (0, self.config.dim), self.hidden[1] - self.hidden[0]
        yield _rows(f"{prefix}gate.weight", (0, self.config.num_experts), whole_dim, f"{prefix}gate.weight")
        experts = self.experts(layer)
        for group in self.groups(layer):
            w13, w2, weights = f"{prefix}w13{group.suffix}", f"{prefix}w2{group.suffix}", group.weights
            for place, slot in enumerate(group.slots):
                source, above, below = f"{prefix}experts.{experts[slot]}.", slice(0, hidden), slice(hidden, 2 * hidden)
                yield Piece(f"{source}w1.weight", self.hidden, whole_dim, w13, (place, above), weights)
                yield Piece(f"{source}w3.weight", self.hidden, whole_dim, w13, (place, below), weights)
                down = slice(0, self.config.dim)
                yield Piece(f"{source}w2.weight", whole_dim, self.hidden, w2, (place, down), weights)


def _rows(
    source: str, rows: tuple[int, int], columns: tuple[int, int] | None, target: str, start: int = 0,
    weights: ExpertWeights = PLAIN,
) -> Piece:  # fmt: skip
    return Piece(source, rows, columns, target, (slice(start, start + rows[1] - rows[0]),), weights)
