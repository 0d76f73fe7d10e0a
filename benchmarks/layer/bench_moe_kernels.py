"""One MoE layer's kernels on one GPU: gate and experts, beside the reference (sorted rows and ``grouped_mm``).

    python -m benchmarks.layer.bench_moe_kernels --tokens 1,8,64,256,1024,4096,16384
    python -m benchmarks.layer.bench_moe_kernels --formats plain int8 int4:32 int4:128 fp8:channel fp8:tensor fp8:block

Prints one line of JSON a measurement on stdout, a table on stderr. Every result is compared with float32 first.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.common.ceilings import Ceilings
from benchmarks.common.machine import describe_run
from benchmarks.common.profile_step import profiled
from lab.timing import times_ms
from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig, parse_dtype
from mixtralkit.distributed import RankContext
from mixtralkit.moe.weights import FORMATS, PLAIN, ExpertWeights, PackedWeight
from mixtralkit.ops.experts import SMALL_BATCH, expert_sum, expert_sum_reference, takes_fp8
from mixtralkit.ops.gate import gate, gate_reference

ROUNDED_ROWS = 5e-4  # the same where compiled CPU kernels round rows to 16 bits beside packed weights
FP8_ROWS = 6e-2  # the same where rows are rounded to fp8, to three bits after the first
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}  # ‖difference‖ / ‖reference‖
INPUT_SETS, WEIGHT_SETS, EPS = 4, 2, 1e-5

VARIANTS = {  # name: (gate, experts, in a CUDA graph)
    "kernels": (gate, expert_sum, True),
    "kernels-eager": (gate, expert_sum, False),
    "grouped_mm": (gate_reference, expert_sum_reference, True),
    "grouped_mm-eager": (gate_reference, expert_sum_reference, False),
}


@torch.no_grad()
def bench_moe_kernels(
    tokens: str = "1,8,64,256,1024,4096,16384",
    model: Path = Path("configs/models/mixtral-8x7b.json"),
    hidden: int | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    routing: str = "uniform",
    formats: tuple[str, ...] = ("plain",),
    variants: str = "all",
    repeats: int = 15,
    dtype: str | None = None,
    profile: bool = False,
    device: str | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Times the layer at numbers of rows, against its bound: bytes of the experts that are touched, or operations.

    Args:
        tokens: numbers of rows, between commas.
        model: architecture, a params.json.
        hidden: expert hidden width instead of the model's, such as a rank's share under tensor parallel.
        num_experts: experts instead of the model's.
        top_k: experts of a row instead of the model's.
        routing: uniform, as random gate weights route random rows; or skew:S, one expert takes the share S of all
            choices; or both between commas.
        formats: of the experts' weights: plain, int8, int4:128 … (docs/quantised.md). A packed one is compared with
            float32 of the numbers that it stands for, and its bytes make the bound.
        variants: names between commas, or all: kernels, grouped_mm (with rows sorted by torch), and each with -eager.
            Packed weights run by the kernels alone.
        repeats: of each measurement; the median counts.
        dtype: bfloat16 on CUDA, float32 on a CPU when not given.
        profile: also print a table of the kernels.
        device: cpu or cuda.
        seed: of weights, rows and routing.
        output: file that takes the lines of JSON.
    """
    context = RankContext.start(device)
    if context.world_size > 1:
        raise ValueError("bench_moe_kernels runs on one GPU; bench_moe_layer.py is for several")
    names = list(VARIANTS) if variants == "all" else [name.strip() for name in variants.split(",")]
    if unknown := sorted(set(names) - set(VARIANTS)):
        raise ValueError(f"variants ({', '.join(unknown)}) must be among {', '.join(VARIANTS)}")
    if not all(count.isdigit() and int(count) for count in tokens.split(",")):
        raise ValueError(f"tokens ({tokens!r}) must be whole numbers of at least 1 between commas")
    kind = parse_dtype(dtype or ("bfloat16" if context.device.type == "cuda" else "float32"))
    config = ModelConfig.from_file(model)
    shape = Shape(
        num_experts or config.num_experts, top_k or config.num_experts_per_tok, config.dim, hidden or config.hidden_dim
    )
    if unknown := [name for name in formats if name != "plain" and name not in FORMATS]:
        raise ValueError(f"formats ({unknown[0]!r}) must be among plain, {', '.join(FORMATS)}")
    ceilings = Ceilings.measure(context, kind)
    common = {"ceilings": ceilings.rounded(), **describe_run(context), **vars(shape), "dtype": str(kind)[6:]}
    if output is not None:
        output.write_text("", encoding="utf-8")
    for held, kind_of_routing in itertools.product(formats, routing.split(",")):
        packed = PLAIN if held == "plain" else FORMATS[held]
        generator = torch.Generator(context.device).manual_seed(seed)
        weights = [Weights.draw(shape, kind, generator).packed(packed) for _ in range(WEIGHT_SETS)]
        for count in map(int, tokens.split(",")):
            drawn = (shape.top_k, kind_of_routing, generator)
            cases = [_case(weights[i % WEIGHT_SETS], count, *drawn) for i in range(INPUT_SETS)]
            for name in names if packed.is_plain else [name for name in names if VARIANTS[name][1] is expert_sum]:
                found = _measure(cases, shape, packed, name, repeats, ceilings)
                line = json.dumps({"measurement": "moe_layer", "variant": name, "format": held, "tokens": count,
                                   "routing": kind_of_routing, **found, **common})  # fmt: skip
                print(line, flush=True)
                print(_row(kind_of_routing, count, f"{held} {name}", found), file=sys.stderr, flush=True)
                if output is not None:
                    with output.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
            if profile:
                _print_profile(cases, f"{held}, {kind_of_routing}, {count} rows", ceilings)


