"""FastMoE's gates: from rows to expert ids and weights, with the constructor and the results that FastMoE has.

Experts are numbered over all ranks, ``rank · num_expert + slot``. A gate returns ids int64 [N, K], -1 where it drops
the choice, and weights [N, K]; its auxiliary loss is fetched with ``get_loss``. A gate that must know of the other
ranks is told by ``bind``, which ``FMoE`` calls.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from mixtralkit.config import TopologyOptions
from mixtralkit.distributed import RankContext
from mixtralkit.ops.counting import count_keys


class BaseGate(nn.Module):
    """What every gate has: ``num_expert`` of a rank, ``tot_expert`` of all, and a loss."""

    def __init__(self, num_expert: int, world_size: int, top_k: int) -> None:
        super().__init__()
        self.num_expert, self.world_size, self.top_k = num_expert, world_size, top_k
        self.tot_expert = num_expert * world_size
        if not 1 <= top_k <= self.tot_expert:
            raise ValueError(f"top_k ({top_k}) must lie in 1 … {self.tot_expert}, the number of experts of all ranks")
        self.loss: torch.Tensor | None = None
        self._context = RankContext() if world_size == 1 else None

    def bind(self, context: RankContext) -> None:
        """Names the ranks over which the experts are spread."""
        if context.world_size != self.world_size:
            raise ValueError(f"world_size ({self.world_size}) must be that of the group ({context.world_size})")
        self._context = context

    @property
    def context(self) -> RankContext:
        if self._context is None:
            raise RuntimeError(f"{type(self).__name__} needs the other ranks: call bind(context) before the first rows")
        return self._context

    def set_loss(self, loss: torch.Tensor | None) -> None:
        self.loss = loss

    def get_loss(self, clear: bool = True) -> torch.Tensor | None:
        """The last forward's auxiliary loss, a scalar; None when there is none, or when it was already fetched."""
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        return self.loss is not None


class ZeroGate(BaseGate):
    """Every choice of every row is expert 0, with weight 1/K."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size, top_k)

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (inp.shape[0], self.top_k)
        return inp.new_zeros(shape, dtype=torch.int64), inp.new_full(shape, 1 / self.top_k)


class NaiveGate(BaseGate):
    """Mixtral's rule (Jiang et al., 2024, §2.1): the K largest of ``W·x + b``, softmax over those K. Its loss is 0."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2, gate_bias: bool = True) -> None:
        super().__init__(num_expert, world_size, top_k)
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)

    def forward(self, inp: torch.Tensor, return_all_scores: bool = False) -> tuple[torch.Tensor, ...]:
        """Ids and weights by falling weight; with ``return_all_scores`` the logits [N, E] too."""
        logits_NE = self.gate(inp)
        chosen_NK, idx_NK = logits_NE.topk(self.top_k, dim=-1)
        self.set_loss(logits_NE.new_zeros(()))
        score_NK = chosen_NK.softmax(-1)
        return (idx_NK, score_NK, logits_NE) if return_all_scores else (idx_NK, score_NK)


