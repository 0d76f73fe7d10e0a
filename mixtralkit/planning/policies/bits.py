"""``bits``: each expert in the format that harms least, all together within a budget of bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from mixtralkit.moe.weights import PLAIN
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.plan import PRECISIONS, ExpertPlan, contiguous
from mixtralkit.planning.policies.inputs import Budget, gb_above
from mixtralkit.planning.precision import ErrorTable


def bits(table: ErrorTable, shape: ModelShape, world_size: int, budget: Budget) -> ExpertPlan:
    """Contiguous experts, each plain or in one of the table's formats, so that the harm is least on every rank.

    Args:
        shape: says the bytes of an expert.
        budget: its ``memory_gb`` is for a rank's experts.

    Raises:
        ValueError: naming what the budget lacks for the smallest formats, or that there is none.
    """
    if budget.memory_gb is None:
        raise ValueError("memory_gb is missing: policy bits fills it")
    layers, experts, _ = table.error.shape
    plan = contiguous(layers, experts, world_size)
    names = np.array([*(PRECISIONS[name].name for name in table.formats), PLAIN.name], object)
    sizes_F = shape.sizes(names)
    harm_LEF = np.concatenate([table.harm, np.zeros((layers, experts, 1))], 2)
    number_LE, bound, harm = np.zeros((layers, experts), int), 0.0, 0.0
    for rank in range(world_size):
        held_LE = plan.holds_LWE[:, rank]
        most, least = budget.memory_gb * 1e9, held_LE.sum() * sizes_F.min()
        if least > most:
            needed = gb_above(least / 1e9, budget.memory_gb)
            raise ValueError(
                f"memory_gb ({budget.memory_gb:g}) must be at least {needed} for the experts of rank {rank}, all in "
                f"{names[sizes_F.argmin()]}"
            )
        chosen_N, bound_here = least_harm(harm_LEF[held_LE], sizes_F, most)
        number_LE[held_LE] = chosen_N
        bound += bound_here
        harm += np.take_along_axis(harm_LEF[held_LE], chosen_N[:, None], 1).sum()
    mean_bits = 8 * sizes_F[number_LE].mean() / (3 * shape.dim * shape.hidden)
    meta = {"harm": float(harm), "harm_bound": float(bound), "bits": float(mean_bits), "errors": table.kind}
    return replace(plan, policy="bits", precision=names[number_LE].tolist(), meta=meta)


def least_harm(harm_NF: np.ndarray, sizes_F: np.ndarray, budget: float) -> tuple[np.ndarray, float]:
    """A format for every expert, of least harm in all, and a bound below which no choice gets.

    The multiple-choice knapsack: along each expert's lower convex hull of harm over bytes, steps are taken in falling
    order of the harm that they save a byte, while they fit (the first that does not gives the bound, of the linear
    relaxation); then what is left is filled, and pairs are exchanged, while that saves more.

    Args:
        harm_NF: of expert n in format f.
        sizes_F: bytes of a format, the same for every expert.
        budget: bytes, at least those of the smallest format for all.
    """
    count = len(harm_NF)
    rank_N = np.arange(count)
    steps = [_hull_steps(harm_F, sizes_F) for harm_F in harm_NF]
    chosen_N = np.array([hull[0] for hull, _ in steps], int)
    order = sorted((-rate, n, i) for n, (_, rates) in enumerate(steps) for i, rate in enumerate(rates))
    used = float(sizes_F[chosen_N].sum())
    harm = float(harm_NF[rank_N, chosen_N].sum())
    bound, open_N = None, np.ones(count, bool)
    for rate, n, i in order:
        hull = steps[n][0]
        more = sizes_F[hull[i + 1]] - sizes_F[hull[i]]
        if used + more > budget and bound is None:
            bound = harm + rate * (budget - used)
        if not open_N[n] or used + more > budget:
            open_N[n] = False  # its later steps build on this one
            continue
        chosen_N[n] = hull[i + 1]
        used, harm = used + more, harm + rate * more
    _polish(chosen_N, harm_NF, sizes_F, budget)
    return chosen_N, float(harm_NF[rank_N, chosen_N].sum() if bound is None else bound)


def _hull_steps(harm_F: np.ndarray, sizes_F: np.ndarray) -> tuple[list[int], list[float]]:
    """Formats on the lower convex hull from the smallest up, and the harm that each step up saves a byte, falling."""
    hull: list[int] = []
    for f in np.lexsort((harm_F, sizes_F)):
        if hull and (sizes_F[f] == sizes_F[hull[-1]] or harm_F[f] >= harm_F[hull[-1]]):
            continue
        while len(hull) > 1 and _rate(harm_F, sizes_F, hull[-1], f) >= _rate(harm_F, sizes_F, hull[-2], hull[-1]):
            hull.pop()
        hull.append(int(f))
    return hull, [_rate(harm_F, sizes_F, a, b) for a, b in itertools.pairwise(hull)]


def _rate(harm_F: np.ndarray, sizes_F: np.ndarray, a: int, b: int) -> float:
    return float((harm_F[a] - harm_F[b]) / (sizes_F[b] - sizes_F[a]))


def _polish(chosen_N: np.ndarray, harm_NF: np.ndarray, sizes_F: np.ndarray, budget: float) -> None:
    """Changes one expert's format, or two's, in place, while that saves harm within the budget.

    For each way from one format to another only the expert that gains most, or loses least, can be one of the two.
    """
    formats, rank_N = len(sizes_F), np.arange(len(chosen_N))
    while True:
        room = budget - sizes_F[chosen_N].sum()
        save_NF = harm_NF[rank_N, chosen_N][:, None] - harm_NF
        moves: list[tuple[float, float, int, int]] = []  # harm saved, bytes, expert, format
        for a in range(formats):
            here_N = np.flatnonzero(chosen_N == a)
            for b in range(formats) if len(here_N) else ():
                for n in here_N[np.argsort(-save_NF[here_N, b])[:2]]:
                    if b != a:
                        moves.append((float(save_NF[n, b]), float(sizes_F[b] - sizes_F[a]), int(n), b))
        best, what = 1e-12 * float(harm_NF.max(initial=0)), ()
        for one in moves:
            if one[1] <= room and one[0] > best:
                best, what = one[0], (one,)
            for two in moves:
                if two[2] != one[2] and one[1] + two[1] <= room and one[0] + two[0] > best:
                    best, what = one[0] + two[0], (one, two)
        if not what:
            return
        for _, _, n, f in what:
            chosen_N[n] = f
