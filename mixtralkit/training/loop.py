"""The training loop over ranks: data-parallel attention, whole experts on their ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mixtralkit.config import ModelConfig, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import contiguous
from mixtralkit.training.batches import BatchSampler
from mixtralkit.training.evaluate import DomainFigures, evaluate
from mixtralkit.training.losses import expert_counts, load_balance, next_token_nats
from mixtralkit.training.optimizer import RankOptimizer, learning_rate
from mixtralkit.training.settings import TrainSettings
from mixtralkit.training.state import load_state, save_state
from mixtralkit.training.tokens import TokenSet

Log = Callable[[int, Mapping[str, float]], None]

# Settings that a resumed run must share with the run it goes on with, for its curve to be the same.
_BINDING = ("batch_tokens", "seq_len", "lr", "warmup", "weight_decay", "aux_loss", "clip", "mix_power", "seed", "zero")
_TIMED_STEPS = (10, 40)  # a run of given minutes takes its speed from these of its steps


class Trainer:
    """A model in training on this rank. Every method is collective.

    Weights and optimizer are float32; ``autocast`` is the dtype of the products, None for float32 throughout.
    ``options`` say how the MoE layers run; the curve is the same for all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens: TokenSet,
        settings: TrainSettings,
        context: RankContext,
        autocast: torch.dtype | None = None,
        options: MoEOptions | None = None,
    ) -> None:
        if tokens.vocab_size != config.vocab_size:
            raise ValueError(f"vocab_size ({config.vocab_size}) must be the tokenizer's {tokens.vocab_size}")
        if settings.sequences < context.world_size:
            raise ValueError(
                f"batch_tokens ({settings.batch_tokens}) must hold a sequence of {settings.seq_len} for each of "
                f"{context.world_size} ranks"
            )
        self.config, self.settings, self.context, self.tokens = config, settings, context, tokens
        plan = contiguous(config.n_layers, config.num_experts, context.world_size)
        parallel = ParallelConfig("dp" if context.world_size > 1 else "tp", "ep")
        self.layout = RankLayout(config, parallel, plan, context.rank)
        self.model = Transformer(self.layout, context, torch.float32, options)
        self.model.initialize(settings.seed)
        self.model.requires_grad_(True)
        self.parameters = self.model.named_tensors()
        self.optimizer = RankOptimizer(
            self.parameters, context, weight_decay=settings.weight_decay, clip=settings.clip, zero=settings.zero
        )
        self.sampler = BatchSampler(
            tokens.train, settings.seq_len, settings.sequences, settings.seed, context.device, settings.mix_power
        )
        self.autocast = torch.autocast(context.device.type, autocast, enabled=autocast is not None)
        self.done_steps = 0
        self.total_steps = settings.steps
        self._first_timed_at = 0.0

    def step(self) -> torch.Tensor:
        """One optimizer step; float32 [loss in nats a token, load-balance loss, gradient norm] of the whole batch.

        The loss parts are this rank's: their sum over ranks is the batch's. Nothing waits for the device.
        """
        settings = self.settings
        batch_BT = self.sampler.batch(self.done_steps, self.context.rank, self.context.world_size)
        with self.autocast:
            logits_BTV, routings = self.model.train_logits(batch_BT[:, :-1])
        nats = next_token_nats(logits_BTV, batch_BT[:, 1:]) / settings.batch_tokens
        counts_LE = self.context.all_reduce(expert_counts(routings))
        balance = load_balance(routings, counts_LE, settings.batch_tokens)
        (nats + settings.aux_loss * balance).backward()
        rate = learning_rate(self.done_steps, self.total_steps or 1 << 60, settings.lr, settings.warmup)
        norm = self.optimizer.step(rate)
        self.done_steps += 1
        return torch.stack([nats.detach(), balance.detach(), norm / self.context.world_size])

    def train(self, folder: Path | None = None, log: Log = lambda step, values: None) -> list[float]:
        """Steps until the run's end; returns the loss of every step taken here.

        Args:
            folder: where states are saved every ``save_every`` steps and at the end; None saves nothing.
            log: called on every rank each ``log_every`` steps with the step and the means since the last call.
        """
        settings, losses, recent = self.settings, [], []
        start = marked = time.monotonic()
        before = self.done_steps
        while self.total_steps is None or self.done_steps < self.total_steps:
            recent.append(self.step())
            if self.total_steps is None:
                self._time_run(self.done_steps - before, start)
            last = self.done_steps == self.total_steps
            if self.done_steps % settings.log_every == 0 or last:
                values = self.context.all_reduce(torch.stack(recent)).cpu()  # host sync
                losses += values[:, 0].tolist()
                seconds, marked = time.monotonic() - marked, time.monotonic()
                log(self.done_steps, self._summary(values, settings.batch_tokens * len(recent) / seconds))
                recent = []
            if folder is not None and (last or (settings.save_every and self.done_steps % settings.save_every == 0)):
                self.save(folder)
        return losses

    def _summary(self, values: torch.Tensor, tokens_per_s: float) -> dict[str, float]:
        loss, balance, norm = values.mean(0).tolist()
        rate = learning_rate(self.done_steps - 1, self.total_steps or 1 << 60, self.settings.lr, self.settings.warmup)
        return {"loss": loss, "balance": balance, "grad_norm": norm, "lr": rate, "tokens_per_s": tokens_per_s}

    def _time_run(self, steps: int, start: float) -> None:
        """Fixes the number of steps that fit in ``minutes`` once enough of them were timed, alike on all ranks.

        ``steps`` were taken since ``start`` (monotonic seconds).
        """
        first, last = _TIMED_STEPS
        if self.context.device.type == "cuda" and steps in _TIMED_STEPS:
            torch.cuda.synchronize(self.context.device)
        now = time.monotonic()
        left_s = self.settings.minutes * 60 - (now - start)
        if steps == first:
            self._first_timed_at = now
        if steps == last:
            more = int(left_s * (last - first) / (now - self._first_timed_at))
            self.total_steps = self.context.broadcast_object(self.done_steps + max(0, more))
        elif self.context.broadcast_object(left_s) < 0:
            self.total_steps = self.done_steps

    def save(self, folder: Path) -> None:
        """Saves everything ``resume`` needs."""
        state = {
            "step": self.done_steps,
            "total_steps": self.total_steps,
            "settings": {name: getattr(self.settings, name) for name in _BINDING},
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state(),
        }
        save_state(folder, self.done_steps, state, self.context)

    def resume(self, folder: Path) -> bool:
        """Goes on from the newest save; False when there is none. The curve is that of an unbroken run."""
        state = load_state(folder, self.context)
        if state is None:
            return False
        with self.context.agreed():
            wanted = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
            found = {name: tuple(tensor.shape) for name, tensor in state["parameters"].items()}
            if wanted != found:
                raise ValueError(f"{folder}: the saved run is of another model")
            for name, value in state["settings"].items():
                if getattr(self.settings, name, None) != value:
                    raise ValueError(f"{name} ({getattr(self.settings, name)}) must be {value}, as in the saved run")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state(state["optimizer"])
        self.done_steps = state["step"]
        self.total_steps = self.settings.steps or state["total_steps"]
        return True

    def evaluate(self) -> dict[str, DomainFigures]:
        """Held-out figures of every domain."""
        return evaluate(self.model, self.tokens, self.settings.seq_len, self.settings.sequences, self.autocast)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Rounds the weights to what ``dtype`` holds, so that figures taken next are of the weights as stored."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.copy_(parameter.to(dtype))

    def whole_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The whole model in Mistral's names, on CPU, on rank 0; empty on the others."""
        own: dict[str, Any] = {}
        for piece in self.layout.pieces():
            if self.context.is_first or ".experts." in piece.source:
                own[piece.source] = self.parameters[piece.target][piece.at].detach().to("cpu", dtype)
        whole: dict[str, torch.Tensor] = {}
        for part in self.context.all_gather_objects(own):
            whole |= part
        return whole if self.context.is_first else {}
