"""A tokenizer for the tests of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtralkit.engine.tokenizer import Tokenizer
from tests.engine.parts import make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.model")
