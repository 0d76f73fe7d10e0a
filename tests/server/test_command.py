"""``mixtralkit serve`` before it listens."""

from __future__ import annotations

import sys

import pytest


def test_a_package_that_is_missing_is_named(command_line, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mixtralkit.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = command_line("serve", "-m", "ckpts")
    assert done.returncode == 1
    assert done.stderr == "error: serve needs the package fastapi: pip install 'mixtralkit[serve]'\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "70000"], "port (70000) must be a whole number in 0 … 65535"),
        (["--max_waiting", "0"], "max_waiting (0) must be a whole number of at least 1"),
        (["--host", "nowhere.invalid"], "host and port (nowhere.invalid, 8000): "),
    ],
)
def test_a_wrong_option(command_line, words, says):
    done = command_line("serve", "-m", "ckpts", *words)
    assert done.returncode != 0
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
