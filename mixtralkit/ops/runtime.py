"""Where Triton and compiled kernels run, and the settings that were tuned for a GPU."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch

from mixtralkit.config import shipped
from mixtralkit.moe.weights import PackedWeight

CPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the compiled kernels' numbers
AMX_ROWS = 32  # from which torch's bfloat16 product is taken where the processor multiplies matrices
TUNED = shipped("kernels")


def runs_triton(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """The guard of every op: whether it runs its Triton kernels on these tensors, else its reference.

    It does where ``has_triton``, no gradient is wanted, all have one dtype and none is empty.
    """
    if not has_triton(x.device):
        return False
    grad = torch.is_grad_enabled()
    return all(not (t.requires_grad and grad) and t.dtype == x.dtype and t.numel() > 0 for t in (x, *others))


def runs_cpu(x: torch.Tensor, *weights: torch.Tensor | PackedWeight) -> bool:
    """The guard of every op on a CPU: whether it runs its compiled kernels on these tensors, else its reference.

    It does where a compiler is and no gradient and no autocast is wanted, and has kernels for the weights' format.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    grad = torch.is_grad_enabled()
    for tensor in (x, *weights):
        if isinstance(tensor, PackedWeight):
            if tensor.weights.cpu_type is None:
                return False
            continue
        fits = tensor.dtype in CPU_TYPES and tensor.numel() > 0 and tensor.stride(-1) == 1
        if not fits or (tensor.requires_grad and grad):
            return False
    from mixtralkit.ops.cpu.build import kernels

    if x.dtype == torch.bfloat16 and x.shape[0] >= AMX_ROWS and torch.cpu._is_amx_tile_supported():
        return False
    return kernels() is not None


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run there: an Nvidia GPU from Ampere on, Triton installed."""
    return device.type == "cuda" and _has_triton(device.index or 0)


@functools.lru_cache
def _has_triton(device: int) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.lru_cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended (programmatic dependent launch, Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; 1 for a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache
def tuned(kernel: str, device: torch.device, rows: int, **shape: int) -> dict[str, int] | None:
    """The settings of ``configs/kernels/`` for a kernel at this GPU and shape, or None where none were measured.

    Of several numbers of rows the smallest that is not below ``rows`` counts; beyond the largest nothing does, since
    what suits a small batch can cost a large one a third of its speed.
    """
    entries = [e for e in _settings(device) if e["kernel"] == kernel and e["shape"] == shape and e["rows"] >= rows]
    return dict(min(entries, key=lambda e: e["rows"])["settings"]) if entries else None


def settings_file(device: torch.device) -> Path:
    """Where the settings that were tuned on such a device are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return TUNED / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".json")


@functools.lru_cache
def _settings(device: torch.device) -> list[dict]:
    if device.type != "cuda":
        return []
    path = settings_file(device)
    return json.loads(path.read_text())["entries"] if path.is_file() else []