class NoisyGate(BaseGate):
    """Noisy top-k gating (Shazeer et al., 2017, eq. 3–5), with the losses of importance and load (eq. 6–10).

    In training ``h = x·Wg + ε·(softplus(x·Wn) + 0.01)``, ε standard normal; in evaluation ``h = x·Wg``. Softmax over
    the K largest of h. Loss: CV²(importance) + CV²(load), CV² = variance / mean² over the experts. Importance is
    the sum of an expert's weights; load is the sum of the probabilities that fresh noise would choose it, in
    evaluation, where there is no noise, the number of its rows.
    """

    NOISE_FLOOR = 1e-2

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size, top_k)
        self.w_gate = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.empty(d_model, self.tot_expert))
        for weight in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clean_NE = inp @ self.w_gate
        noisy_NE, deviation_NE = clean_NE, None
        if self.training:
            deviation_NE = F.softplus(inp @ self.w_noise) + self.NOISE_FLOOR
            noisy_NE = clean_NE + torch.randn_like(clean_NE) * deviation_NE
        top_NX, top_idx_NX = noisy_NE.topk(min(self.top_k + 1, self.tot_expert), dim=-1)
        idx_NK, score_NK = top_idx_NX[:, : self.top_k], top_NX[:, : self.top_k].softmax(-1)
        gates_NE = torch.zeros_like(noisy_NE).scatter(1, idx_NK, score_NK)
        if deviation_NE is not None and self.top_k < self.tot_expert:
            load_E = self._chance_of_choice(clean_NE, noisy_NE, deviation_NE, top_NX).sum(0)
        else:
            load_E = (gates_NE > 0).sum(0)
        self.set_loss(_squared_variation(gates_NE.sum(0)) + _squared_variation(load_E.float()))
        return idx_NK, score_NK

    def _chance_of_choice(self, clean_NE, noisy_NE, deviation_NE, top_NX) -> torch.Tensor:
        """Eq. 9: Φ((clean − the K-th largest of the other experts' noisy logits) / deviation)."""
        last_in, first_out = top_NX[:, self.top_k - 1, None], top_NX[:, self.top_k, None]
        kth_of_others_NE = torch.where(noisy_NE > first_out, first_out, last_in)
        return torch.special.ndtr((clean_NE - kth_of_others_NE) / deviation_NE)


class GShardGate(NaiveGate):
    """Top-2 with a limit on each expert's rows of each rank and a random second choice (GShard, algorithm 1).

    Limit: ``ceil(capacity · N) · K // E`` of a rank's N rows, first choices before second, then by row; capacity is
    (training, evaluation). The second choice is dropped where ``2 · weight < u``, u uniform in [0, 1). Weights are
    NaiveGate's. Loss: ``E · Σ_e share(e) · p(e)``, the share of first choices times the mean probability.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = True,
        gate_bias: bool = True,
    ) -> None:
        if top_k != 2:
            raise ValueError(f"top_k ({top_k}) must be 2 with {type(self).__name__}")
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        self.capacity, self.random_routing = capacity, random_routing

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        idx_NK, score_NK, logits_NE = super().forward(inp, return_all_scores=True)
        self.set_loss(_first_choice_loss(logits_NE, idx_NK[:, 0]))
        idx_NK = self._limit(idx_NK, math.ceil(_by_mode(self.capacity, self.training) * inp.shape[0]))
        if self.random_routing:
            unlucky_N = 2 * score_NK[:, 1] < torch.rand(inp.shape[0], device=inp.device)
            idx_NK[:, 1].masked_fill_(unlucky_N, -1)
        return idx_NK, score_NK

    def _limit(self, idx_NK: torch.Tensor, rows: int) -> torch.Tensor:
        limit = rows * self.top_k // self.tot_expert
        return _keep_first(idx_NK, torch.full((self.tot_expert,), limit, device=idx_NK.device))


class DCGate(GShardGate):
    """GShardGate whose limit, ``ceil(capacity · N)`` rows an expert, holds for the rows of all ranks together."""

    def _limit(self, idx_NK: torch.Tensor, rows: int) -> torch.Tensor:
        return limit_by_capacity(idx_NK, rows, self.num_expert, self.context)


class SwitchGate(NaiveGate):
    """Top-1 of a softmax over all experts, with jitter and a limit over all ranks (Fedus et al., 2021, §2).

    ``p = softmax(W·x + b + u)``, u uniform in [1-eps, 1+eps) in training and 0 in evaluation; the weight is the
    chosen p. An expert takes ``ceil(capacity · N / num_expert)`` rows of all ranks together, N the rows of its own
    rank. Loss: ``E · Σ_e kept(e)/kept · Σ_n p_n(e)/kept``, with kept the rows within the limit.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
    ) -> None:
        if top_k != 1:
            raise ValueError(f"top_k ({top_k}) must be 1 with SwitchGate")
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        self.switch_eps, self.capacity = switch_eps, capacity

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NE = self.gate(inp)
        if self.training:
            logits_NE = logits_NE + 1 - self.switch_eps + 2 * self.switch_eps * torch.rand_like(logits_NE)
        probability_NE = logits_NE.float().softmax(-1)
        score_N1, idx_N1 = probability_NE.topk(1, dim=-1)
        limit = math.ceil(_by_mode(self.capacity, self.training) * inp.shape[0] / self.num_expert)
        idx_N1 = limit_by_capacity(idx_N1, limit, self.num_expert, self.context)
        kept_E = _count(idx_N1, self.tot_expert)
        kept = kept_E.sum().clamp(min=1)
        self.set_loss((kept_E / kept * probability_NE.sum(0) / kept).sum() * self.tot_expert)
        return idx_N1, score_N1.type_as(inp)


