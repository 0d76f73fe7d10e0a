"""How fast a checkpoint loads, how much of the file is read and how much memory that takes, on gloo ranks.

Writes a checkpoint of random weights with Mixtral's proportions, loads it on all ranks for three layouts, cold (pages
evicted) and warm, and deletes it. In the same run the same processes plainly read the file, each its own stretch of
it in blocks of 16 MiB, once into memory of its own as ``read()`` does (``of_plain`` is against this) and once into one
buffer over and over, which drops what was read and so costs no new memory (``of_dropped``).

Bytes read are ``rchar`` of ``/proc/self/io`` (what was asked of the kernel) and ``read_bytes`` (what came from the
disk). Memory is the peak of the resident set over what it was before the load, less the rank's own parameters, in
units of the model's largest tensor.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mixtralkit.checkpoint import load_into, open_checkpoint, save_checkpoint
from mixtralkit.cli import run_tool
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout, canonical_shapes
from mixtralkit.planning.plan import contiguous

LAYOUTS = (("tp", "tp"), ("tp", "ep"), ("dp", "ep"))
BLOCK_BYTES = 16 << 20
POOL_NUMEL = 1 << 29


@dataclass(frozen=True)
class Case:
    """One thing to time: a layout to load under, or plain reading (``plain`` is "kept" or "dropped")."""

    cold: bool
    plain: str = ""
    attention: str = ""
    experts: str = ""

    @property
    def title(self) -> str:
        what = (
            f"load, attention {self.attention}, experts {self.experts}"
            if not self.plain
            else f"plain read, {self.plain}"
        )
        return f"{what}, {'cold' if self.cold else 'warm'}"


@dataclass(frozen=True)
class Measured:
    """What one rank saw: seconds between barriers, bytes asked of the kernel and got from disk, bytes of memory."""

    seconds: float
    asked: int
    from_disk: int
    memory: int


def bench(
    size_gb: float = 8.0,
    ranks: int = 4,
    threads: int = 2,
    repeats: int = 3,
    format: str = "mistral",
    folder: Path | None = None,
    output: Path | None = None,
) -> None:
    """Times loading of a synthetic checkpoint against plainly reading it.

    Args:
        size_gb: size of the checkpoint in 10^9 bytes.
        ranks: gloo ranks that load together.
        threads: reading threads of each rank.
        repeats: runs of each case; medians are reported.
        format: format of the checkpoint.
        folder: where the checkpoint is made; a temporary folder when not given.
        output: JSON file for the result.
    """
    config = _model(size_gb)
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-loading-") as made:
        _write(Path(made), config, format)
        kinds = [{"plain": "kept"}, {"plain": "dropped"}, *({"attention": a, "experts": e} for a, e in LAYOUTS)]
        cases = [Case(cold, **kind) for cold, kind in product((True, False), kinds)]
        with tempfile.TemporaryDirectory() as shared:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # freed tensors go back, so that growth is seen
            mp.spawn(_rank_main, (ranks, shared, made, config, cases * repeats, threads), nprocs=ranks)
            runs = json.loads((Path(shared) / "runs.json").read_text())
        file_bytes = sum(path.stat().st_size for path in _weights(Path(made)))
    result = _result(config, cases, runs, file_bytes, ranks, threads, repeats, format)
    for row in result["cases"]:
        print(
            f"{row['case']:45} {row['gb_per_s']:6.2f} GB/s  {row['of_plain']:5.2f} of plain ({row['of_dropped']:.2f})  "
            f"asked {row['asked_of_file']:.3f} and from disk {row['from_disk_of_file']:.3f} of the file  "
            f"memory {row['extra_memory_in_tensors']:.2f} tensors"
        )
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def _model(size_gb: float) -> ModelConfig:
    """8x7B at half its width, as many layers as make the size in 16 bits, and as large a share of embeddings."""
    dim, hidden = 2048, 7168
    layer = 8 * 3 * dim * hidden + 2 * dim * dim + 2 * dim * 512
    layers = max(1, round(size_gb * 1e9 / 2 / layer))
    vocab = 500 * layers
    return ModelConfig(
        dim=dim, n_layers=layers, head_dim=128, hidden_dim=hidden, n_heads=16, n_kv_heads=4, vocab_size=vocab
    )


def _write(folder: Path, config: ModelConfig, format: str) -> None:
    """Every tensor is a stretch of one pool of random bits, so that the model is never in memory."""
    pool = torch.randint(-(1 << 15), 1 << 15, (POOL_NUMEL // 8,), dtype=torch.int16).view(torch.bfloat16)
    tensors, start = {}, 0
    for name, shape in canonical_shapes(config).items():
        numel = torch.Size(shape).numel()
        start = start if start + numel <= len(pool) else start % 997
        tensors[name] = pool[start : start + numel].view(shape)
        start += numel
    save_checkpoint(folder, config, tensors, format, progress=True)


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".json")


def _rank_main(
    rank: int, ranks: int, shared: str, folder: str, config: ModelConfig, cases: list[Case], threads: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{shared}/store", rank=rank, world_size=ranks)
    context = RankContext.start("cpu", {"RANK": str(rank), "WORLD_SIZE": str(ranks)})
    runs = []
    for case in cases:
        context.barrier()
        if case.cold and context.is_first:
            _evict(Path(folder))
        if case.plain:
            measured = _plain(context, Path(folder), case.plain == "kept")
        else:
            measured = _load(context, Path(folder), config, case, threads)
        runs.append([asdict(one) for one in context.all_gather_objects(measured)])
    if context.is_first:
        (Path(shared) / "runs.json").write_text(json.dumps(runs))


def _evict(folder: Path) -> None:
    for path in _weights(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _load(context: RankContext, folder: Path, config: ModelConfig, case: Case, threads: int) -> Measured:
    plan = contiguous(config.n_layers, config.num_experts, context.world_size)
    layout = RankLayout(config, ParallelConfig(case.attention, case.experts), plan, context.rank)
    parameters = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in layout.shapes().items()}
    own = sum(parameter.nbytes for parameter in parameters.values())
    context.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    resident, before, start = _status("VmRSS"), _read_so_far(), time.perf_counter()
    with open_checkpoint(folder) as reader:
        load_into(parameters, layout, reader, context, threads=threads)
    asked, from_disk = (b - a for a, b in zip(before, _read_so_far(), strict=True))
    memory = _status("VmHWM") - resident - own
    context.barrier()
    return Measured(time.perf_counter() - start, asked, from_disk, memory)


def _plain(context: RankContext, folder: Path, keep: bool) -> Measured:
    stretches = []
    for path in _weights(folder):
        size = path.stat().st_size
        stretches.append((path, *(size * rank // context.world_size for rank in (context.rank, context.rank + 1))))
    kept = torch.empty(sum(end - at for _, at, end in stretches) if keep else BLOCK_BYTES, dtype=torch.uint8)
    buffer, used = memoryview(kept.numpy()), 0
    context.barrier()
    before, start = _read_so_far(), time.perf_counter()
    for path, at, end in stretches:
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            while at < end:
                got = file.readinto(buffer[used : used + min(BLOCK_BYTES, end - at)])
                at, used = at + got, used + got if keep else 0
    asked, from_disk = (b - a for a, b in zip(before, _read_so_far(), strict=True))
    context.barrier()
    return Measured(time.perf_counter() - start, asked, from_disk, 0)


def _status(key: str) -> int:
    """Bytes of a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _read_so_far() -> tuple[int, int]:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["read_bytes"])


