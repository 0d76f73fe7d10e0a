"""FastMoE's gates against their rules written out row by row."""

from __future__ import annotations

import math

import pytest
import torch

from mixtralkit.config import TopologyOptions
from mixtralkit.distributed import RankContext
from mixtralkit.fastmoe import gates
from tests.ranks import run_ranks

D = 6


def _gate(kind, num_expert: int, context: RankContext, **options):
    torch.manual_seed(5)
    gate = kind(D, num_expert, context.world_size, **options)
    gate.bind(context)
    return gate


def _rows(rank: int, rows: int, skew: float = 0.0) -> torch.Tensor:
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(rank))
    return x + skew


@torch.no_grad()
def test_naive_gate_is_mixtrals_rule():
    gate, x = _gate(gates.NaiveGate, 8, RankContext()), _rows(0, 20)
    idx, score = gate(x)
    for n, row in enumerate(x):
        logits = gate.gate(row)
        best = sorted(range(8), key=lambda e: -float(logits[e]))[:2]
        assert idx[n].tolist() == best
        torch.testing.assert_close(score[n], logits[best].exp() / logits[best].exp().sum())
    assert gate.has_loss
    assert gate.get_loss() == 0
    assert gate.get_loss() is None


def test_naive_gate_without_bias():
    assert gates.NaiveGate(D, 4, 1, gate_bias=False).gate.bias is None


def test_zero_gate_sends_all_to_expert_zero():
    idx, score = gates.ZeroGate(D, 4, 1, top_k=2)(_rows(0, 3))
    assert idx.tolist() == [[0, 0]] * 3
    assert score.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_noisy_gate(training, top_k):
    gate, x = _gate(gates.NoisyGate, 4, RankContext(), top_k=top_k).train(training), _rows(0, 12)
    torch.manual_seed(9)
    idx, score = gate(x)
    torch.manual_seed(9)
    noise = torch.randn(12, 4)
    importance, load = torch.zeros(4), torch.zeros(4)
    for n in range(12):
        clean = x[n] @ gate.w_gate
        deviation = torch.log1p((x[n] @ gate.w_noise).exp()) + 0.01
        h = clean + noise[n] * deviation if training else clean
        best = h.argsort(descending=True)[:top_k].tolist()
        assert idx[n].tolist() == best
        torch.testing.assert_close(score[n], h[best].softmax(0))
        for place, e in enumerate(best):
            importance[e] += h[best].softmax(0)[place]
        for e in range(4):
            others = sorted((h[i].item() for i in range(4) if i != e), reverse=True)
            if training and top_k < 4:
                z = (clean[e].item() - others[top_k - 1]) / deviation[e].item()
                load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
            else:
                load[e] += e in best
    expected = sum(v.var() / v.mean() ** 2 for v in (importance, load))
    loss = gate.get_loss()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert torch.isfinite(gate.w_gate.grad).all()


def _first_choice_loss(logits: torch.Tensor) -> torch.Tensor:
    rows, experts = logits.shape
    share = torch.bincount(logits.argmax(1), minlength=experts) / rows
    return experts * (share * logits.softmax(1).mean(0)).sum()


def _cut(idx: list[list[int]], rows_left: dict[int, int]) -> list[list[int]]:
    """First choices of all rows, then second ones, each while its expert has room."""
    out = [list(row) for row in idx]
    for k in range(len(idx[0]) if idx else 0):
        for row in out:
            rows_left[row[k]] -= 1
            if rows_left[row[k]] < 0:
                row[k] = -1
    return out


