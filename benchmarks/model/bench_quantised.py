"""What fewer bits cost: bits a byte of text and answers right of the model in ckpts/, for every format of its experts.

    python -m benchmarks.model.bench_quantised --output benchmarks/results/quantised.json
    python -m benchmarks.model.bench_quantised --plans bits.json --output …    # formats of a plan

A line a format on stderr and in the file, as soon as it is known; attention, router, embedding and output stay in
float32, so that nothing but the experts' format differs. ``experts`` is the size of all experts' tensors against
bfloat16, ``error`` the root of their mean squared error over that of the weights. docs/quantised.md has the table.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.machine import describe_run
from mixtralkit.checkpoint import open_checkpoint
from mixtralkit.cli.run import run_tool
from mixtralkit.config import EngineConfig, shipped
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.evaluation.prompt_sets import read_prompts
from mixtralkit.evaluation.run import Results, run
from mixtralkit.evaluation.run_record import FORMAT
from mixtralkit.evaluation.work import AnswerOptions, make_works
from mixtralkit.layout import expert_of
from mixtralkit.mixtral import Mixtral, open_source
from mixtralkit.moe.weights import FORMATS, ExpertWeights, parse_weights
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.plan import ExpertPlan, contiguous

PLAIN_BYTES = 2  # of a bfloat16
ALIASES = ("int4", "fp8")


def bench_quantised(
    prompts: Path = Path("heldout"),
    model: Path = Path("ckpts"),
    formats: tuple[str, ...] = (),
    plans: tuple[Path, ...] = (),
    every: Count = 1,
    max_batch_size: int = 16,
    output: Path | None = None,
) -> None:
    """Scores the model in every format.

    Args:
        prompts: a prompt set, or the name of one in configs/prompts.
        model: folder of a plain checkpoint.
        formats: names of formats; none is the checkpoint's own numbers. Left out, all, where no plans are given.
        plans: plans with a precision for each expert, scored after the formats.
        every: of the questions, each of that many is asked; texts are all scored.
        max_batch_size: sequences at a time.
        output: file that takes the result as JSON.
    """
    context = RankContext.start("cpu")
    found: list[dict[str, Any]] = []
    source = open_source(EngineConfig.of(model=model).source)
    whole = read_prompts(shipped("prompts", prompts))
    records = [record for place, record in enumerate(whole) if record.is_text or place % every == 0]
    options = AnswerOptions()
    works = make_works(records, prompts, source[1], options)
    if not (formats or plans):
        formats = ("none", *(name for name in FORMATS if name not in ALIASES))
    for name in (*formats, *plans):
        plan = ExpertPlan.load(name) if isinstance(name, Path) else None
        name = name.stem if isinstance(name, Path) else name
        weights = parse_weights(None if plan is not None or name == "none" else name)
        config = EngineConfig.of(
            model=model, max_seq_len=max(work.longest for work in works), dtype="float32", device="cpu",
            max_batch_size=max_batch_size, quantize=None if weights.is_plain else weights.name,
            plan=plan,
        )  # fmt: skip
        mixtral = Mixtral.load(config, context, source)
        facts = {"format": FORMAT, "model": {"config": name}}
        with (
            tempfile.TemporaryDirectory() as folder,
            Results(context, records, Path(folder) / "run", facts) as results,
            tqdm(total=len(works), desc=name, leave=False) as bar,
        ):
            run(mixtral, works, options, results, bar)
            measures = results.finish()
        scores = {m.metric: m for m in measures if m.group is None and m.metric in ("accuracy", "bits_per_byte")}
        found.append({"format": name, **size_and_error(model, weights, plan), **described(scores)})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        if output is not None:
            content = {
                **describe_run(context),
                "model": model.name,
                "prompts": prompts.name,
                "every": every,
                "formats": found,
            }
            output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def size_and_error(model: Path, weights: ExpertWeights, plan: ExpertPlan | None = None) -> dict[str, float]:
    """Bits a weight of the experts, with all that belongs to them, and the relative error of their matrices."""
    with open_checkpoint(model) as reader:
        config = reader.config
        plan = plan or contiguous(config.n_layers, config.num_experts, 1)
        formats_LE, shape = plan.formats_LE(weights), ModelShape.of(config, PLAIN_BYTES, weights)
        bits = 8 * float(shape.expert_bytes_LE(plan).mean()) / (3 * config.dim * config.hidden_dim)
        off = size = 0.0
        for name in reader.shapes():
            if ".experts." in name:
                w_OK, (layer, expert) = reader.read(name).float(), expert_of(name)
                if not (own := formats_LE[layer][expert]).is_plain:
                    off += float((own.quantize(w_OK).float() - w_OK).double().square().sum())
                size += float(w_OK.double().square().sum())
    return {"bits": round(bits, 3), "error": round((off / size) ** 0.5, 5)}


def described(scores: dict[str, Any]) -> dict[str, Any]:
    """Value and interval of each metric."""
    return {
        metric: {"value": round(m.value, 5), "interval": [round(m.low, 5), round(m.high, 5)]}
        for metric, m in sorted(scores.items())
    }


if __name__ == "__main__":
    run_tool(bench_quantised)
