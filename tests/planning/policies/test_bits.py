"""Policy ``bits`` against every choice there is, and the table of errors that it reads."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtralkit.cli.plan import plan as plan_experts
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.policies.bits import bits, least_harm
from mixtralkit.planning.policies.inputs import Budget
from mixtralkit.planning.precision import ErrorTable
from mixtralkit.planning.simulate import sample_routing
from tests.configs import small_config

FORMATS = ("int4:128", "int4:32", "int8", "fp8:channel")


def drawn(seed: int, layers: int = 3, experts: int = 8) -> ErrorTable:
    rng = np.random.default_rng(seed)
    load, gate = rng.dirichlet(np.ones(experts), layers), rng.uniform(0.2, 0.9, (layers, experts))
    error = np.array([0.1, 0.08, 0.007, 0.026]) * rng.uniform(0.7, 1.4, (layers, experts, 1))
    return ErrorTable.of_weights(FORMATS, [4.125, 4.5, 8.0, 8.0], error, load, gate, model="drawn")


def brute_force(harm_NF: np.ndarray, sizes_F: np.ndarray, budget: float) -> float:
    count, formats = harm_NF.shape
    choices = np.array(list(itertools.product(range(formats), repeat=count)))
    fits = sizes_F[choices].sum(1) <= budget
    return float(harm_NF[np.arange(count), choices].sum(1)[fits].min())


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 6), st.integers(1, 4))
def test_no_choice_beats_the_bound_and_few_beat_the_choice(seed, count, formats):
    rng = np.random.default_rng(seed)
    sizes_F = rng.integers(1, 30, formats).astype(float)
    harm_NF = rng.random((count, formats)) ** 3 * rng.random((count, 1))
    budget = float(rng.integers(int(count * sizes_F.min()), int(count * sizes_F.max()) + 2))
    chosen_N, bound = least_harm(harm_NF, sizes_F, budget)
    best, found = brute_force(harm_NF, sizes_F, budget), harm_NF[np.arange(count), chosen_N].sum()
    assert sizes_F[chosen_N].sum() <= budget
    assert bound <= best * (1 + 1e-9) + 1e-15
    step = np.ptp(harm_NF, axis=1).max()  # the relaxation cuts one expert's step
    assert best - 1e-12 <= found <= bound + step + 1e-12


def test_nearly_every_small_case_is_solved_exactly():
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        harm_NF, sizes_F = (
            np.sort(rng.random((5, 4)))[:, ::-1] * rng.random((5, 1)),
            np.sort(rng.integers(4, 17, 4)) * 1.0,
        )
        budget = rng.uniform(5 * sizes_F[0], 5 * sizes_F[-1])
        chosen_N, _ = least_harm(harm_NF, sizes_F, budget)
        missed += harm_NF[np.arange(5), chosen_N].sum() > brute_force(harm_NF, sizes_F, budget) + 1e-12
    assert missed <= 10  # 7: in 96.5% of the cases nothing is better


def test_experts_that_matter_get_the_bits():
    shape, table = ModelShape.of(small_config()), drawn(1)
    sizes = dict(zip(FORMATS, shape.sizes(FORMATS), strict=True))
    for world, times in ((1, 1.3), (2, 1.1), (4, 3.0)):
        memory_gb = times * sizes["int4:128"] * 24 / world / 1e9
        plan = bits(table, shape, world, Budget(memory_gb=memory_gb, expert_bytes=shape.expert_bytes))
        assert shape.rank_bytes(plan)[0].max() <= memory_gb * 1e9
        harm = sum(
            0.0 if name == "plain" else table.harm[layer, expert, FORMATS.index(name)]
            for layer, row in enumerate(plan.precision) for expert, name in enumerate(row)
        )  # fmt: skip
        assert harm == pytest.approx(plan.meta["harm"])
        step = table.harm.max()  # a rank's relaxation cuts one expert's step
        assert plan.meta["harm_bound"] <= harm <= plan.meta["harm_bound"] + world * step
        mean = np.mean(shape.expert_bytes_LE(plan)) * 8 / (3 * shape.dim * shape.hidden)
        assert plan.meta["bits"] == pytest.approx(mean)
    whole = bits(table, shape, 1, Budget(memory_gb=1.0, expert_bytes=1))
    assert whole.counts() == {"precision": {"plain": 24}}
    with pytest.raises(
        ValueError, match=r"memory_gb \(1e-05\) must be at least .* for the experts of rank 0, all in int4:"
    ):
        bits(table, shape, 1, Budget(memory_gb=1e-5, expert_bytes=1))


def test_the_command_fills_the_budget_from_a_report(tmp_path, capsys):
    drawn(2).save(tmp_path / "errors.json")
    sample_routing(np.ones((3, 8)), 64, 2).save(tmp_path / "trace.npz")
    common = {"world_size": 2, "memory_gb": 9.0, "output": tmp_path / "plan.json", "plot": tmp_path / "plan.png"}
    plan_experts(tmp_path / "trace.npz", "bits", errors=tmp_path / "errors.json", **common)
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    plan = load_plan(tmp_path / "plan.json")
    assert figures["precision"] == plan.counts()["precision"]
    assert figures["memory_gb_per_rank"] <= 9.0
    assert "no choice within the budget has less than" in out
    assert len(figures["precision"]) > 1 or figures["precision"] == {"plain": 24}
    for more, sentence in (
        ({}, "errors is missing: policy bits needs what mixtralkit quantise-report measured"),
        ({"errors": tmp_path / "trace.npz"}, "trace.npz"),
        ({"errors": tmp_path / "errors.json", "memory_gb": None}, "memory_gb is missing: policy bits fills it"),
    ):
        with pytest.raises(ValueError, match=sentence):
            plan_experts(tmp_path / "trace.npz", "bits", **{**common, "overwrite": True} | more)
    with pytest.raises(ValueError, match=r"errors \(.*\) is an option of policy bits, not of 'balanced'"):
        plan_experts(tmp_path / "trace.npz", "balanced", errors=tmp_path / "errors.json", **common, overwrite=True)
    sample_routing(np.ones((2, 8)), 64, 2).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"errors: layers and experts \(3, 8\) must be \(2, 8\)"):
        plan_experts(tmp_path / "other.npz", "bits", errors=tmp_path / "errors.json", **common, overwrite=True)


def test_tables_are_read_as_they_were_written(tmp_path):
    table = drawn(3, 2, 4)
    table.save(tmp_path / "t.json")
    again = ErrorTable.load_from(tmp_path / "t.json")
    for name in ("bits", "error", "load", "gate", "harm"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert (again.formats, again.kind, again.meta) == (table.formats, "weights", {"model": "drawn"})
    table.save(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "layer,expert,format,bits,load,gate,error,harm"
    assert len(lines) == 1 + 2 * 4 * 4
    assert lines[-1].startswith("1,3,fp8:channel,8,")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"formats": ["int4:128", "int4:32", "int8", "int3"]}, r"formats \('int3'\) must be of plain, int4"),
        ({"formats": ["int8"]}, "formats must be 4 names, as many as error has, not 1"),
        ({"kind": "rows"}, r"kind \('rows'\) must be one of weights, outputs"),
        ({"load": [[0.5]]}, r"load must be numbers of at least 0, of shape \[2, 4\]"),
        ({"error": [[[1.0]], [[1.0, 2.0]]]}, "must have equally many experts"),
        ({"error": 1}, r"error \(1\) must be a list"),
        ({"gate": [[-1.0] * 4] * 2}, "gate must be numbers of at least 0"),
        ({"meta": None}, r"meta \(None\) must be an object"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path, change, sentence):
    drawn(4, 2, 4).save(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text()) | change
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence) as caught:
        ErrorTable.load_from(tmp_path / "t.json")
    assert str(caught.value).startswith(str(tmp_path / "t.json"))
