"""What fewer bits cost: bits a byte of text and answers right of the model in ckpts/, for every format.

    python -m benchmarks.model.bench_quantised --output benchmarks/results/quantised.json
    python -m benchmarks.model.bench_quantised --plans bits.json --output …    # formats of a plan
    python -m benchmarks.model.bench_quantised --attention int8 fp8 --output …    # of attention and output
    python -m benchmarks.model.bench_quantised --fp8_rows --output …    # rows rounded too, as GPUs multiply fp8
    python -m benchmarks.model.bench_quantised --dtype bfloat16 --formats int4:32 --output …    # as CPUs run them

A line a format on stderr and in the file, as soon as it is known; all else stays in float32 unless ``--dtype`` says
otherwise, so that nothing but the format of the experts, or of attention and output, differs. ``bits`` are those of a
rounded weight, with all that belongs to it; ``error`` is the root of their mean squared error over that of the weights.
docs/quantised.md has the table.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tqdm import tqdm

from benchmarks.common.machine import describe_run
from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.cli.run import run_tool
from mixtralkit.config import EngineConfig, shipped
from mixtralkit.config.engine import Dtype
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.evaluation.prompt_sets import read_prompts
from mixtralkit.evaluation.run import Results, run
from mixtralkit.evaluation.run_record import FORMAT
from mixtralkit.evaluation.work import AnswerOptions, make_works
from mixtralkit.layout import is_projection, matrix_formats
from mixtralkit.mixtral import Mixtral, open_source
from mixtralkit.moe.weights import FORMATS, PLAIN, ExpertWeights, parse_weights
from mixtralkit.ops import experts
from mixtralkit.ops.experts import expert_sum_reference
from mixtralkit.planning.plan import ExpertPlan, contiguous

PLAIN_BYTES = 2  # of a bfloat16
ALIASES = ("int4", "fp8")


@dataclass(frozen=True)
class Formats:
    """Of the experts, by a name or a plan, or of attention and output."""

    weights: ExpertWeights = PLAIN
    attention: ExpertWeights = PLAIN
    plan: ExpertPlan | None = None
    rounds_rows: bool = False  # of the experts

    @property
    def options(self) -> dict[str, str]:
        """Of an engine."""
        named = {"quantize": self.weights, "quantize_attention": self.attention}
        return {option: weights.name for option, weights in named.items() if not weights.is_plain}


def bench_quantised(
    prompts: Path = Path("heldout"),
    model: Path = Path("ckpts"),
    formats: tuple[str, ...] = (),
    plans: tuple[Path, ...] = (),
    attention: tuple[str, ...] = (),
    fp8_rows: bool = False,
    every: Count = 1,
    max_batch_size: int = 16,
    dtype: Dtype = "float32",
    output: Path | None = None,
) -> None:
    """Scores the model in every format.

    Args:
        prompts: a prompt set, or the name of one in configs/prompts.
        model: folder of a plain checkpoint.
        formats: names of formats; none is the checkpoint's own numbers. Left out, all, where there are neither plans
            nor attention.
        plans: plans with a precision for each expert, scored after the formats.
        attention: formats of attention and output, int8 or fp8, beside experts as they are; scored after those.
        fp8_rows: scores fp8 with rows rounded too, as GPUs multiply more than a few; last.
        every: of the questions, each of that many is asked; texts are all scored.
        max_batch_size: sequences at a time.
        dtype: of all that is not rounded, and of rows.
        output: file that takes the result as JSON.
    """
    context = RankContext.start("cpu")
    found: list[dict[str, Any]] = []
    source = open_source(EngineConfig.of(model=model).source)
    whole = read_prompts(shipped("prompts", prompts))
    records = [record for place, record in enumerate(whole) if record.is_text or place % every == 0]
    options = AnswerOptions()
    works = make_works(records, prompts, source[1], options)
    if not (formats or plans or attention or fp8_rows):
        formats = ("none", *(name for name in FORMATS if name not in ALIASES))
    cases = [(name, Formats(weights=parse_weights(None if name == "none" else name))) for name in formats]
    cases += [(path.stem, Formats(plan=ExpertPlan.load(path))) for path in plans]
    for name in attention:
        cases.append((f"attention {name}", Formats(attention=parse_weights(name, "quantize_attention"))))
    for name in ("fp8:channel", "fp8:tensor") if fp8_rows else ():
        cases.append((f"{name}, rows too", Formats(parse_weights(name), rounds_rows=True)))
    for name, case in cases:
        config = EngineConfig.of(
            model=model, max_seq_len=max(work.longest for work in works), dtype=dtype, device="cpu",
            max_batch_size=max_batch_size, plan=case.plan, **case.options,
        )  # fmt: skip
        mixtral = Mixtral.load(config, context, source)
        facts = {"format": FORMAT, "model": {"config": name}}
        with (
            tempfile.TemporaryDirectory() as folder,
            Results(context, records, Path(folder) / "run", facts) as results,
            tqdm(total=len(works), desc=name, leave=False) as bar,
            patch.object(experts, "expert_sum_reference", partial(expert_sum_reference, rounds_rows=case.rounds_rows)),
        ):
            run(mixtral, works, options, results, bar)
            measures = results.finish()
        scores = {m.metric: m for m in measures if m.group is None and m.metric in ("accuracy", "bits_per_byte")}
        found.append({"format": name, **size_and_error(model, case), **described(scores)})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        if output is not None:
            content = {
                **describe_run(context),
                "model": model.name,
                "prompts": prompts.name,
                "every": every,
                "dtype": dtype,
                "formats": found,
            }
            output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def size_and_error(model: Path, formats: Formats) -> dict[str, float]:
    """Bits of a weight of what is rounded, with all that belongs to it, and the relative error of its matrices."""
    with open_checkpoint(model) as reader:
        config = reader.config
        plan = formats.plan or contiguous(config.n_layers, config.num_experts, 1)
        own = matrix_formats(config, plan.formats_LE(formats.weights), formats.attention)
        off = size = count = held = 0.0
        for name in reader.shapes():
            weights = own.get(name.removesuffix(".weight"))
            if weights is None or is_projection(name) == formats.attention.is_plain:
                continue
            w_OK = reader.read(name).float()
            if not weights.is_plain:
                off += float((weights.quantize(w_OK).float() - w_OK).double().square().sum())
            size += float(w_OK.double().square().sum())
            count, held = count + w_OK.numel(), held + weights.bytes(*w_OK.shape, PLAIN_BYTES)
    return {"bits": round(8 * held / count, 3), "error": round((off / size) ** 0.5, 5)}


def described(scores: dict[str, Any]) -> dict[str, Any]:
    """Value and interval of each metric."""
    return {
        metric: {"value": round(m.value, 5), "interval": [round(m.low, 5), round(m.high, 5)]}
        for metric, m in sorted(scores.items())
    }


if __name__ == "__main__":
    run_tool(bench_quantised)
