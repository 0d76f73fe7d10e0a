"""tools/train_tiny.py as a person runs it."""

import json
import random
from pathlib import Path

import pytest
import torch

from mixtralkit.checkpoint import load_into, open_checkpoint
from mixtralkit.config import ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from tests.training.samples import small_config, small_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path):
    """A text with bytes that are not UTF-8, another text, and a small architecture."""
    corpus = small_corpus()
    noise = random.Random(0).randbytes(600)
    (tmp_path / "prose").write_bytes(corpus["prose"]["train"][0].text * 3 + noise)
    (tmp_path / "code.py").write_bytes(corpus["code"]["train"][0].text * 3)
    (tmp_path / "small.json").write_text(json.dumps(small_config().to_mistral()))
    return tmp_path


def test_text_to_checkpoint_and_on(files, command_line):
    out = files / "out"
    size = ("--config", files / "small.json", "--batch_tokens", 512, "--seq_len", 32, "--warmup", 3)
    text = ("--text", files / "prose", files / "code.py", "--vocab_size", 340, "--heldout_percent", 10)
    first = command_line("train", "--device", "cpu", out, *text, *size, "--steps", 12, "--log_dir", files / "board")
    assert first.returncode == 0, first.stderr
    assert "bits/byte" in first.stdout
    assert list((files / "board").glob("events*"))
    report = json.loads((out / "report.json").read_text())
    assert list(report["domains"]) == ["code", "prose"]
    assert 0 < report["domains"]["code"]["bits_per_byte"] < 8
    assert (out / "checkpoint" / "tokenizer.model").exists()
    assert check_checkpoint(out / "checkpoint")

    more = command_line(
        "train", "--device", "cpu", out, "--tokens", out / "tokens.npz", *size, "--steps", 20, "--resume"
    )
    assert more.returncode == 0, more.stderr
    assert json.loads((out / "report.json").read_text())["steps"] == 20


def test_nothing_of_another_run_is_touched(files, command_line):
    """tokens.npz was written anew before anybody saw that a run was there."""
    out = files / "out"
    out.mkdir()
    size = ("--config", files / "small.json", "--batch_tokens", 64, "--seq_len", 32, "--steps", 1, "--device", "cpu")
    text = ("--vocab_size", 310, "--heldout_percent", 10, "--text")
    assert command_line("train", out, *text, files / "prose", *size).returncode == 0
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    again = command_line("train", out, *text, files / "code.py", *size)
    more = command_line("train", out, *text, files / "code.py", *size, "--resume")
    (files / "other").mkdir()
    (files / "other" / "tokens.npz").write_bytes(before[out / "tokens.npz"])
    other = command_line("train", files / "other", *text, files / "code.py", *size)
    for done, says in (
        (again, f"error: {out}/state: a run is there; go on with it by --resume, or name another output folder\n"),
        (more, f"error: {out}/tokens.npz: has the tokens of another text; take these by --tokens, or move them away\n"),
        (other, f"error: {files}/other/tokens.npz: has the tokens of another text"),
    ):
        assert done.returncode == 1
        assert done.stderr.startswith(says)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def check_checkpoint(folder: Path) -> bool:
    reader = open_checkpoint(folder)
    assert len(list(folder.glob("consolidated.*.pth"))) == 2
    assert reader.config == ModelConfig.from_file(folder / "params.json")
    layout = RankLayout.single(reader.config)
    model = Transformer(layout, RankContext(), torch.bfloat16)
    load_into(model.named_tensors(), layout, reader, RankContext(), progress=False)
    return all(bool(tensor.isfinite().all()) for tensor in model.named_tensors().values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "text or tokens must be given"),
        (("--text", "nowhere"), "nowhere does not exist"),
        (("--tokens", "none.npz"), "none.npz"),
        (("--text", "x", "--steps", 5, "--minutes", 1), "must be given, not both"),
        (("--text", "x", "--seq_len", 100), "must be a multiple of seq_len"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, command_line, options, words):
    done = command_line("train", "--device", "cpu", tmp_path / "out", *options)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
