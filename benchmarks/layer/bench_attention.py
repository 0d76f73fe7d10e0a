"""What attention takes on one device by the size of the cache's pages: decode steps, and whole prompts.

    python -m benchmarks.layer.bench_attention --output attention.json

Every case is checked against the plain reference first, on pages in random order with NaN behind each sequence. The
largest page holds a whole sequence, as a cache without pages would. Shapes are those of Mixtral-8x7B on one GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.common.ceilings import Ceilings
from benchmarks.common.machine import describe_run
from lab.timing import times_ms
from mixtralkit.cli.run import run_tool
from mixtralkit.config.options import Count, Natural
from mixtralkit.distributed import RankContext
from mixtralkit.model.rope import rope_table
from mixtralkit.ops.attention import decode_attention, decode_attention_reference, rotate_and_store
from mixtralkit.ops.ragged_attention import ragged_attention, ragged_attention_reference, span_table

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BEYOND_CACHES = 2**28  # bytes of keys and values that take turns: several times the largest L2
CHECKED = 8  # sequences of a case
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 1e-5}  # ‖difference‖ / ‖reference's‖


@dataclass(frozen=True)
class Case:
    """A decode step of ``sequences`` with ``length`` tokens each, their own included; or as many prompts."""

    kind: str  # decode or prompts
    sequences: int
    length: int
    page_size: int


class Inputs:
    """One layer's cache, pages in random order, with so many sequences that no cache holds what comes next."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, beyond_caches: bool) -> None:
        each = -(-case.length // case.page_size)
        bytes_read = 2 * case.sequences * KV_HEADS * case.length * HEAD_DIM * dtype.itemsize
        self.sets = max(1, BEYOND_CACHES // bytes_read) if beyond_caches else 1
        slots = self.sets * case.sequences
        generator = torch.Generator(device).manual_seed(case.page_size)
        like = {"device": device, "generator": generator}
        tables_SM = torch.randperm(slots * each, **like).view(slots, each)
        shape = (slots * each, KV_HEADS, case.page_size, HEAD_DIM)
        keys, values = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
        if behind := each * case.page_size - case.length:
            for memory in (keys, values):
                memory[tables_SM[:, -1], :, case.page_size - behind :] = float("nan")
        self.case, self.cache = case, (keys, values, tables_SM.int())
        self.rope_SC = rope_table(case.length, HEAD_DIM, 1e6, device)
        tokens = case.sequences * (case.length if case.kind == "prompts" else 1)
        self.qkv_TQ = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, **like).to(dtype)

    def calls(self) -> list[Callable[[], torch.Tensor]]:
        """The same work on each set of sequences."""
        work = self._decode if self.case.kind == "decode" else self._prompts
        return [work(first) for first in range(0, self.sets * self.case.sequences, self.case.sequences)]

    def error(self) -> float:
        """How far the first sequences are from the reference in float32, as a part of its norm."""
        rows = min(CHECKED, self.case.sequences) * len(self.qkv_TQ) // self.case.sequences
        got = self.calls()[0]()[:rows].flatten(1).double()
        slots = min(CHECKED, self.case.sequences)
        pages = self.cache[2][:slots].flatten().long()
        wide = (*(memory[pages].float() for memory in self.cache[:2]), torch.arange(len(pages)).view(slots, -1).int())
        wide = (*wide[:2], wide[2].to(pages.device))
        if self.case.kind == "decode":
            step = (torch.arange(slots, device=pages.device), self._last(slots), self.rope_SC, HEADS)
            wanted = decode_attention_reference(self.qkv_TQ[:slots].float(), *wide, *step)
        else:
            q_THC = rotate_and_store(self.qkv_TQ[:rows], *self.cache, *self._places(0, slots), self.rope_SC, HEADS)
            wanted = ragged_attention_reference(q_THC.float(), *wide, self._spans(0, slots)).flatten(1)
        return float((got - wanted.double()).norm() / wanted.double().norm())

    def _decode(self, first: int) -> Callable[[], torch.Tensor]:
        count = self.case.sequences
        slots_B = torch.arange(first, first + count, device=self.qkv_TQ.device)
        step = (slots_B, self._last(count), self.rope_SC, HEADS)
        return lambda: decode_attention(self.qkv_TQ, *self.cache, *step)

    def _prompts(self, first: int) -> Callable[[], torch.Tensor]:
        """Keys and values are in the cache; what a prompt's layer takes beside this is turning and storing them."""
        spans, places = self._spans(first, self.case.sequences), self._places(first, self.case.sequences)
        q_THC = rotate_and_store(self.qkv_TQ, *self.cache, *places, self.rope_SC, HEADS)
        table = span_table(spans).to(q_THC.device)
        return lambda: ragged_attention(q_THC, *self.cache, spans, table)

    def _last(self, count: int) -> torch.Tensor:
        return torch.full((count,), self.case.length - 1, device=self.qkv_TQ.device)

    def _spans(self, first: int, count: int) -> list[tuple[int, int, int]]:
        return [(slot, 0, self.case.length) for slot in range(first, first + count)]

    def _places(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.qkv_TQ.device
        slots_T = torch.arange(first, first + count, device=device).repeat_interleave(self.case.length)
        return slots_T, torch.arange(self.case.length, device=device).repeat(count)


@torch.no_grad()
def checked(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """``Inputs.error`` of a case; compiles its kernels, which lie on the disk then. For a process of its own."""
    found = Inputs(case, device, dtype, beyond_caches=False).error()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other processes need it
    return found


@torch.no_grad()
def bench_attention(
    sequences: str = "1,8,64,256",
    lengths: str = "256,2048",
    prompts: str = "8x2048",
    page_sizes: str = "16,32,64,128,256,4096",
    repeats: Count = 31,
    workers: Natural = 12,
    device: str | None = None,
    output: Path | None = None,
) -> None:
    """Times attention at every page size.

    Args:
        sequences: numbers of sequences of a decode step, between commas.
        lengths: tokens of each of them, between commas.
        prompts: prompts that run together, as NUMBERxTOKENS.
        page_sizes: powers of two of at least 16, between commas.
        repeats: timings of a case.
        workers: processes that compile and check; 0 does it in this one.
        device: cpu or cuda.
        output: JSON file for the results.
    """
    context = RankContext.start(device)
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    cases = list(_cases(*map(_numbers, (sequences, lengths, prompts.replace("x", ","), page_sizes))))
    errors = _errors(cases, context.device, dtype, workers)
    ceilings = Ceilings.measure(context, dtype)
    results = []
    for case, error in zip(cases, errors, strict=True):
        if not error < TOLERANCE[dtype]:  # NaN as well
            raise RuntimeError(f"{case} is {error:.1e} from its reference")
        inputs = Inputs(case, context.device, dtype, beyond_caches=context.device.type == "cuda")
        times = times_ms(inputs.calls(), context.device, repeats)
        results.append(_result(case, error, times, ceilings, dtype))
        print(_line(results[-1]), file=sys.stderr, flush=True)
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": str(dtype).removeprefix("torch.")}
    summary = {**describe_run(context), **shape, "ceilings": ceilings.rounded(), "results": results}
    if output is not None:
        output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


def _cases(
    sequences: Sequence[int], lengths: Sequence[int], prompts: Sequence[int], page_sizes: Sequence[int]
) -> Iterator[Case]:
    for count in sequences:
        for length in lengths:
            yield from (Case("decode", count, length, size) for size in page_sizes)
    yield from (Case("prompts", *prompts, size) for size in page_sizes)


def _errors(cases: Sequence[Case], device: torch.device, dtype: torch.dtype, workers: int) -> list[float]:
    if not workers or device.type != "cuda":
        return [checked(case, device, dtype) for case in cases]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        jobs = [executor.submit(checked, case, device, dtype) for case in cases]
        return [job.result() for job in jobs]


def _result(case: Case, error: float, times: Sequence[float], ceilings: Ceilings, dtype: torch.dtype) -> dict:
    count, length = case.sequences, case.length
    tokens, seen = (count, count * length) if case.kind == "decode" else (count * length, count * length)
    bytes_read = (2 * KV_HEADS * seen + (2 * HEADS + 2 * KV_HEADS) * tokens) * HEAD_DIM * dtype.itemsize
    pairs = count * (length if case.kind == "decode" else length * (length + 1) // 2)
    bound_s, bound = ceilings.bound_s(bytes_read, 4 * HEADS * HEAD_DIM * pairs)
    return {
        "kind": case.kind, "sequences": count, "length": length, "page_size": case.page_size,
        "ms": round(median(times), 5), "ms_p10_p90": [round(float(t), 5) for t in np.percentile(times, [10, 90])],
        "bound": bound, "share_of_bound": round(1e3 * bound_s / median(times), 4), "error": float(f"{error:.2e}"),
    }  # fmt: skip


def _line(result: dict) -> str:
    head = f"{result['kind']:>8} {result['sequences']:>4} x {result['length']:<5} pages of {result['page_size']:<5}"
    return f"{head} {result['ms']:>9.4f} ms, {result['share_of_bound']:.1%} of the bound ({result['bound']})"


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"{text!r} must be whole numbers of at least 1 between commas")
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    run_tool(bench_attention)
