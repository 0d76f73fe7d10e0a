"""Finding the fastest settings of each kernel on a GPU: what to sweep, on which inputs, and the sweep itself.

A module of kernels that can be tuned has ``candidates(rows, **shape)``, the settings worth trying, and a launcher that
takes ``settings``. ``tools/tune_kernels.py`` is the command, ``runtime.tuned`` reads what it writes.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch

from lab.timing import times_ms
from mixtralkit.config import CacheOptions
from mixtralkit.model.kv_cache import own_pages
from mixtralkit.moe.weights import FORMATS
from mixtralkit.ops.attention import decode_attention_reference
from mixtralkit.ops.experts import SMALL_BATCH, expert_sum_reference
from mixtralkit.ops.linear import MOST_ROWS, linear_reference
from mixtralkit.ops.linear.library import MOST_PACKED_ROWS
from mixtralkit.ops.ragged_attention import ragged_attention_reference, span_table

BEYOND_CACHES = 2**28  # bytes of inputs that take turns: several times the largest L2
PROMPT = 2048  # tokens of a prompt, for the attention of many tokens
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}  # ‖difference‖ / ‖reference's‖
FINALISTS = 4  # of the first short timing, timed again at length
PARTS = ("up_", "down_")  # of settings that belong to launches of their own, so that any two go together

Settings = dict[str, int]


class Work(NamedTuple):
    """One set of inputs: the kernel on them with some settings (None: its own choice), and what its reference says."""

    call: Callable[[Settings | None], torch.Tensor]
    reference: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A kernel at a shape and a number of rows, as ``runtime.tuned`` is asked for it.

    ``context`` is how many tokens the sequences have, where that matters.
    """

    kernel: str
    shape: tuple[tuple[str, int], ...]
    rows: int
    dtype: torch.dtype
    context: int = 256

    def __str__(self) -> str:
        return f"{self.kernel} {' '.join(f'{name}={value}' for name, value in self.shape)} rows={self.rows}"

    def candidates(self) -> list[Settings]:
        return _module(self.kernel).candidates(self.rows, **dict(self.shape))

    def work(self, device: torch.device, beyond_caches: bool = True) -> list[Work]:
        """Inputs for the kernel; so many sets that no cache holds the next one, or just one."""
        generator = torch.Generator(device).manual_seed(0)
        count = 1
        if beyond_caches:
            count = min(64, max(2, -(-BEYOND_CACHES // self.bytes_read())))
        return [KERNELS[self.kernel].make(self, generator) for _ in range(count)]

    def bytes_read(self) -> int:
        """About what one call reads, of the data that differs from call to call."""
        return self.dtype.itemsize * KERNELS[self.kernel].numbers(dict(self.shape), self.rows, self.context)


class Tunable(NamedTuple):
    """Where a kernel is, the rows it takes (lowest and highest), its inputs, and how many numbers it reads."""

    module: str
    rows: tuple[int, int]
    make: Callable[[Case, torch.Generator], Work]
    numbers: Callable[[dict[str, int], int, int], int]


class Timed(NamedTuple):
    """Settings and the milliseconds of a call with them."""

    ms: float
    settings: Settings


@dataclass(frozen=True)
class Best:
    """The fastest settings of a case; ``default_ms`` is what the kernel does unasked. ``failed`` counts candidates."""

    settings: Settings
    ms: float
    default_ms: float
    tried: int
    failed: int


def sweep(case: Case, device: torch.device, compilers: Executor | None = None, workers: int = 1) -> Best | None:
    """Times all candidates; None where none runs and is right.

    Args:
        compilers: other processes, ``workers`` of them, that compile the candidates first, into Triton's cache on disk.
    """
    candidates = case.candidates()
    wrong = (
        _compiled(case, candidates, device, compilers, workers) if compilers is not None else [None] * len(candidates)
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the last case
    work = case.work(device, beyond_caches=device.type == "cuda")
    expected = work[0].reference()
    default_ms = _ms(work, None, device, 21)

    def timed(several: Iterable[Settings], repeats: int) -> list[Timed]:
        right = [settings for settings in several if _is_right(work[0], settings, expected, case.dtype)]
        found = [Timed(_ms(work, settings, device, repeats), settings) for settings in right]
        return sorted(found, key=lambda one: one.ms)

    found = timed((settings for settings, error in zip(candidates, wrong, strict=True) if error is None), 5)
    if not found:
        return None
    failed = len(candidates) - len(found)
    finalists = sorted([*found, *timed(crossed(found), 5)], key=lambda one: one.ms)[:FINALISTS]
    best = timed((one.settings for one in finalists), 21)[0]
    if default_ms <= best.ms and (own := _default(case)) is not None:
        best = Timed(default_ms, own)
    return Best(best.settings, best.ms, default_ms, len(candidates), failed)


def _default(case: Case) -> Settings | None:
    """The settings that a kernel takes when none were tuned, where its module has them as a rule of the shape."""
    rule = getattr(_module(case.kernel), "default_settings", None)
    return None if rule is None else rule(case.rows, **dict(case.shape))


def crossed(found: Sequence[Timed], best: int = 3) -> list[Settings]:
    """New settings: the best parts (``PARTS``) of different candidates put together, where the rest is the same."""
    rest = _without_parts(found[0].settings)
    alike = [one.settings for one in found if _without_parts(one.settings) == rest]  # fastest first
    choices = []
    for part in PARTS:
        own = [{name: s[name] for name in s if name.startswith(part)} for s in alike]
        choices.append([values for i, values in enumerate(own) if values not in own[:i]][:best])
    together = [rest | one | other for one, other in itertools.product(*choices)]
    return [settings for settings in together if settings not in alike]


def _without_parts(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if not name.startswith(PARTS)}


def compile_candidates(case: Case, candidates: Sequence[Settings], device: torch.device) -> list[str | None]:
    """Runs each once, which compiles it; what went wrong with each, or None. For a process of its own."""
    (work,) = case.work(device, beyond_caches=False)
    wrong = [_failure(work, settings, device) for settings in candidates]
    del work
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other processes need it
    return wrong


def _compiled(
    case: Case, candidates: Sequence[Settings], device: torch.device, compilers: Executor, workers: int
) -> list[str | None]:
    parts = [list(candidates[i::workers]) for i in range(workers)]
    jobs = [compilers.submit(compile_candidates, case, part, device) for part in parts if part]
    wrong: list[str | None] = [None] * len(candidates)
    for i, job in enumerate(jobs):
        wrong[i::workers] = job.result()
    return wrong


def _failure(work: Work, settings: Settings, device: torch.device) -> str | None:
    try:
        work.call(settings)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # a compiler has many ways to refuse
        return f"{type(error).__name__}: {error}"
    return None


def _is_right(work: Work, settings: Settings, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    try:
        got = work.call(settings).float()
    except Exception:  # as above: the candidate is out, whatever the reason
        return False
    error = (got - expected.float()).norm() / expected.float().norm()
    return bool(error < TOLERANCE[dtype])


def _ms(work: Sequence[Work], settings: Settings | None, device: torch.device, repeats: int) -> float:
    calls = [lambda one=one: one.call(settings) for one in work]
    return median(times_ms(calls, device, repeats if device.type == "cuda" else 1))


def _module(kernel: str):
    return importlib.import_module(KERNELS[kernel].module)


def _normal(case: Case, generator: torch.Generator, *size: int, std: float = 1.0) -> torch.Tensor:
    return torch.empty(size, dtype=case.dtype, device=generator.device).normal_(0.0, std, generator=generator)


def _linear(case: Case, generator: torch.Generator) -> Work:
    shape = dict(case.shape)
    x_TI = _normal(case, generator, case.rows, shape["inputs"])
    w_OI = _normal(case, generator, shape["outputs"], shape["inputs"], std=0.02)
    if "size" in shape:  # the bytes of a weight
        w_OI = FORMATS["int8"].quantize(w_OI)
    norm = (1 + _normal(case, generator, shape["inputs"], std=0.02), 1e-5)
    if shape["outputs"] == shape["inputs"]:  # the product back to the model's width ends in a residual, has no norm
        other = {"residual_TO": _normal(case, generator, case.rows, shape["outputs"])}
    else:
        other = {"norm": norm}
    launch = _module("linear").linear_small
    return Work(
        lambda settings: launch(x_TI, w_OI, **other, settings=settings), lambda: linear_reference(x_TI, w_OI, **other)
    )


def _experts(launcher: str) -> Callable[[Case, torch.Generator], Work]:
    def make(case: Case, generator: torch.Generator) -> Work:
        shape, draw = dict(case.shape), {"device": generator.device, "generator": generator}
        scores_RS = torch.rand(case.rows, shape["slots"], **draw)
        weights_RK = torch.rand(case.rows, shape["top_k"], **draw).softmax(-1)
        inputs = (
            _normal(case, generator, case.rows, shape["width"]),
            scores_RS.topk(shape["top_k"], dim=-1).indices,
            weights_RK,
            _normal(case, generator, shape["slots"], 2 * shape["hidden"], shape["width"], std=0.02),
            _normal(case, generator, shape["slots"], shape["width"], shape["hidden"], std=0.02),
        )
        launch = getattr(_module(case.kernel), launcher)
        return Work(lambda settings: launch(*inputs, settings=settings), lambda: expert_sum_reference(*inputs))

    return make


def _attention(case: Case, generator: torch.Generator) -> Work:
    shape, device = dict(case.shape), generator.device
    head_dim, kv_heads = shape["head_dim"], shape["kv_heads"]
    heads = kv_heads * shape["group"]
    angles = torch.rand(case.context, head_dim // 2, device=device, generator=generator)
    inputs = (
        _normal(case, generator, case.rows, (heads + 2 * kv_heads) * head_dim),
        *_cache(case, generator, case.rows, case.context),
        torch.arange(case.rows, device=device),
        torch.full((case.rows,), case.context - 1, device=device),
        torch.stack([angles.cos(), angles.sin()], dim=-1),
        heads,
    )
    launch = _module("decode_attention").launch_decode_attention
    return Work(lambda settings: launch(*inputs, settings=settings), lambda: decode_attention_reference(*inputs))


def _cache(case: Case, generator: torch.Generator, sequences: int, length: int) -> tuple[torch.Tensor, ...]:
    """Keys, values and tables of one layer, the sequences' pages anyhow, as after many have come and gone."""
    shape, size = dict(case.shape), CacheOptions.page_size
    tables_SM = own_pages(sequences, -(-length // size)).to(generator.device)
    order = torch.randperm(tables_SM.numel(), generator=generator, device=generator.device).int()
    pages = (_normal(case, generator, len(order), shape["kv_heads"], size, shape["head_dim"]) for _ in range(2))
    return *pages, order[tables_SM]


def _prefill_attention(case: Case, generator: torch.Generator) -> Work:
    shape, device = dict(case.shape), generator.device
    spans = [(slot, 0, min(PROMPT, case.rows - start)) for slot, start in enumerate(range(0, case.rows, PROMPT))]
    longest = min(PROMPT, case.rows)
    cache = _cache(case, generator, len(spans), longest)
    q_THC = _normal(case, generator, case.rows, shape["heads"], shape["head_dim"])
    table = span_table(spans).to(device)
    launch = _module("ragged_attention").launch_ragged_attention
    return Work(
        lambda settings: launch(q_THC, *cache, table, longest, settings=settings),
        lambda: ragged_attention_reference(q_THC, *cache, spans),
    )


def _expert_numbers(shape: dict[str, int], rows: int, context: int) -> int:
    return min(shape["slots"], rows * shape["top_k"]) * 3 * shape["width"] * shape["hidden"]


KERNELS = {
    "linear": Tunable(
        "mixtralkit.ops.linear.triton", (1, MOST_ROWS), _linear,
        lambda shape, rows, context: shape["outputs"] * shape["inputs"],
    ),
    "linear_packed": Tunable(
        "mixtralkit.ops.linear.triton", (1, MOST_PACKED_ROWS), _linear,
        lambda shape, rows, context: shape["outputs"] * shape["inputs"] // 2,
    ),
    "experts_small": Tunable(
        "mixtralkit.ops.experts.triton_small", (1, SMALL_BATCH), _experts("expert_sum_small"), _expert_numbers
    ),
    "experts_grouped": Tunable(
        "mixtralkit.ops.experts.triton_grouped", (SMALL_BATCH + 1, 2**17), _experts("expert_sum_grouped"),
        _expert_numbers,
    ),
    "decode_attention": Tunable(
        "mixtralkit.ops.attention.triton", (1, 512), _attention,
        lambda shape, rows, context: 2 * rows * shape["kv_heads"] * shape["head_dim"] * context,
    ),
    "ragged_attention": Tunable(
        "mixtralkit.ops.ragged_attention.triton", (64, 2**17), _prefill_attention,
        lambda shape, rows, context: 2 * rows * (shape["heads"] + shape["kv_heads"]) * shape["head_dim"],
    ),
}  # fmt: skip


def shapes_of(kernel: str, layout) -> list[dict[str, int]]:
    """The shapes at which a rank of ``layout`` (``layout.RankLayout``) runs a kernel."""
    config = layout.config
    if kernel.startswith("linear"):
        size = {"size": 1} if kernel == "linear_packed" else {}
        return [{"outputs": outputs, "inputs": inputs, **size} for outputs, inputs in layout.projections.values()]
    heads, kv_heads = (high - low for low, high in (layout.heads, layout.kv_heads))
    if kernel == "ragged_attention":
        return [{"heads": heads, "kv_heads": kv_heads, "head_dim": config.head_dim}]
    if kernel == "decode_attention":
        return [{"kv_heads": kv_heads, "group": heads // kv_heads, "head_dim": config.head_dim}]
    hidden = layout.hidden[1] - layout.hidden[0]
    return [{"slots": len(layout.experts(0)), "top_k": config.num_experts_per_tok, "width": config.dim,
             "hidden": hidden}]  # fmt: skip


def cases_of(
    kernels: Iterable[str], layouts: Iterable, rows: Sequence[int], dtype: torch.dtype, context: int
) -> list[Case]:
    """Every kernel at every shape of the layouts and every number of rows that it takes."""
    found = []
    for layout in layouts:
        for kernel in kernels:
            lowest, highest = KERNELS[kernel].rows
            for shape in shapes_of(kernel, layout):
                for count in rows:
                    case = Case(kernel, tuple(shape.items()), count, dtype, context)
                    if lowest <= count <= highest and case not in found:
                        found.append(case)
    return found
