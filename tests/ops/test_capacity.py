"""The cut to a capacity: the reference against a slow and obvious one, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.ops.capacity import CapacityRule, Cut
from mixtralkit.ops.capacity.reference import cut_to_capacity_reference

SHAPES = {
    (8, 2): 1.0,
    (5, 1): 0.7,
    (7, 3): 0.4,
    (6, 6): 0.8,
    (60, 4): 0.5,
    (20, 4): 0.5,
}  # experts and choices: capacity factor


def routed(seed: int, rows: int, num_experts: int, top_k: int, skew: float = 1.5, ties: bool = False):
    """Choices, weights, logits, local experts; one expert is hot, one chosen by none where it can be."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(rows, num_experts, generator=generator)
    if ties:
        logits_TE = logits_TE.round()
    logits_TE[:, 1] += skew
    if num_experts > top_k:
        logits_TE[:, -1] -= 100.0
    order_TE = logits_TE.argsort(dim=1, descending=True, stable=True)  # as the gate: ties to the lower expert
    experts_TK = order_TE[:, :top_k].contiguous()
    local_E = torch.zeros(num_experts, dtype=torch.bool)
    local_E[[0, 2]] = True
    return experts_TK, logits_TE.gather(1, experts_TK).softmax(-1), logits_TE, local_E


def slow_cut(experts_TK, weights_TK, logits_TE, local_E, rule: CapacityRule, valid: list[bool]) -> tuple[list, int]:
    """One choice at a time; (experts, choices over the capacity)."""
    top_k, num_experts = experts_TK.shape[1], len(local_E)
    wanted = experts_TK.tolist()
    experts = [list(row) if ok else [-1] * top_k for row, ok in zip(wanted, valid, strict=True)]
    capacity = rule.capacity(sum(valid) * top_k)

    def worth(t: int, k: int) -> float:
        return -float(weights_TK[t, k]) if rule.by_weight else 0.0

    for expert in (e for e in range(num_experts) if not local_E[e]):
        wanting = [(worth(t, k), t, k) for t, row in enumerate(experts) for k, e in enumerate(row) if e == expert]
        for _, t, k in sorted(wanting)[capacity:]:
            experts[t][k] = -1
    over = sum(e == -1 for row, ok in zip(experts, valid, strict=True) if ok for e in row)
    if not rule.reroutes:
        return experts, over
    room = {e: capacity - sum(row.count(e) for row in experts) for e in range(num_experts)}
    rest = [
        [e for e in torch.argsort(-logits_TE[t], stable=True).tolist() if e not in wanted[t]]
        for t in range(len(wanted))
    ]
    for place in range(num_experts - top_k):
        offers = []
        for t, row in enumerate(experts):
            if valid[t] and -1 in row:
                offers.append((worth(t, row.index(-1)), t, row.index(-1), rest[t][place]))
        for _, t, k, expert in sorted(offers):
            if local_E[expert] or room[expert] > 0:
                experts[t][k] = expert
                room[expert] -= 1
    return experts, over


CASES = [
    (seed, rows, 20 if reroutes and num_experts == 60 else num_experts, top_k, reroutes, by_weight, hidden)
    for seed, (rows, (num_experts, top_k)) in enumerate(
        [(31, (8, 2)), (70, (5, 1)), (33, (7, 3)), (9, (6, 6)), (40, (60, 4))]  # 60 to reroute among take a minute
    )
    for reroutes, by_weight, hidden in [(False, True, 0.3), (True, True, 0.0), (True, False, 0.3), (False, False, 0.0)]
]


@pytest.mark.parametrize(("seed", "rows", "num_experts", "top_k", "reroutes", "by_weight", "hidden"), CASES)
def test_the_cut_is_the_slow_one(seed, rows, num_experts, top_k, reroutes, by_weight, hidden):
    from mixtralkit.ops.capacity.triton import cut_rows

    routing = routed(seed, rows, num_experts, top_k, ties=bool(seed % 2))
    rule = CapacityRule(num_experts, SHAPES[num_experts, top_k], 0.8, reroutes, by_weight)
    valid_T = (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) >= hidden).long() - 1
    wanted, over = slow_cut(*routing, rule, (valid_T >= 0).tolist())
    found = cut_to_capacity_reference(*routing, rule, valid_T if hidden else None)
    assert found.experts_TK.tolist() == wanted
    dropped = sum(e == -1 for row, valid in zip(wanted, valid_T, strict=True) if valid >= 0 for e in row)
    assert (int(found.dropped), int(found.rerouted)) == (dropped, over - dropped)
    assert over > 0
    check_weights(routing, found)
    check_equal(cut_rows(*routing, rule, valid_T if hidden else None), found)


