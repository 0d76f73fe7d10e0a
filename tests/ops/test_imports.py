"""No op ties an import circle, and no reference needs Triton."""

from __future__ import annotations

from tests.imports import find_circle, import_graph


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}
    assert find_circle(graph) == ["b", "d", "b"]
    assert find_circle(graph | {"d": {"c"}}) == []


def test_ops_tie_no_circle():
    graph = import_graph("mixtralkit/ops")
    assert "mixtralkit.ops.experts.triton_small" in graph["mixtralkit.ops.experts"], "imports inside functions count"
    assert find_circle(graph) == []


def test_references_import_nothing_of_triton():
    graph = import_graph("mixtralkit/ops")
    reached = {module for module in graph if module.endswith(".reference")}
    assert len(reached) > 7
    while more := set().union(*(graph[module] for module in reached)) - reached:
        reached |= more
    assert not [module for module in reached if ".triton" in module]
