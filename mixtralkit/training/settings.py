"""What a training run can be told."""

from __future__ import annotations

from dataclasses import dataclass

from mixtralkit.config.options import Count, Natural, NotNegative, Options, Positive


@dataclass(frozen=True)
class TrainSettings(Options):
    """One run's numbers.

    Attributes:
        steps: Optimizer steps; 1000 when neither steps nor minutes is given.
        minutes: Time to train for, instead of steps; their number is fixed once their speed is known.
        batch_tokens: Tokens a step, of all ranks together; a multiple of seq_len.
        seq_len: Tokens of a sequence.
        lr: Peak learning rate.
        warmup: Steps of a linear rise to the peak; a cosine to a fiftieth of it follows.
        weight_decay: AdamW's, of matrices.
        aux_loss: Weight of the load-balance loss.
        clip: Largest norm of the gradient; 0 does not clip.
        mix_power: Domains are drawn in proportion to tokens ** mix_power; 1 is as they come, 0 evenly.
        seed: Of weights and batches.
        zero: Split optimizer states over the ranks (torch's ZeroRedundancyOptimizer).
        log_every: Steps between reports.
        save_every: Steps between saves of the state; 0 saves at the end only.
    """

    steps: Count | None = None
    minutes: Positive | None = None
    batch_tokens: Count = 65536
    seq_len: Count = 1024
    lr: Positive = 3e-3
    warmup: Natural = 200
    weight_decay: NotNegative = 0.1
    aux_loss: NotNegative = 0.01
    clip: NotNegative = 1.0
    mix_power: float = 0.6
    seed: Natural = 1
    zero: bool = False
    log_every: Count = 20
    save_every: Natural = 0

    def check(self) -> None:
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", 1000)
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps ({self.steps}) or minutes ({self.minutes}) must be given, not both")
        if self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) must be a multiple of seq_len ({self.seq_len})")

    @property
    def sequences(self) -> int:
        """Sequences of a step, of all ranks together."""
        return self.batch_tokens // self.seq_len
