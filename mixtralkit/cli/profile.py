"""``mixtralkit profile``, ``show`` and ``popularity``: which experts a prompt set uses, and what follows from that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from mixtralkit.cli.run import command
from mixtralkit.cli.running import WatchOptions, is_watched, requests_of, watched
from mixtralkit.config import EngineConfig, shipped
from mixtralkit.config.options import Natural
from mixtralkit.distributed import RankContext
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.evaluation.prompt_sets import read_prompts
from mixtralkit.mixtral import Mixtral, open_source
from mixtralkit.planning.popularity import PathPopularity, accuracy
from mixtralkit.planning.trace import RoutingTrace
from mixtralkit.whole_file import check_free, save_figure


@command
def profile(
    prompts: Path,
    output: Path,
    plot: Path | None = None,
    max_gen_len: Natural = 64,
    overwrite: bool = False,
    *,
    sampling: SamplingOptions = SamplingOptions(temperature=0.0),
    engine: EngineConfig,
) -> None:
    """Runs a prompt set, records which experts every token takes, and prints how evenly the layers use them.

    Args:
        prompts: Prompts, .jsonl (an object with "prompt" or "messages" a line) or .txt (a prompt a line), or the name
            of a set in configs/prompts.
        output: Trace to write, .npz (docs/traces.md).
        plot: Draw a heat map of the loads, layers by experts, to this .png.
        max_gen_len: Most tokens to generate for each prompt; 0 profiles the prompts alone.
        overwrite: Replace output and plot where they are there already.
    """
    context = RankContext.start(engine.limits.device)
    with context.agreed():
        if context.is_first:
            for path in (output, plot):
                check_free(path, overwrite)
        records = read_prompts(shipped("prompts", prompts))
        source = open_source(engine.source)
        requests, engine = requests_of(source, records, engine, max_gen_len, sampling)
    mixtral = Mixtral.load(engine, context, source)
    meta = {"model": engine.source.model.name, "prompts": prompts.name}
    with (
        watched(mixtral, WatchOptions(record_routing=output, overwrite=overwrite), meta),
        tqdm(total=len(requests), unit="prompt", disable=not is_watched(context)) as bar,
    ):
        for _ in mixtral.generate_many(requests):
            bar.update()
    with context.agreed():
        if context.is_first:
            _present(RoutingTrace.load(output), output, plot)
    mixtral.close()


def show(trace: Path, num_experts: int | None = None, plot: Path | None = None, overwrite: bool = False) -> None:
    """Prints how evenly a trace's layers use their experts.

    Args:
        trace: Trace, .npz or .npy of any kind that docs/traces.md lists.
        num_experts: Experts of the model, for a trace that does not say.
        plot: Draw a heat map of the loads, layers by experts, to this .png.
        overwrite: Replace the picture where it is there already.
    """
    check_free(plot, overwrite)
    _present(RoutingTrace.load(trace, num_experts), trace, plot)


def popularity(
    trace: Path,
    num_experts: int | None = None,
    path_length: int = 6,
    batch: int = 256,
    fraction: float = 0.5,
    keep: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Estimates each layer's load from the tokens' paths (Lina), and says how often it is right.

    Counts a part of the trace's sequences and tries the estimate on the rest, with the last 0, 1, 2 … layers.

    Args:
        trace: Trace, .npz or .npy of any kind that docs/traces.md lists.
        num_experts: Experts of the model, for a trace that does not say.
        path_length: Most layers of a path, up to 6.
        batch: Tokens of a batch whose load is estimated.
        fraction: Share of the tokens that is counted.
        keep: Count only so many likeliest experts of each path; left out, all.
        output: Write the profile of the counted part to this file, .npz.
        overwrite: Replace output where it is there already.
    """
    check_free(output, overwrite)
    whole = RoutingTrace.load(trace, num_experts)
    if whole.num_layers < 2:
        raise ValueError(f"{trace}: a trace of 1 layer has no paths to learn from")
    counted, tried = whole.split(fraction)
    paths = PathPopularity.fit(counted, path_length)
    print(f"{trace}: counted {counted.num_tokens:,} tokens, tried {tried.num_tokens:,} in batches of {batch}")
    print("layers looked at  batches right  tokens right   (means over layers 1 and up)")
    for length in range(path_length + 1):
        found = accuracy(paths, tried, batch, length, keep)
        batches, tokens = (float(right_L[1:].mean()) for right_L in (found.batches_L, found.tokens_L))
        print(f"{length:16}{100 * batches:14.1f}%{100 * tokens:13.1f}%")
    if output is not None:
        paths.save(output)


def _present(trace: RoutingTrace, path: Path, plot: Path | None) -> None:
    sequences = len(np.unique(trace.sequence))
    print(f"{path}: {trace.num_tokens:,} tokens of {sequences:,} sequences, {trace.num_layers} layers, "
          f"{trace.top_k} of {trace.num_experts} experts")  # fmt: skip
    print(table(trace))
    if plot is not None:
        draw_loads(trace, plot)


def table(trace: RoutingTrace) -> str:
    """Load in per cent of the choices, max/mean, mean/max, entropy and repetition, a layer a line."""
    wide = trace.num_experts > 16  # experts no longer fit on a line
    heads = [] if wide else [f"{'e' + str(e):>5}" for e in range(trace.num_experts)]
    lines = ["layer " + "".join([*heads, "  max/mean", "  mean/max", "  entropy", "  repetition"])]
    total = max(trace.num_tokens * trace.top_k, 1)
    for i, layer in enumerate(trace.statistics()):
        loads = "" if wide else "".join(f"{100 * load / total:5.1f}" for load in layer.load_E)
        lines.append(
            f"{i:5} {loads}{layer.max_over_mean:10.2f}{layer.mean_over_max:10.2f}{layer.entropy:9.2f}"
            f"{100 * layer.repetition:11.1f}%"
        )
    return "\n".join(lines)


def draw_loads(trace: RoutingTrace, path: Path) -> None:
    """A heat map of each expert's load over the layer's mean, layers by experts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install 'mixtralkit[plot]'") from None
    loads_LE = trace.loads_LE()
    relative_LE = loads_LE / np.maximum(loads_LE.mean(1, keepdims=True), 1e-9)
    layers, experts = relative_LE.shape
    figure = Figure(figsize=(min(3 + 0.55 * experts, 16), min(1.6 + 0.33 * layers, 16)), layout="constrained")
    axes = figure.add_subplot()
    most = max(2.0, float(relative_LE.max()))
    image = axes.imshow(relative_LE, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", title=f"load / mean, {trace.num_tokens:,} tokens")
    axes.set_xticks(range(0, experts, -(-experts // 16)))
    axes.set_yticks(range(0, layers, -(-layers // 32)))
    if experts <= 16:
        for layer, expert in np.ndindex(layers, experts):
            value = relative_LE[layer, expert]
            colour = "black" if value > 0.6 * most else "white"
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes)
    save_figure(figure, path, dpi=120)