class SwipeGate(NaiveGate):
    """In training every rank receives at most as many choices as it sends, K · N of its own N rows (SWIPE).

    Choice by choice k: each rank accepts rows in rank order, then row order, while its allowance lasts. The others
    fill the ranks with allowance left, in rank order, at their expert ``k mod num_expert``. Softmax over the logits
    of the K experts a row ends with. Evaluation is NaiveGate.
    """

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        idx_NK, score_NK, logits_NE = super().forward(inp, return_all_scores=True)
        if not self.training:
            return idx_NK, score_NK
        own = torch.tensor([idx_NK.numel()], device=inp.device)
        allowance_W = self.context.all_gather(own).squeeze(1)
        columns = []
        for k in range(self.top_k):
            ranks_N = idx_NK[:, k] // self.num_expert
            counts_SW = self.context.all_gather(count_keys(ranks_N, self.world_size))
            new_N, allowance_W = even_out(ranks_N, counts_SW, allowance_W, self.context.rank)
            moved_to_N = new_N * self.num_expert + k % self.num_expert
            columns.append(torch.where(new_N == ranks_N, idx_NK[:, k], moved_to_N))
        idx_NK = torch.stack(columns, dim=1)
        return idx_NK, logits_NE.gather(1, idx_NK).softmax(-1)


