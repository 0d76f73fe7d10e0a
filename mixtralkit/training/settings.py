"""What a training run can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSettings:
    """One run's numbers.

    Attributes:
        steps: optimizer steps; None when ``minutes`` decides.
        minutes: wall-clock time of the training steps; their number is fixed once their speed is known.
        batch_tokens: tokens a step, of all ranks together; a multiple of ``seq_len``.
        seq_len: tokens of one sequence.
        lr: peak learning rate; linear warm-up over ``warmup`` steps, then a cosine to a fiftieth.
        aux_loss: weight of the load-balance loss.
        clip: largest gradient norm; 0 does not clip.
        mix_power: domains are drawn in proportion to tokens ** mix_power.
        zero: split optimizer states over the ranks.
        log_every, save_every: steps; save_every 0 saves at the end only.
    """

    steps: int | None = 1000
    minutes: float | None = None
    batch_tokens: int = 65536
    seq_len: int = 1024
    lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    aux_loss: float = 0.01
    clip: float = 1.0
    mix_power: float = 0.6
    seed: int = 1
    zero: bool = False
    log_every: int = 20
    save_every: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps ({self.steps}) or minutes ({self.minutes}) must be given, not both")
        for name in ("batch_tokens", "seq_len", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("weight_decay", "aux_loss", "clip", "save_every", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        for name in ("steps", "minutes", "lr"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        if self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) must be a multiple of seq_len ({self.seq_len})")

    @property
    def sequences(self) -> int:
        """Sequences of a step, of all ranks together."""
        return self.batch_tokens // self.seq_len
