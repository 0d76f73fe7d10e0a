"""Compiles kernels for a GPU that is not there, in a process without the interpreter: ``python -m … 90 plain packed``.

The interpreter knows no types: a kernel that it runs may still be refused by the compiler. Launches are those of the
launchers on tensors in main memory that nothing touches; prints one line a kernel.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
import triton
from triton._C.libtriton import nvidia
from triton.backends.compiler import GPUTarget

import mixtralkit.ops
from mixtralkit.distributed import SymmetricMemory

OPS = Path(mixtralkit.ops.__file__).parent
BF16 = torch.bfloat16


class NoGPU:
    """What Triton's driver is asked before a compilation."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """A kernel whose launches only compile."""

    def __init__(self, name: str, kernel) -> None:
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            found = self.kernel.run(*args, grid=(1, 1, 1), warmup=True, **options)
            print(f"{self.name} {found.metadata.shared}", flush=True)

        return launch


def prepare(capability: int) -> None:
    """Every kernel of the package compiles for ``capability`` where it would be launched."""
    triton.runtime.driver.set_active(NoGPU(capability))
    # where barriers belong takes a third of the time to find, and is a reason to refuse nothing
    nvidia.passes.ttgpuir.add_membar = lambda *_: None
    nvidia.passes.ttnvgpuir.add_proxy_fence_insertion = lambda *_: None
    for module in _triton_modules():
        if hasattr(module, "overlaps_launches"):
            module.overlaps_launches = lambda device: capability >= 90
        if hasattr(module, "_has_warp_groups"):
            module._has_warp_groups = lambda device: capability == 90
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: 132
        for name, value in list(vars(module).items()):
            if name.startswith("_") and isinstance(value, triton.runtime.JITFunction) and _is_launched(module, name):
                setattr(module, name, Compiled(name, value))


def _triton_modules() -> list:
    paths = sorted(OPS.glob("*/triton*.py"))
    return [importlib.import_module(f"mixtralkit.ops.{path.parent.name}.{path.stem}") for path in paths]


def _is_launched(module, name: str) -> bool:
    with open(module.__file__, encoding="utf-8") as source:
        return f"{name}[" in source.read()


def experts(rows: int, slots: int = 8, width: int = 4096, hidden: int = 14336, stored: bool = False) -> None:
    from mixtralkit.ops.experts.triton_grouped import expert_sum_grouped
    from mixtralkit.ops.experts.triton_small import expert_sum_small

    x_RD = torch.empty(rows, width, dtype=BF16)
    weights = torch.empty(slots, 2 * hidden, width, dtype=BF16), torch.empty(slots, width, hidden, dtype=BF16)
    chosen = torch.zeros(rows, 2, dtype=torch.int64), torch.zeros(rows, 2)
    launch = expert_sum_small if rows <= 16 else expert_sum_grouped
    at_desk = (x_RD.float(), None, torch.arange(slots))  # residual and storage of a step with experts in host memory
    launch(x_RD, *chosen, *weights, *(at_desk if stored else (x_RD,)))


def packed_experts(
    name: str, rows: int, slots: int = 8, width: int = 4096, hidden: int = 14336, operands: bool = False
) -> None:
    from mixtralkit.moe.weights import FORMATS, PackedWeight
    from mixtralkit.ops.experts.triton_grouped import expert_sum_grouped
    from mixtralkit.ops.experts.triton_packed import expert_sum_packed

    weights, matrices = FORMATS[name], []
    for outputs, columns, stacked in ((hidden, width, 2), (width, hidden, 1)):
        parts = [
            torch.empty(slots, *weights.shape(part, outputs, columns, stacked), dtype=getattr(torch, part.dtype))
            for part in weights.parts
        ]
        matrices.append(PackedWeight(weights, columns, tuple(parts), stacked))
    x_RD, chosen = torch.empty(rows, width, dtype=BF16), (torch.zeros(rows, 2, dtype=torch.int64), torch.zeros(rows, 2))
    launch = expert_sum_grouped if operands else expert_sum_packed
    at_desk = (x_RD.float(), None, torch.arange(slots))
    launch(x_RD, *chosen, *matrices, *(at_desk if rows == 8 else (x_RD,)))


