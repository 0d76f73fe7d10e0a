"""Hugging Face's files, written and read by ``transformers`` itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixtralkit.checkpoint import open_checkpoint, save_checkpoint
from tests.checkpoint.models import CONFIGS, random_tensors


def _their_model(name: str) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIGS[name].to_hugging_face("float32").items() if k != "torch_dtype"}
    return MixtralForCausalLM(MixtralConfig(**config))


@pytest.mark.parametrize("name", ["grouped", "one_kv_head", "odd_heads"])
@pytest.mark.parametrize("format", ["hf", "hf-packed"])
@pytest.mark.parametrize("shards", [1, 3])
def test_theirs_to_ours_to_theirs(tmp_path: Path, name: str, format: str, shards: int) -> None:
    """What ``save_pretrained`` wrote, through Mistral's format, loads again with every parameter the same."""
    model = _their_model(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    with open_checkpoint(tmp_path / "theirs") as reader:
        save_checkpoint(tmp_path / "ours", reader.config, reader, "mistral")
    with open_checkpoint(tmp_path / "ours") as reader:
        assert reader.config == CONFIGS[name]
        save_checkpoint(tmp_path / "again", reader.config, reader, format, shards)
    again, report = MixtralForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    wanted, got = model.state_dict(), again.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["grouped", "odd_heads"])
def test_packed_as_transformers_keeps_it(tmp_path: Path, name: str) -> None:
    """``save_original_format=False`` writes all experts of a layer in one tensor."""
    model = _their_model(name)
    model.save_pretrained(tmp_path / "packed", save_original_format=False)
    model.save_pretrained(tmp_path / "plain")
    with open_checkpoint(tmp_path / "packed") as packed, open_checkpoint(tmp_path / "plain") as plain:
        for tensor in plain.shapes():
            assert torch.equal(packed.read(tensor), plain.read(tensor)), tensor


def test_query_rows_turn_neighbours_where_theirs_turn_halves(tmp_path: Path) -> None:
    """Row i of a head's first half and row i of its second are rows 2i and 2i+1 here."""
    config = CONFIGS["grouped"]
    tensors = random_tensors(config, torch.float32)
    save_checkpoint(tmp_path, config, tensors, "hf")
    theirs = MixtralForCausalLM.from_pretrained(tmp_path).state_dict()["model.layers.1.self_attn.q_proj.weight"]
    ours = tensors["layers.1.attention.wq.weight"]
    half = config.head_dim // 2
    for head in range(config.n_heads):
        for i in range(half):
            start = head * config.head_dim
            assert torch.equal(theirs[start + i], ours[start + 2 * i])
            assert torch.equal(theirs[start + half + i], ours[start + 2 * i + 1])
