"""``FMoE``: FastMoE's layer contract, for any gate and any experts, over this package's exchange of rows.

Expert e of all ranks is number ``e % num_expert`` of rank ``e // num_expert``. docs/fastmoe.md compares the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mixtralkit.config import FasterOptions
from mixtralkit.distributed import RankContext
from mixtralkit.fastmoe.gates import BaseGate, NaiveGate
from mixtralkit.moe.capacity import CutRouting
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.dispatch.collectives import enter_replicated, sum_over_ranks
from mixtralkit.moe.dispatch.exact import ExactDispatcher
from mixtralkit.moe.dispatch.schedule import num_chunks, run_in_chunks
from mixtralkit.ops.counting import count_keys
from mixtralkit.ops.hidden import Hidden


class FMoE(nn.Module):
    """Σ_k score · expert(x) for every row, ``num_expert`` experts on each of ``world_size`` ranks.

    Args:
        moe_group: process group over which the experts are spread; None with several ranks means all of them.
        slice_group: process group whose ranks hold the same input and want the same output. Each computes its share
            of the rows. The loss must be the same on these ranks; each then has the whole gradient of the input, and
            its own rows' part of the gradients of gate and experts.
        gate: called with (d_model, num_expert, world_size, top_k) and, if a ``NaiveGate``, ``gate_bias``; what it
            makes maps rows [N, D] to ids [N, K] (-1: dropped, contributes zero) and scores [N, K].
        expert: called with ``d_model`` once for each expert; a list makes one of each. An expert is called with its
            rows, and with their number as an int64 tensor if it takes two arguments. None: the subclass sets
            ``self.experts`` to one module for all, called with rows grouped by expert and their numbers [num_expert].
        gate_hook: called with (ids, scores, None) after the gate.
        mask: [*] of the input's leading shape; rows where it is not 0 reach no expert.
        mask_dict: mask value → what stands for a masked row's K expert outputs: a number, [D] or [K, D]. Values
            without an entry give zeros.
        faster: FasterMoE's switches, of which ``schedule`` applies here; None reads ``FMOE_FASTER_*``.
    """

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        world_size: int = 1,
        *,
        moe_group: dist.ProcessGroup | None = None,
        slice_group: dist.ProcessGroup | None = None,
        top_k: int = 2,
        gate: Callable[..., nn.Module] = NaiveGate,
        expert: Callable[[int], nn.Module] | list[Callable[[int], nn.Module]] | None = None,
        gate_hook: Callable[[torch.Tensor, torch.Tensor, Any], Any] | None = None,
        mask: torch.Tensor | None = None,
        mask_dict: Mapping[int, Any] | None = None,
        gate_bias: bool = True,
        faster: FasterOptions | None = None,
    ) -> None:
        super().__init__()
        if mask is None and mask_dict is not None:
            raise ValueError("mask_dict needs a mask")
        makers = expert if isinstance(expert, list) else [expert] * num_expert
        self.num_expert, self.d_model, self.world_size, self.top_k = len(makers), d_model, world_size, top_k
        self.context = _moe_context(world_size, moe_group)
        self.slices = RankContext() if slice_group is None else _context_of(slice_group)
        self.experts_fused = expert is None
        self.experts = None if expert is None else nn.ModuleList(make(d_model) for make in makers)
        bias = {"gate_bias": gate_bias} if isinstance(gate, type) and issubclass(gate, NaiveGate) else {}
        self.gate = gate(d_model, self.num_expert, world_size, top_k, **bias)
        if isinstance(self.gate, BaseGate):
            self.gate.bind(self.context)
        self.gate_hook, self.mask, self.mask_dict = gate_hook, mask, mask_dict
        self.faster = FasterOptions.of() if faster is None else faster

    def forward(self, moe_inp: torch.Tensor) -> torch.Tensor:
        """Rows [*, D] to rows [*, width of the experts' output]. Collective over both groups."""
        rows_ND = enter_replicated(moe_inp.reshape(-1, moe_inp.shape[-1]), self.slices)
        mine = _share(len(rows_ND), self.slices)
        x_ND = rows_ND[mine]
        idx_NK, score_NK = self._route(x_ND)
        mask_N = None if self.mask is None else self.mask.reshape(-1)[mine].to(x_ND.device)
        if mask_N is not None:
            idx_NK = idx_NK.masked_fill((mask_N != 0)[:, None], -1)
        y_ND = self._experts_of_all_ranks(x_ND, idx_NK, score_NK)
        if mask_N is not None:
            y_ND = self._fill_masked(y_ND, mask_N, score_NK)
        # Every rank adds zeros outside its share, so the sum is the whole and gradients return undoubled.
        padding = (0, 0, mine.start, len(rows_ND) - mine.stop)
        y_ND = sum_over_ranks(F.pad(y_ND, padding), self.slices) if self.slices.group is not None else y_ND
        return y_ND.view(*moe_inp.shape[:-1], y_ND.shape[-1])

    def _route(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        idx, score = self.gate(x_ND)
        if self.gate_hook is not None:
            self.gate_hook(idx, score, None)
        return idx.reshape(-1, self.top_k), score.reshape(-1, self.top_k)  # FastMoE's gates shape them in many ways

    def _experts_of_all_ranks(self, x_ND: torch.Tensor, idx_NK: torch.Tensor, score_NK: torch.Tensor) -> torch.Tensor:
        dispatcher, table = ExactDispatcher(self.context), _FixedTable(self.num_expert)
        none = idx_NK.new_zeros(())
        cut = CutRouting(idx_NK, score_NK.float().masked_fill(idx_NK < 0, 0.0), none, none)
        if self.faster.schedule and self.world_size > 1:
            chunks = num_chunks(self.world_size, self.faster.group_size)
            return run_in_chunks(dispatcher, self._experts_of_rank, Hidden(None, x_ND), cut, table, chunks)[0].rows_TD
        rows, handle = dispatcher.dispatch(Hidden(None, x_ND), cut, table)
        return dispatcher.combine(self._experts_of_rank(rows), handle).rows_TD

    def _experts_of_rank(self, rows: RoutedRows) -> torch.Tensor:
        """Σ_k weight · expert(x) over this rank's experts, in the dtype of their output, summed in float32."""
        row_M, choice_M = (rows.slots_RK >= 0).nonzero(as_tuple=True)  # host sync
        slot_M = rows.slots_RK[row_M, choice_M]
        order_M = slot_M.argsort(stable=True)
        row_M, choice_M = row_M[order_M], choice_M[order_M]
        y_MD = self.expert_fn(rows.x_RD[row_M], count_keys(slot_M, self.num_expert).cpu())
        weighted_MD = y_MD.float() * rows.weights_RK[row_M, choice_M, None]
        parts_RKD = weighted_MD.new_zeros(*rows.slots_RK.shape, y_MD.shape[1])
        return parts_RKD.index_put((row_M, choice_M), weighted_MD).sum(1).type_as(y_MD)

    def expert_fn(self, inp: torch.Tensor, fwd_expert_count: torch.Tensor) -> torch.Tensor:
        """Rows [M, D] grouped by expert, and each group's length (int64 on the host), through the experts."""
        if self.experts is None:
            raise RuntimeError("expert was None: set self.experts to a module for all experts of the rank")
        if self.experts_fused:
            return self.experts(inp, fwd_expert_count)
        groups = inp.split(fwd_expert_count.tolist())
        outputs = []
        for expert, group, count in zip(self.experts, groups, fwd_expert_count, strict=True):
            outputs.append(expert(group, count[None]) if _takes_count(expert) else expert(group))
        return torch.cat(outputs)

    def _fill_masked(self, y_ND: torch.Tensor, mask_N: torch.Tensor, score_NK: torch.Tensor) -> torch.Tensor:
        for key, value in (self.mask_dict or {}).items():
            chosen_N = mask_N == key
            shape = (self.top_k, y_ND.shape[1])
            value_KD = torch.as_tensor(value, dtype=torch.float32, device=y_ND.device).expand(shape)
            filled_ND = (score_NK.float() @ value_KD).type_as(y_ND)
            y_ND = torch.where(chosen_N[:, None], filled_ND, y_ND)
        return y_ND

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Sets ``dp_comm`` on every parameter, as FastMoE's data-parallel wrapper reads it."""
        for module, comm in ((self.experts, expert_dp_comm), (self.gate, "gate")):
            for parameter in () if module is None else module.parameters():
                parameter.dp_comm = comm


class _FixedTable:
    """Every expert is in one place: expert e on rank ``e // num_expert``, in slot ``e % num_expert``."""

    def __init__(self, num_expert: int) -> None:
        self.num_expert = num_expert

    def pour(self, experts_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lost_NK = experts_NK < 0
        ranks_NK, slots_NK = experts_NK // self.num_expert, experts_NK % self.num_expert
        return ranks_NK.masked_fill(lost_NK, -1), slots_NK.masked_fill(lost_NK, -1)


def _moe_context(world_size: int, group: dist.ProcessGroup | None) -> RankContext:
    if world_size == 1:
        return RankContext()
    if group is None and not dist.is_initialized():
        raise ValueError(f"world_size ({world_size}) above 1 needs torch.distributed's process group")
    context = _context_of(dist.group.WORLD if group is None else group)
    if context.world_size != world_size:
        raise ValueError(f"world_size ({world_size}) must be that of moe_group ({context.world_size})")
    return context


def _context_of(group: dist.ProcessGroup) -> RankContext:
    size = dist.get_world_size(group)
    return RankContext(dist.get_rank(group), size, group=group if size > 1 else None)


def _share(rows: int, slices: RankContext) -> slice:
    return slice(rows * slices.rank // slices.world_size, rows * (slices.rank + 1) // slices.world_size)


def _takes_count(expert: nn.Module) -> bool:
    try:
        inspect.signature(expert.forward).bind(None, None)
    except TypeError:
        return False
    return True
