"""Tests marked ``gpu`` run where there is one. Elsewhere Triton kernels run in its interpreter."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings

import pytest
import torch

from mixtralkit.cli import COMMANDS
from mixtralkit.cli.run import run_tool
from tests import interpreter
from tests.ranks import Done

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any import of one
interpreter.hasten()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background; processes of tests would inherit it
    with contextlib.suppress(ValueError):  # not in this thread
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def command_line(capsys, monkeypatch):
    """Runs a command of ``mixtralkit`` in this process, as its own would: the name and the words that follow it."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    def run(name: str, *words: object) -> Done:
        monkeypatch.setattr(os, "_exit", leave)
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        capsys.readouterr()
        with warnings.catch_warnings():
            try:
                run_tool(COMMANDS, None, {"m": "model", "t": "tokenizer"}, [name, *map(str, words)], "mixtralkit")
                code = 0
            except SystemExit as end:
                code = end.code
        return Done(code, *capsys.readouterr())

    return run