@dataclass(frozen=True)
class Shape:
    """Of a layer, or of a rank's part of one."""

    num_experts: int
    top_k: int
    dim: int
    hidden: int


@dataclass(frozen=True)
class Weights:
    """One layer's, normal(0, 0.02)."""

    gate_ED: torch.Tensor
    w13_EGD: torch.Tensor | PackedWeight
    w2_EDF: torch.Tensor | PackedWeight
    norm_D: torch.Tensor

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Weights:
        def normal(*size: int) -> torch.Tensor:
            empty = torch.empty(size, dtype=dtype, device=generator.device)
            return empty.normal_(0.0, 0.02, generator=generator)

        experts, dim, hidden = shape.num_experts, shape.dim, shape.hidden
        w13_EGD, w2_EDF = normal(experts, 2 * hidden, dim), normal(experts, dim, hidden)
        return cls(normal(experts, dim), w13_EGD, w2_EDF, 1 + normal(dim))

    def packed(self, weights: ExpertWeights) -> Weights:
        """The same with experts in another format."""
        if weights.is_plain:
            return self
        return replace(self, w13_EGD=_packed(self.w13_EGD, weights, 2), w2_EDF=_packed(self.w2_EDF, weights, 1))


def _packed(w_EOK: torch.Tensor, weights: ExpertWeights, stacked: int) -> PackedWeight:
    """Rounds one expert after the other; each is ``stacked`` matrices one above the other."""
    experts = [weights.quantize(w_OK.unflatten(0, (stacked, -1))).tensors for w_OK in w_EOK]
    parts = tuple(torch.stack([part.flatten(0, 1) for part in same]) for same in zip(*experts, strict=True))
    return PackedWeight(weights, w_EOK.shape[2], parts, stacked)


@dataclass(frozen=True)
class Case:
    """Rows before the norm, their weights, and their experts where the routing is made up (None: the gate's)."""

    x_TD: torch.Tensor
    weights: Weights
    top_k: int
    experts_TK: torch.Tensor | None

    def run(self, gate: Callable, experts: Callable) -> torch.Tensor:
        """Norm, gate, experts, residual: the second half of a block."""
        gated, w = self.gated(gate), self.weights
        chosen_TK = gated.experts_TK if self.experts_TK is None else self.experts_TK
        return experts(gated.normed_TD, chosen_TK, gated.weights_TK, w.w13_EGD, w.w2_EDF, self.x_TD)

    def gated(self, gate: Callable):
        """What the gate gives for these rows."""
        return gate(self.x_TD, self.weights.gate_ED, self.top_k, (self.weights.norm_D, EPS))

    def chosen(self, gate: Callable) -> torch.Tensor:
        """The experts int64 [T, K] that run."""
        return self.gated(gate).experts_TK if self.experts_TK is None else self.experts_TK


def _case(weights: Weights, count: int, top_k: int, way: str, generator: torch.Generator) -> Case:
    experts, dim = weights.gate_ED.shape
    x_TD = torch.randn(count, dim, device=generator.device, generator=generator).to(weights.gate_ED.dtype)
    return Case(x_TD, weights, top_k, _skewed(way, count, experts, top_k, generator))


