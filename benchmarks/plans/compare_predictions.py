"""The time model against what was measured: predicted and measured milliseconds, and their differences.

    python -m benchmarks.plans.compare_predictions benchmarks/results/model-*.json --plot scatter.png

Whole models are lines of bench_model.py, layers alone those of bench_moe_layer.py. Predictions take what a line says
of model, ranks, dispatcher, plan, rows and routing, and nothing that it measured: unless its routing is skewed, every
expert is as likely as another, as random weights make it. docs/cost-model.md has the formulas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mixtralkit.cli.run import run_tool
from mixtralkit.config import ModelConfig, parse_dtype
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.dispatchers import Surroundings, choose_dispatcher
from mixtralkit.planning.hardware import Hardware, nearest
from mixtralkit.planning.policies.registry import named_plan
from mixtralkit.planning.replay import PHASES, Execution
from mixtralkit.planning.replicas import SMALL_BATCH_CHOICES
from mixtralkit.planning.simulate import sample_routing, simulate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MACHINES = tuple(CONFIGS / "hardware" / f"{name}.json" for name in ("h200x2", "h200x4"))
MODELS, LAYERS = ("decode", "prefill"), ("moe_layer_over_ranks",)
# Names of bench_moe_layer.py whose layers are modelled: plans as they are, and parts of every expert.
LAYER = re.compile(r"(contiguous|hot_cold|balanced|everywhere)(\+(exact|static|symmetric))?|tensor_parallel")
SAMPLED_TOKENS, MOST_STEPS = 512, 8  # of a model's steps
LAYER_SAMPLES = 4  # the inputs of a round of bench_moe_layer.py


@dataclass(frozen=True)
class Compared:
    """One line: what it is, which of them go together in the picture, and its milliseconds.

    ``place`` is the row and the column of a layer's line in their table; None for a whole model's.
    """

    what: str
    group: str
    dispatcher: str
    measured_ms: float
    predicted_ms: float
    place: tuple[str, str] | None = None

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


def compare_predictions(
    results: tuple[Path, ...],
    hardware: tuple[Path, ...] = MACHINES,
    leave_out: str = "not this code's time",
    plot: Path | None = None,
) -> None:
    """Prints a table of lines, one of groups, the median and the worst error; the last line is JSON.

    Args:
        results: files of bench_model.py or bench_moe_layer.py: lines of JSON, or an object with them under "runs".
        hardware: machines to predict for; a line takes the one measured among the nearest number of ranks.
        leave_out: lines whose note has these words are named and not counted.
        plot: picture of predicted against measured times, .png.
    """
    machines = [Hardware.load(path) for path in hardware]
    lines = [line for path in results for line in read_lines(path) if is_modelled(line)]
    left_out = [line for line in lines if leave_out in line.get("note", "")]
    compared = [compare(line, nearest(machines, line["ranks"])) for line in lines if line not in left_out]
    if not compared:
        raise ValueError("results have no line of decode or prefill, or of a layer in a dispatcher that is modelled")
    print(table([one for one in compared if one.place is None]))
    print(table_of_layers([one for one in compared if one.place is not None]))
    for line in left_out:
        print(f"left out: {describe(line)}, {dispatcher_of(line)} ({line['note']})")
    print(table_of_groups(compared))
    errors = [abs(one.error) for one in compared]
    found = {"median_error": round(median(errors), 4), "worst_error": round(max(errors), 4)}
    print(json.dumps({"hardware": [machine.name for machine in machines], "compared": len(compared), **found}))
    if plot is not None:
        draw(compared, plot)


def is_modelled(line: dict[str, Any]) -> bool:
    """Whether the line is one of a model's steps, or of a layer, that is nothing but a plan and a dispatcher.

    Shadows, capacities, managers, schedules, two phases and coherent rows are not predicted here.
    """
    if line.get("measurement") in MODELS:
        return not line.get("with")
    return line.get("measurement") in LAYERS and "ms" in line and LAYER.fullmatch(line["variant"]) is not None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file; ValueError names it."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()] if _is_lines(text) else json.loads(text)["runs"]
        return [line for line in lines if isinstance(line, dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of measurements ({error})") from None


def _is_lines(text: str) -> bool:
    """Whether the first line is an object of its own."""
    try:
        return "measurement" in json.loads(text.partition("\n")[0])
    except ValueError:
        return False


def compare(line: dict[str, Any], hardware: Hardware) -> Compared:
    """Predicts a line's time."""
    if line["measurement"] in LAYERS:
        return compare_layer(line, hardware)
    config = replace(ModelConfig.from_file(CONFIGS / "models" / f"{line['model']}.json"), n_layers=line["layers"])
    decodes = line["measurement"] == "decode"
    batch, ranks = line["batch"], line["ranks"]
    span = 1 if decodes else line["prompt_len"]
    context = line["prompt_len"] + line["new_tokens"] // 2 if decodes else 0
    dispatcher = dispatcher_of(line)
    tokens = batch * span
    execution = Execution(
        dispatcher, step_tokens=tokens, context=context, span=span, exchange_rows=line.get("symmetric_rows") or None,
        small_choices=line.get("small_batch_choices", SMALL_BATCH_CHOICES),
    )  # fmt: skip
    loads_LE = np.ones((config.n_layers, config.num_experts))
    plan = named_plan(line.get("plan", {}).get("name", "contiguous"), loads_LE, ranks)
    steps = min(MOST_STEPS, max(2, SAMPLED_TOKENS // tokens))
    sample = sample_routing(loads_LE, steps * tokens, config.num_experts_per_tok)
    shape = ModelShape.of(config, parse_dtype(line["dtype"]).itemsize)
    seconds = simulate(plan, sample, shape, hardware, execution).step_s
    measured_ms = line["ms_per_step"] if decodes else 1e3 * line["time_to_first_token_s"]
    group = f"{line['ranks']} rank{'s' * (ranks > 1)}, {line['measurement']}, {dispatcher}"
    return Compared(describe(line), group, dispatcher, measured_ms, 1e3 * float(seconds))


def compare_layer(line: dict[str, Any], hardware: Hardware) -> Compared:
    """Predicts the time of one layer, without its attention."""
    ranks, dispatcher = line["ranks"], dispatcher_of(line)
    shape = shape_of_layer(line)
    loads_LE = loads_of(line["routing"], shape)
    plan = named_plan(plan_of_layer(line), loads_LE, ranks)
    execution = Execution(dispatcher)
    tokens = line["tokens_per_rank"] * ranks
    samples = [sample_routing(loads_LE, tokens, shape.top_k, seed) for seed in range(LAYER_SAMPLES)]
    phases = [simulate(plan, sample, shape, hardware, execution).phases_LP for sample in samples]
    attention = PHASES.index("attention")
    seconds = np.mean([found_LP.sum() - found_LP[:, attention].sum() for found_LP in phases])
    place = (line["variant"], f"{line['routing']}, {line['tokens_per_rank']}")
    group = f"{ranks} ranks, layer, {dispatcher}"
    return Compared(describe(line), group, dispatcher, line["ms"], 1e3 * float(seconds), place)


def shape_of_layer(line: dict[str, Any]) -> ModelShape:
    """Sizes of a line's layer; it has next to no attention."""
    return ModelShape(
        line["dim"], line["hidden"], line["num_experts"], line["top_k"], heads=1, kv_heads=1, head_dim=1, vocab=1,
        data_bytes=parse_dtype(line["dtype"]).itemsize,
    )  # fmt: skip


def loads_of(routing: str, shape: ModelShape) -> np.ndarray:
    """Loads [1, E] of a layer's routing: uniform, or skew:SHARE, of all choices the part that is expert 0's."""
    kind, _, share = routing.partition(":")
    if kind not in ("uniform", "skew"):
        raise ValueError(f"routing ({routing!r}) must be uniform or skew:SHARE")
    loads_LE = np.ones((1, shape.num_experts))
    if kind == "skew":
        loads_LE[:, 0] = float(share) / (1 - float(share)) * (shape.num_experts - 1)
    return loads_LE


def plan_of_layer(line: dict[str, Any]) -> str:
    """Name of the plan; bench_moe_layer.py's balanced one has a slot a rank more than the experts need."""
    plan = line["variant"].partition("+")[0]
    if plan == "balanced":
        slots = min(line["num_experts"], -(-line["num_experts"] // line["ranks"]) + 1)
        return f"balanced+{slots * line['ranks'] - line['num_experts']}"
    return "contiguous" if plan == "tensor_parallel" else plan


def dispatcher_of(line: dict[str, Any]) -> str:
    """The dispatcher of a line's steps: what the line says, else what ``choose_dispatcher`` says of its layout."""
    if line["measurement"] in LAYERS:
        return line["dispatcher"]
    if "dispatchers" in line:
        return line["dispatchers"][line["measurement"]]
    symmetric = line.get("symmetric_rows") != 0
    here = Surroundings(line["attention"], line["experts"], line["ranks"], symmetric=symmetric)
    return choose_dispatcher(here, rows_known=True, decode=line["measurement"] == "decode")


def describe(line: dict[str, Any]) -> str:
    """Ranks, what was run, and the plan, in a few words."""
    if line["measurement"] in LAYERS:
        return (
            f"{line['ranks']} ranks, layer, {line['tokens_per_rank']} rows a rank, {line['routing']}, {line['variant']}"
        )
    if line["measurement"] == "decode":
        work = f"decode {line['batch']}, {line['prompt_len']} + {line['new_tokens']} tokens"
    else:
        work = f"prefill {line['batch']} × {line['prompt_len']}"
    plan = line.get("plan", {}).get("name", "")
    return f"{line['ranks']} rank{'s' * (line['ranks'] > 1)}, {work}{plan and f', {plan}'}"


def table(compared: Sequence[Compared]) -> str:
    """Markdown, a row a line."""
    rows = ["| | dispatcher | measured, ms | predicted, ms | difference |", "|---|---|---|---|---|"]
    rows += [
        f"| {one.what} | {one.dispatcher} | {one.measured_ms:.2f} | {one.predicted_ms:.2f} | {one.error:+.1%} |"
        for one in compared
    ]
    return "\n".join([*rows, ""]) if compared else ""


def table_of_layers(compared: Sequence[Compared]) -> str:
    """Markdown, a row a variant, a column for each routing and number of rows: measured ms and the difference."""
    if not compared:
        return ""
    variants, cases = ({one.place[part]: None for one in compared} for part in (0, 1))
    cases = sorted(cases, key=lambda case: (case.partition(", ")[0] != "uniform", int(case.split()[-1])))
    cells = {one.place: f"{one.measured_ms:.2f} ({one.error:+.0%})" for one in compared}
    rows = [f"| | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    rows += [f"| {name} | {' | '.join(cells.get((name, case), '') for case in cases)} |" for name in variants]
    return "\n".join([*rows, ""])


def table_of_groups(compared: Sequence[Compared]) -> str:
    """Markdown: lines, median and worst error of each group."""
    rows = ["| | lines | median | worst |", "|---|---|---|---|"]
    for group in dict.fromkeys(one.group for one in compared):
        errors = [one.error for one in compared if one.group == group]
        worst = max(errors, key=abs)
        rows.append(f"| {group} | {len(errors)} | {median(map(abs, errors)):.1%} | {worst:+.1%} |")
    return "\n".join([*rows, ""])


def draw(compared: Sequence[Compared], path: Path) -> None:
    """Predicted against measured times, both logarithmic, with the lines of 25% above and below."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])
    times = [value for one in compared for value in (one.measured_ms, one.predicted_ms)]
    ends = np.array([min(times) / 1.5, max(times) * 1.5])
    axes.fill_between(ends, ends * 0.75, ends * 1.25, color="0.92", label="within 25%")
    axes.plot(ends, ends, color="0.6", linewidth=1)
    groups = sorted({one.group for one in compared})
    for marker, group in zip("osD^v<>Px*hp" * len(groups), groups, strict=False):
        times_ms = [(one.measured_ms, one.predicted_ms) for one in compared if one.group == group]
        axes.scatter(*zip(*times_ms, strict=True), s=28, marker=marker, label=group)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_aspect("equal")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run_tool(compare_predictions)
