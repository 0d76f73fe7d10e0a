"""What index, config.json and the other side files say is what is read, and what a conversion keeps."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtralkit.checkpoint import open_checkpoint, save_checkpoint
from mixtralkit.config import ModelConfig
from tests.checkpoint.models import CONFIGS, random_tensors, write_fairscale_shards, write_one_file

CONFIG = CONFIGS["grouped"]
INDEX = "model.safetensors.index.json"


def hugging_face(folder: Path, shards: int = 1, seed: int = 0, **config: object) -> Path:
    save_checkpoint(folder, CONFIG, random_tensors(CONFIG, seed=seed), "hf", shards)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **config}))
    return folder


def said_of(folder: Path, **more: object) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_checkpoint(folder, **more)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def holds(folder: Path, seed: int = 0, **more: object) -> bool:
    with open_checkpoint(folder, **more) as reader:
        return all(torch.equal(reader.read(name), t) for name, t in random_tensors(CONFIG, seed=seed).items())


def test_the_index_names_the_files_whatever_their_names(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "a", 2)
    text = (folder / INDEX).read_text()
    for i in (1, 2):
        (folder / f"model-0000{i}-of-00002.safetensors").rename(folder / f"weights.{i}.safetensors")
        text = text.replace(f"model-0000{i}-of-00002.", f"weights.{i}.")
    (folder / INDEX).write_text(text)
    assert holds(folder)


def test_files_that_the_index_does_not_name_are_mentioned_once_and_not_read(tmp_path: Path) -> None:
    """Shards of an older save beside the newer ones were read in their place."""
    folder, old = hugging_face(tmp_path / "a", 3), hugging_face(tmp_path / "old", 2, seed=1)
    for i in (1, 2):
        (old / f"model-0000{i}-of-00002.safetensors").rename(folder / f"model-0000{i}-of-00002.safetensors")
    with pytest.warns(UserWarning, match=r"not read, .*: model-00001-of-00002\.safetensors, model-00002") as warned:
        assert holds(folder)
    assert len(warned) == 1
    (folder / INDEX).unlink()
    assert "shards of several saves" in said_of(folder)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "", "."])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, file: str) -> None:
    folder = hugging_face(tmp_path / "a", 2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    assert "which is no file of this folder" in said_of(folder)


def test_an_index_that_is_wrong_about_a_tensor(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "a", 2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    said = said_of(folder)
    assert "lm_head.weight is not in model-00001" in said
    assert "it is in model-00002" in said


def test_a_tensor_in_two_files_is_an_error_that_names_both(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "a", 2)
    second = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file({**load_file(second), "model.embed_tokens.weight": first["model.embed_tokens.weight"]}, second)
    said = said_of(folder)
    assert "model.embed_tokens.weight is in two files" in said
    assert "model-00001-of" in said
    assert "model-00002-of" in said


@pytest.mark.parametrize("name", ["layers.0.feed_forward.experts.1.w1.weight", "norm.weight", "output.weight"])
def test_a_tensor_in_two_pth_shards(tmp_path: Path, name: str) -> None:
    """A shard of another save holds what its neighbour holds: which is right is not for us to guess."""
    tensors = random_tensors(CONFIG)
    write_fairscale_shards(tmp_path, CONFIG, tensors, 2)
    paths = [tmp_path / f"consolidated.0{i}.pth" for i in (0, 1)]
    shards = [torch.load(path) for path in paths]
    if name == "norm.weight":
        shards[1][name] = tensors[name] + 1
    elif name == "output.weight":  # whole, in one shard of two
        shards = [{**shards[0], name: tensors[name]}, shards[1]]
    else:
        shards = [{**shard, name: tensors[name]} for shard in shards]
    for shard, path in zip(shards, paths, strict=True):
        torch.save(shard, path)
    said = said_of(tmp_path)
    assert name in said
    assert "consolidated.00.pth" in said


def test_format_chooses_among_several(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    write_one_file(tmp_path, CONFIG, random_tensors(CONFIG, seed=1))
    assert "choose a format (mistral, hf)" in said_of(tmp_path)
    assert holds(tmp_path, format="hf")
    assert holds(tmp_path, 1, format="mistral")
    assert holds(tmp_path, 1, format="mistral-shards")
    assert "holds no checkpoint of format 'mixtralkit'; it holds mistral, hf" in said_of(tmp_path, format="mixtralkit")
    with pytest.raises(ValueError, match=r"format \('ggml'\) must be one of mistral"):
        open_checkpoint(tmp_path, "ggml")


ROPES = [
    {"rope_theta": 5e5, "rope_parameters": None},
    {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 1e4, "rope_scaling": {"type": "default", "rope_theta": 5e5}, "rope_parameters": {"rope_theta": 3.0}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "rope_parameters": None},
]  # fmt: skip


@pytest.mark.parametrize("stated", ROPES, ids=str)
@pytest.mark.filterwarnings("ignore:rope_theta")
def test_rope_base_is_where_transformers_reads_it(tmp_path: Path, stated: dict) -> None:
    from transformers import AutoConfig

    folder = hugging_face(tmp_path)
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if not k.startswith("rope")}
    config.update({key: value for key, value in stated.items() if value is not None})
    (folder / "config.json").write_text(json.dumps(config))
    with open_checkpoint(folder) as reader:
        assert reader.config.rope_theta == AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"]


def test_absent_keys_are_what_transformers_takes(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    config = CONFIG.to_hugging_face("float32")
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "num_local_experts", "head_dim",
                "num_experts_per_tok", "sliding_window", "rope_theta", "rope_parameters"):  # fmt: skip
        del config[key]
    config |= {"num_attention_heads": 8, "hidden_size": 48}
    ours, theirs = ModelConfig.from_dict(config), MixtralConfig(**config)
    assert (ours.n_kv_heads, ours.max_seq_len, ours.norm_eps) == (
        theirs.num_key_value_heads, theirs.max_position_embeddings, theirs.rms_norm_eps
    )  # fmt: skip
    assert (ours.num_experts, ours.num_experts_per_tok) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    assert (ours.rope_theta, ours.sliding_window) == (theirs.rope_parameters["rope_theta"], theirs.sliding_window)
    assert ModelConfig.from_dict({**config, "num_key_value_heads": None}).n_kv_heads == 8, "as transformers 4 has it"


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling: rope_type \('yarn'\)"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling: rope_type \('linear'\)"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_parameters: rope_type \('llama3'\)"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by kind of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings \(True\)"),
        ({"model_type": "mistral"}, r"model_type \('mistral'\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"sliding_window": 0}, r"sliding_window \(0\)"),
        ({"max_position_embeddings": "long"}, r"max_seq_len \('long'\)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 3}}, r"bits \(3\) must be 4"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, r"version \('gemv'\) must be"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"bits \(None\) must be 4 or 8"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantised by AQLM, which is not read"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}}, "format"),
        ({"quantization_config": "awq"}, r"quantization_config \('awq'\) must be an object"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "load_in_4bit or load_in_8bit must be true"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "mxfp4"}}, r"mode \('mxfp4'\) must be affine"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, stated: dict, says: str) -> None:
    import re

    said = said_of(hugging_face(tmp_path, **stated))
    assert "config.json: " in said
    assert re.search(says, said), said


@pytest.mark.parametrize(("name", "method"), [("qweight", "AWQ or GPTQ"), ("weight_packed", "compressed-tensors"),
                                              ("absmax", "bitsandbytes"), ("weight_scale", "FP8")])  # fmt: skip
def test_quantised_tensors_without_a_word_in_config(tmp_path: Path, name: str, method: str) -> None:
    folder = hugging_face(tmp_path)
    path = folder / "model.safetensors"
    more = {f"model.layers.0.block_sparse_moe.experts.0.w1.{name}": torch.zeros(3, dtype=torch.int32)}
    save_file({**load_file(path), **more}, path)
    assert f"quantised by {method}" in said_of(folder)
    save_file({**load_file(path), **{key: torch.zeros(3) for key in more}}, path)
    assert f"quantised by {method}" in said_of(folder)


def test_ggml_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "mixtral.q4_0.ggml").write_bytes(b"ggml")
    assert "quantised by GGML" in said_of(tmp_path)


SIDE = {
    "generation_config.json": b'{"eos_token_id": [2, 13]}',
    "tokenizer_config.json": b'{"chat_template":   "x", "eos_token": "</s>"}\n\n',
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"any bytes",
}


@pytest.mark.parametrize("target", ["hf", "hf-packed", "mistral", "mistral-stacked", "mixtralkit"])
def test_conversion_keeps_side_files_byte_for_byte(tmp_path: Path, target: str) -> None:
    """Hugging Face to Hugging Face lost eos_token_id, keys announced as kept, and every side file."""
    source = hugging_face(
        tmp_path / "source", eos_token_id=13, router_aux_loss_coef=0.5, my_note="keep", bos_token_id=1
    )
    for name, content in SIDE.items():
        (source / name).write_bytes(content)
    with warnings.catch_warnings(record=True) as said, open_checkpoint(source) as reader:
        warnings.simplefilter("always")
        save_checkpoint(tmp_path / "target", reader.config, reader, target)
    for name, content in SIDE.items():
        assert (tmp_path / "target" / name).read_bytes() == content
    texts = [str(one.message) for one in said if "cannot hold" in str(one.message)]
    if target.startswith("hf"):
        assert (tmp_path / "target/config.json").read_bytes() == (source / "config.json").read_bytes()
        assert texts == []
    elif target != "mistral-stacked":
        assert "router_aux_loss_coef" in texts[0]
        kept = json.loads(
            next((tmp_path / "target").glob("[pc]*s.json"), tmp_path / "target/checkpoint.json").read_text()
        )
        assert kept.get("config", kept)["my_note"] == "keep"


def test_conversion_says_the_new_dtype_and_keeps_the_rest(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "source", eos_token_id=13, my_note="keep")
    with open_checkpoint(source) as reader:
        save_checkpoint(tmp_path / "target", reader.config, reader, "hf", dtype="float32")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "target"))
    assert {k for k in before if before[k] != after[k]} == {"dtype", "torch_dtype"}
    assert set(before) == set(after)


def test_end_tokens_of_config_json_survive_where_there_is_none(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "source", eos_token_id=13)
    with open_checkpoint(source) as reader:
        save_checkpoint(tmp_path / "target", reader.config, reader, "mistral")
    assert json.loads((tmp_path / "target/generation_config.json").read_text()) == {"eos_token_id": 13}


def test_mistral_to_mistral_keeps_params_json(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_one_file(source, CONFIG, random_tensors(CONFIG))
    (source / "params.json").write_text('{"note": 1,   ' + json.dumps(CONFIG.to_mistral())[1:])
    with open_checkpoint(source) as reader:
        save_checkpoint(tmp_path / "target", reader.config, reader, "mistral-shards", 2)
    assert (tmp_path / "target/params.json").read_bytes() == (source / "params.json").read_bytes()


def test_side_files_of_the_target_stay_without_overwrite(tmp_path: Path) -> None:
    source, target = hugging_face(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (source / "tokenizer.model").write_bytes(b"new")
    (target / "tokenizer.model").write_bytes(b"mine")
    with open_checkpoint(source) as reader:
        with pytest.warns(UserWarning, match=r"tokenizer\.model is there already and stays"):
            save_checkpoint(target, reader.config, reader, "hf")
        assert (target / "tokenizer.model").read_bytes() == b"mine"
        save_checkpoint(target, reader.config, reader, "hf", overwrite=True)
    assert (target / "tokenizer.model").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "model.safetensors", "config.json"])
def test_pipes_are_refused_and_never_waited_for(tmp_path: Path, name: str) -> None:
    (
        hugging_face
        if "model" in name or "config" in name
        else lambda p: write_one_file(p, CONFIG, random_tensors(CONFIG))
    )(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "is a pipe, not an ordinary file" in said_of(tmp_path)
