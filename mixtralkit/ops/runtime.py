"""Where Triton kernels run, and the settings that were tuned for a GPU."""

from __future__ import annotations

import functools
import json
import re

import torch

from mixtralkit.config import shipped

TUNED = shipped("kernels")


def runs_triton(x: torch.Tensor) -> bool:
    """Whether kernels on this tensor are Triton's: an Nvidia GPU from Ampere on, Triton installed, no gradients."""
    if not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return _has_triton(x.device.index or 0)


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
    what suits few rows can cost many of them a third of their speed.
    """
    entries = [e for e in _settings(device) if e["kernel"] == kernel and e["shape"] == shape and e["rows"] >= rows]
    return dict(min(entries, key=lambda e: e["rows"])["settings"]) if entries else None


@functools.lru_cache
def _settings(device: torch.device) -> list[dict]:
    if device.type != "cuda":
        return []
    path = TUNED / (re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()) + ".json")
    return json.loads(path.read_text())["entries"] if path.is_file() else []
