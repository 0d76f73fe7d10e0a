"""Checkpoints whose linear layers others quantised, in our terms: a file a method, and here what all of them do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mixtralkit.checkpoint.files import Region
from mixtralkit.checkpoint.foreign.base import Linear, Method, Module, by_output, name_of
from mixtralkit.checkpoint.foreign.bitsandbytes import BitsAndBytes
from mixtralkit.checkpoint.foreign.compressed_tensors import CompressedTensors
from mixtralkit.checkpoint.foreign.fp8 import FbgemmFp8, FineFp8
from mixtralkit.checkpoint.foreign.hqq import Hqq
from mixtralkit.checkpoint.foreign.int32_words import Awq, Gptq
from mixtralkit.checkpoint.foreign.mlx import Mlx
from mixtralkit.checkpoint.names import Stored
from mixtralkit.checkpoint.quantised import REFUSED, refusal, stated_quantisation
from mixtralkit.layout import is_projection
from mixtralkit.moe.weights import ATTENTION_FORMATS, PLAIN, ExpertWeights

METHODS: dict[str, type[Method]] = {
    "fp8": FineFp8, "fbgemm_fp8": FbgemmFp8, "compressed-tensors": CompressedTensors, "gptq": Gptq, "awq": Awq,
    "mlx": Mlx, "bitsandbytes": BitsAndBytes, "hqq": Hqq,
}  # fmt: skip


@dataclass(frozen=True)
class InOurTerms:
    """A checkpoint's tensors by the names of plain ones.

    Attributes:
        weights: the format that all experts are kept in.
        formats: that of each layer which has an exact one here, by the file's names: experts, if all have the same, and
            attention's and the output's, if it is one of ``ATTENTION_FORMATS``.
        tensors: these layers as the parts of their format, ``….w1.data``; others as numbers.
        numbers: all as numbers.
        why: experts are quantised and yet plain here; empty where they are not.
    """

    weights: ExpertWeights
    formats: Mapping[str, ExpertWeights]
    tensors: Mapping[str, Region]
    numbers: Mapping[str, Region]
    why: str = ""


def method_of(config: Mapping[str, Any]) -> Method | None:
    """How the model of a ``config.json`` is quantised; ValueError for methods and settings that are not read."""
    stated = stated_quantisation(config)
    if stated is None:
        return None
    name, settings = stated
    if name not in METHODS:
        raise ValueError(refusal(REFUSED.get(name, name)))
    return METHODS[name](settings)


def in_our_terms(method: Method, known: Mapping[str, Stored], regions: Mapping[str, Region]) -> InOurTerms:
    """Takes quantised layers apart.

    Args:
        known: the plain tensors of the model, as the files may call them.
        regions: those of the files.

    Raises:
        ValueError: naming file, tensor, found and wanted.
    """
    modules: dict[str, dict[str, Region]] = {}
    plain: dict[str, Region] = {}
    for name, region in regions.items():
        module, end = _split(name, known)
        if module is not None:
            modules.setdefault(module, {})[end] = region
        elif name.rpartition(".")[2] not in method.ignored:
            plain[name] = region
    _check_numbers(known, plain)
    meant = _dtype_of_norms(known, plain)
    experts = [name for name in modules if _is_expert(known[f"{name}.weight"])]
    common = math.gcd(*(known[f"{name}.weight"].shape[-1] for name in experts))
    linears: dict[str, Linear] = {}
    for name, tensors in modules.items():
        if not _is_quantised(method, tensors):
            plain |= {f"{name}.{end}": region for end, region in tensors.items() if end not in method.ignored}
            continue
        if known[f"{name}.weight"].slabs[0].source.endswith("feed_forward.gate.weight"):
            end, region = next((end, region) for end, region in tensors.items() if not _is_number(region))
            raise ValueError(
                f"{region.file}: {name}.{end}: found a router quantised by {method.title}, wanted its weight in full "
                "precision"
            )
        linears[name] = _linear(method, Module(name, known[f"{name}.weight"].shape, tensors, meant, common))
    kept, why = _kept(experts, linears)
    numbers = plain | {f"{name}.weight": linear.numbers for name, linear in linears.items()}
    held = {} if kept.is_plain else {name: linears[name] for name in experts}
    for name, linear in linears.items():
        if is_projection(known[f"{name}.weight"].slabs[0].source):
            linear = by_output(linear)
            if linear.weights in ATTENTION_FORMATS.values():
                held[name] = linear
    tensors = {name: region for name, region in numbers.items() if name.rpartition(".")[0] not in held}
    for name, linear in held.items():
        parts = zip(linear.weights.parts, linear.parts, strict=True)
        tensors |= {f"{name}.{part.name}": region for part, region in parts}
    return InOurTerms(kept, {name: linear.weights for name, linear in held.items()}, tensors, numbers, why)


def _split(name: str, known: Mapping[str, Stored]) -> tuple[str | None, str]:
    """The layer that a tensor belongs to, and what of it."""
    stem, end = name, ""
    while "." in stem:
        stem, _, last = stem.rpartition(".")
        end = f"{last}.{end}" if end else last
        if f"{stem}.weight" in known and len(known[f"{stem}.weight"].shape) > 1:
            return stem, end
    return None, name


def _dtype_of_norms(known: Mapping[str, Stored], regions: Mapping[str, Region]) -> torch.dtype:
    """In which all else is stored, and quantised layers were before."""
    norms = (region for name, region in regions.items() if name in known and len(known[name].shape) == 1)
    return next((region.dtype for region in norms), torch.float32)


def _is_number(region: Region) -> bool:
    """Whether it is stored as it is, in floating point."""
    return type(region) is Region and region.dtype.is_floating_point and region.dtype.itemsize > 1


def _check_numbers(known: Mapping[str, Stored], regions: Mapping[str, Region]) -> None:
    """ValueError for tensors that are no layers and yet not in floating point: nothing says what they mean."""
    for name, region in regions.items():
        if name in known and not _is_number(region):
            raise ValueError(f"{region.file}: {name}: found {name_of(region.dtype)}, wanted numbers of 16 bits or more")


def _is_quantised(method: Method, tensors: Mapping[str, Region]) -> bool:
    return any(end in tensors for end in method.marks) or not all(map(_is_number, tensors.values()))


def _linear(method: Method, module: Module) -> Linear:
    linear = method.linear(module)
    extra = [end for end in module.tensors if end not in module.taken and end not in method.ignored]
    if extra:
        region = module.tensors[extra[0]]
        found = f"{name_of(region.dtype)} {list(region.shape)}"
        raise module.error(extra[0], found, f"no such tensor of {method.title}")
    return linear


def _is_expert(stored: Stored) -> bool:
    return ".experts." in stored.slabs[0].source


def _kept(experts: Iterable[str], linears: Mapping[str, Linear]) -> tuple[ExpertWeights, str]:
    """The format that all experts are in, else the plain one and why."""
    found: dict[str, str] = {}
    for name in experts:
        linear = linears.get(name)
        if linear is None:
            found.setdefault("plain", f"{name} is not quantised")
        elif linear.why:
            return PLAIN, f"{name}: {linear.why}"
        else:
            found.setdefault(linear.weights.name, name)
    if set(found) <= {"plain"}:
        return PLAIN, ""
    if len(found) > 1:
        return PLAIN, "they are in several formats, " + ", ".join(f"{key} ({name})" for key, name in found.items())
    return next(linears[name].weights for name in experts), ""