@pytest.mark.parametrize(("training", "capacity"), [(True, (1.2, 2.4)), (False, (1.2, 2.4)), (True, (0.3, 0.3))])
def test_gshard_gate(training, capacity):
    x = _rows(0, 30, skew=0.7)
    gate = _gate(gates.GShardGate, 8, RankContext(), capacity=capacity).train(training)
    torch.manual_seed(2)
    idx, score = gate(x)
    torch.manual_seed(2)
    luck = torch.rand(30)
    logits = gate.gate(x)
    limit = math.ceil((capacity[0] if training else capacity[1]) * 30) * 2 // 8
    expected = _cut(logits.topk(2).indices.tolist(), dict.fromkeys(range(8), limit))
    for n in range(30):
        if 2 * score[n, 1].item() < luck[n].item():
            expected[n][1] = -1
    assert idx.tolist() == expected
    torch.testing.assert_close(score, logits.topk(2).values.softmax(-1))
    torch.testing.assert_close(gate.get_loss(), _first_choice_loss(logits))


def _limited(context: RankContext, rows: list[int]) -> list[tuple]:
    """Ids before and after the limits that hold over all ranks."""
    results = []
    x = _rows(context.rank, rows[context.rank], skew=0.8)
    dc = _gate(gates.DCGate, 2, context, capacity=(0.4, 0.4), random_routing=False)
    results.append((dc.gate(x).topk(2).indices.tolist(), dc(x)[0].tolist()))
    switch = _gate(gates.SwitchGate, 2, context, capacity=(0.5, 0.5)).eval()
    idx, score = switch(x)
    probability = switch.gate(x).softmax(-1)
    torch.testing.assert_close(score, probability.amax(1, keepdim=True))
    kept = torch.bincount(idx[idx >= 0], minlength=2 * context.world_size)
    total = max(1, int(kept.sum()))
    expected_loss = 2 * context.world_size * (kept / total * probability.sum(0) / total).sum()
    torch.testing.assert_close(switch.get_loss(), expected_loss)
    results.append((probability.argmax(1, keepdim=True).tolist(), idx.tolist()))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_limits_hold_over_all_ranks(world_size):
    """An expert's limit counts the rows of every rank: lower ranks first, then first choices, then by row."""
    rows = [11, 6, 0, 3][:world_size]
    by_rank = run_ranks(_limited, world_size, rows)
    for number, limit_of in enumerate((lambda n: math.ceil(0.4 * n), lambda n: math.ceil(0.5 * n / 2))):
        room = {e: limit_of(rows[e // 2]) for e in range(2 * world_size)}
        for rank in range(world_size):
            before, after = by_rank[rank][number]
            room = {e: max(0, left) for e, left in room.items()}
            assert after == _cut(before, room), (number, rank)
        assert any(-1 in row for results in by_rank for row in results[number][1])


def test_switch_jitter_is_uniform_and_only_in_training():
    gate, x = _gate(gates.SwitchGate, 4, RankContext(), switch_eps=0.5, capacity=(9.0, 9.0)), _rows(0, 8)
    torch.manual_seed(1)
    idx, score = gate(x)
    torch.manual_seed(1)
    p = (gate.gate(x) + 0.5 + torch.rand(8, 4)).softmax(-1)
    assert idx.tolist() == p.argmax(1, keepdim=True).tolist()
    torch.testing.assert_close(score, p.amax(1, keepdim=True))


def _swiped(context: RankContext, rows: list[int], skew: float) -> tuple[list, list]:
    gate, x = _gate(gates.SwipeGate, 2, context), _rows(context.rank, rows[context.rank], skew)
    idx, score = gate(x)
    logits = gate.gate(x)
    torch.testing.assert_close(score, logits.gather(1, idx).softmax(-1))
    plain_idx, plain_score = gate.eval()(x)
    assert plain_idx.equal(logits.topk(2).indices)
    torch.testing.assert_close(plain_score, logits.topk(2).values.softmax(-1))
    return plain_idx.tolist(), idx.tolist()


@pytest.mark.parametrize(("world_size", "skew"), [(1, 0.0), (2, 0.8), (4, 0.0), (4, 2.0)])
def test_swipe_gate_gives_every_rank_as_much_as_it_sends(world_size, skew):
    rows = [9, 9, 5, 0][:world_size]
    by_rank = run_ranks(_swiped, world_size, rows, skew)
    room = [2 * n for n in rows]
    expected = [[[None, None] for _ in range(n)] for n in rows]
    for k in range(2):
        for rank in range(world_size):
            for n, row in enumerate(by_rank[rank][0]):
                if room[row[k] // 2] > 0:
                    room[row[k] // 2] -= 1
                    expected[rank][n][k] = row[k]
        for rank in range(world_size):
            for n in range(rows[rank]):
                if expected[rank][n][k] is None:
                    free = next(w for w in range(world_size) if room[w] > 0)
                    room[free] -= 1
                    expected[rank][n][k] = 2 * free + k
    assert [after for _, after in by_rank] == expected
    assert room == [0] * world_size


@torch.no_grad()
def _leaving(context: RankContext, cases: list[tuple[float, int]]) -> list[int]:
    """Rows of this rank that leave their node of two, for each case; checks each row's choices and weights."""
    inside = [e for e in range(8) if e // 4 == context.rank // 2]
    counts = []
    for fraction, top_k in cases:
        topology = TopologyOptions(gpus_per_node=2, outgoing_fraction=fraction)
        gate, x = _gate(gates.FasterGate, 2, context, top_k=top_k, topology=topology), _rows(context.rank, 21)
        idx, score = gate(x)
        logits = gate.gate(x)
        best = logits.topk(top_k)
        weight_inside = {}
        for n, (ids, weights) in enumerate(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True)):
            if not set(ids) <= set(inside):
                weight_inside[n] = sum(w for e, w in zip(ids, weights, strict=True) if e in inside)
        stay = sorted(weight_inside, key=weight_inside.get)[int(fraction * 21) :]
        for n in range(21):
            home = sorted(inside, key=lambda e, row=logits[n]: -float(row[e]))[:top_k]
            assert idx[n].tolist() == (home if n in stay else best.indices[n].tolist()), (n, fraction, top_k)
        torch.testing.assert_close(score, logits.gather(1, idx).softmax(-1))
        torch.testing.assert_close(gate.get_loss(), _first_choice_loss(logits))
        counts.append(sum(not set(row) <= set(inside) for row in idx.tolist()))
    return counts


def test_topology_gate_caps_the_rows_that_leave_the_node():
    for counts in run_ranks(_leaving, 4, [(fraction, k) for fraction in (0.14, 0.0, 1.0) for k in (1, 2)]):
        assert counts[:4] == [2, 2, 0, 0]
        assert min(counts[4:]) > 2


def test_topology_is_read_from_the_environment():
    environ = {"FMOE_TOPO_GPUS_PER_NODE": "4", "FMOE_TOPO_OUTGOING_FRACTION": "0.5"}
    assert TopologyOptions.of(environ) == TopologyOptions(4, 0.5)
    assert TopologyOptions.of({}) == TopologyOptions(8, 0.14)
    for name, value in (("FMOE_TOPO_GPUS_PER_NODE", "0"), ("FMOE_TOPO_OUTGOING_FRACTION", "1.5")):
        with pytest.raises(ValueError, match=name):
            TopologyOptions.of({name: value})


def test_bad_gates_are_refused():
    with pytest.raises(ValueError, match=r"top_k \(1\) must be 2"):
        gates.GShardGate(D, 4, 1, top_k=1)
    with pytest.raises(ValueError, match=r"top_k \(2\) must be 1"):
        gates.SwitchGate(D, 4, 1, top_k=2)
    with pytest.raises(ValueError, match="experts of a node"):
        gates.FasterGate(D, 1, 4, top_k=2, topology=TopologyOptions(1))
    with pytest.raises(RuntimeError, match="bind"):
        gates.SwitchGate(D, 4, 2)(_rows(0, 3))
    with pytest.raises(ValueError, match="world_size"):
        gates.SwitchGate(D, 4, 2).bind(RankContext())