def _skewed(way: str, count: int, experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor | None:
    """Experts int64 [T, K] of which the first has the share that ``way`` says; None for uniform."""
    if way == "uniform":
        return None
    kind, _, text = way.partition(":")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if kind != "skew" or not 0 <= share * top_k <= 1:
        raise ValueError(f"routing ({way!r}) must be uniform or skew:SHARE, of at most 1/top_k = {1 / top_k:g}")
    draw = {"device": generator.device, "generator": generator}
    scores_TE = torch.rand(count, experts, **draw)
    scores_TE[:, 0] = torch.where(torch.rand(count, **draw) < share * top_k, 2.0, -1.0)
    return scores_TE.topk(top_k, dim=1).indices


def _measure(
    cases: list[Case], shape: Shape, weights: ExpertWeights, name: str, repeats: int, ceilings: Ceilings
) -> dict[str, object]:
    """Checks a variant, then times it; the bound is the mean of the inputs'."""
    gate_of, experts_of, graph = VARIANTS[name]
    error = max(_error(case, gate_of, experts_of) for case in cases[:2])
    dtype, device = cases[0].x_TD.dtype, cases[0].x_TD.device
    count, rounded = len(cases[0].x_TD), ROUNDED_ROWS if device.type == "cpu" and not weights.is_plain else 0.0
    in_fp8 = (
        device.type == "cuda" and count > SMALL_BATCH and takes_fp8(cases[0].x_TD, weights, shape.dim, shape.hidden)
    )
    if not error < max(TOLERANCE[dtype], FP8_ROWS if in_fp8 else rounded):
        raise RuntimeError(f"{name}: differs from float32 by {error:.2g} of the norm")
    calls = [lambda case=case: case.run(gate_of, experts_of) for case in cases]
    times = times_ms(calls, device, repeats, graph)
    touched = sum(len(case.chosen(gate_of).unique()) for case in cases) / len(cases)
    size = dtype.itemsize * (shape.num_experts * shape.dim + 2 * count * shape.dim)
    size += touched * weights.expert_bytes(shape.dim, shape.hidden, dtype.itemsize)
    operations = 2.0 * count * shape.dim * (shape.top_k * 3 * shape.hidden + shape.num_experts)
    bound_s, bound = ceilings.bound_s(size, operations / 2 if in_fp8 else operations)  # of eight bits in half the time
    seconds = median(times) / 1e3
    return {
        "ms": round(1e3 * seconds, 4), "spread_ms": [round(min(times), 4), round(max(times), 4)],
        "bound_ms": round(1e3 * bound_s, 4), "bound": bound, "share_of_bound": round(bound_s / seconds, 4),
        "tflops": round(operations / seconds / 1e12, 2), "gb_s": round(size / seconds / 1e9, 1),
        "touched_experts": touched, "error": error,
    }  # fmt: skip


def _error(case: Case, gate_of: Callable, experts_of: Callable) -> float:
    """Of a variant against float32, one expert after the other.

    Takes the variant's own choice of experts, since a tie may fall either way in another precision, but first sees that
    no other expert has a logit above the chosen ones by more than rounding.
    """
    w, x_TD = case.weights, case.x_TD.float()
    normed_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + EPS) * w.norm_D.float()
    logits_TE = normed_TD @ w.gate_ED.float().T
    chosen_TK = case.chosen(gate_of)
    own_TK = logits_TE.gather(1, case.gated(gate_of).experts_TK)
    shortfall = (logits_TE.topk(case.top_k).values - own_TK).max() / logits_TE.std()
    if not shortfall < 0.1:
        return float("inf")
    shares_TK = own_TK.softmax(-1)
    expected_TD = x_TD.clone()
    for expert in range(len(w.gate_ED)):
        rows, choices = (chosen_TK == expert).nonzero(as_tuple=True)
        if len(rows):
            gate_NF, up_NF = (normed_TD[rows] @ w.w13_EGD[expert].float().T).chunk(2, dim=-1)
            y_ND = (F.silu(gate_NF) * up_NF) @ w.w2_EDF[expert].float().T
            expected_TD.index_add_(0, rows, shares_TK[rows, choices][:, None] * y_ND)
    got_TD = case.run(gate_of, experts_of).float()
    return float((got_TD - expected_TD).norm() / (expected_TD - x_TD).norm())


def _print_profile(cases: list[Case], title: str, ceilings: Ceilings) -> None:
    def run() -> int:
        for _ in range(4):
            for case in cases:
                case.run(gate, expert_sum)
        return 4 * len(cases)

    run()
    found = profiled(run, cases[0].x_TD.device)
    print(f"\n{title}\n" + ("needs a GPU" if found is None else found.table({}, ceilings.read)), file=sys.stderr)


def _row(way: str, count: int, name: str, found: dict[str, object]) -> str:
    figures = (
        f"{found['ms']:>9.4f} ms  bound {found['bound_ms']:>8.4f} ({found['bound']}, {found['share_of_bound']:.1%})"
    )
    return f"{way:>10} {count:>6}  {name:<30} {figures}  {found['tflops']:>7.1f} TFLOP/s  {found['gb_s']:>7.1f} GB/s"


if __name__ == "__main__":
    run_tool(bench_moe_kernels)
