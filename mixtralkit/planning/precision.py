"""What each expert loses in each format: measured errors, weighed by how much the model leans on the expert."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtralkit.config import ModelConfig
from mixtralkit.json_file import conform, load_json, shown
from mixtralkit.planning.plan import PRECISIONS
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import writing

KINDS = ("weights", "outputs")
Loads = tuple[np.ndarray, np.ndarray]  # [L, E] share of the layer's choices, root mean square of their gate's weights


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Errors of experts in formats, as ``mixtralkit quantise-report`` measures them.

    Attributes:
        formats: names.
        bits: [F] of a weight, with its share of scales.
        error: float64 [L, E, F], root of the squared error over the squared size, of an expert's weights, or of what it
            makes of its rows.
        load: [L, E] share of the layer's choices.
        gate: [L, E] root of the mean square of the gate's weights with which it is chosen.
        harm: [L, E, F] what the layer's sum is off by: mean square over the tokens. Of weights
            ``error² · load · gate²``; of outputs, as measured, against the stream behind the layer.
        kind: ``"weights"`` or ``"outputs"``: what ``error`` is of.
        meta: anything else worth keeping.
    """

    formats: tuple[str, ...]
    bits: np.ndarray
    error: np.ndarray
    load: np.ndarray
    gate: np.ndarray
    harm: np.ndarray
    kind: str = "weights"
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in PRECISIONS:
                raise ValueError(f"formats ({shown(name)}) must be of {', '.join(PRECISIONS)}")
        if self.kind not in KINDS:
            raise ValueError(f"kind ({shown(self.kind)}) must be one of {', '.join(KINDS)}")
        shape = np.shape(self.error)
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f"error (shape {shape}) must be [layers][experts][formats]")
        wanted = {"bits": shape[2:], "error": shape, "load": shape[:2], "gate": shape[:2], "harm": shape}
        if len(self.formats) != shape[2]:
            raise ValueError(f"formats must be {shape[2]} names, as many as error has, not {len(self.formats)}")
        for name, of in wanted.items():
            array = np.asarray(getattr(self, name), float)
            if array.shape != of or not (np.isfinite(array) & (array >= 0)).all():
                raise ValueError(f"{name} must be numbers of at least 0, of shape {list(of)}")
            object.__setattr__(self, name, array)

    @classmethod
    def of_weights(
        cls, formats: Sequence[str], bits: Sequence[float], error: np.ndarray, load: np.ndarray, gate: np.ndarray,
        **meta: Any,
    ) -> ErrorTable:  # fmt: skip
        """From errors of weights."""
        harm = error**2 * (load * gate**2)[..., None]
        return cls(tuple(formats), np.asarray(bits), error, load, gate, harm, "weights", meta)

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON, or as CSV with a line for each layer, expert and format."""
        with writing(path) as unfinished:
            if Path(path).suffix != ".csv":
                content = {"formats": self.formats, "kind": self.kind, "meta": self.meta}
                arrays = {name: getattr(self, name).tolist() for name in ("bits", "load", "gate", "error", "harm")}
                unfinished.write_text(json.dumps(content | arrays) + "\n", encoding="utf-8")
                return
            with open(unfinished, "w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file, lineterminator="\n")
                lines.writerow(["layer", "expert", "format", "bits", "load", "gate", "error", "harm"])
                for layer, expert, number in np.ndindex(self.error.shape):
                    own = (self.load[layer, expert], self.gate[layer, expert])
                    found = (*own, self.error[layer, expert, number], self.harm[layer, expert, number])
                    name, bits = self.formats[number], self.bits[number]
                    lines.writerow([layer, expert, name, f"{bits:.6g}", *(f"{value:.6g}" for value in found)])

    @classmethod
    def load_from(cls, path: str | Path) -> ErrorTable:
        """Reads what ``save`` wrote as JSON; errors name the file."""
        return load_json(path, cls._from)

    @classmethod
    def _from(cls, content: Any) -> ErrorTable:
        said = conform(content, _File)
        try:
            arrays = {name: np.array(getattr(said, name), float) for name in ("bits", "load", "gate", "error", "harm")}
        except ValueError:
            raise ValueError("error, harm, load and gate must have equally many experts in each layer") from None
        return cls(formats=tuple(said.formats), kind=said.kind, meta=said.meta, **arrays)


@dataclass
class _File:
    """The JSON of an ``ErrorTable``."""

    formats: list[str]
    bits: list[float]
    load: list[list[float]]
    gate: list[list[float]]
    error: list[list[list[float]]]
    harm: list[list[list[float]]]
    kind: str
    meta: dict[str, Any]


def loads_of(trace: RoutingTrace | None, config: ModelConfig) -> Loads:
    """How much each expert is used; without a trace all alike, without weights in it every choice 1 / K."""
    shape, top_k = (config.n_layers, config.num_experts), config.num_experts_per_tok
    if trace is None:
        return np.full(shape, 1 / shape[1]), np.full(shape, 1 / top_k)
    if (trace.num_layers, trace.num_experts) != shape:
        raise ValueError(
            f"trace: layers and experts ({trace.num_layers}, {trace.num_experts}) must be {shape}, the model's"
        )
    counts_LE = trace.loads_LE()
    if trace.weights is None:
        squares_LE = counts_LE / trace.top_k**2
    else:
        squares_LE = np.stack([
            np.bincount(trace.experts[:, layer].ravel(), trace.weights[:, layer].ravel().astype(float) ** 2, shape[1])
            for layer in range(shape[0])
        ])  # fmt: skip
    return counts_LE / counts_LE.sum(1, keepdims=True), np.sqrt(squares_LE / np.maximum(counts_LE, 1))
