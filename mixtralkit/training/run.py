"""One training run, from text to a checkpoint folder and its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mixtralkit.checkpoint import save_checkpoint
from mixtralkit.config import ModelConfig
from mixtralkit.training.corpus import load_corpus
from mixtralkit.training.evaluate import DomainFigures
from mixtralkit.training.loop import Log, Trainer
from mixtralkit.training.tokens import TokenSet, train_tokenizer
from mixtralkit.whole_file import writing


def prepare_tokens(
    text: Sequence[str | Path],
    cache: Path,
    vocab_size: int,
    tokenizer: Path | None = None,
    heldout_percent: float = 4.0,
) -> TokenSet:
    """Reads text, encodes it with ``tokenizer`` or one trained on it, and keeps the tokens in ``cache``.

    ValueError where ``cache`` has other tokens, which stay.
    """
    corpus = load_corpus(text, heldout_percent)
    model = tokenizer.read_bytes() if tokenizer else train_tokenizer(corpus, vocab_size)
    tokens = TokenSet.encode(corpus, model)
    if cache.exists():
        if not tokens.equals(TokenSet.load(cache)):
            raise ValueError(f"{cache}: has the tokens of another text; take these by --tokens, or move them away")
        return tokens
    cache.parent.mkdir(parents=True, exist_ok=True)
    tokens.save(cache)
    return tokens


def check_unused(output: Path) -> None:
    """ValueError where a run has written into ``output``."""
    for path in (output / "state", output / "report.json", output / "checkpoint"):
        if path.exists():
            raise ValueError(f"{path}: a run is there; go on with it by --resume, or name another output folder")


def run_training(trainer: Trainer, output: Path, *, resume: bool, log_dir: Path | None, dtype: torch.dtype) -> None:
    """Trains, evaluates the weights as they will be stored, and writes the results; collective.

    ``output`` gets ``checkpoint/`` (two ``consolidated.NN.pth`` in ``dtype``, ``params.json``, ``tokenizer.model``),
    ``report.json`` (held-out figures of every domain) and ``state/`` (to resume from).
    """
    context = trainer.context
    state = output / "state"
    if resume and not trainer.resume(state):
        raise ValueError(f"resume: {state} holds no saved run")
    with ExitStack() as stack:
        trainer.train(state, _logger(trainer, log_dir, stack))
    trainer.round_weights(dtype)
    figures = trainer.evaluate()
    tensors = trainer.whole_tensors(dtype)
    with context.agreed():
        if context.is_first:
            folder = output / "checkpoint"
            save_checkpoint(folder, trainer.config, tensors, format="mistral-shards", shards=2, overwrite=True)
            (folder / "tokenizer.model").write_bytes(trainer.tokens.tokenizer)
            report = {"steps": trainer.done_steps, "domains": {d: f.to_dict() for d, f in figures.items()}}
            with writing(output / "report.json") as unfinished:
                unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(format_figures(figures))


def load_config(path: Path, vocab_size: int) -> ModelConfig:
    """The architecture of ``path``, with the vocabulary of the tokenizer that is used."""
    config = ModelConfig.from_file(path)
    return replace(config, vocab_size=vocab_size)


def format_figures(figures: Mapping[str, DomainFigures]) -> str:
    """A table: bits per byte of each domain, and per layer the share of its rows that each expert got, in percent."""
    lines = [f"{'domain':12} bits/byte  loss"]
    lines += [f"{domain:12} {f.bits_per_byte:9.3f} {f.loss:5.3f}" for domain, f in figures.items()]
    for domain, f in figures.items():
        lines.append(f"expert load of {domain}, % of rows")
        lines += [
            f"  layer {layer:2}  " + " ".join(f"{100 * share:5.1f}" for share in row)
            for layer, row in enumerate(f.load_LE.tolist())
        ]
    return "\n".join(lines)


def _logger(trainer: Trainer, log_dir: Path | None, stack: ExitStack) -> Log:
    """Progress bar and TensorBoard on rank 0; nothing on the others."""
    if not trainer.context.is_first:
        return lambda step, values: None
    board = _board(log_dir, stack) if log_dir else None
    bar: Any = stack.enter_context(tqdm(total=trainer.total_steps, initial=trainer.done_steps, unit="step"))

    def log(step: int, values: Mapping[str, float]) -> None:
        bar.total = trainer.total_steps
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}  balance {values['balance']:.2f}  {values['tokens_per_s']:,.0f} tokens/s"
        )
        bar.update(step - bar.n)
        if board:
            for name, value in values.items():
                board.add_scalar(f"train/{name}", value, step)

    return log


def _board(log_dir: Path, stack: ExitStack) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log_dir needs tensorboard, which is not installed: pip install 'mixtralkit[train]'") from None
    board = SummaryWriter(str(log_dir))
    stack.callback(board.close)
    return board
