"""The layer over the real library: its errors without it, and its wiring over a stand-in for ``fmoe.functions``."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from mixtralkit.config import FasterOptions, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.fastmoe import backend as fmoe_backend
from mixtralkit.fastmoe.backend import FastMoELayer
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.dispatch.collectives import all_to_all
from mixtralkit.moe.layer import StepRows
from mixtralkit.moe.reference import moe_reference
from mixtralkit.moe.store import ExpertStore
from mixtralkit.ops.hidden import Hidden
from mixtralkit.ops.norm.reference import rms_norm_reference
from mixtralkit.planning.plan import contiguous, everywhere
from tests.moe.layers import Whole
from tests.ranks import run_ranks

FASTMOE = MoEOptions(backend="fastmoe")


def _stand_in() -> ModuleType:
    """``fmoe.functions`` as documented: rows by destination rank and expert, counts on the host."""
    functions = ModuleType("fmoe.functions")
    functions.comm = None

    def ensure_comm(tensor, comm):
        functions.comm = comm

    def context(world_size: int) -> RankContext:
        return RankContext(dist.get_rank(), world_size, group=functions.comm) if world_size > 1 else RankContext()

    def prepare_forward(gate, num_expert, world_size):
        assert gate.numel(), "a CUDA kernel cannot start for no rows"
        keys = gate.flatten()
        valid = (keys >= 0).nonzero().squeeze(1)
        pos = valid[keys[valid].argsort(stable=True)]
        local = torch.bincount(keys[valid], minlength=num_expert * world_size)
        every = context(world_size).all_gather(local).view(world_size, world_size, num_expert)
        received = every[:, context(world_size).rank].contiguous()  # [source, expert]
        return pos, local, received.flatten(), received.sum(0), int(received.sum())

    def exchange(rows, local, received, world_size, back: bool):
        """Between (destination, expert) at the source and (expert, source) at the destination."""
        send, take = local.view(world_size, -1).sum(1).tolist(), received.view(world_size, -1)
        by_source = torch.arange(int(take.sum())).split(take.flatten().tolist())
        experts = take.shape[1]
        order = torch.cat([by_source[s * experts + e] for e in range(experts) for s in range(world_size)])
        if back:
            return all_to_all(rows[order.argsort()], context(world_size), take.sum(1).tolist(), send)
        return all_to_all(rows, context(world_size), send, take.sum(1).tolist())[order]

    class MOEScatter:
        @staticmethod
        def apply(inp, pos, local, received, fwd_batch_size, world_size):
            rows = exchange(inp[pos], local, received, world_size, back=False)
            assert len(rows) == fwd_batch_size
            return rows

    class MOEGather:
        @staticmethod
        def apply(rows, pos, local, received, local_batch_size, world_size):
            home = exchange(rows, local, received, world_size, back=True)
            return home.new_zeros(local_batch_size, home.shape[1]).index_copy(0, pos, home)

    functions.ensure_comm, functions.prepare_forward = ensure_comm, prepare_forward
    functions.MOEScatter, functions.MOEGather = MOEScatter, MOEGather
    return functions


@pytest.fixture
def installed(monkeypatch):
    _install(monkeypatch)


def _install(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("fmoe")
    package.functions = _stand_in()
    monkeypatch.setitem(sys.modules, "fmoe", package)
    monkeypatch.setitem(sys.modules, "fmoe.functions", package.functions)
    monkeypatch.setattr(fmoe_backend, "DEVICE_TYPES", ("cpu",))


def _layout(whole: Whole, context: RankContext, attention: str = "dp", plan=None) -> RankLayout:
    plan = contiguous(1, whole.num_experts, context.world_size) if plan is None else plan
    return RankLayout(whole.config(), ParallelConfig(attention, "ep"), plan, context.rank)


def _layer(layout: RankLayout, context: RankContext, options: MoEOptions = FASTMOE) -> FastMoELayer:
    return FastMoELayer(0, context, ExpertStore(layout, context, torch.float32), options)


def _errors(context: RankContext, rows: list[int]) -> float:
    _install(pytest.MonkeyPatch())
    whole = Whole(skew={3: 2.0})
    gate, w13, w2 = whole.weights()
    layout = _layout(whole, context)
    layer = _layer(layout, context)
    mine = list(layout.experts(0))
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), (gate, w13[mine], w2[mine]), strict=True):
            parameter.copy_(value)
    x_TD = whole.rows(rows[context.rank], context.rank)
    with torch.no_grad():
        hidden, report = layer(Hidden(None, x_TD), StepRows(per_rank=max(rows)))
    y_TD = hidden.rows_TD
    assert report.routing.experts_TK.shape == (len(x_TD), whole.top_k)
    assert int(report.dropped) == int(report.rerouted) == 0
    expected = moe_reference(x_TD, gate, w13, w2, whole.top_k)
    assert y_TD.shape == expected.shape
    _compare_stream(whole, layer, x_TD)
    return float((y_TD - expected).abs().max()) if y_TD.numel() else 0.0


@torch.no_grad()
def _compare_stream(whole: Whole, layer: FastMoELayer, x_TD: torch.Tensor) -> None:
    """As a block calls it: added to the residual stream, without the rows that only fill the shape."""
    before, after = ((torch.linspace(0.8, 1.2, whole.dim) ** power, 1e-5) for power in (1, 2))
    valid_T = torch.arange(len(x_TD)).masked_fill(torch.arange(len(x_TD)) % 3 == 1, -1)
    hidden, _ = layer(Hidden(x_TD, None, before), StepRows(valid_T=valid_T), after)
    y_TD = moe_reference(rms_norm_reference(x_TD, *before), *whole.weights(), whole.top_k)
    wanted_TD = x_TD + y_TD.masked_fill((valid_T < 0)[:, None], 0.0)
    torch.testing.assert_close(hidden.x_TD, wanted_TD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.normalised(), rms_norm_reference(wanted_TD, *after), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layer_over_the_library_equals_the_oracle(world_size):
    assert max(run_ranks(_errors, world_size, [9, 0, 3, 1][:world_size])) < 1e-5


def test_transformer_takes_the_backend_of_its_options(installed):
    layout = RankLayout.single(Whole().config())
    models = [Transformer(layout, RankContext(), options=options) for options in (FASTMOE, MoEOptions())]
    assert isinstance(models[0].layers[0].feed_forward, FastMoELayer)
    for model in models:
        model.initialize(seed=1, std=0.3)
    tokens = torch.arange(7)[None]
    torch.testing.assert_close(models[0](tokens), models[1](tokens))
    assert models[0].named_tensors().keys() == models[1].named_tensors().keys()


def test_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "fmoe", None)
    with pytest.raises(ValueError, match=r"package fmoe .* CUDA and NCCL .*github\.com/laekov/fastmoe") as error:
        Transformer(RankLayout.single(Whole().config()), RankContext(), options=FASTMOE)
    assert "\n" not in str(error.value)


def test_library_on_a_cpu_is_refused(installed, monkeypatch):
    monkeypatch.setattr(fmoe_backend, "DEVICE_TYPES", ("cuda",))
    with pytest.raises(ValueError, match="needs device 'cuda', not 'cpu'"):
        _layer(_layout(Whole(), RankContext()), RankContext())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention": "tp"}, "attention \\('tp'\\)"),
        ({"plan": everywhere(1, 8, 2)}, r"plan \(everywhere\) must be contiguous"),
        ({"whole": Whole(num_experts=7)}, r"num_experts \(7\)"),
        ({"faster": FasterOptions(schedule=True)}, "faster_schedule must be off"),
        ({"faster": FasterOptions(shadow=True)}, "faster_shadow must be off"),
    ],
)
def test_what_the_library_cannot_do_is_refused(installed, change, says):
    two = RankContext(0, 2)
    layout = _layout(change.get("whole", Whole()), two, change.get("attention", "dp"), change.get("plan"))
    options = MoEOptions(backend="fastmoe", faster=change.get("faster", FasterOptions()))
    with pytest.raises(ValueError, match=says):
        _layer(layout, two, options)
