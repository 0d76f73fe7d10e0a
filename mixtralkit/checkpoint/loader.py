"""Fills one rank's parameters from a checkpoint, straight to its device.

Of the pieces that several ranks hold, the smaller ones are read by each of them, which the page cache makes cheap, as
far as ``REREAD_SHARE`` goes; each larger one is read by one rank and sent to the others.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from tqdm import tqdm

from mixtralkit.checkpoint.mapped import HeldBlock
from mixtralkit.checkpoint.quantising import RoundedBlock, rounded_blocks, rows_read
from mixtralkit.checkpoint.reader import Block, CheckpointReader
from mixtralkit.checkpoint.staging import Stage
from mixtralkit.checkpoint.weight_hash import WeightHash
from mixtralkit.distributed import RankContext
from mixtralkit.layout import Piece, RankLayout, expert_of

REREAD_SHARE = 0.06  # of the checkpoint's bytes, over all ranks: what is read more than once
CPU_THREADS = 2  # more only compete with the other ranks for the memory that is touched
MOST_GPU_THREADS = 8

_Key = tuple[str, tuple[int, int], "tuple[int, int] | None"]


@dataclass(frozen=True)
class Transfer:
    """A piece that ``owner`` reads and sends to the other ``ranks``."""

    key: _Key
    owner: int
    ranks: tuple[int, ...]


def load_into(
    parameters: Mapping[str, torch.Tensor],
    layout: RankLayout,
    reader: CheckpointReader,
    context: RankContext,
    progress: bool = False,
    threads: int | None = None,
    hashes: bool = False,
    mapped: frozenset[str] = frozenset(),
) -> str | None:
    """Fills ``parameters`` (named and shaped as ``layout.shapes()``) from ``reader``, each in its own dtype.

    Experts are rounded on the way where the layout has them in another format than the checkpoint (``quantising``),
    but for those of our own files in fewer bits. Every rank calls it. ``threads`` read at a time (None for
    ``reading_threads``); ``progress`` draws a bar on rank 0. When it returns, the bytes are there, on a GPU too. With
    ``hashes`` it returns a hash of all weights that are read, the same on every rank and for every layout, made of
    what is read anyway (``weight_hash``). Parameters named in ``mapped`` are the checkpoint's file itself, on one rank
    (``MappedLayers``).

    ValueError, or RankFailed where another rank failed, when the parameters or the checkpoint do not fit the layout
    (before any byte is read), and when a file cannot be read.
    """
    with context.agreed():
        _check(parameters, layout, reader, context)
    threads = reading_threads(context) if threads is None else threads
    transfers = _plan_transfers(layout, parameters)
    received = {t.key for t in transfers if t.owner != context.rank}
    with torch.no_grad():
        pieces = [piece for piece in layout.pieces() if _key(piece) not in received]
        counted = _counted(layout, reader, transfers) if hashes else frozenset()
        weight_hash = WeightHash()
        with context.agreed():
            reads = _reads(parameters, layout, reader, pieces, counted, weight_hash, mapped)
            _read_all(reads, reader, context, progress, threads)
        _share(transfers, parameters, layout, context)
    return weight_hash.digest(reader.regions, context) if hashes else None


def reading_threads(context: RankContext) -> int:
    """How many threads of a rank read: for a GPU its share of the cores, as if all ranks were on this host."""
    if context.device.type == "cpu":
        return CPU_THREADS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(CPU_THREADS, min(MOST_GPU_THREADS, cores // context.world_size))


def _check(
    parameters: Mapping[str, torch.Tensor], layout: RankLayout, reader: CheckpointReader, context: RankContext
) -> None:
    if (layout.world_size, layout.rank) != (context.world_size, context.rank):
        raise ValueError(
            f"layout is of rank {layout.rank} of {layout.world_size}, this is rank {context.rank} "
            f"of {context.world_size}"
        )
    shapes = RankLayout.single(layout.config).shapes()
    found = RankLayout.single(reader.config).shapes()
    for name in dict.fromkeys((*shapes, *found)):
        if shapes.get(name) != found.get(name):
            raise ValueError(f"{reader.folder}: {name}: found {found.get(name)}, the model wants {shapes.get(name)}")
    for name, held in reader.formats_for(layout.matrix_formats).items():
        wanted_format = layout.matrix_formats[name]
        if not held.is_plain and wanted_format != held:
            option, of = "quantize_attention", ""
            if ".experts." in name:
                layer, expert = expert_of(name)
                option, of = "quantize", f" of layer {layer}, expert {expert}" if layout.plan.precision else ""
            raise ValueError(
                f"{reader.folder}: {option} ({wanted_format.name!r}){of} must be {held.name!r}, in which the "
                "checkpoint is, or left out"
            )
    wanted = layout.shapes()
    wrong = [
        f"{name}: found {tuple(parameters[name].shape) if name in parameters else None}, wanted {wanted.get(name)}"
        for name in dict.fromkeys((*wanted, *parameters))
        if name not in parameters or tuple(parameters[name].shape) != wanted.get(name)
    ]
    if wrong:
        raise ValueError(f"the parameters to fill do not fit the layout: {'; '.join(wrong[:8])}")


def _key(piece: Piece) -> _Key:
    return piece.source, piece.rows, piece.columns


def _plan_transfers(layout: RankLayout, parameters: Mapping[str, torch.Tensor]) -> list[Transfer]:
    """Pieces that one rank reads for others, spread evenly over the ranks; the same list on every rank."""
    holders: dict[_Key, list[int]] = {}
    sizes: dict[_Key, int] = {}
    for rank in range(layout.world_size):
        for piece in replace(layout, rank=rank).pieces():
            holders.setdefault(_key(piece), []).append(rank)
            sizes[_key(piece)] = sum(_bytes(part, parameters[part.target]) for part in layout.parts(piece))
    load = [0] * layout.world_size
    for key, ranks in holders.items():
        if len(ranks) == 1:
            load[ranks[0]] += sizes[key]
    transfers, reread_left = [], REREAD_SHARE * sum(sizes.values())
    for key in sorted((key for key in holders if len(holders[key]) > 1), key=sizes.__getitem__):
        reread_left -= sizes[key] * (len(holders[key]) - 1)
        if reread_left < 0:
            owner = min(holders[key], key=load.__getitem__)
            load[owner] += sizes[key]
            transfers.append(Transfer(key, owner, tuple(holders[key])))
    return transfers


def _bytes(piece: Piece, parameter: torch.Tensor) -> int:
    first, last = piece.columns or (0, 1)
    return (piece.rows[1] - piece.rows[0]) * (last - first) * parameter.dtype.itemsize


def _is_rounded(piece: Piece, reader: CheckpointReader) -> bool:
    return not piece.weights.is_plain and piece.weights != reader.format_of(piece.source)


def _read_key(piece: Piece, layout: RankLayout, reader: CheckpointReader) -> _Key:
    """What is read for a piece: to be rounded, whole rows."""
    if not _is_rounded(piece, reader):
        return _key(piece)
    outputs, columns = reader.shapes()[piece.source]
    return piece.source, rows_read(piece, outputs), (0, columns)


def _counted(layout: RankLayout, reader: CheckpointReader, transfers: Iterable[Transfer]) -> frozenset[_Key]:
    """What this rank reads and adds to the hash: of all that read it, the owner of a transfer, or the first."""
    owners = {transfer.key: transfer.owner for transfer in transfers}
    for rank in range(layout.rank + 1):
        for piece in replace(layout, rank=rank).pieces():
            owners.setdefault(_read_key(piece, layout, reader), rank)
    return frozenset(key for key, owner in owners.items() if owner == layout.rank)


def _reads(
    parameters: Mapping[str, torch.Tensor],
    layout: RankLayout,
    reader: CheckpointReader,
    pieces: Iterable[Piece],
    counted: frozenset[_Key],
    weight_hash: WeightHash,
    mapped: frozenset[str] = frozenset(),
) -> list[tuple[Block | RoundedBlock, WeightHash | None]]:
    """The reads of ``pieces``, in the order of the files, each with the hash that it is added to."""

    def blocks(piece: Piece) -> Iterable[Block | RoundedBlock]:
        if _is_rounded(piece, reader):
            return rounded_blocks(reader, parameters, layout, piece)
        return (
            HeldBlock(block.region, block.row, block.column, block.out) if part.target in mapped else block
            for part in layout.parts(piece)
            for block in reader.blocks(part.source, part.rows, part.columns, parameters[part.target][part.at])
        )

    reads = [
        (block, weight_hash if _read_key(piece, layout, reader) in counted else None)
        for piece in pieces
        for block in blocks(piece)
    ]
    return sorted(reads, key=lambda read: reader.order(read[0]))


def _read_all(
    reads: Sequence[tuple[Block | RoundedBlock, WeightHash | None]],
    reader: CheckpointReader,
    context: RankContext,
    progress: bool,
    threads: int,
) -> None:
    """Reads with ``threads`` at a time, through buffers where bytes cannot go straight to their place."""
    stages = [Stage.allocate(context.device) for _ in range(threads)]
    free: queue.SimpleQueue[Stage] = queue.SimpleQueue()
    for stage in stages:
        free.put(stage)

    def read(i: int) -> int:
        stage = free.get()
        for later, _ in reads[i + threads : i + threads + 1]:
            later.prefetch()
        try:
            stage.read(*reads[i])
        finally:
            free.put(stage)
        return reads[i][0].nbytes

    total = sum(block.nbytes for block, _ in reads)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc=f"loading {reader.folder.name}",
        disable=not (progress and context.is_first),
    )  # fmt: skip
    with bar, ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(read, i) for i in range(len(reads))]
        try:
            for future in as_completed(futures):
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for stage in stages:
            stage.wait()


def _share(
    transfers: Sequence[Transfer], parameters: Mapping[str, torch.Tensor], layout: RankLayout, context: RankContext
) -> None:
    """Sends every shared piece from its owner to the other ranks that hold it, in one order on all of them.

    What lies in host memory beside a GPU goes by way of the GPU, which is all that its ranks' group sends from.
    """
    own = {_key(piece): piece for piece in layout.pieces()} if transfers else {}
    for transfer in transfers:
        if context.rank not in transfer.ranks:
            continue
        for part in layout.parts(own[transfer.key]):
            content = parameters[part.target][part.at]
            assert content.is_contiguous()  # only whole rows are ever shared
            content = content.view(-1).view(torch.uint8)
            is_owner, sent = context.rank == transfer.owner, content
            if content.device != context.device:
                sent = torch.empty(content.shape, dtype=torch.uint8, device=context.device)
                if is_owner:
                    sent.copy_(content)
            if len(transfer.ranks) == context.world_size:
                dist.broadcast(sent, src=transfer.owner, group=context.group)
            elif is_owner:
                for rank in transfer.ranks:
                    if rank != transfer.owner:
                        dist.send(sent, rank, group=context.group)
            else:
                dist.recv(sent, transfer.owner, group=context.group)
            if sent is not content and not is_owner:
                content.copy_(sent)
