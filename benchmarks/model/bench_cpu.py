"""Our engine on a CPU beside llama.cpp: both in one process, a few tokens each in turn, since machines change speed.

    pip install 'mixtralkit[bench]'
    python -m benchmarks.model.bench_cpu --folder /tmp/models --layers 2 --batch 1,4,16,64 \
        --prompts 64,512 --threads 1,2

Prints one line of JSON a measurement on stdout, a table on stderr. ``ratio`` is our rate by llama.cpp's, the median of
the turns, and ``quartiles`` those of the turns. docs/cpu.md has the figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from unittest.mock import patch

import torch
from sentencepiece import SentencePieceProcessor

from benchmarks.common.machine import describe_run
from benchmarks.model.bounds import decode_bytes
from benchmarks.model.source import RandomWords, random_requests
from mixtralkit.cli.run import run_tool
from mixtralkit.config import EngineConfig, ModelConfig, MoEOptions, parse_dtype, shipped
from mixtralkit.config.engine import Quantize, QuantizeAttention
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.runner import Runner
from mixtralkit.layout import RankLayout
from mixtralkit.mixtral import choose_layout
from mixtralkit.model.transformer import Transformer
from mixtralkit.ops.cpu.build import kernels
from mixtralkit.ops.cpu.memory import ask_for_large_pages
from mixtralkit.ops.cpu.products import read_cpu

SHORT = 8  # tokens of a prompt whose answer is timed


def bench_cpu(
    folder: Path,
    model: Path = Path("mixtral-8x7b"),
    tokenizer: Path = Path("ckpts/tokenizer.model"),
    layers: int = 2,
    kind: str = "f16",
    dtype: str = "bfloat16",
    quantize: Quantize | None = None,
    quantize_attention: QuantizeAttention | None = None,
    batch: str = "1,4,16,64",
    prompts: str = "64,512",
    threads: str = "1,2",
    turns: int = 10,
    new_tokens: int = 4,
    output: Path | None = None,
) -> None:
    """Times both programs on one random model.

    Args:
        folder: keeps the models between runs.
        model: its shape, a params.json or the name of one in configs/models; the vocabulary is the tokenizer's.
        tokenizer: a sentencepiece model for llama.cpp's file.
        layers: blocks of the model, at most those it has.
        kind: of llama.cpp's weights: f16, q8_0 or q4_0.
        dtype: of ours.
        quantize: of our experts; left out, dtype.
        quantize_attention: of our attention and output; left out, dtype.
        batch: sequences of a step, between commas.
        prompts: tokens of a prompt, between commas.
        threads: numbers of threads, between commas.
        turns: how often each program runs.
        new_tokens: tokens of an answer in a turn, the first of which is not timed.
        output: file that takes the lines of JSON.
    """
    peer = llama_cpp()
    if kind not in peer.FORMATS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(peer.FORMATS)}")
    if turns < 2 or new_tokens < 2:
        raise ValueError(f"turns ({turns}) and new_tokens ({new_tokens}) must be at least 2")
    batches, lengths, counts = (_numbers(text) for text in (batch, prompts, threads))
    config = ModelConfig.from_file(shipped("models", model))
    if not 1 <= layers <= config.n_layers:
        raise ValueError(f"layers ({layers}) must lie in 1 … {config.n_layers}")
    vocabulary = SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    config = replace(config, n_layers=layers, vocab_size=vocabulary)
    config = config.with_limits(max([SHORT, *lengths]) + new_tokens, max([1, *batches]))
    paths = files(peer, folder, model.stem, config, tokenizer, {"f16", kind})
    context = RankContext.start("cpu")
    mine = (quantize or dtype) + (f", attention {quantize_attention}" if quantize_attention else "")
    about = {
        **describe_run(context), "model": model.stem, "layers": layers, "ours": mine, "llama_cpp": kind,
        "compiled": kernels() is not None, "turns": turns,
    }  # fmt: skip
    if output is not None:
        output.write_text("", encoding="utf-8")
    layout = choose_layout(config, context, EngineConfig.of(quantize=quantize, quantize_attention=quantize_attention))
    ours = Ours(layout, context, parse_dtype(dtype), lambda tensors: peer.fill(tensors, layout, paths["f16"]))
    both = Both(ours, peer, paths[kind], turns, new_tokens, about, output)
    for count in counts:
        torch.set_num_threads(count)
        for sequences in batches:
            both.decode(count, sequences)
        for length in lengths:
            both.prompt(count, length)


def llama_cpp() -> ModuleType:
    """``benchmarks.model.llama_cpp``; ValueError, one sentence, without the packages that it needs."""
    try:
        from benchmarks.model import llama_cpp
    except ImportError as error:
        raise ValueError(f"llama.cpp beside us needs {error.name}: pip install 'mixtralkit[bench]'") from None
    return llama_cpp


def files(
    peer: ModuleType, folder: Path, model: str, config: ModelConfig, tokenizer: Path, kinds: set[str]
) -> dict[str, Path]:
    """llama.cpp's file of each kind, written where ``folder`` does not have it yet."""
    name = f"{model}-{config.n_layers}-{config.dim}-{config.hidden_dim}-{config.vocab_size}"
    paths = {kind: folder / f"{name}-{kind}.gguf" for kind in sorted(kinds)}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, path in paths.items():
        if not path.is_file():
            print(f"writing {path}", file=sys.stderr)
            peer.write_model(path, config, tokenizer, kind)
    return paths


