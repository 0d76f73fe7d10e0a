"""Plans by short names, as commands take them: ``contiguous``, ``hot_cold+2``, ``balanced+4``, ``everywhere``."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np

from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from mixtralkit.planning.policies.balanced import balanced
from mixtralkit.planning.policies.hot_cold import hot_cold
from mixtralkit.planning.policies.inputs import Budget

_NAMES = "contiguous, hot_cold, hot_cold+N (N hot experts), balanced+N (N extra slots a layer), everywhere"


def named_plan(name: str, loads_LE: np.ndarray, world_size: int) -> ExpertPlan:
    """The plan of a name for these loads; ``hot_cold`` is ``hot_cold+1``. ``meta`` has the name.

    ValueError for another name, or a number of experts or slots that does not fit.
    """
    num_layers, num_experts = loads_LE.shape
    match = re.fullmatch(r"(contiguous|everywhere|hot_cold)|(hot_cold|balanced)\+(\d+)", name)
    if match is None:
        raise ValueError(f"plan ({name!r}) must be one of {_NAMES}")
    policy, count = match[1] or match[2], int(match[3] or 1)
    if policy == "hot_cold":
        plan = hot_cold(loads_LE, world_size, count)
    elif policy == "balanced":
        plan = _with_extra_slots(loads_LE, world_size, count)
    else:
        plan = {"contiguous": contiguous, "everywhere": everywhere}[policy](num_layers, num_experts, world_size)
    return replace(plan, meta={**plan.meta, "name": name})


def _with_extra_slots(loads_LE: np.ndarray, world_size: int, extra: int) -> ExpertPlan:
    """``balanced`` with so many slots a layer more than there are experts, over all ranks.

    Where they do not divide by the ranks, each rank gets the next whole number and the replicas too many are left out,
    those first that leave the heaviest rank lightest; among equals of the rank that has most so far.
    """
    num_experts = loads_LE.shape[1]
    slots = math.ceil((num_experts + extra) / world_size)
    if slots > num_experts:
        most = num_experts * (world_size - 1)
        raise ValueError(
            f"plan: balanced+{extra} must have at most {most} extra slots: then all experts are everywhere"
        )
    plan = balanced(loads_LE, world_size, Budget(slots_per_rank=slots))
    surplus = slots * world_size - num_experts - extra
    if surplus == 0:
        return plan
    slots_LWS, held_W = plan.slots_LWS.copy(), np.zeros(world_size)
    for layer, loads_E in enumerate(loads_LE):
        for _ in range(surplus):
            _leave_one_out(slots_LWS[layer], loads_E, held_W)
        held_W += (slots_LWS[layer] >= 0).sum(1)
    return replace(plan, slots_LWS=slots_LWS)


def _leave_one_out(slots_WS: np.ndarray, loads_E: np.ndarray, held_W: np.ndarray) -> None:
    """Empties the slot of a replicated expert whose loss leaves the lightest heaviest rank."""
    copies_E = np.bincount(slots_WS[slots_WS >= 0], minlength=len(loads_E))

    def price(place: tuple[int, int]) -> tuple[float, float]:
        fewer_E = copies_E - (np.arange(len(loads_E)) == slots_WS[place])
        each_E = np.append(loads_E / fewer_E, 0.0)  # the last for empty slots
        rest_WS = slots_WS.copy()
        rest_WS[place] = -1
        return round(float(each_E[rest_WS].sum(1).max()), 9), -held_W[place[0]] - (slots_WS[place[0]] >= 0).sum()

    spare = [tuple(place) for place in np.argwhere(slots_WS >= 0) if copies_E[slots_WS[tuple(place)]] > 1]
    slots_WS[min(spare, key=price)] = -1
