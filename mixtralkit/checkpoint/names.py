"""What every format calls its tensors and how each is made of canonical ones.

A canonical tensor has its name and shape from ``layout.canonical_shapes`` (Mistral's one-file format). A stored
tensor is a stack of slabs of canonical tensors; the reader takes the stacks apart, the writer builds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mixtralkit.config import ModelConfig
from mixtralkit.layout import RankLayout, canonical_shapes
from mixtralkit.moe.weights import ExpertWeights, Part

STYLES = ("mistral", "stacked", "hugging-face", "packed", "mlx", "gguf", "gguf-merged", "gguf-single")


@dataclass(frozen=True)
class Slab:
    """Rows and columns of one canonical tensor (a vector has one column), transposed or not, as they are stored."""

    source: str
    rows: range
    columns: range
    transposed: bool = False

    @property
    def height(self) -> int:
        """Rows it takes in the stored tensor."""
        return len(self.columns) if self.transposed else len(self.rows)

    @property
    def width(self) -> int:
        """Columns it takes in the stored tensor."""
        return len(self.rows) if self.transposed else len(self.columns)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its shape, and the slabs that fill its rows from top to bottom."""

    shape: tuple[int, ...]
    slabs: tuple[Slab, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part(self, part: Part, weights: ExpertWeights) -> Stored:
        """The same of a part of the matrices in a format of fewer bits; only of whole rows, as they are.

        Where rows have another order, the part must have one for each.
        """
        slabs = []
        for slab in self.slabs:
            rows, columns = map(range, weights.shape(part, len(slab.rows), len(slab.columns)))
            name = f"{slab.source.removesuffix('weight')}{part.name}"
            slabs.append(Slab(name, slab.rows if part.rows == 1 else rows, columns))
        rows = sum(slab.height for slab in slabs) // math.prod(self.shape[:-2])
        return Stored((*self.shape[:-2], rows, slabs[0].width), tuple(slabs))

    def cut_rows(self, rows: range) -> Stored:
        """A block of its rows; only a tensor of one plain slab is ever cut."""
        (slab,) = self.slabs
        cut = replace(slab, rows=slab.rows[rows.start : rows.stop])
        return Stored((len(rows), *self.shape[1:]), (cut,))

    def cut_columns(self, columns: range) -> Stored:
        """A block of its columns; only a tensor of one plain slab is ever cut."""
        (slab,) = self.slabs
        cut = replace(slab, columns=slab.columns[columns.start : columns.stop])
        return Stored((*self.shape[:-1], len(columns)), (cut,))


def stored_tensors(style: str, config: ModelConfig) -> dict[str, Stored]:
    """Every tensor of a whole model in one of ``STYLES``, in the order of the model.

    - ``mistral``: the canonical names themselves.
    - ``stacked``: the eight-file release; experts one above the other, w2 of each transposed.
    - ``hugging-face``: one matrix per expert; query and key rows ordered for rotary halves.
    - ``packed``: Hugging Face with all experts of a layer in ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F].
    - ``mlx``: Hugging Face with all experts of a layer in ``switch_mlp.gate_proj``, ``up_proj`` and ``down_proj``.
    - ``gguf``: llama.cpp's, a projection of all experts in one tensor; ``gguf-merged``: gate and up in one;
      ``gguf-single``: one matrix per expert.
    """
    plain = {name: Stored(shape, (_whole(name, shape),)) for name, shape in canonical_shapes(config).items()}
    if style == "mistral":
        return plain
    if style == "stacked":
        return dict(_stacked(config, plain))
    if style.startswith("gguf"):
        return dict(_llama_cpp(config, plain, style))
    assert style in ("hugging-face", "packed", "mlx")
    return dict(_hugging_face(config, plain, style))


def rank_tensors(layout: RankLayout) -> dict[str, Stored]:
    """The parameters of one rank as stacks of slabs: our own format."""
    slabs: dict[str, list[tuple[int, Slab]]] = {name: [] for name in layout.shapes()}
    shapes = layout.shapes()
    for piece in (part for whole in layout.pieces() for part in layout.parts(whole)):
        *slot, rows = piece.at
        first = rows.start + (slot[0] * shapes[piece.target][1] if slot else 0)
        slab = Slab(piece.source, range(*piece.rows), range(*(piece.columns or (0, 1))))
        slabs[piece.target].append((first, slab))
    ordered = {name: sorted(parts, key=lambda part: part[0]) for name, parts in slabs.items()}
    return {name: Stored(shapes[name], tuple(slab for _, slab in parts)) for name, parts in ordered.items()}


def _whole(name: str, shape: tuple[int, ...]) -> Slab:
    return Slab(name, range(shape[0]), range(shape[1] if len(shape) > 1 else 1))


def _stacked(config: ModelConfig, plain: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
    yield "tok_embeddings.weight", plain["tok_embeddings.weight"]
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm"):
            yield f"{prefix}{name}.weight", plain[f"{prefix}{name}.weight"]
        yield f"{prefix}block_sparse_moe.gate.weight", plain[f"{prefix}feed_forward.gate.weight"]
        for matrix in ("w1", "w2", "w3"):
            slabs = _experts(config, plain, layer, (matrix,))
            slabs = tuple(replace(slab, transposed=matrix == "w2") for slab in slabs)
            shape = (config.num_experts * config.hidden_dim, config.dim)
            yield f"{prefix}block_sparse_moe.{matrix}", Stored(shape, slabs)
    yield "norm.weight", plain["norm.weight"]
    yield "output.weight", plain["output.weight"]


def _hugging_face(config: ModelConfig, plain: dict[str, Stored], style: str) -> Iterator[tuple[str, Stored]]:
    moe = "mlp" if style == "packed" else "block_sparse_moe"
    switch = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    yield "model.embed_tokens.weight", plain["tok_embeddings.weight"]
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for letter in "qkvo":
            stored = plain[f"{ours}attention.w{letter}.weight"]
            yield (
                f"{theirs}self_attn.{letter}_proj.weight",
                _rotary_halves(stored, config.head_dim) if letter in "qk" else stored,
            )
        yield f"{theirs}input_layernorm.weight", plain[f"{ours}attention_norm.weight"]
        yield f"{theirs}post_attention_layernorm.weight", plain[f"{ours}ffn_norm.weight"]
        yield f"{theirs}{moe}.gate.weight", plain[f"{ours}feed_forward.gate.weight"]
        if style == "mlx":
            for name, matrix in switch.items():
                slabs = _experts(config, plain, layer, (matrix,))
                shape = (config.num_experts, slabs[0].height, slabs[0].width)
                yield f"{theirs}{moe}.switch_mlp.{name}.weight", Stored(shape, slabs)
            continue
        if style == "packed":
            experts, dim, hidden = config.num_experts, config.dim, config.hidden_dim
            up, down = _experts(config, plain, layer, ("w1", "w3")), _experts(config, plain, layer, ("w2",))
            yield f"{theirs}mlp.experts.gate_up_proj", Stored((experts, 2 * hidden, dim), up)
            yield f"{theirs}mlp.experts.down_proj", Stored((experts, dim, hidden), down)
            continue
        for expert in range(config.num_experts):
            for matrix in ("w1", "w2", "w3"):
                end = f"experts.{expert}.{matrix}.weight"
                yield f"{theirs}block_sparse_moe.{end}", plain[f"{ours}feed_forward.{end}"]
    yield "model.norm.weight", plain["norm.weight"]
    yield "lm_head.weight", plain["output.weight"]


def _llama_cpp(config: ModelConfig, plain: dict[str, Stored], style: str) -> Iterator[tuple[str, Stored]]:
    inside = {
        "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
        "attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "ffn_gate_inp": "feed_forward.gate",
    }  # fmt: skip
    merged = {"ffn_gate_up": ("w1", "w3"), "ffn_down": ("w2",)}
    apart = {"ffn_gate": ("w1",), "ffn_up": ("w3",), "ffn_down": ("w2",)}
    yield "token_embd.weight", plain["tok_embeddings.weight"]
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        for name, source in inside.items():
            yield f"{theirs}{name}.weight", plain[f"{ours}{source}.weight"]
        for name, matrices in (merged if style == "gguf-merged" else apart).items():
            if style == "gguf-single":
                for expert in range(config.num_experts):
                    stored = plain[f"{ours}feed_forward.experts.{expert}.{matrices[0]}.weight"]
                    yield f"{theirs}{name}.{expert}.weight", stored
                continue
            slabs = _experts(config, plain, layer, matrices)
            height = len(matrices) * slabs[0].height
            yield f"{theirs}{name}_exps.weight", Stored((config.num_experts, height, slabs[0].width), slabs)
    yield "output_norm.weight", plain["norm.weight"]
    yield "output.weight", plain["output.weight"]


def _rotary_halves(stored: Stored, head_dim: int) -> Stored:
    """Rows of each head ordered 0, 2, 4, …, 1, 3, 5, …: rotary turns halves there, neighbours here."""
    (slab,) = stored.slabs
    slabs = (
        replace(slab, rows=range(head + parity, head + head_dim, 2))
        for head in range(0, stored.shape[0], head_dim)
        for parity in (0, 1)
    )
    return Stored(stored.shape, tuple(slabs))


def _experts(config: ModelConfig, plain: dict[str, Stored], layer: int, matrices: tuple[str, ...]) -> tuple[Slab, ...]:
    prefix = f"layers.{layer}.feed_forward.experts."
    return tuple(
        plain[f"{prefix}{expert}.{matrix}.weight"].slabs[0]
        for expert in range(config.num_experts)
        for matrix in matrices
    )
