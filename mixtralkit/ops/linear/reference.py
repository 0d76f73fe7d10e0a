"""The product in plain torch, with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixtralkit.ops.norm.reference import rms_norm_reference


def linear_reference(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The reference of ``linear``, with gradients; rounds the product to the dtype of x before what follows."""
    y_TO = F.linear(x_TI if norm is None else rms_norm_reference(x_TI, *norm), w_OI)
    if residual_TO is not None:
        y_TO = y_TO + residual_TO
    if out is not None:
        return out.copy_(y_TO)
    return y_TO if out_dtype is None else y_TO.to(out_dtype)
