"""Pages quote benchmarks/results as it is: tables of README and docs against the JSON that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.host_memory import plot_host_memory as host_memory
from mixtralkit.planning.precision import ErrorTable

ROOT = Path(__file__).resolve().parent.parent
Table = dict[str, list[str]]  # first cell → the others, without what stands in the head


def runs(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["runs"]


def table(page: str, head: str) -> Table:
    """The rows of the table whose head begins so; marks of code are left out."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head))
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip().replace("`", "") for cell in line.strip("|").split("|"))
        found[first] = cells
    return found


def rate(line: dict) -> str:
    return f"{line['tokens_per_s']:,.0f}"


def rates(name: str, attention: str, plan: str = "contiguous", extras: tuple[str, ...] = ()) -> list[str]:
    """Tokens a second at 1, 8, 64 and 256 sequences and of prompts, and GB at 256, as pages write them."""
    lines = [line for line in runs(name) if line["measurement"] in ("decode", "prefill")]
    lines = [
        line for line in lines
        if (line["attention"], line["plan"]["name"], tuple(line["with"])) == (attention, plan, extras)
    ][:5]  # fmt: skip
    assert [line["batch"] for line in lines] == [1, 8, 64, 256, 8]
    return [*map(rate, lines), f"{lines[3]['peak_memory_gb']:.1f}"]


def test_readme():
    rows = table("README.md", "| | one H200 |")
    assert list(rows) == ["1 sequence", "8", "64", "256", "prefill 8 × 2048"]
    columns = list(zip(*rows.values(), strict=True))
    wanted = [rates("model-h200", "tp"), rates("model-plans-h200x2", "tp"), rates("model-plans-h200x2", "dp")]
    assert [list(columns[place]) for place in (0, 2, 3)] == [column[:5] for column in wanted]


def test_one_gpu():
    lines = [line for line in runs("model-h200") if line["measurement"] in ("decode", "prefill")]
    rows = list(table("docs/performance.md", "| tokens/s | ours |").values())
    assert [cells[0] for cells in rows] == [f"{lines[0]['tokens_per_s']:.1f}", *map(rate, lines[1:])]
    assert [cells[1] for cells in rows] == [f"{line['share_of_bound']:.0%}" for line in lines]
    bounds = table("docs/performance.md", "| sequences | experts, GB |")
    for line in lines[:4]:
        *sizes, bound_ms, most = bounds[str(line["batch"])]
        parts = line["gb_per_step"]
        assert sizes == [f"{parts['experts']:.1f}", f"{parts['linear']:.2f}", f"{parts['attention']:.2f}"]
        assert float(bound_ms) == pytest.approx(line["bound_ms"], rel=3e-3)
        assert float(most.replace(",", "")) == pytest.approx(1e3 * line["batch"] / line["bound_ms"], rel=3e-3)
    start = next(line for line in runs("model-h200") if line["measurement"] == "start")
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert re.search(r"decoding at batch 1: ([\d.]+) s", page)[1] == f"{start['decoding_s']:.1f}"


def test_kernels_alone():
    times = {
        (line["tokens"], line["variant"]): line
        for line in runs("moe-kernels-h200")
        if line["hidden"] == 14336 and line["routing"] == "uniform"
    }
    rows = table("docs/performance.md", "| rows | ours, ms | bound, ms |")
    assert {tokens for tokens, _ in times} == set(map(int, rows))
    for rows_text, (ours, bound, others) in rows.items():
        kernels, grouped = (times[int(rows_text), variant] for variant in ("kernels", "grouped_mm"))
        for text, ms in ((ours, kernels["ms"]), (bound, kernels["bound_ms"]), (others, grouped["ms"])):
            assert float(text) == pytest.approx(ms, abs=0.51 * 10 ** -len(text.partition(".")[2]))


def test_plans_over_two_gpus():
    rows = table("docs/expert-parallel.md", "| | 1 | 8 | 64 | 256 |")
    of = {
        "dp, ep, contiguous": ("dp",), "… with shadows": ("dp", "contiguous", ("shadow",)),
        "dp, ep, hot_cold": ("dp", "hot_cold+1"),
        "… with a cold capacity of 0.5": ("dp", "hot_cold+1", ("capacity0.5",)),
        "dp, ep, balanced+2": ("dp", "balanced+2"), "dp, ep, everywhere": ("dp", "everywhere"), "tp, tp": ("tp",),
    }  # fmt: skip
    assert rows == {name: rates("model-plans-h200x2", *what) for name, what in of.items()}


