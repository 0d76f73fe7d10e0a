"""The routing report of a run: which experts its tokens took, as a trace, figures and pictures in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from mixtralkit.evaluation.routing_html import ShownSequence, token_page
from mixtralkit.evaluation.routing_pictures import WHOLE, draw_affinity, draw_load, draw_ranks, require_matplotlib
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.policies.quality import measure, rank_loads
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import check_free, writing

VERSION = 1
FILES = (
    "trace.npz", "report.json", "repetition.json", "repetition.md", "load.png", "affinity.png", "ranks.png",
    "tokens.html",
)  # fmt: skip
_MOST_SETS = 4096  # distinct choices of a layer that are all compared with one another


@dataclass(frozen=True, eq=False)
class Repetition:
    """How often a token shares an expert with the token before it (Mixtral of Experts, arXiv 2401.04088, Table 5).

    Attributes:
        pairs: tokens that have the token before them in the trace.
        first_L: share of the pairs whose first choices are the same; NaN without pairs.
        any_L: share of the pairs with at least one expert in both tokens' choices; NaN without pairs.
        shuffled_first_L, shuffled_any_L: the same for two tokens drawn at random, with replacement, from the whole
            trace: what its loads alone give. What is above that is due to the order of the tokens.
    """

    pairs: int
    first_L: np.ndarray
    any_L: np.ndarray
    shuffled_first_L: np.ndarray
    shuffled_any_L: np.ndarray

    @classmethod
    def of(cls, trace: RoutingTrace) -> Repetition:
        """Counts a trace of at least one token."""
        before_M, after_M = trace.neighbours()
        first_L, any_L = (np.full(trace.num_layers, np.nan) for _ in range(2))
        if len(before_M):
            before_MLK, after_MLK = trace.experts[before_M], trace.experts[after_M]
            first_L = (before_MLK[:, :, 0] == after_MLK[:, :, 0]).mean(0)
            shared_ML = np.zeros(before_MLK.shape[:2], bool)
            for i, j in np.ndindex(trace.top_k, trace.top_k):
                shared_ML |= before_MLK[:, :, i] == after_MLK[:, :, j]
            any_L = shared_ML.mean(0)
        drawn = [_shuffled(trace.experts[:, layer], trace.num_experts) for layer in range(trace.num_layers)]
        return cls(len(before_M), first_L, any_L, *np.array(drawn).T)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: shares by layer and their mean over all layers, null where there are no pairs."""
        found: dict[str, Any] = {"pairs": self.pairs}
        for choice in ("first", "any"):
            measured_L, shuffled_L = getattr(self, f"{choice}_L"), getattr(self, f"shuffled_{choice}_L")
            found[choice] = {
                "measured": _numbers(measured_L),
                "all_layers": _number(measured_L.mean()),
                "shuffled": _numbers(shuffled_L),
                "shuffled_all_layers": _number(shuffled_L.mean()),
            }
        return found


def _shuffled(experts_TK: np.ndarray, num_experts: int) -> tuple[float, float]:
    """Chance that two tokens drawn from these share their first choice, and that they share any.

    Exact from the distinct sets of choices; where a layer has more than ``_MOST_SETS`` of them, from that many tokens
    drawn with a fixed seed.
    """
    shares_E = np.bincount(experts_TK[:, 0], minlength=num_experts) / len(experts_TK)
    sets_UK, counts_U = np.unique(np.sort(experts_TK, axis=1), axis=0, return_counts=True)
    if len(sets_UK) > _MOST_SETS:
        drawn = np.random.default_rng(0).choice(len(experts_TK), _MOST_SETS, replace=False)
        sets_UK, counts_U = experts_TK[drawn], np.ones(_MOST_SETS)
    has_UE = np.zeros((len(sets_UK), num_experts), np.float32)
    np.put_along_axis(has_UE, sets_UK.astype(np.int64), 1, axis=1)
    share_U = counts_U / counts_U.sum()
    meets_UU = has_UE @ has_UE.T > 0
    return float(shares_E @ shares_E), float(share_U @ meets_UU @ share_U)


def random_repetition(num_experts: int, top_k: int) -> tuple[float, float]:
    """(first choice, any choice) of a router that draws ``top_k`` of ``num_experts`` evenly and independently.

    1/E and 1 - C(E-K, K)/C(E, K): 12.5% and 46.4% for 2 of 8.
    """
    return 1 / num_experts, 1 - comb(num_experts - top_k, top_k) / comb(num_experts, top_k)


