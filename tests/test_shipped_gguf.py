"""The model in ckpts/ as a llama.cpp file, from the command line to text, with no other file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtralkit.checkpoint import open_checkpoint, save_checkpoint
from mixtralkit.distributed import RankContext
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.mixtral import Mixtral

pytest.importorskip("gguf")
from tests.checkpoint.gguf_files import write_gguf

CKPTS = Path(__file__).resolve().parent.parent / "ckpts"
PROMPTS = ["In the beginning", "def read(path):\n", "NAME\n       tar -"]
pytestmark = pytest.mark.filterwarnings("ignore:.* become numbers")


def texts(model: Path, **options) -> list[str]:
    mixtral = Mixtral.build(
        model, max_seq_len=64, max_batch_size=3, context=RankContext(), dtype="float32", **options
    )  # fmt: skip
    return [answer["generation"] for answer in mixtral.text_completion(PROMPTS, 0.0, max_gen_len=16)]


@pytest.mark.parametrize(
    ("layout", "kind", "split"), [("stacked", "Q8_0", 0), ("single", "Q8_0", 30), ("stacked", "Q4_0", 0)]
)
def test_text_is_that_of_the_same_numbers(tmp_path: Path, layout: str, kind: str, split: int) -> None:
    """In one file, in the old layout in parts, and with experts kept in four bits."""
    with open_checkpoint(CKPTS) as reader:
        config, tensors = reader.config, {name: reader.read(name).float() for name in reader.shapes()}
    folder, tokenizer = tmp_path / "gguf", Tokenizer(CKPTS / "tokenizer.model")
    folder.mkdir()
    numbers = write_gguf(
        folder / "model.gguf", layout, kind, model=(config, tensors), tokenizer=tokenizer, split=split
    )  # fmt: skip
    save_checkpoint(tmp_path / "plain", config, numbers, tokenizer=CKPTS / "tokenizer.model")
    path = min(folder.iterdir())
    assert (len(list(folder.iterdir())) > 1) == bool(split)
    expected = texts(tmp_path / "plain")
    assert texts(path) == expected
    with open_checkpoint(folder) as reader:
        assert reader.found.files == tuple((part,) for part in sorted(folder.iterdir()))
    with open_checkpoint(path) as reader:
        assert reader.weights.name == ("int4:32" if kind == "Q4_0" else "plain")
        save_checkpoint(tmp_path / "hf", config, reader, "hf")
    assert {one.name for one in (tmp_path / "hf").iterdir()} >= {"tokenizer.model", "generation_config.json"}
    assert texts(tmp_path / "hf") == expected
    if kind == "Q4_0":
        return
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = [sys.executable, "-m", "mixtralkit", "generate", "-m", path, "--prompts", prompts, "--output", output]
    command += ["--dtype", "float32", "--temperature", "0", "--max_gen_len", "16", "--max_seq_len", "64"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["generation"] for answer in answers] == expected
