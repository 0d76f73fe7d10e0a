"""What a machine can do: the figures that the time model reads, from JSON."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from mixtralkit.json_file import conform, load_json, shown
from mixtralkit.whole_file import writing

_LEAST, _MOST = 1e-18, 1e18  # of any figure, so that times stay finite


@dataclass(frozen=True)
class Link:
    """One kind of collective: ``latency_s`` of an empty one, and ``bandwidth`` in bytes/s out of each rank.

    Bytes are those that leave a rank for the wire. Of an all-reduce of M bytes over W ranks they are 2·M·(W-1)/W.
    """

    latency_s: float
    bandwidth: float

    def __post_init__(self) -> None:
        _check_number("latency_s", self.latency_s, zero=True)
        _check_number("bandwidth", self.bandwidth)


@dataclass(frozen=True)
class Network:
    """The wires between ``members``: ranks of a node, or nodes.

    Attributes:
        members: how many were measured. Latencies grow with log2 of the members in use.
        exchange: all-to-all with unequal splits; also stands for all-gather.
        all_reduce, broadcast: those.
    """

    members: int
    exchange: Link
    all_reduce: Link
    broadcast: Link

    def __post_init__(self) -> None:
        if isinstance(self.members, bool) or not isinstance(self.members, int) or self.members < 2:
            raise ValueError(f"members ({shown(self.members)}) must be a whole number of at least 2")

    def latency_s(self, kind: str, members: int) -> float:
        """Latency of collective ``kind`` among ``members``; 0 when there is nobody to talk to."""
        link: Link = getattr(self, kind)
        return link.latency_s * math.log2(members) / math.log2(self.members) if members > 1 else 0.0


# (rows, seconds, FLOP/s): a product of so many rows with w weights takes seconds + 2·w·rows / FLOP/s.
ProductPoints = tuple[tuple[float, float, float], ...]
# (bytes, seconds)
WirePoints = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class FusedKernels:
    """What this project's own kernels take on the device, launched as one graph so that the host takes nothing.

    Attributes:
        memory_bandwidth: bytes/s of reading.
        small_s: a kernel with next to nothing to do, from the end of the one before it.
        step_s: from the end of a graph to the beginning of the next.
        linear: products with weights, by rising rows.
        experts: the same for one expert's rows; its seconds are those of a whole call, which all experts share.
        attention_bandwidth: bytes/s of keys and values in a decode step.
        attention_flops: FLOP/s of the attention of prompts, turning and storing keys included.
        members: ranks that ``sums`` and ``exchange`` were measured among; null where there was one rank.
        sums: rows of so many bytes summed over the ranks, with the residual and the norm that follow.
        exchange: rows to their experts and back, by the bytes that the busiest rank sends or gets one way of the two.
    """

    memory_bandwidth: float
    small_s: float
    step_s: float
    linear: ProductPoints
    experts: ProductPoints
    attention_bandwidth: float
    attention_flops: float
    members: int | None = None
    sums: WirePoints | None = None
    exchange: WirePoints | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bandwidth", "attention_bandwidth", "attention_flops"):
            _check_number(name, getattr(self, name))
        for name in ("small_s", "step_s"):
            _check_number(name, getattr(self, name), zero=True)
        for name in ("linear", "experts"):
            _check_points(name, getattr(self, name), ("rows", "seconds", "FLOP/s"))
        for name in ("sums", "exchange"):
            if getattr(self, name) is not None:
                _check_points(name, getattr(self, name), ("bytes", "seconds"))
        measured = (self.sums, self.exchange) != (None, None)
        if measured and (not isinstance(self.members, int) or self.members < 2):
            raise ValueError(
                f"members ({shown(self.members)}) must be a whole number of at least 2 with sums or exchange"
            )


@dataclass(frozen=True)
class HostRates:
    """The host's memory behind a GPU.

    Attributes:
        bus_bandwidth: bytes/s from pinned memory to the GPU.
        cpu_bandwidth: bytes/s of weights that products of few rows on the CPU read.
        source: where the figures come from.
    """

    bus_bandwidth: float
    cpu_bandwidth: float
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("bus_bandwidth", "cpu_bandwidth"):
            _check_number(name, getattr(self, name))


@dataclass(frozen=True)
class Hardware:
    """A machine's measured figures.

    Attributes:
        name, date, machine, source: what was measured, when, on what, and how.
        data_bytes: of a number in the matrix products that were measured.
        memory_bandwidth: bytes/s of reading weights.
        matrix_rates: (rows, FLOP/s) of a product of so many rows with weights that no cache holds, by rising rows.
        launch_s: a small kernel queued after others.
        sync_s: waiting for a number from the device.
        overlaps: whether exchange and products run at the same time (streams of a GPU).
        inside: between the ranks of a node.
        across: between nodes, each rank with its own share of the wire; None when only one node is known.
        fused: this project's kernels; None where they were not measured.
        host: the host's memory behind a GPU; None where it was not measured (``USUAL_HOST``).
        gpu: the device's name, by which ``auto`` finds the file; None for a file that only a path names.
    """

    name: str
    date: str
    machine: str
    source: str
    data_bytes: int
    memory_bandwidth: float
    matrix_rates: tuple[tuple[float, float], ...]
    launch_s: float
    sync_s: float
    overlaps: bool
    inside: Network
    across: Network | None = None
    fused: FusedKernels | None = None
    host: HostRates | None = None
    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.data_bytes not in (1, 2, 4, 8):
            raise ValueError(f"data_bytes ({shown(self.data_bytes)}) must be 1, 2, 4 or 8")
        _check_number("memory_bandwidth", self.memory_bandwidth)
        _check_number("launch_s", self.launch_s, zero=True)
        _check_number("sync_s", self.sync_s, zero=True)
        if not isinstance(self.overlaps, bool):
            raise ValueError(f"overlaps ({shown(self.overlaps)}) must be true or false")
        _check_points("matrix_rates", self.matrix_rates, ("rows", "FLOP/s"))

    @property
    def peak_flops(self) -> float:
        """The best matrix rate that was measured, FLOP/s."""
        return max(rate for _, rate in self.matrix_rates)

    def matrix_rate(self, rows: np.ndarray | float) -> np.ndarray:
        """FLOP/s of a product of ``rows`` rows: between the measured points on a line of log rate over log rows.

        Below the first point the time is that point's, so the rate falls with the rows; above the last it stays.
        """
        known_rows, known_rates = np.array(self.matrix_rates, float).T
        rows = np.asarray(rows, float)
        inside = np.exp(np.interp(np.log(np.maximum(rows, 1e-9)), np.log(known_rows), np.log(known_rates)))
        return inside * np.minimum(rows / known_rows[0], 1.0)

    def networks(self, world_size: int, ranks_per_node: int | None) -> tuple[tuple[Network, int], ...]:
        """The networks in use and the members in each: inside first, then across if there are several nodes."""
        per_node = world_size if ranks_per_node is None else min(ranks_per_node, world_size)
        inside = ((self.inside, per_node),)
        if per_node == world_size:
            return inside
        if self.across is None:
            raise ValueError(f"across of hardware {self.name} (null) must be given: {world_size} ranks span nodes")
        return (*inside, (self.across, world_size // per_node))

    def to_dict(self) -> dict[str, Any]:
        """The content of a hardware file."""
        return {name: value for name, value in asdict(self).items() if value is not None or name == "across"}

    def save(self, path: str | Path) -> None:
        """Writes a hardware file."""
        with writing(path) as unfinished:
            unfinished.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Hardware:
        """Reads what ``to_dict`` gives; a ValueError names the field that is missing, unknown or wrong."""
        _refuse_unknown(cls, content, "hardware")
        return conform(content, cls, "hardware")

    @classmethod
    def load(cls, path: str | Path) -> Hardware:
        """Reads a hardware file; errors name it."""
        return load_json(path, cls.from_dict)


def nearest(machines: Sequence[Hardware], ranks: int) -> Hardware:
    """Of machines with ``fused`` the one measured among the number of ranks nearest to ``ranks``; the first of several.

    A machine that was measured on one rank has no ``members``.
    """
    return min(machines, key=lambda machine: abs((machine.fused.members or 1) - ranks))


def _refuse_unknown(kind: type, content: Any, name: str) -> None:
    """ValueError for a key that no field has, at any depth; ``conform`` passes over these."""
    if not isinstance(content, Mapping):
        return
    hints = get_type_hints(kind)
    if unknown := [key for key in content if key not in hints]:
        raise ValueError(f"{name} has unknown {', '.join(map(shown, unknown[:8]))}")
    for key, value in content.items():
        for part in (hints[key], *get_args(hints[key])):
            if is_dataclass(part):
                _refuse_unknown(part, value, key)


def _check_points(name: str, points: Any, columns: tuple[str, ...]) -> None:
    """Points of numbers above 0 (seconds: at least 0), the first column rising."""
    if not points:
        raise ValueError(f"{name} must have at least one {'pair' if len(columns) == 2 else 'triple'}")
    for point in points:
        for column, value in zip(columns, point, strict=True):
            _check_number(f"{name}: {column}", value, zero=column == "seconds")
    first = [point[0] for point in points]
    if any(b <= a for a, b in itertools.pairwise(first)):
        raise ValueError(f"{name}: {columns[0]} ({', '.join(f'{r:g}' for r in first)}) must rise")


def _check_number(name: str, value: Any, zero: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (_LEAST <= value <= _MOST or (value == 0 and zero)):
        raise ValueError(
            f"{name} ({shown(value)}) must be a number {'of at least' if zero else 'above'} 0 ({_LEAST:g} … {_MOST:g})"
        )


# For a machine whose file has no ``host``.
USUAL_HOST = HostRates(
    55e9,
    57e9,
    "measured beside one H200, 16 cores, PCIe 5: copies from pinned memory, and products of few rows on the CPU",
)