def affinity_strength(transitions_LEE: np.ndarray) -> np.ndarray:
    """How much of a layer's choice the layer before it tells, [L-1], 0 … 1.

    Mutual information of the two layers over the entropy of the later one: 0 if they are independent, 1 if the
    earlier expert decides the later. Few tokens make it too large, by about (E-1)²/(2·tokens·ln 2) bits.

    Args:
        transitions_LEE: [L-1, E, E] weight of expert a in a layer and b in the next.
    """
    joint_JEE = transitions_LEE / np.maximum(transitions_LEE.sum((1, 2), keepdims=True), 1e-300)
    before_JE, after_JE = joint_JEE.sum(2), joint_JEE.sum(1)
    after_J = _entropy(after_JE)
    shared_J = _entropy(before_JE) + after_J - _entropy(joint_JEE)
    return np.divide(shared_J, after_J, out=np.zeros_like(after_J), where=after_J > 1e-12).clip(0, 1)


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Bits of each entry of the first dimension, whose shares sum to 1."""
    bits = shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return -bits.sum(tuple(range(1, shares.ndim)))


def check_report(folder: str | Path, overwrite: bool = True) -> None:
    """Makes the folder and fails early, in one sentence, where ``write_report`` could not do its work there, or would
    replace files that it may not."""
    require_matplotlib()
    for name in FILES:
        check_free(Path(folder) / name, overwrite)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".unfinished"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder}: a routing report cannot be written there ({error.strerror})") from None


def write_report(
    folder: str | Path,
    trace: RoutingTrace,
    *,
    domains: Mapping[int, str] | None = None,
    shown: Sequence[ShownSequence] = (),
    plan: ExpertPlan | None = None,
    affinity_layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Writes ``FILES`` into ``folder``, over an earlier report there; for one process, the first rank.

    A file that has no content this time is left out, and an earlier report's is removed: ``affinity.png`` for one
    layer, ``ranks.png`` without a plan or for one rank, ``tokens.html`` without sequences to show.

    Args:
        domains: name of each sequence's domain, by its number in the trace; every sequence of the trace is there.
        shown: sequences for ``tokens.html``.
        plan: what ran; None if experts were not placed whole on ranks.
        affinity_layers: layers whose transition to the next is drawn; left out, the first, the middle and the last.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: a trace without tokens, domains, plan or layers that are not the trace's, matplotlib missing, or a
            folder that cannot be written. The arguments are checked before anything is written.
    """
    folder = Path(folder)
    if not trace.num_tokens:
        raise ValueError("the trace has no tokens, so there is no routing to report")
    parts = {WHOLE: trace, **_split(trace, domains)}
    if plan is not None:
        plan.check_fits(trace.num_layers, trace.num_experts, plan.world_size)
    layers = _affinity_layers(affinity_layers, trace.num_layers)
    page = token_page(trace, shown, domains) if shown else None
    check_report(folder)

    repetition = _repetition(parts)
    strengths = {name: affinity_strength(_first_pairs(part)) for name, part in parts.items()}
    ranks = None if plan is None or plan.world_size == 1 else _ranks(parts, plan)
    absent = {"affinity.png": not layers, "ranks.png": ranks is None, "tokens.html": page is None}
    report = {
        "version": VERSION,
        "trace": _about(trace, parts),
        "load": _by_part({name: _load(part) for name, part in parts.items()}),
        "repetition": repetition,
        "affinity": _by_part({name: _numbers(found_J) for name, found_J in strengths.items()}) if layers else None,
        "ranks": ranks,
        "files": [name for name in FILES if not absent.get(name, False)],
    }
    for name in FILES:
        if absent.get(name, False):
            (folder / name).unlink(missing_ok=True)
    trace.save(folder / "trace.npz")
    _write(folder / "report.json", _json(report))
    _write(folder / "repetition.json", _json(repetition))
    _write(folder / "repetition.md", repetition_table(repetition))
    if page is not None:
        _write(folder / "tokens.html", page)
    draw_load({name: _shares(part) for name, part in parts.items()}, _counts(parts), folder / "load.png")
    if layers:
        draw_affinity(_first_pairs(trace), strengths, layers, folder / "affinity.png")
    if ranks is not None:
        over_mean = {name: _over_mean(plan, part) for name, part in parts.items()}
        plain = _over_mean(contiguous(plan.num_layers, plan.num_experts, plan.world_size), trace)
        draw_ranks(over_mean, None if plan.policy == "contiguous" else plain, plan.policy, folder / "ranks.png")
    return report


def _split(trace: RoutingTrace, domains: Mapping[int, str] | None) -> dict[str, RoutingTrace]:
    """The trace of each domain, in the order in which they come; {} for one domain or none, which is the whole."""
    if domains is None:
        return {}
    ids, of_row = np.unique(trace.sequence, return_inverse=True)
    names = [domains.get(int(number)) for number in ids]
    for number, name in zip(ids, names, strict=True):
        if not isinstance(name, str) or not name:
            raise ValueError(f"domains: sequence {number} has {name!r}, which must be a name")
    order = list(dict.fromkeys(names))
    of_id = np.array([order.index(name) for name in names])
    return {name: trace.take(of_id[of_row] == i) for i, name in enumerate(order)} if len(order) > 1 else {}


