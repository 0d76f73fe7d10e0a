"""Gradients and optimizers over ranks: some parameters are the same on every rank, experts are a rank's own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from mixtralkit.distributed import RankContext


class RankOptimizer:
    """AdamW over this rank's parameters, with the exchange of gradients and clipping that come before it.

    Gradients of replicated parameters are summed over the ranks: each rank's loss is its part of the whole batch's.
    Those of experts are whole already, because rows came from all ranks. With ``zero`` the states of replicated
    parameters are split over the ranks by torch's ZeroRedundancyOptimizer; experts' states are split as experts are.
    Matrices decay by ``weight_decay``; norms do not.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        context: RankContext,
        *,
        weight_decay: float,
        clip: float,
        zero: bool,
    ) -> None:
        self._context, self._clip = context, clip
        spread = context.world_size > 1
        is_expert = {name: name.endswith((".w13", ".w2")) for name in parameters}
        self._experts = [p for name, p in parameters.items() if is_expert[name] and p.numel()]
        self._replicated = [p for name, p in parameters.items() if not is_expert[name]]
        settings = {"lr": 0.0, "betas": (0.9, 0.95), "fused": context.device.type == "cuda"}
        replicated_groups = [
            {"params": [p for p in self._replicated if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in self._replicated if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._zero = zero and spread
        if self._zero:
            replicated = ZeroRedundancyOptimizer(
                replicated_groups, torch.optim.AdamW, process_group=context.group, **settings
            )
        else:
            replicated = torch.optim.AdamW(replicated_groups, **settings)
        self._optimizers = [replicated]
        if self._experts:
            self._optimizers.append(torch.optim.AdamW(self._experts, weight_decay=weight_decay, **settings))

    def step(self, learning_rate: float) -> torch.Tensor:
        """Brings gradients together, clips them by their global norm, moves the parameters; the norm before."""
        self._sum_replicated()
        norm = self._clip_gradients()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        for parameter in (*self._replicated, *self._experts):
            parameter.grad = None
        return norm

    def _sum_replicated(self) -> None:
        if self._context.group is None:
            return
        flat = torch.cat([_gradient(p).flatten() for p in self._replicated])
        self._context.all_reduce(flat)
        for parameter, part in zip(self._replicated, flat.split([p.numel() for p in self._replicated]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _clip_gradients(self) -> torch.Tensor:
        shared = nn.utils.get_total_norm([_gradient(p) for p in self._replicated]).square()
        own = nn.utils.get_total_norm([_gradient(p) for p in self._experts]).square().to(shared.device)
        norm = (shared + self._context.all_reduce(own)).sqrt()
        if self._clip > 0:
            nn.utils.clip_grads_with_norm_([*self._replicated, *self._experts], self._clip, norm)
        return norm

    def state(self) -> list[dict]:
        """What ``load_state`` needs to go on; collective. A rank keeps its own file of it."""
        if self._zero:
            self._optimizers[0].consolidate_state_dict(to=0)
        first = self._context.is_first or not self._zero
        return [opt.state_dict() if first or at else {} for at, opt in enumerate(self._optimizers)]

    def load_state(self, states: list[dict]) -> None:
        """Takes what ``state`` gave on this rank, for the same world size and ``zero``; collective."""
        if self._zero:
            states = [self._context.broadcast_object(states[0]), *states[1:]]
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient, zeros where no row of the batch touched the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def learning_rate(step: int, steps: int, peak: float, warmup: int, final: float = 0.02) -> float:
    """Linear over ``warmup`` steps, then a cosine down to ``final · peak`` at the last of ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
