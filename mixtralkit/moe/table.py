"""Where one layer's experts are, on the device: ``planning.ReplicaTable`` as the dispatchers and kernels read it."""

from __future__ import annotations

import numpy as np
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.ops.counting import count_keys
from mixtralkit.planning.replicas import SLOT_BITS, ReplicaTable


class LayerTable:
    """Look-ups for the choices of this rank's rows. Its tensors keep their addresses, so that graphs may read them.

    Attributes:
        replicas: what the tensors say, on the host.
        local_E: bool [E], experts that are computed where the rows are; no capacity limits them.
        places_2EC: int32, rank · 2^16 + slot of expert e for rows t with t mod C = c, in large batches and in small
            ones; of all rows where every rank has the same, else of this rank's.
    """

    def __init__(self, replicas: ReplicaTable, context: RankContext, turns_always: bool = False) -> None:
        """``turns_always``: rows take turns whether or not there are replicas now, since these come and go."""
        self.context, self.replicas, self.turns_always = context, replicas, turns_always
        self.local_E, self.places_2EC, self._own_2EC = self._tensors()

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        replicas, rank = self.replicas, self.context.rank
        places_2EC = np.stack([replicas.places_EC(rank, small) for small in (False, True)])
        is_own_2EC = places_2EC >> SLOT_BITS == rank
        own_2EC = np.where(is_own_2EC, places_2EC & (2**SLOT_BITS - 1), -1).astype(np.int64)
        local_E = np.array(replicas.local_WE[rank])
        return tuple(self._upload(array) for array in (local_E, places_2EC, own_2EC))

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        """On the device when it gets there; from pinned memory, which torch keeps until then."""
        values = torch.from_numpy(array)
        values = values.pin_memory() if self.context.device.type == "cuda" else values
        return values.to(self.context.device, non_blocking=True)

    def update(self, replicas: ReplicaTable) -> bool:
        """Goes over to other replicas between two steps; in stream order, so that steps in flight see the old ones.

        False where a graph that was captured before may go on.
        """
        before = self.takes_turns, self.is_identity
        self.replicas = replicas
        for own, new in zip((self.local_E, self.places_2EC, self._own_2EC), self._tensors(), strict=True):
            own.copy_(new)
        return before != (self.takes_turns, self.is_identity)

    @property
    def takes_turns(self) -> bool:
        """Whether replicas may take turns; else an expert is at the same place for every row."""
        return self.turns_always or self.replicas.has_choice

    @property
    def is_identity(self) -> bool:
        """Whether slots are the experts by their own numbers, as one rank has them."""
        slots_WE = self.replicas.slots_WE
        return len(slots_WE) == 1 and bool((slots_WE[0] == np.arange(slots_WE.shape[1])).all())

    def look_up(self, experts_TK: torch.Tensor, small: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (ranks_TK, slots_TK) that compute the choices, replicas in turn by row; both -1 where experts are."""
        places_TK = self._in_turn(self.places_2EC[int(small)], experts_TK).long()
        lost_TK = experts_TK < 0
        slots_TK = (places_TK & (2**SLOT_BITS - 1)).masked_fill(lost_TK, -1)
        return (places_TK >> SLOT_BITS).masked_fill(lost_TK, -1), slots_TK

    def own_slots(self, experts_TK: torch.Tensor, small: bool) -> torch.Tensor:
        """int64 [T, K]: this rank's slot where it computes the choice, else -1; ``experts_TK`` has no -1."""
        return self._in_turn(self._own_2EC[int(small)], experts_TK)

    def _in_turn(self, table_EC: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        experts_TK = experts_TK.clamp(min=0)
        if not self.takes_turns:
            return table_EC[:, 0][experts_TK]
        turn_T = torch.arange(len(experts_TK), device=experts_TK.device) % table_EC.shape[1]
        return table_EC[experts_TK, turn_T[:, None]]

    def pour(self, experts_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``look_up``, replicas getting rows so that the busiest rank has as few as can be. Collective.

        For rows that each rank has of its own; every rank's counts are taken first, which waits for the device.
        """
        if not self.replicas.has_choice:
            return self.look_up(experts_TK, small=False)
        replicas, rank, device = self.replicas, self.context.rank, experts_TK.device
        experts_N = experts_TK.flatten()
        num_experts = len(self.local_E)
        keys_N = experts_N.masked_fill(experts_N < 0, num_experts)
        counts_WE = self.context.all_gather(count_keys(keys_N, num_experts + 1)[:-1]).cpu().numpy()  # host sync
        shares_GW = replicas.pour(counts_WE)
        # Rows of a group, sender by sender and in each sender's order, fill its ranks' shares one after the other.
        earlier_G = np.zeros(len(shares_GW), np.int64)
        for sender in range(rank):
            served_E = replicas.group_WE[sender]
            np.add.at(earlier_G, served_E[served_E >= 0], counts_WE[sender][served_E >= 0])
        group_E = torch.from_numpy(replicas.group_WE[rank]).to(device)
        group_N = group_E[experts_N.clamp(min=0)]
        free_N = (group_N >= 0) & (experts_N >= 0)
        in_group_N = _place_of_each(group_N.masked_fill(~free_N, len(shares_GW)), len(shares_GW) + 1)
        group_N = group_N.clamp(min=0)
        place_N = in_group_N + torch.from_numpy(earlier_G).to(device)[group_N]
        ends_GW = torch.from_numpy(shares_GW.cumsum(1)).to(device)
        ranks_N = (place_N[:, None] >= ends_GW[group_N]).sum(1).clamp(max=self.context.world_size - 1)
        ranks_N = torch.where(free_N, ranks_N, rank)
        slots_WE = torch.from_numpy(replicas.slots_WE.astype(np.int64)).to(device)
        slots_N = slots_WE[ranks_N, experts_N.clamp(min=0)]
        lost_N = experts_N < 0
        shape = experts_TK.shape
        return ranks_N.masked_fill(lost_N, -1).view(shape), slots_N.masked_fill(lost_N, -1).view(shape)


def _place_of_each(keys_N: torch.Tensor, num_keys: int) -> torch.Tensor:
    """0 for the first of its key, 1 for the next, …, in order."""
    order_N = keys_N.argsort(stable=True)
    sorted_N = keys_N[order_N]
    counts_G = count_keys(sorted_N, num_keys)
    start_N = (counts_G.cumsum(0) - counts_G)[sorted_N]
    index_N = torch.arange(len(keys_N), device=keys_N.device)
    return torch.empty_like(keys_N).scatter_(0, order_N, index_N - start_N)