def _affinity_layers(asked: Sequence[int] | None, num_layers: int) -> list[int]:
    last = num_layers - 2
    if asked is None:
        return sorted({0, last // 2, last}) if last >= 0 else []
    for layer in asked:
        if not 0 <= layer <= last:
            raise ValueError(f"affinity_layers ({layer}) must lie in 0 … {last}, a layer with one after it")
    return list(dict.fromkeys(asked))


def _first_pairs(trace: RoutingTrace) -> np.ndarray:
    """[L-1, E, E], tokens whose first choice is a in a layer and b in the next."""
    return trace.first(1).transitions_LEE(weighted=False)


def _shares(trace: RoutingTrace) -> np.ndarray:
    """[L, E], share of a layer's choices that each expert takes."""
    return trace.loads_LE() / (trace.num_tokens * trace.top_k)


def _over_mean(plan: ExpertPlan, trace: RoutingTrace) -> np.ndarray:
    """[L, W], rows of each rank over the mean of the layer."""
    loads_LW = rank_loads(plan, trace.loads_LE())
    return loads_LW / loads_LW.mean(1, keepdims=True)


def _about(trace: RoutingTrace, parts: Mapping[str, RoutingTrace]) -> dict[str, Any]:
    sizes = {
        name: {"tokens": part.num_tokens, "sequences": len(np.unique(part.sequence))} for name, part in parts.items()
    }
    return {
        **sizes[WHOLE],
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "domains": {name: size for name, size in sizes.items() if name != WHOLE},
        "meta": dict(trace.meta),
    }


def _counts(parts: Mapping[str, RoutingTrace]) -> dict[str, int]:
    return {name: part.num_tokens for name, part in parts.items()}


def _load(trace: RoutingTrace) -> dict[str, Any]:
    layers = trace.statistics()
    return {
        "share": [_numbers(share_E) for share_E in _shares(trace)],
        "max_over_mean": _numbers(layer.max_over_mean for layer in layers),
        "mean_over_max": _numbers(layer.mean_over_max for layer in layers),
        "entropy_bits": _numbers(layer.entropy for layer in layers),
    }


def _repetition(parts: Mapping[str, RoutingTrace]) -> dict[str, Any]:
    trace = parts[WHOLE]
    first, any_choice = random_repetition(trace.num_experts, trace.top_k)
    return {
        "layers": trace.num_layers,
        "top_k": trace.top_k,
        "random": {"first": first, "any": any_choice},
        **_by_part({name: Repetition.of(part).to_dict() for name, part in parts.items()}),
    }


def _ranks(parts: Mapping[str, RoutingTrace], plan: ExpertPlan) -> dict[str, Any]:
    """Loads of the ranks before any cut to a capacity, and the plan's quality on the whole trace."""
    found = {}
    for name, part in parts.items():
        over_mean_LW = _over_mean(plan, part)
        most_L = over_mean_LW.max(1)
        found[name] = {
            "load_over_mean": [_numbers(ranks_W) for ranks_W in over_mean_LW],
            "max_over_mean": _numbers(most_L),
            "mean_over_max": _numbers(1 / most_L),
        }
    trace = parts[WHOLE]
    quality = measure(plan, trace.loads_LE(), trace.transitions_LEE())
    return {
        "policy": plan.policy,
        "world_size": plan.world_size,
        "crossings_per_token": _number(quality.crossings_per_token),
        "uniform_crossings_per_token": _number(quality.uniform_crossings_per_token),
        **_by_part(found),
    }


def repetition_table(repetition: Mapping[str, Any]) -> str:
    """Markdown of ``repetition.json``: the first, the middle and the last layer and the mean of all, in per cent."""
    count, top_k, random = repetition["layers"], repetition["top_k"], repetition["random"]
    layers = sorted({0, (count - 1) // 2, count - 1})
    ways = {"first": "First choice"}
    if top_k > 1:
        ways["any"] = "First or second choice" if top_k == 2 else f"Any of the {top_k} choices"
    lines = [
        "# Consecutive tokens with the same expert",
        "",
        "Tokens that have an expert in common with the token before them in their sequence, in per cent, as in Table 5",
        "of Mixtral of Experts (arXiv 2401.04088). In brackets: pairs drawn at random from the same tokens, as uneven",
        "loads alone give them. Last line: a router that draws evenly.",
    ]
    rows = [("all", repetition["all"]), *repetition["domains"].items()]
    for way, title in ways.items():
        heads = ["", "pairs", *(f"layer {layer}" for layer in layers), "all layers"]
        lines += ["", f"## {title}", "", _line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        for name, found in rows:
            figures = found[way]
            cells = [_cell(figures["measured"][layer], figures["shuffled"][layer]) for layer in layers]
            cells.append(_cell(figures["all_layers"], figures["shuffled_all_layers"]))
            lines.append(_line([name, f"{found['pairs']:,}", *cells]))
        lines.append(_line(["random", "", *[f"{100 * random[way]:.1f}"] * (len(layers) + 1)]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _cell(measured: float | None, shuffled: float) -> str:
    shown = "–" if measured is None else f"{100 * measured:.1f}"
    return f"{shown} ({100 * shuffled:.1f})"


def _by_part(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"all": found[WHOLE], "domains": {name: value for name, value in found.items() if name != WHOLE}}


def _number(value: float) -> float | None:
    """A JSON number of six digits; null for NaN."""
    return None if np.isnan(value) else float(f"{value:.6g}")


def _numbers(values: Any) -> list[float | None]:
    return [_number(float(value)) for value in values]


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    """A whole file or none, in place of an earlier one."""
    with writing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
