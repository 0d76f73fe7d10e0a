"""benchmarks/plans/fit_hardware.py: its rules on times made from known figures, and the files that it wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.plans import fit_hardware as fit
from mixtralkit.config import shipped
from mixtralkit.planning.hardware import Hardware


@pytest.fixture(params=["h200x2", "h200x4"])
def hardware(request) -> Hardware:
    return Hardware.load(shipped("hardware", request.param))


def test_files_have_what_the_results_give(hardware):
    assert fit.fitted(hardware) == hardware


def test_a_machine_without_fused_kernels():
    with pytest.raises(ValueError, match=r"hardware h200 has no fused kernels to fit"):
        fit.fitted(Hardware.load(shipped("hardware", "h200")))


def test_experts_of_two_widths_give_price_and_rate(hardware):
    """Of the middle size one width alone: its price lies between its neighbours'."""
    fused, lines = hardware.fused, []
    known = {16: (2e-6, 1e12), 64: (5e-6, 2e12), 112: (8e-6, 3e12)}
    for tokens, (start_s, rate) in known.items():
        rows = tokens * 2 / 8
        gate_s = fused.small_s + 2 * tokens * 64 * 2 / fused.memory_bandwidth
        for hidden in (32,) if tokens == 64 else (32, 128):
            seconds = gate_s + start_s + 2 * 3 * 64 * hidden * 8 * rows / rate
            lines.append({
                "variant": "kernels", "routing": "uniform", "tokens": tokens, "dim": 64, "hidden": hidden, "top_k": 2,
                "touched_experts": 8, "ms": 1e3 * seconds,
            })  # fmt: skip
    lines.append({**lines[0], "routing": "skew:0.5", "ms": 99.0})
    lines.append({**lines[0], "variant": "grouped_mm", "ms": 99.0})
    found = fit.experts(lines, fused)
    assert [rows for rows, *_ in found] == [4, 16, 28]
    for (_, start_s, rate), wanted in zip(found, known.values(), strict=True):
        assert (start_s, rate) == pytest.approx(wanted, rel=1e-3)


def layer(variant: str, tokens: int, **phases: float) -> dict:
    return {
        "measurement": "moe_layer_over_ranks", "variant": variant, "routing": "uniform", "tokens_per_rank": tokens,
        "ranks": 2, "top_k": 2, "num_experts": 8, "dim": 64, "hidden": 128, "dtype": "bfloat16",
        "bytes_sent": 2000.0 * tokens, "phases_ms": phases,
    }  # fmt: skip


def test_phases_of_layers_less_an_empty_one(hardware):
    lines = [
        layer("contiguous", 16, **{"permute+dispatch": 0.008, "combine": 0.012, "experts": 0.103}),
        layer("tensor_parallel", 16, permute=0.003, combine=0.009, experts=0.105),
        {**layer("contiguous", 16, **{"permute+dispatch": 9.0, "combine": 9.0}), "routing": "skew:0.5"},
    ]
    assert fit.sums(lines) == ((16 * 2 * 64 * 2, pytest.approx(6e-6)),)
    assert fit.exchange(lines) == ((16000.0, pytest.approx(14e-6)),)
    points = ((4.0, 1e-6, 1e9), (12.0, 3e-6, 1e9))
    (rows, start_s, rate) = fit.with_layers(points, lines)[1]
    assert (rows, start_s) == (8, pytest.approx(2e-6))
    assert rate == pytest.approx(2 * 8 * 3 * 64 * 128 * 8 / 2 / (104e-6 - 3e-6 - 2e-6), rel=1e-3)


def test_small_kernels_from_profiles(hardware):
    fused, layers = hardware.fused, 32
    kernels, row, token = 2 * layers + 4, 8192, layers * 2 * 8 * 128 * 2
    profiles = []
    for batch, idle_us in ((1, 10.0), (8, 12.0), (64, 40.0)):
        seconds = kernels * 3e-6 + batch * 136 * token / 2e12 + layers * 10 * batch * row / fused.memory_bandwidth
        parts = {"experts": 1e4, "linear": 1e3, "attention": 0.7e6 * seconds, "gate": 0.3e6 * seconds}
        profiles.append({"of": f"decode-{batch}", "us_by_part": parts, "idle_us": idle_us})
    profiles.append({"of": "prefill-2x100", "us_by_part": {"attention": 50.0}, "idle_us": 1e4})
    profiles = [{**line, "model": "mixtral-8x7b", "layers": layers} for line in profiles]
    found = fit.small_kernels(profiles, fused)
    assert found["small_s"] == pytest.approx(3e-6, rel=1e-3)
    assert found["attention_bandwidth"] == pytest.approx(2e12, rel=1e-3)
    assert found["step_s"] == pytest.approx(12e-6)
    assert found["attention_flops"] == pytest.approx(layers * 4 * 200 * 50.5 * 32 * 128 / 50e-6, rel=1e-3)


def test_launches_are_what_exact_exchanges_take_beyond_bytes_and_waits(hardware):
    hardware = replace(hardware, launch_s=0.0)
    line = {**layer("contiguous+exact", 16, permute=0.0, dispatch=0.0), "dispatcher": "exact"}
    nothing = fit.launches([line], hardware)
    more = {**line, "phases_ms": {"permute": 0.4, "dispatch": 0.2}}
    assert fit.launches([more], hardware) - nothing == pytest.approx(1e-5, rel=1e-2), "60 kernels"
    assert nothing < 0, "waits, messages and bytes alone take time"
    scheduled = {**line, "variant": "contiguous+schedule"}
    assert fit.launches([more, scheduled], hardware) == fit.launches([more], hardware)