def rest(rows: int, width: int = 4096) -> None:
    from mixtralkit.ops.capacity.triton import CapacityRule, cut_rows
    from mixtralkit.ops.gate.triton import gate_rows
    from mixtralkit.ops.linear.triton import default_settings, linear_small
    from mixtralkit.ops.norm.triton import add_rms_norm_rows

    x_TD, norm = torch.empty(rows, width, dtype=BF16), (torch.empty(width, dtype=BF16), 1e-5)
    gate_rows(x_TD, torch.empty(8, width, dtype=BF16), 2, norm)
    add_rms_norm_rows(x_TD, x_TD, *norm)
    chosen_T2, rule = torch.zeros(rows, 2, dtype=torch.int64), CapacityRule(8, 1.1, 0.5, rows != 1, rows != 8)
    valid_T = None if rows == 256 else chosen_T2[:, 0]
    cut_rows(chosen_T2, torch.empty(rows, 2), torch.empty(rows, 8), torch.empty(8, dtype=torch.bool), rule, valid_T)
    for outputs in (width, 6144) if rows <= 16 else ():
        linear_small(
            x_TD, torch.empty(outputs, width, dtype=BF16), norm, settings=default_settings(rows, outputs, width)
        )


def packed_linear(name: str, rows: int, outputs: int = 6144, inputs: int = 4096) -> None:
    from mixtralkit.moe.weights import FORMATS, PackedWeight
    from mixtralkit.ops.linear.triton import _unpacked, default_settings, linear_small

    parts = [
        torch.empty(FORMATS[name].shape(part, outputs, inputs), dtype=getattr(torch, part.dtype))
        for part in FORMATS[name].parts
    ]
    packed = PackedWeight(FORMATS[name], inputs, tuple(parts))
    _unpacked(packed, BF16)
    norm, settings = (torch.empty(inputs, dtype=BF16), 1e-5), default_settings(rows, outputs, inputs, 1)
    linear_small(torch.empty(rows, inputs, dtype=BF16), packed, norm, settings=settings)


