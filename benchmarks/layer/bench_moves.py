"""How long one MoE layer stands still while its experts move to another plan.

    torchrun --standalone --nproc_per_node=4 -m benchmarks.layer.bench_moves

Goes round a ring of plans and times each move on the slowest rank; the first round connects the ranks and is left out.
Every move is followed by a check that the layer still computes what it did.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.common.machine import describe_run
from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig, ParallelConfig, parse_dtype
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.moe.layer import MoELayer
from mixtralkit.moe.transfers import MoveReport, open_links
from mixtralkit.ops.hidden import Hidden
from mixtralkit.planning.plan import ExpertPlan, contiguous


def bench_moves(
    dim: int | None = None,
    hidden: int | None = None,
    num_experts: int = 8,
    rounds: int = 5,
    dtype: str | None = None,
    device: str | None = None,
    output: Path | None = None,
) -> None:
    """Times moves of one layer between plans.

    Args:
        dim: model width; 4096 on CUDA, 512 on a CPU when not given.
        hidden: expert hidden width; 3.5 times dim when not given.
        num_experts: experts.
        rounds: timed rounds.
        dtype: bfloat16 on CUDA, float32 on a CPU when not given.
        device: cpu or cuda.
        output: JSON file for the results.
    """
    context = RankContext.start(device)
    if context.world_size == 1:
        raise ValueError("one rank has nobody to move experts to; start with torchrun")
    on_gpu = context.device.type == "cuda"
    dim, world = dim or (4096 if on_gpu else 512), context.world_size
    config = ModelConfig(
        dim=dim, n_layers=1, head_dim=2, hidden_dim=hidden or dim * 7 // 2, n_heads=world, n_kv_heads=world,
        vocab_size=world, num_experts=num_experts,
    )  # fmt: skip
    torch.set_grad_enabled(False)
    plans = _plans(num_experts, world)
    layout = RankLayout(config, ParallelConfig("dp", "ep"), plans["contiguous"], context.rank)
    layer = MoELayer.alone(layout, context, parse_dtype(dtype or ("bfloat16" if on_gpu else "float32")))
    _fill(layer)
    open_links(context)
    results = _measure(layer, plans, rounds)
    if context.is_first:
        for found in results:
            print(f"{found['from']:>10} → {found['to']:<10} {found['experts']:>3} experts {found['ms']:>9.3f} ms")
        expert_mb = 3 * config.dim * config.hidden_dim * layer.experts.w13.element_size() / 1e6
        summary = {**describe_run(context), "dim": dim, "hidden": config.hidden_dim, "expert_mb": expert_mb,
                   "rounds": rounds, "results": results}  # fmt: skip
        if output is not None:
            output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(summary))
    context.stop()


def _plans(num_experts: int, world: int) -> dict[str, ExpertPlan]:
    """A ring: from each plan to the next, and from the last to the first."""
    start = contiguous(1, num_experts, world)
    swapped = start.slots_LWS.copy()
    swapped[0, 0, 0], swapped[0, 1, 0] = swapped[0, 1, 0], swapped[0, 0, 0]
    shifted = np.concatenate([np.roll(start.slots_LWS, 1, axis=1), swapped[:, :, :1] * 0 - 1], axis=2)
    for rank in range(world):
        shifted[0, rank, -1] = next(e for e in range(num_experts) if e not in shifted[0, rank])
    return {
        "contiguous": start,
        "same": ExpertPlan(start.slots_LWS, num_experts, policy="same"),
        "swapped": ExpertPlan(swapped, num_experts, policy="swapped"),
        "shifted+1": ExpertPlan(shifted, num_experts, policy="shifted+1"),
    }


def _fill(layer: MoELayer) -> None:
    """Weights that depend on the expert alone, so that every plan gives the same results."""
    layer.gate.weight.normal_(0, 1, generator=torch.Generator(layer.context.device).manual_seed(99))
    for slot, expert in enumerate(layer.store.layout.experts(0)):
        generator = torch.Generator(layer.context.device).manual_seed(expert)
        layer.experts.w13[slot].normal_(0, layer.store.layout.config.dim**-0.5, generator=generator)
        layer.experts.w2[slot].normal_(0, layer.store.layout.config.hidden_dim**-0.5, generator=generator)


def _measure(layer: MoELayer, plans: dict[str, ExpertPlan], rounds: int) -> list[dict]:
    context, names = layer.context, list(plans)
    generator = torch.Generator(context.device).manual_seed(context.rank)
    x_TD = torch.randn(32, layer.store.layout.config.dim, device=context.device, generator=generator).to(
        layer.gate.weight.dtype
    )
    expected_TD = _rows(layer, x_TD)
    moves = list(zip(names, names[1:] + names[:1], strict=True))
    times: dict[tuple[str, str], list[float]] = {move: [] for move in moves}
    moved: dict[tuple[str, str], MoveReport] = {}
    for number in range(rounds + 1):
        for move in moves:
            ms, moved[move] = _timed(layer, plans[move[1]])
            if number:
                times[move].append(ms)
            with context.agreed():
                torch.testing.assert_close(_rows(layer, x_TD), expected_TD, rtol=2e-2, atol=2e-2)
    return [
        {"from": move[0], "to": move[1], "experts": len(moved[move].transfers), "mb": moved[move].bytes_moved / 1e6,
         "ms": round(median(times[move]), 4), "ms_of_rounds": [round(ms, 4) for ms in times[move]]}
        for move in moves
    ]  # fmt: skip


def _rows(layer: MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    return layer(Hidden(None, x_TD))[0].normed_TD


def _timed(layer: MoELayer, plan: ExpertPlan) -> tuple[float, MoveReport]:
    """Milliseconds of the slowest rank."""
    layer.context.barrier()
    _synchronize(layer)
    start = time.perf_counter()
    report = layer.store.adopt(0, replace(layer.store.layout, plan=plan))
    _synchronize(layer)
    return max(layer.context.all_gather_objects(1e3 * (time.perf_counter() - start))), report


def _synchronize(layer: MoELayer) -> None:
    if layer.context.device.type == "cuda":
        torch.cuda.synchronize(layer.context.device)


if __name__ == "__main__":
    run_tool(bench_moves)
