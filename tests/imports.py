"""Who imports whom, read from the source: imports inside functions count, those for type checkers alone do not."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def import_graph(folder: str) -> dict[str, set[str]]:
    """For each module below a folder of the repository the modules there that it imports.

    A package's ``__init__`` counts as a module; importing a module of a package is not importing its ``__init__``.
    """
    paths = {_name(path): path for path in sorted((ROOT / folder).rglob("*.py"))}
    graph = {}
    for name, path in paths.items():
        graph[name] = _imported(ast.parse(path.read_text(encoding="utf-8")), paths.keys()) - {name}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in this order, the last the first; empty where there are none."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            for imported in sorted(graph[module]):
                if circle := walk(imported, [*trail, module]):
                    return circle
            done.add(module)
        return []

    return next((circle for module in graph if (circle := walk(module, []))), [])


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST, modules: Collection[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # a name may be a module or stand in one
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module or "" for name in names}
        else:
            found |= _imported(node, modules)
    return found & set(modules)
