"""EPLB as its public description has it, slow and plain: the reference that ``balanced`` is held against.

Heaviest groups to the lightest node with room; in each node one replica at a time to the expert with most load per
replica; replicas, heaviest first, to the lightest GPU with room. A GPU may get an expert twice.
"""

from __future__ import annotations

import numpy as np


def pack(weights_X: np.ndarray, packs: int) -> list[list[int]]:
    """Equally many items in each pack: heaviest first, to the lightest pack with room."""
    room = len(weights_X) // packs
    found, loads = [[] for _ in range(packs)], [0.0] * packs
    for item in sorted(range(len(weights_X)), key=lambda x: -weights_X[x]):
        open_packs = [p for p in range(packs) if len(found[p]) < room]
        pack = min(open_packs, key=lambda p: loads[p])
        found[pack].append(item)
        loads[pack] += float(weights_X[item])
    return found


def replicate(weights_E: np.ndarray, total: int) -> list[int]:
    """Expert of each of ``total`` replicas."""
    experts, copies_E = list(range(len(weights_E))), np.ones(len(weights_E))
    for _ in range(total - len(weights_E)):
        expert = int((weights_E / copies_E).argmax())
        experts.append(expert)
        copies_E[expert] += 1
    return experts


def rebalance(weights_E: np.ndarray, replicas: int, groups: int, nodes: int, gpus: int) -> list[list[int]]:
    """Experts of each GPU in one layer, duplicates and all."""
    if groups % nodes:
        groups = nodes = 1
    size = len(weights_E) // groups
    found = []
    for of_node in pack(weights_E.reshape(groups, size).sum(1), nodes):
        mine = np.array([group * size + i for group in of_node for i in range(size)])
        chosen = replicate(weights_E[mine], replicas // nodes)
        copies_E = np.bincount(chosen, minlength=len(mine))
        each = np.array([weights_E[mine[e]] / copies_E[e] for e in chosen])
        found += [[int(mine[chosen[x]]) for x in items] for items in pack(each, gpus // nodes)]
    return found
