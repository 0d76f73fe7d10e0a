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
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.common.machine import describe_run
from benchmarks.model.bounds import decode_bytes
from benchmarks.model.llama_cpp import FORMATS, LlamaCpp, fill, write_model
from benchmarks.model.source import RandomWords, random_requests
from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig, MoEOptions, parse_dtype
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.mixtral import choose_layout
from mixtralkit.model.transformer import Transformer
from mixtralkit.ops.cpu.build import kernels
from mixtralkit.ops.cpu.products import read_cpu

SHORT = 8  # tokens of a prompt whose answer is timed


def bench_cpu(
    folder: Path,
    model: Path = Path("configs/models/mixtral-8x7b.json"),
    tokenizer: Path = Path("ckpts/tokenizer.model"),
    layers: int = 2,
    kind: str = "f16",
    dtype: str = "bfloat16",
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
        model: its shape, a params.json; the vocabulary is the tokenizer's.
        tokenizer: a sentencepiece model for llama.cpp's file.
        layers: blocks of the model.
        kind: of llama.cpp's weights: f16, q8_0 or q4_0.
        dtype: of ours.
        batch: sequences of a step, between commas.
        prompts: tokens of a prompt, between commas.
        threads: numbers of threads, between commas.
        turns: how often each program runs.
        new_tokens: tokens of an answer in a turn, the first of which is not timed.
        output: file that takes the lines of JSON.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(FORMATS)}")
    if turns < 2 or new_tokens < 2:
        raise ValueError(f"turns ({turns}) and new_tokens ({new_tokens}) must be at least 2")
    batches, lengths = _numbers(batch), _numbers(prompts)
    most, longest = max([1, *batches]), max([SHORT, *lengths]) + new_tokens
    config = replace(ModelConfig.from_file(model), n_layers=layers, vocab_size=4096).with_limits(longest, most)
    paths = {name: folder / f"random-{layers}-{name}.gguf" for name in {"f16", kind}}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        if not path.is_file():
            print(f"writing {path}", file=sys.stderr)
            write_model(path, config, tokenizer, name)
    context = RankContext.start("cpu")
    ours = Ours(config, context, parse_dtype(dtype), paths["f16"])
    about = {
        **describe_run(context), "model": model.stem, "layers": layers, "ours": dtype, "llama_cpp": kind,
        "compiled": kernels() is not None, "turns": turns,
    }  # fmt: skip
    if output is not None:
        output.write_text("", encoding="utf-8")
    for count in _numbers(threads):
        torch.set_num_threads(count)
        for sequences in batches:
            theirs = LlamaCpp(paths[kind], count, sequences, 128)
            work = random_requests(ours.words, sequences, SHORT, new_tokens, sequences)
            ids = [request.prompt for request in work]
            found = in_turn(
                turns, ours.read_gb_s, lambda work=work: ours.step_s(work),
                lambda ids=ids, theirs=theirs: theirs.step_s(ids, new_tokens),
            )  # fmt: skip
            ours_s, theirs_s, reads = found
            fields = {"threads": count, "sequences": sequences, **rates(ours_s, theirs_s, sequences)}
            fields["gb_s_of_machine"] = round(median(reads), 2)
            if sequences == 1:
                size = ours.bytes_of_one()
                fields["gb_per_step"] = round(size / 1e9, 4)
                shares = [size / 1e9 / s / read for s, read in zip(ours_s, reads, strict=True)]
                fields["share_of_reading"] = round(median(shares), 3)
            emit("decode", about | fields, output)
            del theirs
        for length in lengths:
            theirs = LlamaCpp(paths[kind], count, 1, length + new_tokens)
            work = random_requests(ours.words, 1, length, 1, length)
            ours_s, theirs_s, _ = in_turn(
                turns, ours.read_gb_s, lambda work=work: ours.prompt_s(work),
                lambda ids=work[0].prompt, theirs=theirs: theirs.prompt_s(ids),
            )  # fmt: skip
            emit("prompt", about | {"threads": count, "tokens": length, **rates(ours_s, theirs_s, length)}, output)
            del theirs


class Ours:
    """The model in our engine."""

    def __init__(self, config: ModelConfig, context: RankContext, dtype: torch.dtype, path: Path) -> None:
        options = MoEOptions()
        self.model = Transformer(choose_layout(config, context, options=options), context, dtype, options)
        fill(self.model.named_tensors(), path)
        self.words = RandomWords(config.vocab_size)
        self.engine = Engine(self.model, self.words, prefill_budget=config.max_seq_len * config.max_batch_size)
        self.buffer = torch.ones(2**26)

    def step_s(self, work: list[Request]) -> float:
        """Seconds of a step in which every sequence gets a token."""
        times = [time.perf_counter() for _ in self.engine.run(work)]
        steps = len(times) // len(work) - 1
        return (times[-1] - times[len(work) - 1]) / steps

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


def emit(measurement: str, found: dict[str, object], output: Path | None) -> None:
    """One line of JSON, and one for people."""
    line = json.dumps({"measurement": measurement, **found})
    print(line, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    shown = list(found.items())[list(found).index("threads") :]
    print(f"{measurement:<7}" + "  ".join(f"{name} {value}" for name, value in shown), file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) for part in text.split(",") if text):
        raise ValueError(f"{text!r} must be whole numbers of at least 1 between commas")
    return [int(part) for part in text.split(",")] if text else []


if __name__ == "__main__":
    run_tool(bench_cpu)
