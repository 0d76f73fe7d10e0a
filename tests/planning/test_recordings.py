"""Recordings of SGLang and TensorRT-LLM, as their writers lay them out, against counting by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixtralkit.planning.trace import RoutingTrace, load_routing

LAYERS, EXPERTS, PHYSICAL, TOP_K = 3, 6, 8, 2
MAP = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 3], [5, 4, 3, 2, 1, 0, 0, 1], [1, 0, 3, 2, 5, 4, 2, 2]])


def a_pass(rng, lengths, decodes=False):
    """A record of ``per_token``: [L, T, 8] physical experts, the first two chosen, the others left at 0."""
    tokens = sum(lengths)
    ids = torch.zeros(LAYERS, tokens, 8, dtype=torch.int32)
    for layer in range(LAYERS):
        for token in range(tokens):
            logical = rng.choice(EXPERTS, TOP_K, replace=False)
            for k, expert in enumerate(logical):
                ids[layer, token, k] = int(rng.choice((MAP[layer] == int(expert)).nonzero().ravel().numpy()))
    positions = [20] * tokens if decodes else [p for length in lengths for p in range(length)]
    return {"forward_pass_id": 0, "rank": 0, "gatherer_key": "primary", "input_ids": [1] * tokens,
            "positions": positions, "extend_seq_lens": None if decodes else list(lengths), "forward_mode": 1,
            "topk_ids_of_layer": ids, "misc_objects": []}  # fmt: skip


def test_per_token_is_a_trace(tmp_path):
    rng = np.random.default_rng(0)
    records = [a_pass(rng, (5, 3)), a_pass(rng, (1, 1), decodes=True)]
    records[1]["topk_ids_of_layer"][:, 1] = -1  # a row that only fills the batch
    path = tmp_path / "recording.pt"
    torch.save({"records": records, "last_physical_to_logical_map": MAP}, path)
    trace = RoutingTrace.load(path)
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (9, LAYERS, TOP_K, EXPERTS)
    assert len(set(trace.sequence)) == 3
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 20]
    rows = [record["topk_ids_of_layer"][:, t, :2] for record, n in zip(records, (8, 1), strict=True) for t in range(n)]
    for row, chosen in zip(rows, trace.experts, strict=True):
        assert [[int(MAP[layer, p]) for p in row[layer]] for layer in range(LAYERS)] == chosen.tolist()
    np.testing.assert_array_equal(load_routing(path)[1], trace.loads_LE())


def test_per_pass_and_stat_are_loads(tmp_path):
    counts = torch.arange(2 * LAYERS * PHYSICAL).view(2, LAYERS, PHYSICAL)
    records = [{"forward_pass_id": i, "rank": 0, "global_physical_count": count} for i, count in enumerate(counts)]
    torch.save({"records": records, "last_physical_to_logical_map": MAP}, tmp_path / "pass.pt")
    wanted = np.zeros((LAYERS, EXPERTS))
    for layer in range(LAYERS):
        for slot in range(PHYSICAL):
            wanted[layer, MAP[layer, slot]] += counts[:, layer, slot].sum()
    np.testing.assert_array_equal(load_routing(tmp_path / "pass.pt")[1], wanted)
    (tmp_path / "stat.json").write_text(json.dumps({"logical_count": [wanted.tolist(), wanted.tolist()]}))
    np.testing.assert_array_equal(load_routing(tmp_path / "stat.json")[1], 2 * wanted)
    assert load_routing(tmp_path / "stat.json")[0] is None
    for name in ("pass.pt", "stat.json"):
        with pytest.raises(ValueError, match=f"{name}: has loads alone, to plan from"):
            RoutingTrace.load(tmp_path / name)


def test_tensorrts_expert_statistic(tmp_path):
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 4, "num_experts_per_token": 2}))
    counts = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)  # rank, iteration, layer (3 and 5), expert
    for rank in range(2):
        named = {f"{100 + i}_{layer}": counts[rank, i, j] for i in range(3) for j, layer in enumerate((3, 5))}
        save_file({name: count.contiguous() for name, count in named.items()}, tmp_path / f"rank{rank}.safetensors")
        save_file({"x": torch.zeros(2)}, tmp_path / f"rank{rank}_raw.safetensors")
    np.testing.assert_array_equal(load_routing(tmp_path)[1], counts.sum((0, 1)))
    with pytest.raises(ValueError, match=r"num_experts \(8\) must be the 4"):
        load_routing(tmp_path, 8)[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"logical_count": torch.tensor(3)}, "logical_count"),
        ({"logical_count": -torch.ones(2, 3)}, "at least 0"),
        ({"logical_count": "x"}, "logical_count"),
        ({"logical_count": torch.full((2, 3), 1e300, dtype=torch.float64)}, "(1e+300) must be at most 1e+18"),
        ({"logical_count": torch.ones(1, 10**5)}, "num_experts (100000) must be at most 32,768"),
        ({"logical_count": torch.ones(10**5, 8)}, "n_layers (100000) must be at most 1,024"),
        ({"other": 1}, "has neither logical_count nor records"),
        ([1], "holds a list"),
        ({"records": [], "last_physical_to_logical_map": MAP}, "records must be a list"),
        ({"records": [{}], "last_physical_to_logical_map": 3}, "last_physical_to_logical_map"),
        ({"records": [{}], "last_physical_to_logical_map": MAP * 10**6}, "must be expert ids"),
        ({"records": [{"global_physical_count": MAP[:1]}], "last_physical_to_logical_map": MAP}, "shape"),
        ({"records": [{"topk_ids_of_layer": torch.full((3, 2, 2), 8)}],
          "last_physical_to_logical_map": MAP}, "below 8"),
        ({"records": [{"topk_ids_of_layer": torch.ones(3, 2, 2, dtype=int), "positions": [1]}],
          "last_physical_to_logical_map": MAP}, "its 2 tokens"),
    ],
)  # fmt: skip
def test_recordings_that_are_not_whole_are_one_sentence(tmp_path, content, says):
    torch.save(content, tmp_path / "recording.pt")
    for read in (load_routing, RoutingTrace.load):
        with pytest.raises(ValueError, match=f"recording.pt: .*{re.escape(says)}"):
            read(tmp_path / "recording.pt")
