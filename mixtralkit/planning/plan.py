"""ExpertPlan: which ranks hold which experts, in which format, in which memory, and how many rows may travel.

All that planning tells the layer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixtralkit.json_file import conform, load_json, shown
from mixtralkit.moe.weights import FORMATS, PLAIN, ExpertWeights
from mixtralkit.whole_file import writing

VERSIONS = (1, 2)  # 2 has precision or tier
TIERS = ("gpu", "host")
PRECISIONS = {PLAIN.name: PLAIN} | FORMATS
OVERFLOWS = ("drop", "reroute")
CUT_ORDERS = ("weight", "arrival")
KEYS = (
    "version", "num_layers", "num_experts", "world_size", "ranks_per_node", "policy", "slots", "cold_capacity_factor",
    "cold_token_percent", "overflow", "cut_order", "precision", "tier", "meta",
)  # fmt: skip
MOST_EXPERTS, MOST_CAPACITY = 32768, 1e6  # bounds on what a file may claim

Words = tuple[tuple[str | None, ...], ...]  # [L][E]


@dataclass(frozen=True, eq=False)
class ExpertPlan:
    """Slots of every rank in every layer, each expert's format and memory, and the rule for rows over capacity.

    Attributes:
        slots_LWS: int32 expert ids, -1 for a slot left empty; read-only.
        num_experts: logical experts E; ids are 0 … E-1.
        ranks_per_node: ranks of one machine, None when all ranks are on one.
        policy: name of the policy that made it.
        cold_capacity_factor: capacity of an expert that is not on every rank, as a multiple of the even share
            K·T/E of its rows; None sends every row, which is exact.
        cold_token_percent: share (0, 1] of that capacity which is really sent.
        overflow: what becomes of rows over the capacity: ``"drop"`` or ``"reroute"``.
        cut_order: which rows these are: ``"weight"`` keeps an expert's heaviest choices, ``"arrival"`` its first rows.
        precision: [L][E] format of each expert on every rank that holds it, a name of ``PRECISIONS`` (``"plain"`` is
            the model's dtype); None, of an expert or of all, is the format that the run has.
        tier: [L][E] memory of each expert on every rank that holds it: ``"gpu"``, or ``"host"``, from where it is
            computed or fetched; None is ``"gpu"``.
        meta: anything else worth keeping with the plan.
    """

    slots_LWS: np.ndarray
    num_experts: int
    ranks_per_node: int | None = None
    policy: str = "contiguous"
    cold_capacity_factor: float | None = None
    cold_token_percent: float = 1.0
    overflow: str = "drop"
    cut_order: str = "weight"
    precision: Words | None = None
    tier: Words | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = np.array(self.slots_LWS)  # a copy of our own, frozen below
        if slots.ndim != 3 or 0 in slots.shape[:2] or (slots.size and not np.issubdtype(slots.dtype, np.integer)):
            raise ValueError(f"slots (shape {slots.shape}, {slots.dtype}) must be whole numbers [layers][ranks][slots]")
        slots = slots.clip(-2, 2**31 - 1).astype(np.int32)  # ids too large for int32 stay out of range
        slots.flags.writeable = False
        object.__setattr__(self, "slots_LWS", slots)
        if isinstance(self.num_experts, bool) or not isinstance(self.num_experts, int):
            raise ValueError(f"num_experts ({shown(self.num_experts)}) must be a whole number")
        if not 1 <= self.num_experts <= MOST_EXPERTS:
            raise ValueError(f"num_experts ({shown(self.num_experts)}) must lie in 1 … {MOST_EXPERTS}")
        self._check_slots()
        per_node = self.ranks_per_node
        if per_node is not None and (type(per_node) is not int or per_node < 1 or self.world_size % per_node):
            raise ValueError(f"ranks_per_node ({shown(per_node)}) must divide world_size ({self.world_size})")
        factor = self.cold_capacity_factor
        if factor is not None and not (_is_number(factor) and 0 <= factor <= MOST_CAPACITY):
            raise ValueError(f"cold_capacity_factor ({shown(factor)}) must be null or a number in 0 … {MOST_CAPACITY}")
        if not (_is_number(self.cold_token_percent) and 0 < self.cold_token_percent <= 1):
            raise ValueError(f"cold_token_percent ({shown(self.cold_token_percent)}) must lie in (0, 1]")
        if self.overflow not in OVERFLOWS:
            raise ValueError(f"overflow ({shown(self.overflow)}) must be one of {', '.join(OVERFLOWS)}")
        if self.cut_order not in CUT_ORDERS:
            raise ValueError(f"cut_order ({shown(self.cut_order)}) must be one of {', '.join(CUT_ORDERS)}")
        names = {name: weights.name for name, weights in PRECISIONS.items()}
        for key, known in (("precision", names), ("tier", dict(zip(TIERS, TIERS, strict=True)))):
            object.__setattr__(self, key, _words(key, getattr(self, key), known, slots.shape[0], self.num_experts))

    def _check_slots(self) -> None:
        outside = np.argwhere((self.slots_LWS < -1) | (self.slots_LWS >= self.num_experts))
        if len(outside):
            layer, rank, slot = outside[0]
            raise ValueError(
                f"slots: layer {layer}, rank {rank} holds expert {self.slots_LWS[layer, rank, slot]}, "
                f"outside 0 … {self.num_experts - 1}"
            )
        twice = np.argwhere(self.copies_LWE > 1)
        if len(twice):
            layer, rank, expert = twice[0]
            raise ValueError(f"slots: layer {layer}, rank {rank} holds expert {expert} twice")
        nowhere = np.argwhere(~self.copies_LWE.any(axis=1))
        if len(nowhere):
            layer, expert = nowhere[0]
            raise ValueError(f"slots: layer {layer} has no slot for expert {expert} on any rank")

    @property
    def num_layers(self) -> int:
        return self.slots_LWS.shape[0]

    @property
    def world_size(self) -> int:
        return self.slots_LWS.shape[1]

    @cached_property
    def copies_LWE(self) -> np.ndarray:
        """How often rank w holds expert e in layer l; 0 or 1 in a valid plan."""
        layers, ranks, _ = self.slots_LWS.shape
        copies = np.zeros((layers, ranks, self.num_experts + 1), np.int32)
        where = np.indices(self.slots_LWS.shape)
        np.add.at(copies, (where[0], where[1], self.slots_LWS), 1)  # id -1 counts in the last column
        return copies[:, :, :-1]

    @cached_property
    def holds_LWE(self) -> np.ndarray:
        """True where rank w holds expert e in layer l."""
        return self.copies_LWE > 0

    @cached_property
    def slot_of_LWE(self) -> np.ndarray:
        """Index of expert e among the experts of rank w, counted without empty slots; -1 where it is not held."""
        slot_of = np.full(self.holds_LWE.shape, -1, np.int32)
        held_LWS = self.slots_LWS >= 0
        layers, ranks, _ = where = held_LWS.nonzero()
        slot_of[layers, ranks, self.slots_LWS[where]] = held_LWS.cumsum(2)[where] - 1
        return slot_of

    def experts_of(self, layer: int, rank: int) -> tuple[int, ...]:
        """Experts that ``rank`` holds in ``layer``, in the order of its slots."""
        return tuple(int(e) for e in self.slots_LWS[layer, rank] if e >= 0)

    def formats_LE(self, weights: ExpertWeights = PLAIN) -> list[list[ExpertWeights]]:
        """The format of each expert; ``weights`` is that of those for which the plan has none."""
        if self.precision is None:
            return [[weights] * self.num_experts] * self.num_layers
        return [[weights if name is None else PRECISIONS[name] for name in row] for row in self.precision]

    @cached_property
    def on_host_LE(self) -> np.ndarray:
        """True where expert e of layer l lies in host memory."""
        rows = self.tier or ((None,) * self.num_experts,) * self.num_layers
        return np.array([[word == "host" for word in row] for row in rows])

    def counts(self) -> dict[str, dict[str, int]]:
        """How many experts have each precision and each tier, by name; only of what the plan has."""
        found = {}
        for key, otherwise in (("precision", "as run"), ("tier", TIERS[0])):
            if (rows := getattr(self, key)) is not None:
                found[key] = dict(sorted(Counter(word or otherwise for row in rows for word in row).items()))
        return found

    def notes(self) -> list[str]:
        """``counts``, a sentence each."""
        return [
            f"{key}: {', '.join(f'{count} experts {word}' for word, count in counts.items())}"
            for key, counts in self.counts().items()
        ]

    def check_fits(self, num_layers: int, num_experts: int, world_size: int) -> None:
        """ValueError unless the plan is for this model and this number of ranks."""
        for name, own, wanted in (
            ("num_layers", self.num_layers, num_layers),
            ("num_experts", self.num_experts, num_experts),
            ("world_size", self.world_size, world_size),
        ):
            if own != wanted:
                raise ValueError(f"plan: {name} ({own}) must be {wanted}, which is what runs")

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``plan.json``, of the least version; ``cut_order`` only where it is not the usual one."""
        more = {key: getattr(self, key) for key in ("precision", "tier") if getattr(self, key) is not None}
        return {
            "version": VERSIONS[bool(more)],
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "world_size": self.world_size,
            "ranks_per_node": self.ranks_per_node,
            "policy": self.policy,
            "slots": self.slots_LWS.tolist(),
            "cold_capacity_factor": self.cold_capacity_factor,
            "cold_token_percent": self.cold_token_percent,
            "overflow": self.overflow,
            **({} if self.cut_order == CUT_ORDERS[0] else {"cut_order": self.cut_order}),
            **{key: [list(row) for row in rows] for key, rows in more.items()},
            "meta": dict(self.meta),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ExpertPlan:
        """Reads what ``to_dict`` gives; slot lists of unequal length are filled with -1."""
        if not isinstance(content, Mapping):
            raise ValueError(f"a plan must be a JSON object, not {type(content).__name__}")
        missing = [k for k in ("version", "num_layers", "num_experts", "world_size", "slots") if k not in content]
        if missing:
            raise ValueError(f"plan lacks: {', '.join(missing)}")
        version = content["version"]
        if type(version) is not int or version not in VERSIONS:
            raise ValueError(f"version ({shown(version)}) must be one of {', '.join(map(str, VERSIONS))}")
        words = {key: content.get(key) for key in ("precision", "tier")}
        for key, rows in words.items():
            if rows is not None and version == 1:
                raise ValueError(f"version ({version}) must be 2 for a plan with {key}")
            words[key] = conform(rows, list[list[str | None]] | None, key)
        if version != 1 and (unknown := [key for key in content if key not in KEYS]):
            raise ValueError(f"plan has unknown {', '.join(map(shown, unknown[:8]))}")
        meta, policy = content.get("meta", {}), content.get("policy", "unknown")
        if not isinstance(meta, Mapping) or not isinstance(policy, str):
            name, value, kind = ("meta", meta, "an object") if isinstance(policy, str) else ("policy", policy, "a text")
            raise ValueError(f"{name} ({shown(value)}) must be {kind}")
        plan = cls(
            slots_LWS=_rectangle(content["slots"]),
            num_experts=content["num_experts"],
            ranks_per_node=content.get("ranks_per_node"),
            policy=policy,
            cold_capacity_factor=content.get("cold_capacity_factor"),
            cold_token_percent=content.get("cold_token_percent", 1.0),
            overflow=content.get("overflow", "drop"),
            cut_order=content.get("cut_order", CUT_ORDERS[0]),
            **words,
            meta=meta,
        )
        for name in ("num_layers", "world_size"):
            if type(content[name]) is not int or content[name] != getattr(plan, name):
                raise ValueError(
                    f"{name} ({shown(content[name])}) differs from the {getattr(plan, name)} that slots has"
                )
        return plan

    def save(self, path: str | Path) -> None:
        """Writes ``plan.json``."""
        with writing(path) as unfinished:
            unfinished.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExpertPlan:
        """Reads ``plan.json``; errors name the file."""
        return load_json(path, cls.from_dict)


def contiguous(num_layers: int, num_experts: int, world_size: int) -> ExpertPlan:
    """FastMoE's placement: rank w holds experts E·w/W … E·(w+1)/W-1 in every layer, none twice."""
    bounds = [num_experts * w // world_size for w in range(world_size + 1)]
    ranks = [list(range(bounds[w], bounds[w + 1])) for w in range(world_size)]
    return ExpertPlan(_rectangle([ranks] * num_layers), num_experts)


def everywhere(num_layers: int, num_experts: int, world_size: int) -> ExpertPlan:
    """Every expert on every rank: nothing ever travels."""
    slots = np.tile(np.arange(num_experts, dtype=np.int32), (num_layers, world_size, 1))
    return ExpertPlan(slots, num_experts, policy="everywhere")


def _rectangle(slots: Any) -> np.ndarray:
    """Nested lists [L][W][S of that rank] → int array [L, W, largest S], short ranks filled with -1."""
    try:
        most = max((len(rank) for layer in slots for rank in layer), default=0)
        return np.array([[[*rank, *[-1] * (most - len(rank))] for rank in layer] for layer in slots])
    except (TypeError, ValueError):
        raise ValueError("slots must be lists of whole numbers, [layers][ranks][slots]") from None


def _words(key: str, rows: Any, known: Mapping[str, str], layers: int, experts: int) -> Words | None:
    """Rows [L][E] with each word as ``known`` spells it; None where no expert has one."""
    if rows is None:
        return None
    if len(rows) != layers or any(len(row) != experts for row in rows):
        raise ValueError(f"{key} must have {layers} lists of {experts} words, one for each layer and expert")
    for layer, row in enumerate(rows):
        for expert, word in enumerate(row):
            if word is not None and word not in known:
                raise ValueError(
                    f"{key}: layer {layer}, expert {expert} ({shown(word)}) must be one of {', '.join(known)}"
                )
    found = tuple(tuple(None if word is None else known[word] for word in row) for row in rows)
    return found if any(word is not None for row in found for word in row) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
