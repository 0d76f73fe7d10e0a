"""Which files each format has and which stored tensors lie in which of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from mixtralkit.checkpoint.discover import OURS_JSON, OURS_VERSION
from mixtralkit.checkpoint.names import Stored, rank_tensors, stored_tensors
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.layout import RankLayout, matrix_formats
from mixtralkit.moe.weights import PLAIN, ExpertWeights
from mixtralkit.planning.plan import ExpertPlan, contiguous

FORMATS = {
    "mistral": "Mistral's one file: consolidated.00.pth",
    "mistral-safetensors": "Mistral's one file: consolidated.safetensors",
    "mistral-split": "byte splits of consolidated.00.pth; shards says how many (11)",
    "mistral-stacked": "the eight-file release: experts stacked, consolidated.NN.pt; shards (8)",
    "mistral-shards": "model-parallel shards cut as fairscale cuts, consolidated.NN.pth; shards (2)",
    "mistral-expert-shards": "whole experts per shard, all else in each, consolidated.NN.pth; shards (2)",
    "hf": "Hugging Face, one matrix per expert; shards (files of about 5 GB)",
    "hf-packed": "Hugging Face as transformers 5 holds it, all experts of a layer in one tensor; shards",
    "mixtralkit": "rank-ready: one safetensors per rank, for world_size, attention, experts, plan",
}
DEFAULT_SHARDS = {
    "mistral-split": 11, "mistral-stacked": 8, "mistral-shards": 2, "mistral-expert-shards": 2,
}  # fmt: skip
_HUGGING_FACE_NUMEL = 2_500_000_000  # of one file when the number of files is not given: 5 GB in 16 bits

_CUT_ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
_CUT_COLUMNS = ("wo.weight", "w2.weight", "tok_embeddings.weight")


@dataclass(frozen=True)
class RankFiles:
    """How our own format is cut, and the formats of its experts where the plan says none, and of attention and output.

    A plan of None is contiguous.
    """

    world_size: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: ExpertPlan | None = None
    weights: ExpertWeights = PLAIN
    attention_weights: ExpertWeights = PLAIN

    def formats(self, config: ModelConfig) -> dict[str, ExpertWeights]:
        """The format of each matrix, as ``layout.matrix_formats``."""
        plan = self.plan or contiguous(config.n_layers, config.num_experts, 1)
        plan.check_fits(config.n_layers, config.num_experts, plan.world_size)
        return matrix_formats(config, plan.formats_LE(self.weights), self.attention_weights)

    def layouts(self, config: ModelConfig) -> tuple[RankLayout, ...]:
        """The layout of each rank."""
        if self.world_size < 1:
            raise ValueError(f"world_size ({self.world_size}) must be at least 1")
        plan = self.plan or contiguous(config.n_layers, config.num_experts, self.world_size)
        plan.check_fits(config.n_layers, config.num_experts, self.world_size)
        formats = self.weights, self.attention_weights
        return tuple(RankLayout(config, self.parallel, plan, rank, *formats) for rank in range(self.world_size))


def weight_files(
    format: str, config: ModelConfig, shards: int | None, ranks: RankFiles
) -> dict[str, dict[str, Stored]]:
    """File names of a format with the tensors in each; ValueError where the format cannot hold the model so."""
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    if shards is not None and format in ("mistral", "mistral-safetensors", "mixtralkit"):
        raise ValueError(f"shards ({shards}) cannot be given with format {format!r}")
    if shards is not None and shards < 1:
        raise ValueError(f"shards ({shards}) must be at least 1")
    shards = shards or DEFAULT_SHARDS.get(format)
    if format == "mixtralkit":
        layouts = ranks.layouts(config)
        return {f"rank-{x.rank:02d}-of-{len(layouts):02d}.safetensors": rank_tensors(x) for x in layouts}
    if format in ("hf", "hf-packed"):
        return _hugging_face_files(stored_tensors("hugging-face" if format == "hf" else "packed", config), shards)
    if format == "mistral-stacked":
        parts = _in_turn(stored_tensors("stacked", config), shards)
        return {f"consolidated.{i:02d}.pt": part for i, part in enumerate(parts)}
    whole = stored_tensors("mistral", config)
    if format == "mistral-safetensors":
        return {"consolidated.safetensors": whole}
    if format in ("mistral", "mistral-split"):
        return {"consolidated.00.pth": whole}
    cut = _fairscale_shard if format == "mistral-shards" else _expert_shard
    return {f"consolidated.{i:02d}.pth": cut(config, whole, i, shards) for i in range(shards)}


def side_files(
    format: str, config: ModelConfig, dtype: str, files: Mapping[str, Mapping[str, Stored]], itemsize: int,
    ranks: RankFiles,
) -> dict[str, str]:  # fmt: skip
    """The small JSON files that go with the weights, by name."""
    if format == "mixtralkit":
        layout = ranks.layouts(config)[0]
        parallel = {"attention": layout.parallel.attention, "experts": layout.parallel.experts}
        content = {
            "version": OURS_VERSION, "dtype": dtype, "parallel": parallel, "config": config.to_mistral(),
            "plan": layout.plan.to_dict(),
        }  # fmt: skip
        if not layout.weights.is_plain:
            content["quantize"] = layout.weights.name
        if not layout.attention_weights.is_plain:
            content["quantize_attention"] = layout.attention_weights.name
        return {OURS_JSON: _text(content)}
    if format == "mistral-stacked":
        return {"params.json": _text(config.to_hugging_face(dtype))}
    if not format.startswith("hf"):
        return {"params.json": _text(config.to_mistral())}
    side = {"config.json": _text(config.to_hugging_face(dtype))}
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        total = itemsize * sum(stored.numel for tensors in files.values() for stored in tensors.values())
        side["model.safetensors.index.json"] = _text({"metadata": {"total_size": total}, "weight_map": weight_map})
    return side


def _text(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


def _hugging_face_files(tensors: dict[str, Stored], shards: int | None) -> dict[str, dict[str, Stored]]:
    if shards is None:
        shards = -(-sum(stored.numel for stored in tensors.values()) // _HUGGING_FACE_NUMEL)
    if shards == 1:
        return {"model.safetensors": tensors}
    parts = _in_turn(tensors, shards)
    return {f"model-{i:05d}-of-{shards:05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _in_turn(tensors: dict[str, Stored], shards: int) -> list[dict[str, Stored]]:
    """The tensors in order, cut to ``shards`` runs of about equal size, none of them empty."""
    if shards > len(tensors):
        raise ValueError(f"shards ({shards}) must be at most the number of tensors ({len(tensors)})")
    names, total, done, bounds = list(tensors), sum(s.numel for s in tensors.values()), 0, [0]
    for i, name in enumerate(names):
        left = shards - len(bounds)
        if left and i > bounds[-1] and (done * shards >= total * len(bounds) or len(names) - i == left):
            bounds.append(i)
        done += tensors[name].numel
    return [{name: tensors[name] for name in names[a:b]} for a, b in pairwise([*bounds, len(names)])]


def _fairscale_shard(config: ModelConfig, whole: dict[str, Stored], shard: int, shards: int) -> dict[str, Stored]:
    for name, value in (
        ("n_heads", config.n_heads),
        ("hidden_dim", config.hidden_dim),
        ("vocab_size", config.vocab_size),
        ("dim", config.dim),
    ):
        if value % shards:
            raise ValueError(f"shards ({shards}) must divide {name} ({value})")
    if config.n_kv_heads % shards and shards % config.n_kv_heads:
        raise ValueError(f"shards ({shards}) must divide n_kv_heads ({config.n_kv_heads}) or be a multiple of it")
    return {name: _cut(config, name, stored, shard, shards) for name, stored in whole.items()}


def _cut(config: ModelConfig, name: str, stored: Stored, shard: int, shards: int) -> Stored:
    """fairscale's cut of one tensor; with fewer key-value heads than shards, neighbours hold the same head."""
    if name.endswith((".wk.weight", ".wv.weight")) and shards > config.n_kv_heads:
        shard, shards = shard * config.n_kv_heads // shards, config.n_kv_heads
    if name.endswith(_CUT_ROWS):
        size = stored.shape[0] // shards
        return stored.cut_rows(range(size * shard, size * (shard + 1)))
    if name.endswith(_CUT_COLUMNS):
        size = stored.shape[1] // shards
        return stored.cut_columns(range(size * shard, size * (shard + 1)))
    return stored


def _expert_shard(config: ModelConfig, whole: dict[str, Stored], shard: int, shards: int) -> dict[str, Stored]:
    if shards > config.num_experts:
        raise ValueError(f"shards ({shards}) must be at most num_experts ({config.num_experts})")
    held = contiguous(config.n_layers, config.num_experts, shards).experts_of(0, shard)
    return {
        name: stored
        for name, stored in whole.items()
        if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) in held
    }
