"""The time model against what bench_model.py measured: predicted and measured milliseconds, and their differences.

    python benchmarks/compare_predictions.py benchmarks/results/model-h200.json \
        benchmarks/results/model-tp4-h200x4.json --hardware configs/hardware/h200x4.json --plot scatter.png

Predictions take what a line says of model, ranks, layout, plan and sequences, and nothing that it measured: every
expert is as likely as another, as random weights make it. docs/cost-model.md has the formulas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mixtralkit.cli import run_tool
from mixtralkit.config import ModelConfig, parse_dtype
from mixtralkit.planning.choose import sample_steps
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.policies.named import named_plan
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import simulate

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MEASUREMENTS = ("decode", "prefill")


@dataclass(frozen=True)
class Compared:
    """One line: what it is, which of them go together in the picture, and its milliseconds."""

    what: str
    group: str
    layout: str
    measured_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


def compare_predictions(
    results: tuple[Path, ...],
    hardware: Path = CONFIGS / "hardware" / "h200x4.json",
    leave_out: str = "not this code's time",
    plot: Path | None = None,
) -> None:
    """Prints a table, the median and the worst error; the last line is JSON.

    Args:
        results: files of bench_model.py: lines of JSON, or an object with them under "runs".
        hardware: machine to predict for.
        leave_out: lines whose note has these words are named and not counted.
        plot: picture of predicted against measured times, .png.
    """
    machine = Hardware.load(hardware)
    lines = [line for path in results for line in read_lines(path) if line.get("measurement") in MEASUREMENTS]
    left_out = [line for line in lines if leave_out in line.get("note", "")]
    compared = [compare(line, machine) for line in lines if line not in left_out]
    if not compared:
        raise ValueError("results have no line of decode or prefill to compare")
    print(table(compared))
    for line in left_out:
        print(f"left out: {describe(line)}, {layout_of(line)} ({line['note']})")
    errors = [abs(one.error) for one in compared]
    found = {"median_error": round(median(errors), 4), "worst_error": round(max(errors), 4)}
    print(json.dumps({"hardware": machine.name, "compared": len(compared), **found}))
    if plot is not None:
        draw(compared, plot)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file; ValueError names it."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()] if _is_lines(text) else json.loads(text)["runs"]
        return [line for line in lines if isinstance(line, dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of bench_model.py ({error})") from None


def _is_lines(text: str) -> bool:
    """Whether the first line is an object of its own."""
    try:
        return "measurement" in json.loads(text.partition("\n")[0])
    except ValueError:
        return False


def compare(line: dict[str, Any], hardware: Hardware) -> Compared:
    """Predicts a line's time."""
    config = replace(ModelConfig.from_file(CONFIGS / "models" / f"{line['model']}.json"), n_layers=line["layers"])
    decodes = line["measurement"] == "decode"
    batch, ranks = line["batch"], line["ranks"]
    span = 1 if decodes else line["prompt_len"]
    context = line["prompt_len"] + line["new_tokens"] // 2 if decodes else 0
    layout = layout_of(line)
    few = line.get("few_choices", 0)  # lines without it are older than the rule
    execution = Execution(layout, context=context, span=span, fused=layout != "static", few_choices=few)
    loads_LE = np.ones((config.n_layers, config.num_experts))
    plan = named_plan(line.get("plan", {}).get("name", "contiguous"), loads_LE, ranks)
    samples = sample_steps(loads_LE, batch * span, config.num_experts_per_tok)
    shape = ModelShape.of(config, parse_dtype(line["dtype"]).itemsize)
    seconds = np.mean([simulate(plan, sample, shape, hardware, execution).step_s for sample in samples])
    measured_ms = line["ms_per_step"] if decodes else 1e3 * line["time_to_first_token_s"]
    group = f"{line['ranks']} rank{'s' * (ranks > 1)}, {line['measurement']}, {layout}"
    return Compared(describe(line), group, layout, measured_ms, 1e3 * float(seconds))


def layout_of(line: dict[str, Any]) -> str:
    """The layout that a line's steps had, as ``replay.Execution`` names it."""
    if line["ranks"] == 1 or (line["attention"], line["experts"]) == ("tp", "tp"):
        return "tp"
    if line["attention"] == "tp":
        return "tp_ep"
    if line["experts"] == "tp":
        raise ValueError("attention dp with experts tp is not modelled")
    if line["measurement"] == "prefill":
        return "ep"
    return "static" if line.get("peer_rows", 0) == 0 else "peer"


def describe(line: dict[str, Any]) -> str:
    """Ranks, what was run, and the plan, in a few words."""
    if line["measurement"] == "decode":
        work = f"decode {line['batch']}, {line['prompt_len']} + {line['new_tokens']} tokens"
    else:
        work = f"prefill {line['batch']} × {line['prompt_len']}"
    plan = line.get("plan", {}).get("name", "")
    return f"{line['ranks']} rank{'s' * (line['ranks'] > 1)}, {work}{plan and f', {plan}'}"


def table(compared: Sequence[Compared]) -> str:
    """Markdown."""
    rows = ["| | layout | measured, ms | predicted, ms | difference |", "|---|---|---|---|---|"]
    rows += [
        f"| {one.what} | {one.layout} | {one.measured_ms:.2f} | {one.predicted_ms:.2f} | {one.error:+.1%} |"
        for one in compared
    ]
    errors = [abs(one.error) for one in compared]
    return "\n".join([*rows, "", f"{len(compared)} lines: median error {median(errors):.1%}, worst {max(errors):.1%}"])


def draw(compared: Sequence[Compared], path: Path) -> None:
    """Predicted against measured times, both logarithmic, with the lines of 25% above and below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    times = [value for one in compared for value in (one.measured_ms, one.predicted_ms)]
    ends = np.array([min(times) / 1.5, max(times) * 1.5])
    axes.fill_between(ends, ends * 0.75, ends * 1.25, color="0.92", label="within 25%")
    axes.plot(ends, ends, color="0.6", linewidth=1)
    groups = sorted({one.group for one in compared})
    for marker, group in zip("osD^v<>Px*" * len(groups), groups, strict=False):
        times_ms = [(one.measured_ms, one.predicted_ms) for one in compared if one.group == group]
        axes.scatter(*zip(*times_ms, strict=True), s=28, marker=marker, label=group)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_aspect("equal")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run_tool(compare_predictions)
