"""Imports point one way: docs/architecture.md has the order, and this holds it."""

from __future__ import annotations

import ast

from tests.imports import ROOT, find_circle, import_graph

# From the top down: a folder imports those below its line, none beside it or above.
ORDER = (
    ("__main__",),
    ("cli",),
    ("server",),
    ("evaluation", "training", "terminal"),
    ("mixtral", "layers"),
    ("automatic",),
    ("engine",),
    ("model",),
    ("fastmoe",),
    ("moe",),
    ("ops", "cache", "checkpoint"),
    ("layout",),
    ("planning",),
    ("distributed",),
    ("config",),
    ("moe.weights",),
    ("json_file", "npz_file", "whole_file", "model_parameters", "version"),
)
BESIDE = {("model_parameters", "json_file"), ("npz_file", "json_file")}


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}
    assert find_circle(graph) == ["b", "d", "b"]
    assert find_circle(graph | {"d": {"c"}}) == []


def test_modules_tie_no_circle():
    graph = import_graph("mixtralkit")
    assert "mixtralkit.ops.experts.triton_small" in graph["mixtralkit.ops.experts"], "imports inside functions count"
    assert find_circle(graph) == []


def test_folders_import_downwards():
    place = {folder: number for number, folders in enumerate(ORDER) for folder in folders}
    edges = {
        (folder, other): (module, imported)
        for module, others in import_graph("mixtralkit").items()
        for imported in others
        if (folder := _folder(module)) != (other := _folder(imported)) and "" not in (folder, other)
    }
    assert len(edges) > 40
    unknown = {folder for edge in edges for folder in edge} - place.keys()
    assert not unknown, "give it a line in ORDER"
    wrong = {edge: how for edge, how in edges.items() if place[edge[0]] >= place[edge[1]] and edge not in BESIDE}
    assert not wrong


def test_planning_needs_no_ranks():
    paths = sorted((ROOT / "mixtralkit" / "planning").rglob("*.py"))
    assert len(paths) > 30
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if name.startswith("torch.distributed")], path


def test_references_import_nothing_of_triton():
    graph = import_graph("mixtralkit/ops")
    reached = {module for module in graph if module.endswith(".reference")}
    assert len(reached) > 7
    while more := set().union(*(graph[module] for module in reached)) - reached:
        reached |= more
    assert not [module for module in reached if ".triton" in module]


def _folder(module: str) -> str:
    """The folder or module right below the package; nothing for the package itself, which imports when asked."""
    if module.startswith("mixtralkit.moe.weights"):  # formats of weights: what planning and options know of them
        return "moe.weights"
    return module.split(".")[1] if "." in module else ""
