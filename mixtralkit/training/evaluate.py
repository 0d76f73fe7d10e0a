"""Held-out figures: bits per byte of each domain, and which experts it goes to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mixtralkit.model.transformer import Transformer
from mixtralkit.training.batches import share, windows
from mixtralkit.training.losses import expert_counts, next_token_nats
from mixtralkit.training.tokens import TokenSet


@dataclass(frozen=True)
class DomainFigures:
    """One domain's held-out result.

    Attributes:
        bits_per_byte: nats of all tokens / ln 2 / bytes of the text.
        loss: nats a token.
        load_LE: share of the routed rows of each layer that each expert got.
    """

    bits_per_byte: float
    loss: float
    load_LE: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        """For a report: numbers rounded to what is meaningful, and the largest load over the mean."""
        return {
            "bits_per_byte": round(self.bits_per_byte, 4),
            "loss": round(self.loss, 4),
            "load_max_over_mean": [round(float(x), 3) for x in self.load_LE.amax(1) / self.load_LE.mean(1)],
            "load": [[round(x, 4) for x in row] for row in self.load_LE.tolist()],
        }


@torch.no_grad()
def evaluate(
    model: Transformer, tokens: TokenSet, seq_len: int, sequences: int, autocast: torch.autocast
) -> dict[str, DomainFigures]:
    """Figures of every domain, the same on every rank; collective. Each rank scores its share of the windows."""
    context, figures = model.context, {}
    for domain, ids in tokens.heldout.items():
        sums = torch.zeros(2, dtype=torch.float64, device=context.device)
        counts = torch.zeros(model.params.n_layers, model.params.num_experts, device=context.device)
        for batch in windows(ids, seq_len, sequences):
            fill = batch.new_full((-len(batch) % context.world_size, batch.shape[1]), -1)  # no rank without rows
            rows = torch.cat([batch, fill])
            own = rows[share(len(rows), context.rank, context.world_size)].to(context.device)
            inputs, targets = own[:, :-1].clamp(min=0), own[:, 1:]
            with autocast:
                logits, routings = model.train_logits(inputs)
            sums[0] += next_token_nats(logits, targets)
            sums[1] += (targets >= 0).sum()
            counts += expert_counts(routings, targets.flatten() >= 0)
        nats, scored = context.all_reduce(sums).tolist()
        counts = context.all_reduce(counts).cpu()
        figures[domain] = DomainFigures(
            nats / math.log(2) / tokens.heldout_bytes[domain], nats / scored, counts / counts.sum(1, keepdim=True)
        )
    return figures