class FasterGate(NaiveGate):
    """Topology-aware: at most a fraction of a rank's rows leave their node (FasterMoE, 2022, §4.3).

    Of the rows with a choice outside the node, the ``int(outgoing_fraction · N)`` with the least weight inside
    keep their choices; the others choose their K best experts inside. Softmax over the logits of the K experts
    chosen. Loss as GShardGate's, of the choices that the rows would have made.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int = 2,
        gate_bias: bool = True,
        topology: TopologyOptions | None = None,
    ) -> None:
        """``topology`` of None is read from ``FMOE_TOPO_*``."""
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        self.topology = TopologyOptions.of() if topology is None else topology
        per_node = self.topology.gpus_per_node
        smallest = num_expert * (world_size % per_node or min(per_node, world_size))
        if smallest < top_k:
            raise ValueError(f"top_k ({top_k}) must be at most the number of experts of a node ({smallest})")

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        idx_NK, score_NK, logits_NE = super().forward(inp, return_all_scores=True)
        self.set_loss(_first_choice_loss(logits_NE, idx_NK[:, 0]))
        per_node = self.topology.gpus_per_node * self.num_expert
        expert_E = torch.arange(self.tot_expert, device=inp.device)
        outside_E = expert_E // per_node != self.context.rank // self.topology.gpus_per_node
        away_NK = outside_E[idx_NK]
        # weight inside, not outside: rows with all choices outside tie at exactly 0, and row order decides
        weight_inside_N = (score_NK.detach() * ~away_NK).sum(1).masked_fill(~away_NK.any(1), torch.inf)
        order_N = weight_inside_N.argsort(stable=True)
        must_stay_N = away_NK.any(1)
        must_stay_N[order_N[: int(self.topology.outgoing_fraction * inp.shape[0])]] = False
        inside_NK = logits_NE.masked_fill(outside_E, -torch.inf).topk(self.top_k, dim=-1).indices
        idx_NK = torch.where(must_stay_N[:, None], inside_NK, idx_NK)
        return idx_NK, logits_NE.gather(1, idx_NK).softmax(-1)


def limit_by_capacity(idx_NK: torch.Tensor, capacity: int, num_expert: int, context: RankContext) -> torch.Tensor:
    """Ids with -1 for choices over their expert's limit: ``capacity`` as its own rank states it, over all ranks.

    Rows of lower ranks come first, then first choices, then row order. Collective: one small all-gather.
    """
    counts_E = _count(idx_NK, num_expert * context.world_size)
    stated_WX = context.all_gather(torch.cat([counts_E, counts_E.new_tensor([capacity])]))
    counts_WE, limit_E = stated_WX[:, :-1], stated_WX[:, -1].repeat_interleave(num_expert)
    return _keep_first(idx_NK, limit_E - counts_WE[: context.rank].sum(0))


def even_out(
    ranks_N: torch.Tensor, counts_SW: torch.Tensor, allowance_W: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One round of SWIPE: the ranks that this rank's choices go to in the end, and every rank's allowance left.

    Args:
        ranks_N: rank each choice asks for.
        counts_SW: choices of every source rank for every rank.
        allowance_W: choices that each rank may still receive; together at least as many as there are.
    """
    accepted_SW = torch.minimum((allowance_W - counts_SW.cumsum(0) + counts_SW).clamp(min=0), counts_SW)
    # Refused choices of all sources, laid end to end, meet the ranks' free places, laid end to end.
    refused_end_S = (counts_SW - accepted_SW).sum(1).cumsum(0)
    free_end_W = (allowance_W - accepted_SW.sum(0)).cumsum(0)
    upto_SW = torch.minimum(refused_end_S[:, None], free_end_W)
    upto_SW = F.pad(upto_SW, (1, 0, 1, 0))  # cumulative in both directions, so differences are the overlaps
    moved_SW = upto_SW.diff(dim=0).diff(dim=1)
    is_refused_N = _place_among_equals(ranks_N, len(allowance_W)) >= accepted_SW[rank][ranks_N]
    turn_N = is_refused_N.cumsum(0) - 1
    new_N = torch.searchsorted(moved_SW[rank].cumsum(0), turn_N.clamp(min=0), right=True)
    received_W = (accepted_SW + moved_SW).sum(0)
    return torch.where(is_refused_N, new_N, ranks_N), allowance_W - received_W


def _keep_first(idx_NK: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    """Each expert's first ``rows_E`` choices, first choices of all rows before second ones; -1 for the others."""
    keys_M = idx_NK.T.flatten()
    is_over_M = _place_among_equals(keys_M, len(rows_E)) >= rows_E[keys_M]
    return keys_M.masked_fill(is_over_M, -1).view(idx_NK.T.shape).T.contiguous()


def _place_among_equals(keys_M: torch.Tensor, size: int) -> torch.Tensor:
    """0 for the first of equal keys, 1 for the next, …"""
    order_M = keys_M.argsort(stable=True)
    counts = count_keys(keys_M, size)
    index_M = torch.arange(len(keys_M), device=keys_M.device) - (counts.cumsum(0) - counts)[keys_M[order_M]]
    return torch.empty_like(keys_M).scatter_(0, order_M, index_M)


def _count(idx_NK: torch.Tensor, num_experts: int) -> torch.Tensor:
    return count_keys(idx_NK.masked_fill(idx_NK < 0, num_experts), num_experts + 1)[:-1]


def _first_choice_loss(logits_NE: torch.Tensor, first_N: torch.Tensor) -> torch.Tensor:
    """GShard's l_aux: 1 when first choices and probabilities are spread evenly."""
    rows, num_experts = max(1, logits_NE.shape[0]), logits_NE.shape[1]
    share_E = count_keys(first_N, num_experts) / rows
    return num_experts * (share_E * logits_NE.softmax(-1).sum(0) / rows).sum()


def _squared_variation(x_E: torch.Tensor) -> torch.Tensor:
    if len(x_E) == 1:
        return x_E.new_zeros(())
    return x_E.var() / (x_E.mean() ** 2 + 1e-10)


def _by_mode(capacity: tuple[float, float], training: bool) -> float:
    return capacity[0] if training else capacity[1]
