"""Rows between two halves of a block: the residual stream, and its norm where some kernel has made it already."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtralkit.moe.weights import PackedWeight
from mixtralkit.ops.linear import linear
from mixtralkit.ops.norm import add_rms_norm, rms_norm

Norm = tuple[torch.Tensor, float]  # (weight_D, eps) of an ``rms_norm``


@dataclass(frozen=True)
class Hidden:
    """Rows [T, D] of the residual stream, with what the next half of a block wants of them.

    A sum over ranks normalises in its own kernel; a product can normalise as it reads. So either ``normed_TD`` is there
    or the next product does what ``norm`` says first.

    Attributes:
        x_TD: the residual stream; None for rows that are not part of one (a layer by itself).
        normed_TD: the rows as the next product takes them; None leaves that to it.
        norm: what makes ``normed_TD`` of ``x_TD``.
        ids_T: int64 numbers of these rows in the step's batch, where rows have moved between ranks; None for all of
            this rank's in order.
        valid_T: int64, negative for rows of the step that other ranks have now, where every rank has a place for each;
            None where all rows are this rank's.
    """

    x_TD: torch.Tensor | None
    normed_TD: torch.Tensor | None = None
    norm: Norm | None = None
    ids_T: torch.Tensor | None = None
    valid_T: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows_TD)

    @property
    def rows_TD(self) -> torch.Tensor:
        """What the next product takes, to be normalised by ``pending`` if that is there."""
        return self.x_TD if self.normed_TD is None else self.normed_TD

    @property
    def pending(self) -> Norm | None:
        """What is still to be done to ``rows_TD``."""
        return self.norm if self.normed_TD is None else None

    def take(self, rows_N: torch.Tensor | slice) -> Hidden:
        """Some of the rows."""
        columns = (self.x_TD, self.normed_TD, self.ids_T, self.valid_T)
        x_ND, normed_ND, ids_N, valid_N = (None if t is None else t[rows_N] for t in columns)
        return Hidden(x_ND, normed_ND, self.norm, ids_N, valid_N)

    def normalised(self) -> torch.Tensor:
        """The rows as the next product takes them."""
        return self.rows_TD if self.pending is None else rms_norm(self.x_TD, *self.norm)

    def project(self, w_OD: torch.Tensor | PackedWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The normalised rows times ``w_OD`` transposed: [T, O]."""
        return linear(self.rows_TD, w_OD, norm=self.pending, out_dtype=out_dtype)


def add(y_TD: torch.Tensor, x_TD: torch.Tensor | None, norm: Norm | None) -> Hidden:
    """x + y as the next half wants it; ``y_TD`` itself where there is no stream to add to."""
    if x_TD is None:
        return Hidden(None, y_TD)
    return Hidden(*add_rms_norm(x_TD, y_TD, *norm), norm)


def join(parts: list[Hidden]) -> Hidden:
    """Rows of the same kind one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*((h.x_TD, h.normed_TD, h.ids_T) for h in parts), strict=True)
    x_TD, normed_TD, ids_T = (None if column[0] is None else torch.cat(column) for column in columns)
    return Hidden(x_TD, normed_TD, parts[0].norm, ids_T)
