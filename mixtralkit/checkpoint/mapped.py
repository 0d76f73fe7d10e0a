"""Experts that stay in the checkpoint's file: read where they lie, as the system has room for them in memory."""

from __future__ import annotations

import math
import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.reader import Block, CheckpointReader
from mixtralkit.checkpoint.weight_hash import WeightHash
from mixtralkit.layout import RankLayout


@dataclass(frozen=True)
class HeldBlock(Block):
    """A block whose ``out`` is the file itself: nothing is to be read."""

    def prefetch(self) -> None:
        """Nothing: see ``Block``."""

    def read(self, scratch: torch.Tensor | None = None, weight_hash: WeightHash | None = None) -> None:
        """Adds the bytes to ``weight_hash``: see ``Block``."""
        if weight_hash is not None:
            weight_hash.add(self.region, self.row, self.column, self.out)


class MappedLayers:
    """Experts of some layers in a file of our own format that has them as one rank keeps them.

    Attributes:
        names: the parameters that lie there.
    """

    def __init__(self, reader: CheckpointReader, layout: RankLayout, layers: Sequence[int], dtype: torch.dtype) -> None:
        """Maps the file; ``dtype`` is the model's.

        Raises:
            ValueError: the checkpoint is another's, or of other ranks, experts, formats or dtype.
        """
        self.layers = tuple(layers)
        self._maps: dict[Path, tuple[mmap.mmap, int, tuple[int, int]]] = {}
        held, shapes = reader.found.layouts, layout.shapes()
        alike = len(held) == layout.world_size == 1 and all(
            held[0].experts(layer) == layout.experts(layer) and held[0].formats_LE[layer] == layout.formats_LE[layer]
            for layer in layers
        )
        if not alike:
            raise ValueError(
                f"{reader.folder}: experts can stay in a checkpoint in the format 'mixtralkit' for one rank with the "
                "same plan and quantize (mixtralkit convert), not in this one"
            )
        stored = {region.name: region for region in reader.regions}
        self._tensors: dict[str, torch.Tensor] = {}
        for layer in layers:
            names = [name for name in shapes if name.startswith(f"layers.{layer}.feed_forward.w")]
            for name in names:
                region = stored[name]
                if layout.weights.is_plain and region.dtype != dtype:
                    raise ValueError(
                        f"{reader.folder}: experts that stay in the checkpoint must be in dtype {dtype}, in which the "
                        f"model runs, not {region.dtype}"
                    )
                assert region.shape == shapes[name]
                self._tensors[name] = self._map(region)
        self.names = frozenset(self._tensors)

    def tensors(self, layer: int) -> tuple[torch.Tensor, ...]:
        """The format's parts of w13, then of w2, [S, …] each; not to be written."""
        return tuple(t for name, t in self._tensors.items() if name.startswith(f"layers.{layer}."))

    def check(self) -> None:
        """Before bytes are used.

        Raises:
            RuntimeError: a file has been changed since it was mapped.
        """
        for path, (_, file, state) in self._maps.items():
            if _state(file) != state:
                raise RuntimeError(f"{path}: the file was changed while its experts were in use; start again")

    def _map(self, region: Region) -> torch.Tensor:
        (path,) = region.file.paths
        if path not in self._maps:
            file = os.open(path, os.O_RDONLY)
            self._maps[path] = mmap.mmap(file, 0, access=mmap.ACCESS_READ), file, _state(file)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
            count = math.prod(region.shape)
            flat = torch.frombuffer(self._maps[path][0], dtype=region.dtype, count=count, offset=region.offset)
        return flat.view(region.shape)

    def __del__(self) -> None:
        for _, file, _ in self._maps.values():
            os.close(file)


def _state(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns
