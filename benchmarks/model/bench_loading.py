"""How fast a checkpoint loads, how much of the file is read and how much memory that takes.

    python -m benchmarks.model.bench_loading                          # 4 gloo ranks
    python -m benchmarks.model.bench_loading --device cuda --ranks 1  # onto GPUs, a rank each

Writes a checkpoint of random weights with Mixtral's proportions, loads it on all ranks for some layouts, cold (pages
evicted) and warm, and deletes it. In the same run the same processes plainly read the file with as many threads, each
its own stretch of it in blocks of 16 MiB into main memory: *kept* as ``read()`` does, in memory that is touched for
the first time (``of_plain`` is against this), and *dropped*, into one buffer over and over, which costs no new memory.
A load onto a GPU ends when the device has the bytes.

Bytes read are ``rchar`` of ``/proc/self/io`` (what was asked of the kernel) and ``read_bytes`` (what came from the
disk). Memory is the peak of the resident set over what it was before the load, less the rank's own parameters if they
lie in it, in units of the model's largest tensor. ``cpu_seconds`` are of all ranks and threads, user and kernel.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mixtralkit.checkpoint import RankFiles, load_into, open_checkpoint, save_checkpoint
from mixtralkit.checkpoint.loader import reading_threads
from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout, canonical_shapes
from mixtralkit.planning.plan import contiguous

PLAIN = ("kept", "dropped")
BLOCK_BYTES = 16 << 20
POOL_NUMEL = 1 << 29


@dataclass(frozen=True)
class Case:
    """One thing to time: a layout to load under, or plain reading (``plain`` is one of ``PLAIN``)."""

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
    """What one rank saw between two barriers: wall and processor time, bytes asked, from disk and of memory."""

    seconds: float
    cpu_seconds: float
    asked: int
    from_disk: int
    memory: int


@dataclass(frozen=True)
class Spent:
    """Counters of this process since it started."""

    seconds: float
    cpu_seconds: float
    asked: int
    from_disk: int

    @classmethod
    def now(cls) -> Spent:
        io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        return cls(time.perf_counter(), cpu, int(io["rchar"]), int(io["read_bytes"]))

    def until_all_are_done(self, context: RankContext, memory: int = 0) -> Measured:
        """What was spent since; the wall time is that of the slowest rank."""
        own = Spent.now()
        context.barrier()
        seconds = time.perf_counter() - self.seconds
        return Measured(
            seconds, own.cpu_seconds - self.cpu_seconds, own.asked - self.asked, own.from_disk - self.from_disk, memory
        )


def bench(
    size_gb: float = 8.0,
    device: str = "cpu",
    ranks: int = 4,
    threads: int | None = None,
    repeats: int = 3,
    format: str = "mistral",
    layouts: str = "tp/tp,tp/ep,dp/ep",
    folder: Path | None = None,
    output: Path | None = None,
) -> None:
    """Times loading of a synthetic checkpoint against plainly reading it.

    Args:
        size_gb: size of the checkpoint in 10^9 bytes.
        device: "cpu" for gloo ranks, "cuda" for a rank on each GPU.
        ranks: how many load together.
        threads: reading threads of each rank; the loader's own number when not given.
        repeats: runs of each case; medians are reported.
        format: format of the checkpoint; "mixtralkit" is written for the one layout that is then asked for.
        layouts: attention/experts to load under, with commas between.
        folder: where the checkpoint is made; a temporary folder when not given.
        output: JSON file for the result.
    """
    for name, value in (("ranks", ranks), ("repeats", repeats), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    if not 0 < size_gb < float("inf"):
        raise ValueError(f"size_gb ({size_gb}) must be a number above 0")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device ({device!r}) must be cpu or cuda")
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"ranks ({ranks}) must be at most the {torch.cuda.device_count()} GPUs with device cuda")
    config = _model(size_gb)
    kinds = [_layout(text, config, ranks) for text in layouts.split(",")]
    if format == "mixtralkit" and len(kinds) > 1:
        raise ValueError(f"layouts ({layouts!r}) must be one for format {format!r}, which is cut for it")
    cases = [Case(cold, **kind) for cold, kind in product((True, False), [*({"plain": x} for x in PLAIN), *kinds])]
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-loading-") as made:
        _write(Path(made), config, format, RankFiles(ranks, ParallelConfig(**kinds[0])))
        with tempfile.TemporaryDirectory() as shared:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # freed tensors go back, so that growth is seen
            try:
                mp.spawn(_rank_main, (device, ranks, shared, made, config, cases * repeats, threads), nprocs=ranks)
            except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:  # its text is the rank's traceback
                raise RuntimeError(str(error).strip().splitlines()[-1]) from None
            threads, runs = json.loads((Path(shared) / "runs.json").read_text())
        file_bytes = sum(path.stat().st_size for path in _weights(Path(made)))
    setup = {"device": device, "ranks": ranks, "threads": threads, "repeats": repeats, "format": format}
    result = _result(config, cases, runs, file_bytes, setup)
    for row in result["cases"]:
        print(
            f"{row['case']:45} {row['gb_per_s']:6.2f} GB/s  {row['of_plain']:5.2f} of plain "
            f"({row['of_dropped']:.2f})  cpu {row['cpu_seconds']:.2f} s  "
            f"asked {row['asked_of_file']:.3f} and from disk {row['from_disk_of_file']:.3f} of the file  "
            f"memory {row['extra_memory_in_tensors']:.2f} tensors"
        )
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def _layout(text: str, config: ModelConfig, ranks: int) -> dict[str, str]:
    """ValueError for a layout that there is not, or not over so many ranks."""
    attention, slash, experts = text.partition("/")
    if not slash:
        raise ValueError(f"layouts ({text!r}) must be like 'tp/ep'")
    plan = contiguous(config.n_layers, config.num_experts, ranks)
    RankLayout(config, ParallelConfig(attention, experts), plan)
    return {"attention": attention, "experts": experts}


def _model(size_gb: float) -> ModelConfig:
    """8x7B at half its width, as many layers as make the size in 16 bits, and as large a share of embeddings."""
    dim, hidden = 2048, 7168
    layer = 8 * 3 * dim * hidden + 2 * dim * dim + 2 * dim * 512
    layers = max(1, round(size_gb * 1e9 / 2 / layer))
    vocab = 500 * layers
    return ModelConfig(
        dim=dim, n_layers=layers, head_dim=128, hidden_dim=hidden, n_heads=16, n_kv_heads=4, vocab_size=vocab
    )


def _write(folder: Path, config: ModelConfig, format: str, ranks: RankFiles) -> None:
    """Every tensor is a stretch of one pool of random bits, so that the model is never in memory."""
    pool = torch.randint(-(1 << 15), 1 << 15, (POOL_NUMEL // 8,), dtype=torch.int16).view(torch.bfloat16)
    tensors, start = {}, 0
    for name, shape in canonical_shapes(config).items():
        numel = torch.Size(shape).numel()
        start = start if start + numel <= len(pool) else start % 997
        tensors[name] = pool[start : start + numel].view(shape)
        start += numel
    save_checkpoint(folder, config, tensors, format, ranks=ranks, progress=True)


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".json")


def _rank_main(
    rank: int, device: str, ranks: int, shared: str, folder: str, config: ModelConfig, cases: list[Case],
    threads: int | None,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    if ranks > 1:
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{shared}/store", rank=rank, world_size=ranks)
    context = RankContext.start(device, {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)})
    threads, runs = threads or reading_threads(context), []
    for case in cases:
        context.barrier()
        if case.cold and context.is_first:
            _evict(Path(folder))
        if case.plain:
            measured = _plain(context, Path(folder), case.plain, threads)
        else:
            measured = _load(context, Path(folder), config, case, threads)
        runs.append([asdict(one) for one in context.all_gather_objects(measured)])
    if context.is_first:
        (Path(shared) / "runs.json").write_text(json.dumps([threads, runs]))


def _evict(folder: Path) -> None:
    for path in _weights(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _load(context: RankContext, folder: Path, config: ModelConfig, case: Case, threads: int) -> Measured:
    plan = contiguous(config.n_layers, config.num_experts, context.world_size)
    layout = RankLayout(config, ParallelConfig(case.attention, case.experts), plan, context.rank)
    like = {"dtype": torch.bfloat16, "device": context.device}
    parameters = {name: torch.empty(shape, **like) for name, shape in layout.shapes().items()}
    own = sum(parameter.nbytes for parameter in parameters.values() if parameter.device.type == "cpu")
    context.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    resident, start = _status("VmRSS"), Spent.now()
    with open_checkpoint(folder) as reader:
        load_into(parameters, layout, reader, context, threads=threads)
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    return start.until_all_are_done(context, _status("VmHWM") - resident - own)


def _plain(context: RankContext, folder: Path, how: str, threads: int) -> Measured:
    stretches, used = [], 0
    for path in _weights(folder):
        size, parts = path.stat().st_size, context.world_size * threads
        for part in range(context.rank * threads, (context.rank + 1) * threads):
            stretches.append((path, size * part // parts, size * (part + 1) // parts, used))
            used += stretches[-1][2] - stretches[-1][1]
    kept = torch.empty(used if how != "dropped" else BLOCK_BYTES * threads, dtype=torch.uint8)
    buffer = memoryview(kept.numpy())

    def read(stretch: int) -> None:
        path, at, end, place = stretches[stretch]
        place = place if how != "dropped" else BLOCK_BYTES * (stretch % threads)
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            while at < end:
                got = file.readinto(buffer[place : place + min(BLOCK_BYTES, end - at)])
                at, place = at + got, place + (got if how != "dropped" else 0)

    context.barrier()
    start = Spent.now()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(len(stretches))))
    return start.until_all_are_done(context)


def _status(key: str) -> int:
    """Bytes of a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _result(config: ModelConfig, cases: list[Case], runs: list, file_bytes: int, setup: dict) -> dict:
    largest = 2 * max(torch.Size(shape).numel() for shape in canonical_shapes(config).values())
    seconds = {case: [max(r["seconds"] for r in run) for run in runs[i :: len(cases)]] for i, case in enumerate(cases)}
    rows = []
    for i, case in enumerate(cases):
        own_runs = runs[i :: len(cases)]
        middle = statistics.median(seconds[case])
        plain = {how: statistics.median(seconds[Case(case.cold, how)]) for how in PLAIN}
        rows.append(
            {
                "case": case.title,
                "seconds": middle,
                "seconds_of_runs": seconds[case],
                "gb_per_s": file_bytes / middle / 1e9,
                "of_plain": plain["kept"] / middle,
                "of_dropped": plain["dropped"] / middle,
                "cpu_seconds": statistics.median(sum(r["cpu_seconds"] for r in run) for run in own_runs),
                "asked_of_file": max(sum(r["asked"] for r in run) for run in own_runs) / file_bytes,
                "from_disk_of_file": max(sum(r["from_disk"] for r in run) for run in own_runs) / file_bytes,
                "extra_memory_in_tensors": max(r["memory"] for run in own_runs for r in run) / largest,
            }
        )
    gpu = {"gpu": torch.cuda.get_device_name()} if setup["device"] == "cuda" else {}
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "benchmark": "loading",
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "memory_gib": round(memory_gib, 1), "system": platform.system(), **gpu},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **setup,
        "file_bytes": file_bytes, "largest_tensor_bytes": largest, "model": config.to_mistral(),
        "cases": rows,
    }  # fmt: skip


if __name__ == "__main__":
    run_tool(bench)
