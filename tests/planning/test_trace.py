"""Routing traces: counts against plain loops, files of every kind, refusals."""

from __future__ import annotations

import json
from dataclasses import astuple

import numpy as np
import pytest
import torch

from mixtralkit.planning.trace import RoutingTrace, load_routing
from mixtralkit.planning.trace_parts import PartWriter, part_of


def random_trace(tokens: int = 40, layers: int = 3, experts: int = 5, top_k: int = 2, seed: int = 0) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(-1)[:, :, :top_k]
    weights = np.sort(rng.dirichlet(np.ones(top_k), (tokens, layers)))[:, :, ::-1]
    sequence = np.sort(rng.integers(0, 6, tokens))
    return RoutingTrace(ids, experts, weights.astype(np.float16), sequence, meta={"model": "random"})


def assert_equal(a: RoutingTrace, b: RoutingTrace) -> None:
    for name in ("experts", "weights", "sequence", "position"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert (a.num_experts, a.meta) == (b.num_experts, b.meta)


def test_loads_are_those_of_a_loop():
    trace = random_trace()
    counts, sums = np.zeros((3, 5)), np.zeros((3, 5))
    for (token, layer, k), expert in np.ndenumerate(trace.experts):
        counts[layer, expert] += 1
        sums[layer, expert] += trace.weights[token, layer, k]
    np.testing.assert_array_equal(trace.loads_LE(), counts)
    np.testing.assert_allclose(trace.loads_LE(weighted=True), sums)


@pytest.mark.parametrize("weighted", [True, False])
def test_transitions_are_those_of_a_loop(weighted):
    trace = random_trace()
    found = np.zeros((2, 5, 5))
    for token in range(trace.num_tokens):
        for layer in range(2):
            shares = trace.weights[token, layer : layer + 2].astype(np.float64) if weighted else np.full((2, 2), 0.5)
            shares /= shares.sum(1, keepdims=True)
            for i, j in np.ndindex(2, 2):
                a, b = trace.experts[token, layer, i], trace.experts[token, layer + 1, j]
                found[layer, a, b] += shares[0, i] * shares[1, j]
    np.testing.assert_allclose(trace.transitions_LEE(weighted), found, rtol=1e-5)
    np.testing.assert_allclose(trace.transitions_LEE(weighted).sum((1, 2)), trace.num_tokens, rtol=1e-5)


def test_statistics_of_a_layer():
    """Rows of two sequences interleaved: repetition looks at the sequence, not at the row before."""
    ids = np.array([[0, 1], [2, 1], [0, 1], [2, 0], [3, 1], [2, 1]])[:, None]
    trace = RoutingTrace(ids, 4, sequence=np.array([0, 1, 0, 1, 0, 1]))
    np.testing.assert_array_equal(trace.position, [0, 0, 1, 1, 2, 2])
    load, max_over_mean, mean_over_max, entropy, repetition = astuple(trace.statistics()[0])
    assert load == (3, 5, 3, 1)
    assert (max_over_mean, mean_over_max) == (pytest.approx(5 / 3), pytest.approx(0.6))
    assert entropy == pytest.approx(-sum(p * np.log2(p) for p in (3 / 12, 5 / 12, 3 / 12, 1 / 12)))
    assert repetition == 3 / 4


def test_a_gap_in_the_positions_is_no_neighbour():
    ids = np.zeros((3, 1, 1), int)
    trace = RoutingTrace(ids, 2, position=np.array([0, 1, 3]))
    assert [list(rows) for rows in trace.neighbours()] == [[0], [1]]


def test_split_keeps_sequences_whole():
    trace = random_trace(400)
    first, second = trace.split(0.3)
    assert not set(first.sequence) & set(second.sequence)
    assert first.num_tokens + second.num_tokens == 400
    assert 0.1 < first.num_tokens / 400 < 0.5
    np.testing.assert_array_equal(first.loads_LE() + second.loads_LE(), trace.loads_LE())
    assert_equal(first, trace.split(0.3)[0])


def test_split_cuts_a_single_sequence_in_time():
    trace = RoutingTrace(np.arange(10)[:, None, None] % 3, 3, position=np.arange(10)[::-1].copy())
    first, second = trace.split(0.4)
    assert sorted(first.position) == [0, 1, 2, 3]
    assert sorted(second.position) == [4, 5, 6, 7, 8, 9]


def test_first_choices_only():
    trace = random_trace()
    first = trace.first(1)
    np.testing.assert_array_equal(first.experts, trace.experts[:, :, :1])
    np.testing.assert_array_equal(first.weights, 1)


def test_file_round_trip(tmp_path):
    trace = random_trace()
    trace.save(tmp_path / "trace")
    assert_equal(RoutingTrace.load(tmp_path / "trace"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_only_ordinary_files_are_replaced(tmp_path):
    """Saving renames over the target: run as root it once took the place of /dev/full."""
    with pytest.raises(ValueError, match="is no ordinary file"):
        random_trace().save(tmp_path)
    with pytest.raises(ValueError, match=r"absent/t: cannot be written"):
        random_trace().save(tmp_path / "absent" / "t")


@pytest.mark.parametrize(("dtype", "top_k"), [(np.int64, None), (np.int8, 2), (np.int16, 1)])
def test_foreign_arrays(tmp_path, dtype, top_k):
    """ExFlow's [tokens, layers] and vLLM's [tokens, layers, top_k]."""
    trace = random_trace(top_k=top_k or 1)
    ids = trace.experts if top_k else trace.experts[:, :, 0]
    np.save(tmp_path / "trace.npy", ids.astype(dtype))
    loaded = RoutingTrace.load(tmp_path / "trace.npy", 9)
    np.testing.assert_array_equal(loaded.experts, trace.experts)
    assert (loaded.num_experts, loaded.weights, set(loaded.sequence)) == (9, None, {0})
    with pytest.warns(UserWarning, match="does not say num_experts; 5"):
        assert RoutingTrace.load(tmp_path / "trace.npy").num_experts == 5


def test_foreign_arrays_of_several_sequences(tmp_path):
    trace = random_trace()
    np.savez(tmp_path / "many.npz", a=trace.experts[:15], b=trace.experts[15:])
    loaded = RoutingTrace.load(tmp_path / "many.npz", 5)
    np.testing.assert_array_equal(loaded.experts, trace.experts)
    np.testing.assert_array_equal(loaded.sequence, [0] * 15 + [1] * 25)
    np.testing.assert_array_equal(loaded.position, [*range(15), *range(25)])


def test_sglang_recording(tmp_path):
    count = torch.randint(0, 9, (4, 3, 5), dtype=torch.int32)
    torch.save({"rank": 0, "logical_count": count}, tmp_path / "recording.pt")
    np.testing.assert_array_equal(load_routing(tmp_path / "recording.pt")[1], count.sum(0))
    with pytest.raises(ValueError, match=r"recording.pt: num_experts \(8\) must be the 5"):
        load_routing(tmp_path / "recording.pt", 8)[1]
    trace = random_trace()
    trace.save(tmp_path / "trace.npz")
    np.testing.assert_array_equal(load_routing(tmp_path / "trace.npz")[1], trace.loads_LE())


@pytest.mark.parametrize("content", [{}, {"logical_count": torch.ones(3)}, {"logical_count": -torch.ones(2, 2, 3)}])
def test_bad_sglang_recordings(tmp_path, content):
    torch.save(content, tmp_path / "recording.pt")
    with pytest.raises(ValueError, match=r"recording.pt: .*logical_count"):
        load_routing(tmp_path / "recording.pt")[1]


def test_concatenation_keeps_sequences_apart():
    a, b = random_trace(seed=1), random_trace(seed=2)
    both = RoutingTrace.concatenate([a, b])
    np.testing.assert_array_equal(both.experts, np.concatenate([a.experts, b.experts]))
    assert not set(both.sequence[:40]) & set(both.sequence[40:])
    with pytest.raises(ValueError, match=r"num_layers \(2\) must be 3 in every part"):
        RoutingTrace.concatenate([a, random_trace(layers=2)])


ONE = np.array([[[0, 1]], [[2, 1]]])
NAN = np.array([[[0.5, 0.5]], [[np.nan, 0.5]]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": ONE[0]}, r"experts \(shape \(1, 2\), int64\) must be whole numbers \[tokens, layers, top_k\]"),
        ({"experts": ONE.astype(float)}, "must be whole numbers"),
        ({"experts": ONE + 1}, r"token 1, layer 0 takes expert 3, outside 0 … 2"),
        ({"experts": ONE - 1}, r"token 0, layer 0 takes expert -1, outside 0 … 2"),
        ({"experts": ONE + 2**16}, r"takes expert 65536, outside 0 … 2"),
        ({"experts": ONE * 0}, "token 0, layer 0 takes expert 0 twice"),
        ({"num_experts": 1}, r"num_experts \(1\) must lie in 2"),
        ({"num_experts": "8"}, r"num_experts \('8'\) must be a whole number"),
        ({"weights": NAN}, "token 1, layer 0 has nan, not a number of at least 0"),
        ({"weights": -ONE.astype(float)}, "has -1.0, not a number of at least 0"),
        ({"weights": NAN[:1]}, r"weights \(shape \(1, 1, 2\), float64\) must be floats of shape \(2, 1, 2\)"),
        ({"sequence": np.zeros(3, int)}, r"sequence \(shape \(3,\), int64\) must be whole numbers \[2\]"),
        ({"position": np.array([0, -1])}, r"position \(-1 … 0\) must lie in 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        RoutingTrace(**{"experts": ONE, "num_experts": 3, **changes})


def test_files_that_are_no_traces(tmp_path):
    whole = tmp_path / "whole.npz"
    random_trace().save(whole)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:500])
    (tmp_path / "text.npy").write_text("no")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("cut.npz", "text.npy", "objects.npy"):
        with pytest.raises(ValueError, match=f"{name}: is not a whole .npy or .npz file of plain arrays"):
            RoutingTrace.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"absent.npz: cannot be read"):
        RoutingTrace.load(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"whole.npz: num_experts \(8\) must be the 5 that the file says"):
        RoutingTrace.load(whole, 8)
    np.save(tmp_path / "flat.npy", np.arange(5))
    with pytest.raises(ValueError, match=r"flat.npy: arrays must be \[tokens, layers\]"):
        RoutingTrace.load(tmp_path / "flat.npy")


def write_part(path, rank: int, steps, num_layers: int = 2, **meta) -> None:
    writer = PartWriter(part_of(path, rank), 4, num_layers, 1, meta)
    for spans, experts_LT in steps:
        experts_LTK = np.array(experts_LT, np.int16)[:, :, None]
        writer.add(spans, experts_LTK, np.ones_like(experts_LTK, np.float16))
    writer.close()


def test_parts_of_a_stopped_recording(tmp_path):
    """Two ranks, sequences in steps; the last step of one is cut off in the middle, as a kill leaves it."""
    path = tmp_path / "trace.npz"
    write_part(path, 0, [([0, 0, 2], [[0, 1], [2, 3]]), ([0, 2, 1], [[2], [1]])], model="m")
    write_part(path, 1, [([1, 0, 1, 2, 5, 1], [[3, 0], [3, 0]]), ([1, 1, 1], [[1], [1]])], model="m")
    part = part_of(path, 1)
    part.write_bytes(part.read_bytes()[:-3])
    trace = RoutingTrace.load(path)
    np.testing.assert_array_equal(trace.experts[:, :, 0], [[0, 2], [1, 3], [2, 1], [3, 3], [0, 0]])
    np.testing.assert_array_equal(trace.sequence, [0, 0, 0, 1, 2])
    np.testing.assert_array_equal(trace.position, [0, 1, 2, 0, 5])
    assert (trace.num_experts, trace.meta) == (4, {"model": "m"})


@pytest.mark.parametrize("size", range(0, 140, 7))
def test_a_part_cut_anywhere_keeps_its_whole_steps(tmp_path, size):
    path = tmp_path / "trace.npz"
    write_part(path, 0, [([0, 0, 1], [[1], [2]]), ([0, 1, 1], [[2], [3]])])
    data = part_of(path, 0).read_bytes()
    start, step = data.index(b"\n") + 1, 24  # int32 number, 3 int32 of the span, 2 int16, 2 float16
    assert len(data) == start + 2 * step
    part_of(path, 0).write_bytes(data[:size])
    if size < start - 1:
        with pytest.raises(ValueError, match="does not begin as a part of a trace does"):
            RoutingTrace.load(path)
    else:
        assert RoutingTrace.load(path).num_tokens == max(0, (min(size, len(data)) - start) // step)


def test_parts_of_different_runs_are_not_mixed(tmp_path):
    write_part(tmp_path / "t", 0, [], model="a")
    write_part(tmp_path / "t", 1, [], model="b")
    with pytest.raises(ValueError, match=r"t.rank1.part is of another run than t.rank0.part"):
        RoutingTrace.load(tmp_path / "t")


def test_a_foreign_archive_of_other_things(tmp_path):
    np.savez(tmp_path / "odd.npz", experts=ONE, meta=json.dumps([]), num_experts=3)
    with pytest.raises(ValueError, match=r"odd.npz: meta .* must be an object"):
        RoutingTrace.load(tmp_path / "odd.npz")