@pytest.mark.parametrize(
    ("page", "head", "name", "counts", "variants"),
    [
        ("docs/expert-parallel.md", "| rows a rank | 16 | skewed | 256 |", "moe-layer-h200x2", (16, 256, 1024), None),
        (
            "docs/smart-schedule.md", "| rows a rank | 16 | skewed | 64 |", "moe-layer-exact-h200x2",
            (16, 64, 1024, 4096), {"exact exchange": "contiguous+exact", "in two parts": "contiguous+schedule"},
        ),
    ],
)  # fmt: skip
def test_layers_over_two_gpus(page, head, name, counts, variants):
    times = {(line["variant"], line["tokens_per_rank"], line["routing"]): line for line in runs(name)}
    rows = table(page, head)
    bounds = rows.pop("bound", None)
    cases = [(count, routing) for count in counts for routing in ("uniform", "skew:0.5")]
    for first, cells in rows.items():
        variant = first if variants is None else variants[first]
        assert cells == [f"{times[(variant, *case)]['ms']:.2f}" for case in cases], first
    if bounds is not None:
        assert bounds == [f"{times[('contiguous', *case)]['bound_ms']:.2f}" for case in cases]
        assert len(rows) == len({variant for variant, *_ in times})


def test_two_phase():
    lines = json.loads((ROOT / "benchmarks/results/two-phase.json").read_text())["results"]
    lines = [line for line in lines if line["kind"] == "two_phase" and not line.get("timed")]

    def near(text: str, share: float) -> bool:
        return abs(float(text) - 100 * share) <= 0.51

    rights = table("docs/two-phase.md", "| estimates right, % |")
    for trace, cells in rights.items():
        found = {line["path_length"]: line["right"] for line in lines if line["trace"] == trace}
        assert len(cells) == len(found) == 7
        assert all(near(cell, found[length]) for length, cell in enumerate(cells)), trace
    for first, cells in table("docs/two-phase.md", "| corrections, % |").items():
        trace, length = re.fullmatch(r"(\w+), l = (\d)", first).groups()
        found = {
            line["threshold"]: line["corrected"]
            for line in lines
            if (line["trace"], line["path_length"]) == (trace, int(length))
        }
        assert all(
            near(cell, found[threshold]) for cell, threshold in zip(cells, (None, 0.05, 0.1, 0.15, 0.2), strict=True)
        ), first


def test_experts_in_fewer_bits():
    found = table("docs/quantised.md", "| | 1 | 8 | 64 | 256 | prefill")
    for row, name in (("int8", "int8"), ("fp8", "fp8"), ("int4:128", "int4:128")):
        lines = [line for line in runs("model-quantised-h200") if line.get("quantize") == name]
        wanted = [rate(line) for line in lines if line["measurement"] in ("decode", "prefill")]
        assert [cell for cell in found[row] if cell] == wanted, row
    plain = [rate(line) for line in runs("model-h200") if line["measurement"] in ("decode", "prefill")]
    assert found["bfloat16 ([performance](performance.md))"] == plain


def test_what_fewer_bits_cost():
    files = [
        ROOT / f"benchmarks/results/{name}.json" for name in ("quantised", "quantised-attention", "quantised-fp8-rows")
    ]
    lines = {line["format"]: line for file in files for line in json.loads(file.read_text())["formats"]}
    found = table("docs/quantised.md", "| format | bits a weight here")
    assert len(found) == len(lines)
    for row, cells in found.items():
        line = lines[row.replace("float32", "none").replace("attention and output", "attention").replace("`", "")]
        right = line["accuracy"]
        assert row == "float32" or cells[0] == f"{line['bits']:g}", row
        assert cells[1:3] == [f"{line['error']:.4f}", f"{line['bits_per_byte']['value']:.4f}"], row
        assert cells[3] == "{:.2f} ({:.2f} to {:.2f})".format(right["value"], *right["interval"]), row


def test_what_experts_lose():
    report = ErrorTable.load_from(ROOT / "benchmarks/results/quantise-report.json")
    found = table("docs/quantised.md", "| format | bits | median error")
    assert len(found) == 7
    for row, cells in found.items():
        number = report.formats.index(row.strip("`"))
        error_LE = report.error[:, :, number]
        wanted = (np.median(error_LE), error_LE.max())
        assert cells[1:3] == [f"{value:.3f}" for value in wanted], row
        assert cells[3] == f"{report.harm[:, :, number].sum():.4f}", row
    page = (ROOT / "docs/quantised.md").read_text(encoding="utf-8")
    harm_LE = report.harm[:, :, report.formats.index("int4:64")]
    assert f"expert 6 of that layer does most harm, {harm_LE[0, 6] / harm_LE.sum():.1%} of all" in page
    assert harm_LE.argmax() == 6


def test_formats_side_by_side():
    lines = {
        line["format"]: line
        for line in json.loads((ROOT / "benchmarks/results/quantised-bits.json").read_text())["formats"]
    }
    plain = {
        line["format"]: line for line in json.loads((ROOT / "benchmarks/results/quantised.json").read_text())["formats"]
    }
    for row, cells in table("docs/quantised.md", "| bits a weight | one format").items():
        assert float(row) == plain[cells[0].strip("`")]["bits"]
        size = row.replace(".", "").ljust(4, "0")
        found = [plain[cells[0].strip("`")], lines[f"bits-{size}"], lines.get(f"zeros-{size}")]
        assert cells[1:] == ["" if one is None else f"{one['bits_per_byte']['value']:.4f}" for one in found]
        assert all(one is None or one["bits"] <= float(row) + 0.001 for one in found)