def _result(
    config: ModelConfig, cases: list[Case], runs: list, file_bytes: int, ranks: int, threads: int, repeats: int,
    format: str,
) -> dict:  # fmt: skip
    largest = 2 * max(torch.Size(shape).numel() for shape in canonical_shapes(config).values())
    seconds = {case: [max(r["seconds"] for r in run) for run in runs[i :: len(cases)]] for i, case in enumerate(cases)}
    rows = []
    for i, case in enumerate(cases):
        own_runs = runs[i :: len(cases)]
        middle = statistics.median(seconds[case])
        kept, dropped = (statistics.median(seconds[Case(case.cold, plain)]) for plain in ("kept", "dropped"))
        rows.append(
            {
                "case": case.title,
                "seconds": middle,
                "seconds_of_runs": seconds[case],
                "gb_per_s": file_bytes / middle / 1e9,
                "of_plain": kept / middle,
                "of_dropped": dropped / middle,
                "asked_of_file": max(sum(r["asked"] for r in run) for run in own_runs) / file_bytes,
                "from_disk_of_file": max(sum(r["from_disk"] for r in run) for run in own_runs) / file_bytes,
                "extra_memory_in_tensors": max(r["memory"] for run in own_runs for r in run) / largest,
            }
        )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "benchmark": "loading",
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "memory_gib": round(memory_gib, 1), "system": platform.system()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "ranks": ranks, "threads": threads, "repeats": repeats, "format": format,
        "file_bytes": file_bytes, "largest_tensor_bytes": largest, "model": config.to_mistral(),
        "cases": rows,
    }  # fmt: skip


if __name__ == "__main__":
    run_tool(bench)
