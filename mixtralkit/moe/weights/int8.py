"""Eight bits a weight, one scale an output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.ops.cpu.packed import PackedWeight, pack_int8


@dataclass(frozen=True)
class Int8:
    """w ≈ q · s_o with q in -127 … 127 and s_o = max |w_o| / 127."""

    name = "int8"

    def tensors(self, outputs: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that holds a matrix [outputs, columns]."""
        return {"q": ((outputs, columns), torch.int8), "scale": ((outputs,), torch.float32)}

    def quantize(self, w: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of matrices [..., O, K], each weight at the nearest step."""
        w = w.float()
        scale = w.abs().amax(-1) / 127
        steps = w / torch.where(scale > 0, scale, 1.0)[..., None]
        return {"q": steps.round().clamp(-127, 127).to(torch.int8), "scale": scale}

    def dequantize(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The reference: float32 [..., O, K]."""
        return tensors["q"].float() * tensors["scale"][..., None]

    def pack(self, tensors: dict[str, torch.Tensor]) -> PackedWeight:
        """As the CPU's kernels read them."""
        return pack_int8(tensors["q"], tensors["scale"])

    def bytes(self, outputs: int, columns: int) -> int:
        """Of a matrix [outputs, columns]."""
        return outputs * (columns + 4)
