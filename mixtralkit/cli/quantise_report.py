"""``mixtralkit quantise-report``: what each expert loses in each format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixtralkit.cli.run import command
from mixtralkit.cli.running import is_watched, requests_of
from mixtralkit.config import CacheOptions, EngineConfig, LimitOptions, SourceOptions, shipped
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.evaluation.prompt_sets import read_prompts
from mixtralkit.evaluation.rounding import measure_outputs, measure_weights
from mixtralkit.mixtral import Mixtral, open_source
from mixtralkit.moe.weights import FORMATS
from mixtralkit.planning.precision import ErrorTable, loads_of
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import check_free

_ALL = tuple(dict.fromkeys(weights.name for weights in FORMATS.values()))
_WORST = 5


@command
def quantise_report(
    output: Path | None = None,
    trace: Path | None = None,
    prompts: Path | None = None,
    formats: tuple[str, ...] = _ALL,
    rows: Count = 256,
    plot: Path | None = None,
    overwrite: bool = False,
    *,
    source: SourceOptions,
    cache: CacheOptions,
    limits: LimitOptions,
) -> None:
    """Measures every expert's error in every format, weighed by how often and how heavily it is chosen.

    Args:
        output: File for the table: .json, which policy bits reads, or .csv.
        trace: Routing trace (docs/traces.md) that says how often and how heavily experts are chosen; left out, all
            alike.
        prompts: Measure what experts make of the rows of these prompts instead of their weights: .jsonl, .txt or the
            name of a set in configs/prompts. How often experts are chosen is then theirs.
        formats: Formats to try (docs/quantised.md).
        rows: With prompts: rows of each expert that are tried, drawn from all that come.
        plot: Draw errors over bits, by layer and expert, to this .png.
        overwrite: Replace output and plot where they are there already.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"formats ({name!r}) must be of {', '.join(FORMATS)}")
    if trace is not None and prompts is not None:
        raise ValueError(f"trace ({trace}) cannot be given with prompts, whose own routing counts")
    for path in (output, plot):
        check_free(path, overwrite)
    context = RankContext.start(limits.device)
    if context.world_size > 1:
        raise ValueError(f"quantise-report runs on one rank, not on {context.world_size}")
    opened = open_source(source)
    reader, watched = opened[0], is_watched(context)
    if prompts is None:
        routing = None if trace is None else RoutingTrace.load(trace, reader.config.num_experts)
        table = measure_weights(reader, formats, loads_of(routing, reader.config), context.device, watched)
    else:
        records = read_prompts(shipped("prompts", prompts))
        engine = EngineConfig(source=source, cache=cache, limits=limits).but(cuda_graphs=False)
        requests, engine = requests_of(opened, records, engine, 0, SamplingOptions(temperature=0.0))
        mixtral = Mixtral.load(engine, context, opened, watched)
        table = measure_outputs(mixtral, requests, formats, rows, watched)
        mixtral.close()
    if output is not None:
        table.save(output)
    if plot is not None:
        from mixtralkit.planning.precision_plot import plot_errors

        plot_errors(table, plot)
    print(describe(table))


def describe(table: ErrorTable) -> str:
    """Formats by bits with errors and harm of all experts; the experts that lose most in the smallest format."""
    lines = [f"errors of {table.kind}; harm is the mean square of what a layer's sum is off by, all layers together"]
    lines.append(f"{'format':<15}{'bits':>8}{'median error':>14}{'largest':>9}  {'of layer, expert':<18}{'harm':>12}")
    order = np.argsort(table.bits, kind="stable")
    for number in order:
        error_LE = table.error[:, :, number]
        layer, expert = np.unravel_index(error_LE.argmax(), error_LE.shape)
        lines.append(
            f"{table.formats[number]:<15}{table.bits[number]:>8.3f}{np.median(error_LE):>14.5f}{error_LE.max():>9.5f}  "
            f"{f'{layer}, {expert}':<18}{table.harm[:, :, number].sum():>12.3e}"
        )
    smallest = order[0]
    harm_LE = table.harm[:, :, smallest]
    lines.append(f"most harm in {table.formats[smallest]}:")
    for place in np.argsort(-harm_LE, axis=None)[:_WORST]:
        layer, expert = np.unravel_index(place, harm_LE.shape)
        lines.append(
            f"  layer {layer}, expert {expert}: {harm_LE[layer, expert] / max(harm_LE.sum(), 1e-300):.1%} of it, "
            f"load {table.load[layer, expert]:.1%}, gate weight {table.gate[layer, expert]:.3f}, "
            f"error {table.error[layer, expert, smallest]:.5f}"
        )
    return "\n".join(lines)
