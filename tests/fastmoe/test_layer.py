"""FMoE equals the sum over choices written out in one place, forward and backward, over any groups."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mixtralkit.config import FasterOptions
from mixtralkit.distributed import RankContext
from mixtralkit.fastmoe.gates import NaiveGate, NoisyGate, SwitchGate, ZeroGate
from mixtralkit.fastmoe.layer import FMoE
from tests.ranks import run_ranks

D, OUT, TOTAL = 6, 5, 8
MASK_VALUES = {1: torch.linspace(-1, 1, OUT), 2: 0.5}
ROWS = [13, 4, 0, 1]


def _weights(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + expert)
    return torch.randn(9, D, generator=generator), torch.randn(OUT, 9, generator=generator)


def _gate_weights() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, TOTAL)


class TwoLayers(nn.Module):
    """An expert whose output is narrower than its input."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, 9, bias=False), nn.Linear(9, OUT, bias=False)

    def forward(self, x):
        return self.down(self.up(x).tanh())


class Counted(TwoLayers):
    """An expert that is told how many rows it has, as FastMoE's own are."""

    def forward(self, x, fwd_expert_count):
        assert fwd_expert_count.tolist() == [len(x)]
        return super().forward(x)


class Fused(nn.Module):
    """All experts of a rank in one module."""

    def __init__(self, num_expert: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(TwoLayers(D) for _ in range(num_expert))

    def forward(self, x, fwd_expert_count):
        groups = x.split(fwd_expert_count.tolist())
        return torch.cat([member(group) for member, group in zip(self.members, groups, strict=True)])


class DroppingGate(NaiveGate):
    """Drops all choices of some rows and the second choice of others, by what is in the row."""

    def forward(self, inp):
        idx, score = super().forward(inp)
        return _dropped(idx, inp), score


def _dropped(idx_NK: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
    idx_NK = idx_NK.masked_fill((x_ND[:, 0] > 0.5)[:, None], -1)
    idx_NK[:, 1][x_ND[:, 1] > 0.3] = -1
    return idx_NK


@dataclass(frozen=True)
class Case:
    """One arrangement: the options of the layer, ranks of a slice, and the kind of experts."""

    slice_size: int = 1
    drop: bool = False
    mask: bool = False
    experts: str = "modules"
    schedule: bool = False
    top_k: int = 2


def _rows(group: int) -> torch.Tensor:
    return torch.randn(ROWS[group], D, generator=torch.Generator().manual_seed(group))


def _mask(group: int) -> torch.Tensor:
    return torch.arange(ROWS[group]) % 4  # value 3 has no entry in the dictionary


def _oracle(case: Case, groups: int):
    """(outputs and input gradients of every slice group, gradients of the gate's and the experts' weights)."""
    gate = _gate_weights()
    weights = [tuple(w.requires_grad_() for w in _weights(e)) for e in range(TOTAL)]
    inputs = [_rows(group).requires_grad_() for group in range(groups)]
    outputs = []
    for group, x_ND in enumerate(inputs):
        logits, idx = gate(x_ND).topk(case.top_k)
        idx = _dropped(idx, x_ND) if case.drop else idx
        rows = []
        for n in range(len(x_ND)):
            score = logits[n].softmax(-1)
            y = torch.zeros(OUT)
            masked = int(_mask(group)[n]) if case.mask else 0
            for k in range(case.top_k):
                up, down = weights[max(0, int(idx[n, k]))]
                if masked:
                    y = y + score[k] * MASK_VALUES.get(masked, 0.0)
                elif idx[n, k] >= 0:
                    y = y + score[k] * (down @ (up @ x_ND[n]).tanh())
            rows.append(y)
        outputs.append(torch.stack(rows) if rows else x_ND.new_zeros(0, OUT))
    sum(_loss(y) for y in outputs).backward()
    return (
        outputs,
        [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs],
        gate.weight.grad,
        [[w.grad for w in pair] for pair in weights],
    )


def _loss(y: torch.Tensor) -> torch.Tensor:
    return (y * y.detach().cos()).sum()


def _layer(case: Case, context: RankContext) -> FMoE:
    count = TOTAL // context.world_size
    slice_group = None
    if case.slice_size > 1:
        starts = range(0, context.world_size, case.slice_size)
        slice_groups = [dist.new_group(list(range(first, first + case.slice_size))) for first in starts]
        slice_group = slice_groups[context.rank // case.slice_size]
    maker = {"modules": TwoLayers, "counted": Counted, "list": [TwoLayers] * count, "fused": None}[case.experts]
    layer = FMoE(
        count, D, context.world_size, slice_group=slice_group, top_k=case.top_k, expert=maker,
        gate=DroppingGate if case.drop else NaiveGate, faster=FasterOptions(schedule=case.schedule, group_size=1),
        mask=_mask(context.rank // case.slice_size) if case.mask else None,
        mask_dict=MASK_VALUES if case.mask else None,
    )  # fmt: skip
    if case.experts == "fused":
        layer.experts = Fused(count)
    layer.gate.gate.load_state_dict(_gate_weights().state_dict())
    for slot, module in enumerate(_modules(layer)):
        with torch.no_grad():
            for parameter, weight in zip(module.parameters(), _weights(context.rank * count + slot), strict=True):
                parameter.copy_(weight)
    return layer


def _modules(layer: FMoE):
    return layer.experts.members if layer.experts_fused else layer.experts


def _run(context: RankContext, cases: list[Case]) -> None:
    for case in cases:
        layer, group = _layer(case, context), context.rank // case.slice_size
        x_ND = _rows(group).requires_grad_()
        y_ND = layer(x_ND)
        _loss(y_ND).backward()
        outputs, grads, gate_grad, expert_grads = _oracle(case, context.world_size // case.slice_size)
        torch.testing.assert_close(y_ND, outputs[group], msg=lambda m, case=case: f"{case} output: {m}")
        torch.testing.assert_close(x_ND.grad, grads[group], msg=lambda m, case=case: f"{case} input: {m}")
        own = layer.gate.gate.weight.grad
        torch.testing.assert_close(context.all_reduce(own), gate_grad, msg=lambda m, case=case: f"{case} gate: {m}")
        for slot, module in enumerate(_modules(layer)):
            expected = expert_grads[context.rank * layer.num_expert + slot]
            for parameter, grad in zip(module.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter) if grad is None else grad)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_arrangement_equals_the_oracle(world_size):
    cases = []
    for slice_size in {1, min(2, world_size), world_size}:
        cases += [
            Case(slice_size),
            Case(slice_size, drop=True, experts="fused"),
            Case(slice_size, mask=True, experts="counted"),
            Case(slice_size, drop=True, mask=True, schedule=True),
            Case(slice_size, experts="list", top_k=3, schedule=True),
        ]
    run_ranks(_run, world_size, cases)


def test_leading_dimensions_are_kept():
    layer = _layer(Case(), RankContext())
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(layer(x), layer(x.view(15, D)).view(3, 5, OUT))


def _mean_rows_of_subgroups(context: RankContext) -> list[list[float]]:
    """Two pairs of ranks, each an expert-parallel group of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = FMoE(1, D, 2, moe_group=groups[context.rank // 2], gate=ZeroGate, top_k=1, expert=lambda d: nn.Identity())
    x = torch.full((2, D), float(context.rank))
    seen = []
    layer.experts[0].register_forward_hook(lambda module, args, out: seen.append(args[0][:, 0].tolist()))
    assert torch.equal(layer(x), x)
    return seen


def test_rows_stay_in_the_group_of_the_experts():
    assert run_ranks(_mean_rows_of_subgroups, 4) == [[[0.0, 0.0, 1.0, 1.0]], [[]], [[2.0, 2.0, 3.0, 3.0]], [[]]]


def test_gate_hook_sees_ids_and_scores():
    calls = []
    layer = FMoE(4, D, expert=TwoLayers, gate_hook=lambda *args: calls.append(args))
    layer(torch.randn(7, D))
    ((idx, score, extra),) = calls
    assert idx.shape == score.shape == (7, 2)
    assert extra is None


def test_gates_shaped_as_fastmoe_shapes_them():
    """FastMoE's noisy gate returns ids [N·K] and scores [N, 1, K]."""

    class Flat(NoisyGate):
        def forward(self, inp):
            idx, score = super().forward(inp)
            return idx.reshape(-1), score.unsqueeze(1)

    layers = []
    for gate in (NoisyGate, Flat):
        torch.manual_seed(3)
        layers.append(FMoE(4, D, gate=gate, expert=TwoLayers).eval())
    x = torch.randn(9, D)
    torch.testing.assert_close(layers[0](x), layers[1](x))


def test_switch_layer_learns():
    torch.manual_seed(0)
    layer = FMoE(4, D, top_k=1, gate=SwitchGate, expert=TwoLayers)
    x, target = torch.randn(64, D), torch.randn(64, OUT)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).pow(2).mean() + 0.01 * layer.gate.get_loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_parameters_are_marked_for_data_parallel():
    layer = FMoE(2, D, expert=TwoLayers)
    layer.mark_parallel_comm("dp")
    assert {p.dp_comm for p in layer.experts.parameters()} == {"dp"}
    assert {p.dp_comm for p in layer.gate.parameters()} == {"gate"}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"world_size \(2\)"):
        FMoE(2, D, 2, expert=TwoLayers)
    with pytest.raises(ValueError, match="mask_dict"):
        FMoE(2, D, expert=TwoLayers, mask_dict={1: 0.0})
    with pytest.raises(ValueError, match=r"top_k \(3\)"):
        FMoE(2, D, expert=TwoLayers, top_k=3)
    with pytest.raises(RuntimeError, match=r"self\.experts"):
        FMoE(2, D)(torch.randn(3, D))
