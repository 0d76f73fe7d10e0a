"""Damaged and hostile folders: one sentence that says what and where."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtralkit.checkpoint import open_checkpoint, save_checkpoint
from tests.checkpoint.models import CONFIGS, random_tensors, write_fairscale_shards, write_one_file, write_params

CONFIG = CONFIGS["grouped"]
W1 = "layers.0.feed_forward.experts.1.w1.weight"


def said_of(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def write_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = random_tensors(CONFIG)
    change(tensors)
    write_one_file(folder, CONFIG, tensors)


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in said_of(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    path = write_one_file(tmp_path, CONFIG, random_tensors(CONFIG))
    assert "is not a folder" in said_of(path)


def test_empty_folder_and_foreign_files(tmp_path: Path) -> None:
    assert "holds no checkpoint" in said_of(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "it holds pytorch_model.bin" in said_of(tmp_path)


def test_ambiguous_folder_lists_what_was_found(tmp_path: Path) -> None:
    write_one_file(tmp_path, CONFIG, random_tensors(CONFIG))
    save_file(random_tensors(CONFIG), tmp_path / "consolidated.safetensors")
    said = said_of(tmp_path)
    assert "several checkpoints" in said
    assert "consolidated.00.pth" in said
    assert "consolidated.safetensors" in said


def test_lost_parameters(tmp_path: Path) -> None:
    write_one_file(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / "params.json").unlink()
    assert "lacks params.json" in said_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"dim": 24}', "\udcff"])
def test_unreadable_parameters(tmp_path: Path, text: str) -> None:
    write_one_file(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / "params.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "params.json: " in said_of(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated_shard(tmp_path: Path, kept: float) -> None:
    write_fairscale_shards(tmp_path, CONFIG, random_tensors(CONFIG), 2)
    shard = tmp_path / "consolidated.01.pth"
    os.truncate(shard, int(shard.stat().st_size * kept))
    assert "consolidated.01.pth: " in said_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_safetensors(tmp_path: Path, kept: int) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), "hf", 2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(path, kept % path.stat().st_size)
    assert "model-00002-of-00002.safetensors: truncated" in said_of(tmp_path)


def test_safetensors_header_that_is_not_json(tmp_path: Path) -> None:
    write_params(tmp_path, CONFIG)
    (tmp_path / "consolidated.safetensors").write_bytes((4).to_bytes(8, "little") + b"{{{{")
    assert "its safetensors header is not readable" in said_of(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"norm.weight": {"dtype": "BF16", "shape": [24], "data_offsets": [0, 40]}},
        {"norm.weight": {"dtype": "BF16", "shape": [-24], "data_offsets": [0, 48]}},
        {"norm.weight": {"dtype": "BF16", "shape": "24", "data_offsets": [0, 48]}},
        {"norm.weight": {"dtype": "BF16", "shape": [24], "data_offsets": 48}},
        {"norm.weight": {"dtype": "BF16", "shape": [24], "data_offsets": [-90, -42]}},
        {"norm.weight": {"dtype": "I8", "shape": [24], "data_offsets": [0, 24]}},
    ],
)
def test_safetensors_header_that_lies(tmp_path: Path, header: dict) -> None:
    write_params(tmp_path, CONFIG)
    text = json.dumps(header).encode()
    (tmp_path / "consolidated.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(60))
    assert "consolidated.safetensors: " in said_of(tmp_path)


def test_lost_shard_in_the_middle(tmp_path: Path) -> None:
    write_fairscale_shards(tmp_path, CONFIG, random_tensors(CONFIG), 4)
    (tmp_path / "consolidated.02.pth").unlink()
    assert "without a gap, found 0, 1, 3" in said_of(tmp_path)


def test_lost_shard_at_the_end(tmp_path: Path) -> None:
    write_fairscale_shards(tmp_path, CONFIG, random_tensors(CONFIG), 4)
    (tmp_path / "consolidated.03.pth").unlink()
    said = said_of(tmp_path)
    assert "misshapen: tok_embeddings.weight in" in said
    assert "found [32, 6], wanted [32, 24]" in said
    assert "missing" not in said


def test_lost_hugging_face_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), "hf", 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors" in said_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "lacks model-00002-of-00003.safetensors" in said_of(tmp_path)


def test_lost_rank_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), "mixtralkit")
    (tmp_path / "rank-00-of-01.safetensors").unlink()
    assert "checkpoint.json is for 1 ranks, found 0 rank files" in said_of(tmp_path)


def test_wrong_shape(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: tensors.update({W1: torch.zeros(24, 20)}))
    assert f"1 misshapen: {W1} in {tmp_path}/consolidated.00.pth: found [24, 20], wanted [20, 24]" in said_of(tmp_path)


def test_missing_extra_and_misshapen_in_one_sentence(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[W1]
        tensors["lora.weight"] = torch.zeros(2, 3)
        tensors["norm.weight"] = torch.zeros(25)

    write_changed(tmp_path, change)
    said = said_of(tmp_path)
    assert f"1 missing: {W1} [20, 24]" in said
    assert "1 not part of the model: lora.weight [2, 3] in" in said
    assert "1 misshapen: norm.weight in" in said
    assert "found [25], wanted [24]" in said


def test_a_model_of_other_parameters_lists_a_few_and_counts_the_rest(tmp_path: Path) -> None:
    write_one_file(tmp_path, CONFIG, random_tensors(CONFIG))
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "dim": 48}))
    said = said_of(tmp_path)
    assert "more" in said
    assert len(said) < 2000


def test_what_is_not_a_tensor(tmp_path: Path) -> None:
    write_changed(tmp_path, lambda tensors: tensors.update({W1: 3}))
    assert f"{W1} is a int, not a tensor" in said_of(tmp_path)


def test_what_is_not_a_mapping(tmp_path: Path) -> None:
    write_params(tmp_path, CONFIG)
    torch.save(list(random_tensors(CONFIG).values()), tmp_path / "consolidated.00.pth")
    assert "holds a list, not tensors by name" in said_of(tmp_path)


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "it-ran"
    folder.mkdir()
    write_changed(folder, lambda tensors: tensors.update({"norm.weight": _Payload(str(mark))}))
    said = said_of(folder)
    assert "refused: its pickle asks for " in said
    assert "mkdir" in said
    assert not mark.exists()
    torch.load(folder / "consolidated.00.pth", weights_only=False)
    assert mark.exists()  # the payload is a real one


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "it-ran"
    folder.mkdir()
    write_params(folder, CONFIG)
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps({"norm.weight": _Payload(str(mark))}))
    assert "before 1.6" in said_of(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"), (b"<html>", "is not a torch file")],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, wanted: str) -> None:
    write_params(tmp_path, CONFIG)
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    assert wanted in said_of(tmp_path)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    """A shard that shrinks while it is converted; nothing half-written stays."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    path = write_one_file(source, CONFIG, random_tensors(CONFIG))
    with open_checkpoint(source) as reader:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ValueError, match=r"consolidated\.00\.pth: was cut short"):
            save_checkpoint(target, CONFIG, reader, "hf")
    assert list(target.iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="the disk is full; nothing was written"):
        save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "shards", "wanted"),
    [
        ("mistral-shards", 3, r"shards \(3\) must divide n_heads \(4\)"),
        ("mistral-expert-shards", 5, r"shards \(5\) must be at most num_experts \(4\)"),
        ("mistral", 2, r"shards \(2\) cannot be given with format 'mistral'"),
        ("hf", 0, r"shards \(0\) must be at least 1"),
        ("hf", 1000, r"shards \(1000\) must be at most the number of tensors"),
        ("gguf", None, r"format \('gguf'\) must be one of mistral, "),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, format: str, shards: int | None, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        save_checkpoint(tmp_path / "target", CONFIG, random_tensors(CONFIG), format, shards)


def test_tensors_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors[W1]
    with pytest.raises(ValueError, match=rf"{W1}: found None, wanted \(20, 24\)"):
        save_checkpoint(tmp_path, CONFIG, tensors)


def test_the_command_converts(tmp_path: Path, command_line) -> None:
    write_one_file(tmp_path, CONFIG, random_tensors(CONFIG))
    done = command_line("convert", tmp_path, tmp_path / "hf", "--format", "hf", "--shards", 2, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    with open_checkpoint(tmp_path / "hf") as reader:
        for name, tensor in random_tensors(CONFIG).items():
            assert torch.equal(reader.read(name), tensor.float())


def test_the_command_fails_in_one_sentence(tmp_path: Path, command_line) -> None:
    done = command_line("convert", tmp_path / "nowhere", tmp_path / "target")
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path}/nowhere: no such folder"
