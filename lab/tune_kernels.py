"""Finds the fastest settings of the kernels on this GPU and keeps them in configs/kernels/, where kernels look."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import torch

from lab.tuning import KERNELS, Best, cases_of, sweep
from mixtralkit.cli.run import command
from mixtralkit.config import ModelConfig, ParallelConfig, parse_dtype, shipped
from mixtralkit.config.engine import Dtype
from mixtralkit.config.options import Count, Natural, Positive
from mixtralkit.distributed import RankContext
from mixtralkit.json_file import load_json
from mixtralkit.layout import RankLayout
from mixtralkit.ops.runtime import settings_file
from mixtralkit.planning.plan import contiguous


@command
@torch.no_grad()
def tune(
    model: Path = Path("mixtral-8x7b"),
    world_size: str = "1",
    rows: str = "1,2,4,8,16,32,64,128,256,512,1024,4096,16384",
    kernels: str = "all",
    output: Path | None = None,
    minutes: Positive = 20.0,
    context: Count = 256,
    dtype: Dtype | None = None,
    workers: Natural = 8,
    device: str | None = None,
) -> None:
    """Sweeps each kernel's candidates on one GPU and writes the fastest, beside what the file already has.

    python tools/tune_kernels.py --world_size 1,4 --minutes 5

    Args:
        model: architecture, a params.json or the name of one in configs/models: its shapes are tuned.
        world_size: numbers of ranks, between commas: shapes of a rank's part under tensor parallel. One GPU does.
        rows: numbers of rows, between commas; between two of them the upper one counts.
        kernels: names between commas, or all.
        output: file; the one of configs/kernels/ that this GPU's settings are read from when not given.
        minutes: after which no further case begins.
        context: tokens of the sequences, for attention.
        dtype: bfloat16 on CUDA, float32 on a CPU when not given.
        workers: processes that compile; 0 compiles while it times.
        device: cpu (Triton's interpreter, for a trial of the tool) or cuda.
    """
    ranks = RankContext.start(device)
    if ranks.world_size > 1:
        raise ValueError("tune_kernels needs one GPU; it finds the settings of any world size there")
    names = list(KERNELS) if kernels == "all" else kernels.split(",")
    if unknown := sorted(set(names) - set(KERNELS)):
        raise ValueError(f"kernels ({', '.join(unknown)}) must be among {', '.join(KERNELS)}")
    config = ModelConfig.from_file(shipped("models", model))
    layouts = [_share(config, world) for world in _numbers("world_size", world_size)]
    kind = parse_dtype(dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    cases = cases_of(names, layouts, _numbers("rows", rows), kind, context)
    path = output or settings_file(ranks.device)
    end = time.monotonic() + 60 * minutes
    found: list[dict] = []
    with _compilers(workers) as compilers:
        for number, case in enumerate(cases):
            if time.monotonic() > end:
                print(f"{minutes:g} minutes are over: {len(cases) - number} cases are left", file=sys.stderr)
                break
            best = sweep(case, ranks.device, compilers, workers)
            print(f"{number + 1}/{len(cases)} {case}: {_line(best)}", file=sys.stderr, flush=True)
            if best is not None:
                found.append({"kernel": case.kernel, "shape": dict(case.shape), "rows": case.rows,
                              "settings": best.settings, "ms": round(best.ms, 5)})  # fmt: skip
                save(path, ranks.device, found)
    if not found:
        raise RuntimeError("nothing was tuned")
    print(f"{path}: {len(found)} entries new or renewed")


def save(path: Path, device: torch.device, found: list[dict]) -> None:
    """Writes the entries, which replace those of the same kernel, shape and rows that the file has."""
    import triton

    entries = {_key(entry): entry for entry in [*(_entries(path) if path.is_file() else []), *found]}
    head = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    body = ",\n".join(f"  {json.dumps(entries[key])}" for key in sorted(entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + "\n".join(lines) + f'\n "entries": [\n{body}\n ]\n}}\n', encoding="utf-8")


def _entries(path: Path) -> list[dict]:
    return load_json(path, lambda content: content["entries"])


def _key(entry: dict) -> tuple:
    return entry["kernel"], tuple(sorted(entry["shape"].items())), entry["rows"]


def _share(config: ModelConfig, world: int) -> RankLayout:
    plan = contiguous(config.n_layers, config.num_experts, world)
    return RankLayout(config, ParallelConfig("tp", "tp"), plan)


@contextlib.contextmanager
def _compilers(workers: Natural) -> Iterator[Executor | None]:
    if workers < 1:
        yield None
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        yield executor


def _line(best: Best | None) -> str:
    if best is None:
        return "no candidate runs and is right"
    failed = f", {best.failed} of {best.tried} failed" if best.failed else f" of {best.tried}"
    return f"{best.ms:.4f} ms (by default {best.default_ms:.4f}){failed}: {json.dumps(best.settings)}"


def _numbers(name: str, text: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"{name} ({text!r}) must be whole numbers of at least 1 between commas")
    return [int(part) for part in text.split(",")]
