"""The options of a model are those of every command that builds one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

import pytest

from mixtralkit.config import MoEOptions
from mixtralkit.options import ModelOptions

ROOT = Path(__file__).resolve().parent.parent


def load(path: str):
    """The module of a script."""
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        return importlib.import_module(Path(path).stem)
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("tools/example.py", "generate"),
        ("tools/example.py", "chat"),
        ("tools/evaluate.py", "evaluate"),
        ("tools/profile_experts.py", "profile"),
        ("benchmarks/bench_model.py", "bench_model"),
    ],
)
def test_every_command_has_them(path, command):
    function = getattr(load(path), command)
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(ModelOptions):
        assert parameters[field.name].default == field.default
        assert f"\n    {field.name}: " in function.__doc__


def test_the_harness_takes_them_too():
    lm_eval = pytest.importorskip("mixtralkit.evaluation.lm_eval")
    assert {field.name for field in dataclasses.fields(ModelOptions)} <= set(
        inspect.signature(lm_eval.MixtralLM.build).parameters
    )


def test_they_become_options_of_the_layer_and_of_the_choice(monkeypatch):
    monkeypatch.setenv("FMOE_FASTER_SHADOW_ENABLE", "1")
    running = ModelOptions(symmetric_rows=7, exchange="static", faster_schedule=True, memory_gb=7.0, explain=True)
    moe = running.moe()
    assert (moe.symmetric_rows, moe.exchange, moe.faster.schedule, moe.faster.shadow) == (7, "static", True, True)
    arguments = running.load_arguments()
    assert arguments["options"] == moe
    assert (arguments["automatic"].memory_gb, arguments["automatic"].explain) == (7.0, True)
    monkeypatch.delenv("FMOE_FASTER_SHADOW_ENABLE")
    assert ModelOptions().moe() == MoEOptions()
