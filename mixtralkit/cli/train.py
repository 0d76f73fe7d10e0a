"""``mixtralkit train``: a small Mixtral from any text, over any number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from mixtralkit.cli.run import command
from mixtralkit.config import MoEOptions, parse_dtype, shipped
from mixtralkit.config.engine import Dtype
from mixtralkit.config.options import Count, NotNegative
from mixtralkit.distributed import RankContext
from mixtralkit.training.loop import Trainer
from mixtralkit.training.run import check_unused, load_config, prepare_tokens, run_training
from mixtralkit.training.settings import TrainSettings
from mixtralkit.training.tokens import TokenSet


@command
def train(
    output: Path,
    text: tuple[Path, ...] = (),
    tokens: Path | None = None,
    config: Path = Path("tiny"),
    tokenizer: Path | None = None,
    vocab_size: Count = 4096,
    heldout_percent: NotNegative = 4.0,
    resume: bool = False,
    log_dir: Path | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    store_dtype: Dtype = "bfloat16",
    *,
    settings: TrainSettings,
) -> None:
    """Trains a small Mixtral and writes OUTPUT/checkpoint, OUTPUT/report.json and OUTPUT/state.

    Runs alone or under torchrun; attention is data parallel and experts are spread over the ranks, with FasterMoE's
    schedule and shadows where FMOE_FASTER_* ask for them. Reports loss, bits per byte of held-out text and the load of
    experts, by domain.

    Args:
        output: folder for the results.
        text: files, or folders as prepare-text makes them; each file is a domain. Any bytes will do.
        tokens: a tokens.npz from an earlier run or prepare-text, instead of text.
        config: architecture, in the keys of params.json, or the name of one in configs/models; its vocab_size gives
            way to the tokenizer's.
        tokenizer: a tokenizer.model to encode the text with; without it one is trained on the text.
        vocab_size: pieces of a tokenizer trained here.
        heldout_percent: part of each file of text that is not trained on.
        resume: go on from OUTPUT/state.
        log_dir: folder for TensorBoard.
        device: cpu or cuda; cuda where there is one.
        dtype: of products; weights and optimizer are float32. bfloat16 on CUDA, float32 on CPU when not given.
        store_dtype: of the checkpoint.
    """
    if bool(text) == bool(tokens):
        raise ValueError("text or tokens must be given, not both")
    context = RankContext.start(device)
    products = parse_dtype(dtype or ("bfloat16" if context.device.type == "cuda" else "float32"))
    with context.agreed():
        if context.is_first and not resume:
            check_unused(output)
        if context.is_first and text:
            prepare_tokens(text, output / "tokens.npz", vocab_size, tokenizer, heldout_percent)
    with context.agreed():
        token_set = TokenSet.load(tokens or output / "tokens.npz")
        model_config = load_config(shipped("models", config), token_set.vocab_size)
        if context.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = products is not torch.float32
    autocast = None if products is torch.float32 else products
    trainer = Trainer(model_config, token_set, settings, context, autocast, MoEOptions.of())
    run_training(trainer, output, resume=resume, log_dir=log_dir, dtype=parse_dtype(store_dtype))
    context.stop()
