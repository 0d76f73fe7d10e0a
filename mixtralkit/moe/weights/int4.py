"""Four bits a weight, one scale for a group of columns of an output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mixtralkit.ops.cpu.packed import PackedWeight, pack_int4


@dataclass(frozen=True)
class Int4:
    """w ≈ (q - z) · s with q in 0 … 15, for every ``group`` columns of an output.

    Without zero points z is 8 and -8 is the weight of largest size, as in llama.cpp's Q4_0; with them the 16 steps
    reach from the smallest weight, or 0, to the largest. Scales are float16, rounded before the weights are.
    """

    group: int = 32
    zero_points: bool = False

    @property
    def name(self) -> str:
        return f"int4:{self.group}" + (":zeros" if self.zero_points else "")

    def tensors(self, outputs: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that holds a matrix [outputs, columns]; q has one weight a byte."""
        groups = -(-columns // self.group)
        found = {"q": ((outputs, columns), torch.uint8), "scale": ((outputs, groups), torch.float16)}
        return found | ({"zero": ((outputs, groups), torch.uint8)} if self.zero_points else {})

    def quantize(self, w: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of matrices [..., O, K], each weight at the nearest step."""
        columns = w.shape[-1]
        grouped = F.pad(w.float(), (0, -columns % self.group)).unflatten(-1, (-1, self.group))
        if self.zero_points:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scale = ((high - low) / 15).half()
        else:
            extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
            scale = (extreme / -8).half()
        step = torch.where(scale == 0, 1.0, scale.float())
        zero = (-low / step).round().clamp(0, 15) if self.zero_points else torch.full_like(step, 8.0)
        bits = (grouped / step[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8)
        found = {"q": bits.flatten(-2)[..., :columns].contiguous(), "scale": scale}
        return found | ({"zero": zero.to(torch.uint8)} if self.zero_points else {})

    def dequantize(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The reference: float32 [..., O, K]."""
        columns = tensors["q"].shape[-1]
        zero = tensors["zero"].float() if self.zero_points else 8.0
        scale, zero = torch.broadcast_tensors(tensors["scale"].float(), torch.as_tensor(zero))
        scale, zero = (part.repeat_interleave(self.group, -1)[..., :columns] for part in (scale, zero))
        return (tensors["q"].float() - zero) * scale

    def pack(self, tensors: dict[str, torch.Tensor]) -> PackedWeight:
        """As the CPU's kernels read them."""
        return pack_int4(tensors["q"], tensors["scale"], tensors.get("zero"), self.group)

    def bytes(self, outputs: int, columns: int) -> int:
        """Of a matrix [outputs, columns], packed."""
        groups = -(-columns // self.group)
        return outputs * (-(-columns // 2) + groups * (3 if self.zero_points else 2))