def check_weights(routing, found: Cut) -> None:
    experts_TK, weights_TK, logits_TE, _ = routing
    assert not found.weights_TK[found.experts_TK < 0].any()
    for t, row in enumerate(found.experts_TK.tolist()):
        kept = [k for k, e in enumerate(row) if e >= 0]
        assert len({row[k] for k in kept}) == len(kept), "an expert twice in a row"
        if all(row[k] == experts_TK[t, k] for k in kept):
            moved = len(kept) < len(row) and not torch.equal(found.weights_TK[t, kept], weights_TK[t, kept])
        else:
            moved = True
        if moved:
            softmax_K = logits_TE[t, [row[k] for k in kept]].softmax(-1)
            torch.testing.assert_close(found.weights_TK[t, kept], softmax_K)


def check_equal(got: Cut, wanted: Cut) -> None:
    assert torch.equal(got.experts_TK, wanted.experts_TK)
    torch.testing.assert_close(got.weights_TK, wanted.weights_TK)
    assert (int(got.dropped), int(got.rerouted)) == (int(wanted.dropped), int(wanted.rerouted))
    assert got.dropped.dtype == got.rerouted.dtype == torch.int64


@pytest.mark.parametrize("reroutes", [False, True])
@pytest.mark.parametrize(("rows", "skew", "valid"), [(0, 0.0, 0), (20, 60.0, 0), (200, 60.0, -1), (150, 0.0, 0)])
def test_no_rows_all_rows_hidden_and_every_row_at_one_expert(rows, skew, valid, reroutes):
    """``valid`` -1 hides all rows."""
    from mixtralkit.ops.capacity.triton import cut_rows

    routing = routed(rows, rows, 8, 2, skew)
    rule, valid_T = CapacityRule(8, 0.6, 1.0, reroutes), torch.full((rows,), valid)
    found = cut_to_capacity_reference(*routing, rule, valid_T)
    assert not valid or (found.experts_TK == -1).all()
    assert int(found.dropped + found.rerouted) == 0 or skew or rows == 150
    if rows:
        check_equal(cut_rows(*routing, rule, valid_T), found)


def test_ties_go_to_the_earlier_row():
    from mixtralkit.ops.capacity.triton import cut_rows

    experts_TK, weights_TK = torch.zeros(4, 1, dtype=torch.int64), torch.tensor([[0.5], [0.9], [0.5], [0.1]])
    logits_TE, local_E = torch.tensor([[2.0, 1.0]] * 4), torch.tensor([False, True])
    for by_weight, kept in [(True, [0, 0, -1, -1]), (False, [0, 0, -1, -1])]:
        rule = CapacityRule(2, 1.0, by_weight=by_weight)
        for cut in (cut_to_capacity_reference, cut_rows):
            assert cut(experts_TK, weights_TK, logits_TE, local_E, rule).experts_TK.flatten().tolist() == kept
    light_TK = torch.tensor([[0.1], [0.5], [0.9], [1.0]])
    for by_weight, kept in [(True, [-1, -1, 0, 0]), (False, [0, 0, -1, -1])]:
        rule = CapacityRule(2, 1.0, by_weight=by_weight)
        for cut in (cut_to_capacity_reference, cut_rows):
            assert cut(experts_TK, light_TK, logits_TE, local_E, rule).experts_TK.flatten().tolist() == kept


@pytest.mark.parametrize(("factor", "percent"), [(1.1, 0.5), (0.3, 1.0), (1.0, 0.9), (1.25, 0.7), (0.7, 0.3)])
def test_a_capacity_is_the_same_number_on_host_and_device(factor, percent):
    from mixtralkit.ops.capacity.triton import cut_rows

    rule = CapacityRule(8, factor, percent)
    numbers = torch.arange(300) * 2
    assert rule.capacity(numbers).tolist() == [rule.capacity(int(number)) for number in numbers]
    for rows in (1, 20, 37, 100):
        experts_TK = torch.tensor([[1, 3]] * rows)
        cut = cut_rows(experts_TK, torch.full((rows, 2), 0.5), torch.zeros(rows, 8), torch.arange(8) == 3, rule)
        assert (cut.experts_TK >= 0).sum(0).tolist() == [min(rule.capacity(2 * rows), rows), rows]