def test_tiers_by_the_simulator():
    budgets = json.loads((ROOT / "benchmarks/results/tiers-simulated.json").read_text())["budgets"]
    rules = ("static", "lru", "lru/layer", "frequency", "prefetch", "belady")
    for row, cells in table("docs/host-memory.md", "| GB | experts there, of 256").items():
        of = budgets[row]
        assert cells[0] == str(of["residents"])
        assert cells[1:] == [
            f"{of[rule]['hit_rate']:.0%}, {of[rule]['tokens_per_s']:.0f} / {1 / of[rule]['split_step_s']:.0f}"
            for rule in rules
        ]


def test_serving():
    lines = {f"{line['measurement']} {line.get('quantize') or ''}".strip(): line for line in runs("serving-h200")}
    rows = table("docs/serving.md", "| output tokens a second |")
    named = ["fixed", "fixed fp8", "equal", "uniform"]
    wanted = [rate(lines["single"]), *(f"{lines[name]['output_tokens_per_second']:,.0f}" for name in named)]
    assert [cells[0] for cells in rows.values()] == wanted
    page, mixed = (ROOT / "docs/serving.md").read_text(encoding="utf-8"), lines["mixed"]
    for ms in (mixed["decode_ms"], mixed["chunk_ms"], mixed["both_ms"]):
        assert f"{ms:.1f} ms" in page
    text, come = " ".join(page.split()), lines["poisson"]
    between, late = come["median_itl_ms"], come["p99_itl_ms"]
    shared = {line["reuse"]: line["last_ttft_s"] for line in runs("serving-h200") if line["measurement"] == "prefix"}
    for words in (
        f"{come['request_rate']:.0f} a second", f"{come['mean_running']} at a time",
        f"is {between:.1f} ms, {between / come['quiet_median_itl_ms']:.2f} times",
        f"than {late:.1f} ms, {late / between:.2f} times",
        f"after {come['median_ttft_ms']:.0f} ms, one in a hundred after {come['p99_ttft_ms']:.0f} ms",
        f"after {shared[True]:.3f} s, without reuse after {shared[False]:.3f} s: {shared[True] / shared[False]:.3f}.",
    ):  # fmt: skip
        assert words in text
    fp8, plain = (f"{lines[name]['output_tokens_per_second']:,.0f}" for name in ("fixed fp8", "fixed"))
    quantised = " ".join((ROOT / "docs/quantised.md").read_text(encoding="utf-8").split())
    assert f"`fp8` gives {fp8} ([serving](serving.md#measured-on-a-gpu)), bfloat16 {plain} " in quantised


def test_host_memory():
    page = (ROOT / "docs/host-memory.md").read_text(encoding="utf-8")
    lines = host_memory.read_lines(ROOT / "benchmarks/results/host-memory-h200.json")
    assert page.split(host_memory.BEGIN)[1].split(host_memory.END)[0] == host_memory.render(lines)
    rules = table("docs/host-memory.md", "| GB, sequences |")
    for line in runs("host-memory-rules"):
        wanted = [f"{one['hit_rate']:.1%}" for one in line["rules"].values()]
        assert rules.pop(f"{line['budget_gb']}, {line['batch']}") == wanted
    assert not rules


def test_cpu():
    rows = table("docs/cpu.md", "| tokens a second | ours | llama.cpp |")
    wanted = [
        [f"{line['ours_tokens_s']:.1f}", f"{line['llama_cpp_tokens_s']:.1f}", f"{line['ratio']:.2f}"]
        for line in runs("cpu-llama")
    ]
    assert list(rows.values()) == wanted


def test_x_in_eight_bits():
    page = (ROOT / "docs/cpu.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks/results/quantised-bfloat16.json").read_text())["formats"]
    assert len(found) == 5
    assert all(f"{line['bits_per_byte']['value']:.4f}" in page for line in found)


def test_simulated_steps():
    page, lines = (ROOT / "docs/serving.md").read_text(encoding="utf-8"), runs("simulated-steps")
    rates = {line["case"]: line["output_tokens_per_s"] for line in lines if line["mixed_budget"] == 768}
    assert len(rates) == 4
    assert all(f"{round(rate, -1):,.0f}" in page for rate in rates.values())


def test_host_s_part_of_steps():
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    ms = {line["measurement"]: f"{line['median_ms']:.2f}" for line in runs("host-steps-cpu")}
    assert f"takes {ms['served']} ms of a step, drawn {ms['served, drawn']}, with a prompt" in page
    assert f"beside them {ms['served, prompts arrive']}, besides" in page
    assert f"which takes {ms['list']} ms" in page
