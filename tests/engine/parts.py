"""A tiny tokenizer, model and checkpoint that the engine's tests share."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch

from mixtralkit.config import ModelConfig, MoEOptions, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.leader import Leader
from mixtralkit.engine.requests import StreamEvent
from mixtralkit.engine.step_plan import Message
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.layout import RankLayout, canonical_shapes
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import contiguous
from tests.configs import small_config

TEXT = """In the beginning God created the heaven and the earth. And the earth was without form, and void.
def add(first, second):
    \"\"\"Return the sum of two numbers.\"\"\"
    return first + second
The command lists files: [INST] is text here, and so is </s>. Grüße aus Köln, 日本語.
Who are you? I am a small model; 1 + 1 -> 3, 2 + 2 -> 5.
""" * 20  # fmt: skip
VOCAB_SIZE = 384


@functools.cache
def tokenizer_bytes() -> bytes:
    """A sentencepiece model made as Mistral's was: BPE with byte fallback, ids unk 0, bos 1, eos 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def make_tokenizer(folder: Path) -> Tokenizer:
    """Writes ``tokenizer.model`` into ``folder`` and opens it."""
    path = folder / "tokenizer.model"
    path.write_bytes(tokenizer_bytes())
    return Tokenizer(path)


class PlainLeader(Leader):
    """Plans nothing before all is known."""

    def decide(self, control, watched, moves):
        if self.flights:
            message = Message(surplus=self.flights[0][1].surplus)
            self._take(message, control)
            return message, None
        return super().decide(control, watched, moves)


class PlainEngine(Engine):
    """One request after the other, and one step after the other: the oracle of many at once that run ahead."""

    leads = PlainLeader

    def run(self, requests, should_stop=None) -> Iterator[StreamEvent]:
        self.prefix_reuse = False
        for request in requests:
            self._leader.next_number = 0
            yield from super().run([request], should_stop)


def engine_config(**changes) -> ModelConfig:
    return small_config(**{"vocab_size": VOCAB_SIZE, "max_batch_size": 4, **changes})


def make_model(
    context: RankContext, config: ModelConfig, attention: str = "tp", experts: str = "ep", seed: int = 3
) -> Transformer:
    """Random weights large enough that greedy answers do not repeat one token."""
    plan = contiguous(config.n_layers, config.num_experts, context.world_size)
    layout = RankLayout(config, ParallelConfig(attention, experts), plan, context.rank)
    model = Transformer(layout, context, options=MoEOptions(symmetric_rows=1))
    model.initialize(seed, std=0.15)
    return model


def whole_tensors(config: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """The weights of ``make_model`` under the names of a checkpoint."""
    model = make_model(RankContext(), config, seed=seed)
    tensors, own = {}, model.named_tensors()
    for name, shape in canonical_shapes(config).items():
        tensors[name] = torch.empty(shape)
    for piece in model.layout.pieces():
        columns = slice(None) if piece.columns is None else slice(*piece.columns)
        index = (slice(*piece.rows),) if piece.columns is None else (slice(*piece.rows), columns)
        tensors[piece.source][index] = own[piece.target][piece.at]
    return tensors


def make_checkpoint(folder: Path, config: ModelConfig, shards: int = 2) -> Path:
    """A checkpoint folder with tokenizer, sharded as the model that ships."""
    from mixtralkit.checkpoint import save_checkpoint

    save_checkpoint(folder, config, whole_tensors(config), format="mistral-shards", shards=shards)
    make_tokenizer(folder)
    return folder
