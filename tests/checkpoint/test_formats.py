"""Round trips of every format, and foreign files that the project's writer had no hand in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mixtralkit.checkpoint import FORMATS, RankFiles, open_checkpoint, save_checkpoint
from mixtralkit.checkpoint.names import stored_tensors
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.planning.plan import contiguous
from tests.checkpoint.models import (
    CONFIGS,
    random_tensors,
    write_fairscale_shards,
    write_one_file,
    write_params,
    write_stacked,
)


def assert_holds(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
    """The folder opens as this model and every tensor is bit for bit the same."""
    with open_checkpoint(folder) as reader:
        assert reader.config == config
        assert list(reader.shapes()) == list(tensors)
        for name, tensor in tensors.items():
            got = reader.read(name)
            assert got.dtype == tensor.dtype, name
            assert torch.equal(got, tensor), name


@pytest.mark.parametrize("name", ["grouped", "one_kv_head"])
@pytest.mark.parametrize("format", FORMATS)
def test_written_then_converted_then_read(tmp_path: Path, format: str, name: str) -> None:
    config = CONFIGS[name]
    tensors = random_tensors(config)
    save_checkpoint(tmp_path / "first", config, tensors, format)
    with open_checkpoint(tmp_path / "first") as reader:
        save_checkpoint(tmp_path / "back", reader.config, reader, "mistral")
    assert_holds(tmp_path / "first", config, tensors)
    assert_holds(tmp_path / "back", config, tensors)
    stored = torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape_round_trips(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    kv_heads = draw(1, 3)
    experts = draw(1, 5)
    config = ModelConfig(
        dim=draw(1, 9), n_layers=draw(1, 2), head_dim=2 * draw(1, 3), hidden_dim=draw(1, 9),
        n_heads=kv_heads * draw(1, 3), n_kv_heads=kv_heads, vocab_size=draw(1, 9), num_experts=experts,
        num_experts_per_tok=draw(1, experts),
    )  # fmt: skip
    tensors = random_tensors(config, data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    format = data.draw(st.sampled_from([f for f in FORMATS if "shards" not in f]))
    folder = tmp_path_factory.mktemp("any")
    world_size = draw(1, 3)
    plan = contiguous(config.n_layers, experts, world_size)
    save_checkpoint(folder, config, tensors, format, ranks=RankFiles(world_size, ParallelConfig("dp", "ep"), plan))
    assert_holds(folder, config, tensors)


@pytest.mark.parametrize("name", ["grouped", "one_kv_head", "odd_heads"])
def test_eight_file_release(tmp_path: Path, name: str) -> None:
    tensors = random_tensors(CONFIGS[name])
    write_stacked(tmp_path, CONFIGS[name], tensors)
    assert_holds(tmp_path, CONFIGS[name], tensors)


@pytest.mark.parametrize(("name", "shards"), [("grouped", 2), ("grouped", 4), ("one_kv_head", 4), ("wide", 8)])
def test_fairscale_shards(tmp_path: Path, name: str, shards: int) -> None:
    """Among them four shards of one key-value head, which each of them repeats."""
    config = CONFIGS[name]
    tensors = random_tensors(config)
    (tmp_path / "foreign").mkdir()
    write_fairscale_shards(tmp_path / "foreign", config, tensors, shards)
    assert_holds(tmp_path / "foreign", config, tensors)
    save_checkpoint(tmp_path / "ours", config, tensors, "mistral-shards", shards)
    for shard in range(shards):
        wanted = torch.load(tmp_path / "foreign" / f"consolidated.{shard:02d}.pth", weights_only=True)
        got = torch.load(tmp_path / "ours" / f"consolidated.{shard:02d}.pth", weights_only=True)
        assert list(got) == list(wanted)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_expert_shards_with_the_rest_in_the_first(tmp_path: Path) -> None:
    config = CONFIGS["grouped"]
    tensors = random_tensors(config)
    write_params(tmp_path, config)
    for shard in range(4):
        held = {n: t for n, t in tensors.items() if f".experts.{shard}." in n or (shard == 0 and ".experts." not in n)}
        torch.save(held, tmp_path / f"consolidated.{shard:02d}.pth")
    assert_holds(tmp_path, config, tensors)


def test_byte_splits_of_any_size(tmp_path: Path) -> None:
    """Parts are cut anywhere, in the middle of a number and of the index."""
    config = CONFIGS["grouped"]
    tensors = random_tensors(config)
    path = write_one_file(tmp_path, config, tensors)
    content = path.read_bytes()
    path.unlink()
    size = len(content) // 11 + 1
    for i in range(11):
        (tmp_path / f"consolidated.00.pth-split{i}").write_bytes(content[i * size : (i + 1) * size])
    assert_holds(tmp_path, config, tensors)


def test_split_files_joined_are_a_torch_file(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["grouped"])
    save_checkpoint(tmp_path, CONFIGS["grouped"], tensors, "mistral-split", shards=3)
    parts = sorted(tmp_path.glob("*-split*"))
    assert len(parts) == 3
    joined = tmp_path / "joined"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    stored = torch.load(joined, weights_only=True)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_safetensors_as_its_own_library_writes_and_reads(tmp_path: Path) -> None:
    config = CONFIGS["odd_heads"]
    tensors = random_tensors(config)
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "consolidated.safetensors")
    write_params(tmp_path / "theirs", config)
    assert_holds(tmp_path / "theirs", config, tensors)
    save_checkpoint(tmp_path / "ours", config, tensors, "mistral-safetensors")
    stored = load_file(tmp_path / "ours" / "consolidated.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_rank_ready_files_hold_what_a_rank_runs(tmp_path: Path) -> None:
    config = CONFIGS["grouped"]
    tensors = random_tensors(config)
    save_checkpoint(tmp_path, config, tensors, "mixtralkit", ranks=RankFiles(2, ParallelConfig("tp", "ep")))
    second = load_file(tmp_path / "rank-01-of-02.safetensors")
    w1, w3 = (tensors[f"layers.1.feed_forward.experts.3.{matrix}.weight"] for matrix in ("w1", "w3"))
    assert torch.equal(second["layers.1.feed_forward.w13"][1], torch.cat([w1, w3]))
    rows = [tensors[f"layers.0.attention.{m}.weight"][half:] for m, half in (("wq", 12), ("wk", 6), ("wv", 6))]
    assert torch.equal(second["layers.0.attention.wqkv.weight"], torch.cat(rows))


def test_dtype_is_converted_while_writing(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["grouped"], torch.float32)
    save_checkpoint(tmp_path, CONFIGS["grouped"], tensors, "hf", dtype="bf16")
    assert_holds(tmp_path, CONFIGS["grouped"], {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_parts_of_a_tensor(tmp_path: Path) -> None:
    """Rows and columns alone, also where the file keeps another order: rotary halves and transposed experts."""
    config = CONFIGS["grouped"]
    tensors = random_tensors(config)
    for format in ("mistral", "hf", "mistral-stacked"):
        save_checkpoint(tmp_path / format, config, tensors, format)
        with open_checkpoint(tmp_path / format) as reader:
            for name in ("layers.1.attention.wq.weight", "layers.0.feed_forward.experts.2.w2.weight"):
                for rows in ((0, 5), (3, 4), (7, 20), (6, 12)):
                    wanted = tensors[name][slice(*rows), 2:9]
                    assert torch.equal(reader.read(name, rows, (2, 9)), wanted), (format, name, rows)


def test_tokenizer_goes_along_and_other_files_stay(tmp_path: Path) -> None:
    config = CONFIGS["grouped"]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    write_one_file(source, config, random_tensors(config))
    (source / "tokenizer.model").write_bytes(b"words")
    (target / "README.md").write_text("kept")
    with open_checkpoint(source) as reader:
        save_checkpoint(target, config, reader, "mistral-shards", 4)
        assert (target / "tokenizer.model").read_bytes() == b"words"
        with pytest.raises(ValueError, match="already holds a checkpoint"):
            save_checkpoint(target, config, reader, "mistral-shards", 2)
        save_checkpoint(target, config, reader, "mistral-shards", 2, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md", "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model",
    ]  # fmt: skip
    assert_holds(target, config, random_tensors(config))


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b"])
def test_published_configurations(name: str) -> None:
    """The published numbers of parameters: 46.7 and 140.6 thousand million."""
    path = Path(__file__).parents[2] / "configs" / "models" / f"{name}.json"
    config = ModelConfig.from_file(path)
    total = sum(stored.numel for stored in stored_tensors("packed", config).values())
    assert round(total / 1e8) == {"mixtral-8x7b": 467, "mixtral-8x22b": 1406}[name]
    assert len(stored_tensors("mistral", config)) == {"mixtral-8x7b": 995, "mixtral-8x22b": 1739}[name]