@dataclass(frozen=True)
class Both:
    """Our engine and llama.cpp's file of the same weights, and the lines of what they take in turns."""

    ours: Ours
    peer: ModuleType
    path: Path
    turns: int
    new_tokens: int
    about: dict[str, object]
    output: Path | None

    def decode(self, threads: int, sequences: int) -> None:
        """A line of steps in which every sequence gets a token."""
        ours, tokens = self.ours, self.new_tokens
        theirs = self.peer.LlamaCpp(self.path, threads, sequences, 128)
        work = random_requests(ours.words, sequences, SHORT, tokens, sequences)
        prompts = [request.prompt for request in work]
        ours_s, theirs_s, reads = in_turn(
            self.turns, ours.read_gb_s, lambda: ours.step_s(work), lambda: theirs.step_s(prompts, tokens)
        )
        found = {
            "sequences": sequences,
            **rates(ours_s, theirs_s, sequences),
            "gb_s_of_machine": round(median(reads), 2),
        }
        if sequences == 1:
            size = ours.bytes_of_one() / 1e9
            found["gb_per_step"] = round(size, 4)
            found["share_of_reading"] = round(median(size / s / r for s, r in zip(ours_s, reads, strict=True)), 3)
        self._emit("decode", {"threads": threads, **found})

    def prompt(self, threads: int, length: int) -> None:
        """A line of one prompt."""
        theirs = self.peer.LlamaCpp(self.path, threads, 1, length + self.new_tokens)
        work = random_requests(self.ours.words, 1, length, 1, length)
        ours_s, theirs_s, _ = in_turn(
            self.turns, self.ours.read_gb_s, lambda: self.ours.prompt_s(work), lambda: theirs.prompt_s(work[0].prompt)
        )
        self._emit("prompt", {"threads": threads, "tokens": length, **rates(ours_s, theirs_s, length)})

    def _emit(self, measurement: str, found: dict[str, object]) -> None:
        """One line of JSON, and one for people."""
        line = json.dumps({"measurement": measurement, **self.about, **found})
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        shown = "  ".join(f"{name} {value}" for name, value in found.items())
        print(f"{measurement:<7}{shown}", file=sys.stderr, flush=True)


class Ours:
    """The model in our engine; ``fill`` writes its weights, by name."""

    def __init__(
        self, layout: RankLayout, context: RankContext, dtype: torch.dtype,
        fill: Callable[[dict[str, torch.Tensor]], None],
    ) -> None:  # fmt: skip
        config = layout.config
        self.model = Transformer(layout, context, dtype, MoEOptions())
        fill(self.model.named_tensors())
        self.words = RandomWords(config.vocab_size)
        self.engine = Engine(
            self.model, self.words, prefill_budget=config.max_seq_len * config.max_batch_size, prefix_reuse=False
        )
        self.buffer = torch.empty(2**26)
        ask_for_large_pages([self.buffer])
        self.buffer.fill_(1)

    def step_s(self, work: list[Request]) -> float:
        """Seconds of a step in which every sequence gets a token.

        From launch to launch: on a CPU one ends with its step, and what a step gave is told two launches later.
        """
        launch, ended = Runner.launch, []

        def noted(*args):
            flight = launch(*args)
            ended.append((time.perf_counter(), flight.kind))
            return flight

        with patch.object(Runner, "launch", noted):
            self.engine.complete(work)
        assert [kind for _, kind in ended] == ["mixed"] + ["launched"] * (len(ended) - 1)
        return (ended[-1][0] - ended[0][0]) / (len(ended) - 1)

    def prompt_s(self, work: list[Request]) -> float:
        """Seconds of reading a prompt."""
        start = time.perf_counter()
        self.engine.complete(work)
        return time.perf_counter() - start

    def read_gb_s(self) -> float:
        """GB/s at which the machine reads now, with all threads."""
        read = self.buffer.sum if kernels() is None else lambda: read_cpu(self.buffer)
        start = time.perf_counter()
        read()
        return self.buffer.nbytes / 1e9 / (time.perf_counter() - start)

    def bytes_of_one(self) -> float:
        """Bytes of weights that a step of one sequence reads, and of its cache."""
        config = self.model.params
        touched = [config.num_experts_per_tok] * config.n_layers
        return sum(decode_bytes(self.model.layout, touched, [SHORT + 2], self.model.dtype.itemsize).values())


def in_turn(turns: int, read: Callable, ours: Callable, theirs: Callable) -> tuple[list, list, list]:
    """Seconds of ours, seconds of theirs and the machine's GB/s around ours, of every turn after one."""
    ours(), theirs()
    ours_s, theirs_s, reads = [], [], []
    for turn in range(turns):
        if turn % 2:
            theirs_s.append(theirs())
        before = read()
        ours_s.append(ours())
        reads.append((before + read()) / 2)
        if turn % 2 == 0:
            theirs_s.append(theirs())
    return ours_s, theirs_s, reads


def rates(ours_s: list[float], theirs_s: list[float], tokens: int) -> dict[str, object]:
    """Medians of rates and of the turns' ratios."""
    ratios = [theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "ours_tokens_s": round(tokens / median(ours_s), 2), "llama_cpp_tokens_s": round(tokens / median(theirs_s), 2),
        "ratio": round(median(ratios), 3), "quartiles": [round(low, 3), round(high, 3)],
    }  # fmt: skip


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in text.split(",") if text):
        raise ValueError(f"{text!r} must be whole numbers of at least 1 between commas")
    return [int(part) for part in text.split(",")] if text else []


if __name__ == "__main__":
    run_tool(bench_cpu)
