"""Trains a small Mixtral on any text, over any number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from mixtralkit.cli import run_tool
from mixtralkit.config import MoEOptions, parse_dtype
from mixtralkit.distributed import RankContext
from mixtralkit.training.loop import Trainer
from mixtralkit.training.run import load_config, prepare_tokens, run_training
from mixtralkit.training.settings import TrainSettings
from mixtralkit.training.tokens import TokenSet


def train_tiny(
    output: Path,
    text: tuple[Path, ...] = (),
    tokens: Path | None = None,
    config: Path = Path(__file__).parent.parent / "configs/models/tiny.json",
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
    heldout_percent: float = 4.0,
    steps: int | None = None,
    minutes: float | None = None,
    batch_tokens: int = 65536,
    seq_len: int = 1024,
    lr: float = 3e-3,
    warmup: int = 200,
    weight_decay: float = 0.1,
    aux_loss: float = 0.01,
    clip: float = 1.0,
    mix_power: float = 0.6,
    seed: int = 1,
    zero: bool = False,
    resume: bool = False,
    save_every: int = 0,
    log_every: int = 20,
    log_dir: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    store_dtype: str = "bfloat16",
) -> None:
    """Trains a small Mixtral and writes OUTPUT/checkpoint, OUTPUT/report.json and OUTPUT/state.

    Runs alone or under torchrun; attention is data parallel and experts are spread over the ranks, with FasterMoE's
    schedule and shadows where FMOE_FASTER_* ask for them. Reports loss, bits per byte of held-out text and the load of
    experts, by domain.

    Args:
        output: folder for the results.
        text: files, or folders as tools/prepare_text.py makes them; each file is a domain. Any bytes will do.
        tokens: a tokens.npz from an earlier run or tools/prepare_text.py, instead of text.
        config: architecture, in the keys of params.json; its vocab_size gives way to the tokenizer's.
        tokenizer: a tokenizer.model to encode the text with; without it one is trained on the text.
        vocab_size: pieces of a tokenizer trained here.
        heldout_percent: part of each file of text that is not trained on.
        steps: optimizer steps (1000 when neither steps nor minutes is given).
        minutes: time to train for, instead of steps.
        batch_tokens: tokens a step, of all ranks together.
        seq_len: tokens of a sequence.
        lr: peak learning rate.
        warmup: steps until the peak; a cosine follows.
        weight_decay: AdamW's, of matrices.
        aux_loss: weight of the load-balance loss.
        clip: largest norm of the gradient; 0 does not clip.
        mix_power: domains are drawn in proportion to tokens ** mix_power; 1 is as they come, 0 evenly.
        seed: of weights and batches.
        zero: split optimizer states over the ranks (torch's ZeroRedundancyOptimizer).
        resume: go on from OUTPUT/state.
        save_every: steps between saves of the state; 0 saves at the end only.
        log_every: steps between reports.
        log_dir: folder for TensorBoard.
        device: cpu or cuda; cuda where there is one.
        dtype: of products; weights and optimizer are float32. bfloat16 on CUDA, float32 on CPU when not given.
        store_dtype: of the checkpoint.
    """
    settings = TrainSettings(
        steps=1000 if steps is None and minutes is None else steps,
        minutes=minutes,
        batch_tokens=batch_tokens,
        seq_len=seq_len,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        aux_loss=aux_loss,
        clip=clip,
        mix_power=mix_power,
        seed=seed,
        zero=zero,
        log_every=log_every,
        save_every=save_every,
    )
    if bool(text) == bool(tokens):
        raise ValueError("text or tokens must be given, not both")
    context = RankContext.start(device)
    products = parse_dtype(dtype or ("bfloat16" if context.device.type == "cuda" else "float32"))
    with context.agreed():
        if context.is_first and text:
            prepare_tokens(text, output / "tokens.npz", vocab_size, tokenizer, heldout_percent)
    with context.agreed():
        token_set = TokenSet.load(tokens or output / "tokens.npz")
        model_config = load_config(config, token_set.vocab_size)
        if context.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = products is not torch.float32
    autocast = None if products is torch.float32 else products
    trainer = Trainer(model_config, token_set, settings, context, autocast, MoEOptions.from_env())
    run_training(trainer, output, resume=resume, log_dir=log_dir, dtype=parse_dtype(store_dtype))
    context.stop()


if __name__ == "__main__":
    run_tool(train_tiny)