def attention(rows: int, page_size: int = 128, window: int | None = None, heads: int = 32, kv_heads: int = 8) -> None:
    from mixtralkit.ops.attention.triton import launch_decode_attention, launch_rotate_and_store
    from mixtralkit.ops.ragged_attention.triton import launch_ragged_attention

    pages = torch.empty(2, 8, kv_heads, page_size, 128, dtype=BF16)
    cache = (*pages, torch.zeros(rows, 384 // page_size, dtype=torch.int32))
    place = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), torch.empty(384, 64, 2)
    qkv_TQ = torch.empty(rows, (heads + 2 * kv_heads) * 128, dtype=BF16)
    launch_decode_attention(qkv_TQ, *cache, *place, heads, window)
    q_THC = launch_rotate_and_store(qkv_TQ, *cache, *place, heads)
    launch_ragged_attention(q_THC, *cache, torch.zeros(1, 4, dtype=torch.int32), rows, window)


def sampling(rows: int, vocab: int = 32000, slots: int = 9) -> None:
    from mixtralkit.engine.sampler import SlotRules
    from mixtralkit.ops.sampling.triton import adjust_rows, best_of_rows

    rules = SlotRules(slots, vocab, torch.device("cpu")).rules
    adjusted_NV = adjust_rows(torch.empty(rows, vocab), rules, *torch.zeros(2, rows, dtype=torch.int64))
    best_of_rows(adjusted_NV)


def exchange(stays: bool, rows: int = 16, ranks: int = 4, width: int = 4096) -> None:
    from mixtralkit.ops.symmetric_exchange.triton import fetch_owned, fetch_sums, send_rows
    from mixtralkit.ops.symmetric_exchange.types import ExchangeMemory

    own, words = torch.empty(2 * rows * ranks, width, dtype=BF16), ExchangeMemory.words_of(ranks, rows, 2)
    sides = (SymmetricMemory(t, 0, (t.data_ptr(),) * ranks) for t in (own, torch.empty(words, dtype=torch.int64)))
    memory = ExchangeMemory(*sides, torch.zeros(2, dtype=torch.int64), rows)
    x_TD, chosen_TK = torch.empty(rows, width, dtype=BF16), torch.zeros(rows, 2, dtype=torch.int64)
    places_EC, norm = torch.zeros(8, 64, dtype=torch.int32), (torch.empty(width, dtype=BF16), 1e-5)
    arrived = send_rows(
        x_TD,
        chosen_TK,
        torch.empty(rows, 2),
        places_EC,
        rows,
        memory,
        None,
        torch.zeros(rows, dtype=torch.int64),
        stays,
    )
    if stays:
        fetch_owned(arrived, memory, norm)
    else:
        fetch_sums(arrived.members_T, memory, x_TD, norm)


def desk(rows: int, width: int = 4096, layers: int = 32, slots: int = 8) -> None:
    from mixtralkit.ops.desk.triton import DeskMemory, ask_host

    slots_TK, weights_TK = torch.zeros(rows, 2, dtype=torch.int64), torch.empty(rows, 2)
    x_TD, sums_TD = torch.empty(rows, width, dtype=BF16), torch.empty(rows, width)
    said_LS, flags_L = torch.zeros(layers + 1, slots, dtype=torch.int64), torch.zeros(layers, dtype=torch.int32)
    memory = DeskMemory(
        slots_TK.expand(layers, rows, 2), x_TD, weights_TK, slots_TK, flags_L[:1], said_LS, sums_TD, flags_L,
        said_LS[:-1], slots_TK, said_LS[0], sums_TD, flags_L[:3],
    )  # fmt: skip
    for residual_TD, guessed_TK, last, always in ((x_TD, None, False, False), (None, slots_TK, True, True)):
        ask_host(slots_TK, weights_TK, x_TD, residual_TD, guessed_TK, memory, 1, 0, last, always)


def plain(is_hopper: bool) -> None:
    """Of older GPUs a kernel each."""
    for count in (1, 8, 64, 128, 256, 1024, 4096) if is_hopper else (8, 256):
        experts(count)
    for count in (1, 8, 64) if is_hopper else ():
        experts(count, stored=True)
    for count in (1, 8, 256, 16384) if is_hopper else (8, 256):
        rest(count)
    for count in (1, 8, 64) if is_hopper else (8,):
        desk(count)
    sampling(8)
    for count in (1, 8, 256):
        attention(count)
    if is_hopper:
        attention(256, page_size=32, window=100)
    for stays in (False, True) if is_hopper else ():
        exchange(stays)


def packed(capability: int) -> None:
    """What 80 takes of int4 and int8 89 does too, which knows fp8 as well."""
    formats = {80: ("int4", "fp8"), 89: ("fp8",), 90: ("int8", "int4:32", "int4:128", "int4:64:zeros", "fp8:block")}
    for name in formats[capability]:
        for count in (1, 8, 64, 1024) if name in ("int4:128", "fp8") else (1, 8, 64):
            packed_experts(name, count)
    for name, count in (("fp8", 64), ("fp8:tensor", 4096)) if capability >= 89 else ():  # rows in fp8 too
        packed_experts(name, count, operands=True)
    for name in ("fp8",) if capability == 89 else ("int8", "fp8"):
        for count in (1, 8, 64, 256):
            packed_linear(name, count)


if __name__ == "__main__":
    prepare(int(sys.argv[1]))
    if "plain" in sys.argv:
        plain(int(sys.argv[1]) >= 90)
    if "packed" in sys.argv:
        packed(int(sys.argv[1]))
