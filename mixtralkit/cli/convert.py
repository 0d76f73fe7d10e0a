"""``mixtralkit convert``: a checkpoint of any known format to any other that can hold the model."""

from __future__ import annotations

from pathlib import Path

from mixtralkit.checkpoint import RankFiles, open_checkpoint, save_checkpoint
from mixtralkit.cli.run import command
from mixtralkit.config import ParallelConfig
from mixtralkit.config.engine import Dtype, Quantize, QuantizeAttention
from mixtralkit.config.options import Count
from mixtralkit.mixtral import with_precision
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.plan import ExpertPlan, contiguous


@command
def convert(
    source: Path,
    target: Path,
    format: str = "mistral",
    shards: Count | None = None,
    dtype: Dtype | None = None,
    world_size: Count | None = None,
    plan: Path | None = None,
    quantize: Quantize | None = None,
    quantize_attention: QuantizeAttention | None = None,
    overwrite: bool = False,
    source_format: str | None = None,
    *,
    parallel: ParallelConfig,
) -> None:
    """Reads the checkpoint in SOURCE, whichever format it has, and writes it to the folder TARGET.

    Args:
        source: folder with the checkpoint; what it holds is found by looking.
        target: folder to write to; made if needed.
        format: mistral (one consolidated.00.pth), mistral-safetensors, mistral-split (byte splits), mistral-stacked
            (the eight-file release), mistral-shards (fairscale's cut), mistral-expert-shards (whole experts per
            shard), hf, hf-packed (all experts of a layer in one tensor) or mixtralkit (rank-ready).
        shards: number of files, for the formats that have several.
        dtype: float32, bfloat16 or float16; as stored when not given.
        world_size: ranks to cut for (format mixtralkit); that of the plan, or 1.
        plan: plan.json with the experts of each rank (format mixtralkit).
        quantize: round the experts' weights to this format (format mixtralkit; docs/quantised.md); left out, they are
            as SOURCE has them, or in dtype where the format has no other.
        quantize_attention: round attention and output to this format (format mixtralkit); left out, they are as a
            SOURCE in the format mixtralkit has them, else in dtype.
        overwrite: replaces a checkpoint that TARGET holds.
        source_format: which checkpoint to read where SOURCE holds several; named as format.
    """
    with open_checkpoint(source, source_format) as reader:
        formats = parse_weights(quantize), parse_weights(quantize_attention, "quantize_attention")
        if format == "mixtralkit":
            held = reader.weights, reader.attention_weights
            formats = tuple(own if new.is_plain else new for new, own in zip(formats, held, strict=True))
        loaded = None if plan is None else ExpertPlan.load(plan)
        world_size = world_size or (loaded.world_size if loaded else 1)
        if format == "mixtralkit" and reader.found.precision is not None:
            config = reader.config
            placed = loaded or contiguous(config.n_layers, config.num_experts, world_size)
            loaded = with_precision(placed, reader.found.precision)
        ranks = RankFiles(
            world_size=world_size,
            parallel=parallel,
            plan=loaded,
            weights=formats[0],
            attention_weights=formats[1],
        )
        print(f"{source}: {reader.kind}, {reader.file_bytes:,} bytes")
        files = save_checkpoint(
            target, reader.config, reader, format, shards, dtype, ranks, overwrite=overwrite, progress=True
        )
    for note in loaded.notes() if loaded else ():
        print(note)
    print(f"{target}: {format}, {sum(path.stat().st_size for path in files):,} bytes in {len(files)} files")
