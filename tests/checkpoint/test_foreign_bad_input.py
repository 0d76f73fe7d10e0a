"""Checkpoints of other quantisers that are damaged: one sentence with file, tensor, found and wanted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtralkit.checkpoint import load_into, open_checkpoint
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from tests.checkpoint.models import empty_parameters
from tests.checkpoint.quantisers import (
    CONFIG,
    E4M3,
    GPTQ,
    LAYER,
    ONES,
    by_scalar,
    change,
    ct,
    nf4,
    of_words,
    packed_int4,
    write,
)


def load(folder: Path) -> None:
    with open_checkpoint(folder) as reader:
        layout = replace(RankLayout.single(CONFIG), weights=reader.weights)
        load_into(empty_parameters(layout), layout, reader, RankContext())


def said_of(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).partition(": ")[2]


def test_damaged_files_get_one_sentence(tmp_path: Path) -> None:
    """Tensor, found, wanted; what only the numbers show is found while they are read."""
    stated = {"quant_method": "fp8"}
    write(tmp_path, by_scalar, stated)
    held = load_file(tmp_path / "model.safetensors")
    for changes, says in (
        ({"weight_scale": None}, "weight_scale: found nothing, wanted a tensor [1] or [1, 1] or [256, 1] or"),
        ({"weight_scale": torch.ones(7)}, "weight_scale: found [7], wanted [1] or [1, 1] or [256, 1] or [256]"),
        ({"weight_scale": torch.tensor(0.0)}, "weight_scale: found a scale of 0.0, wanted finite numbers other than 0"),
        ({"weight_scale": torch.tensor(float("nan"))}, "weight_scale: found a scale of nan, wanted finite numbers"),
        ({"weight_scale": torch.ones(1).long()}, "weight_scale: found int64, wanted float32 or bfloat16 or float16"),
        ({"weight": torch.ones(256, 310).to(E4M3)}, "weight: found [256, 310], wanted [256, 320]"),
        ({"weight": torch.ones(256, 320).to(torch.int8)}, "weight: found int8, wanted float8_e4m3fn"),
        ({"zero": torch.ones(3)}, "zero: found float32 [3], wanted no such tensor of FP8"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says
    router = "model.layers.0.block_sparse_moe.gate"
    data, scale = torch.ones(2, 256).to(E4M3), torch.ones(1)
    save_file(held | {f"{router}.weight": data, f"{router}.weight_scale": scale}, tmp_path / "model.safetensors")
    assert said_of(tmp_path) == f"{router}.weight: found a router quantised by FP8, wanted its weight in full precision"


def test_numbers_in_eight_bits_without_a_scale_are_no_numbers(tmp_path: Path) -> None:
    """They were read as they are where the file calls them otherwise than layers, as transformers 5 does."""
    write(tmp_path, by_scalar, {"quant_method": "fp8"})
    held = load_file(tmp_path / "model.safetensors")
    packed = "model.layers.0.mlp.experts.down_proj"
    for name, shape in ((packed, (2, 256, 320)), ("model.norm.weight", (256,))):
        save_file(held | {name: torch.ones(shape).to(E4M3)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name}: found float8_e4m3fn, wanted numbers of 16 bits or more"):
            load(tmp_path)


def test_damaged_words_get_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, of_words(range(8), True, ONES), GPTQ | {"sym": False})
    held = load_file(tmp_path / "model.safetensors")
    for changes, says in (
        ({"qweight": torch.zeros(40, 128).int()}, "qweight: found [40, 128], wanted [40, 256]"),
        ({"qzeros": None}, "qzeros: found nothing, wanted a tensor [5, 32]"),
        ({"scales": torch.ones(4, 256).half()}, "scales: found [4, 256], wanted [5, 256]"),
        ({"scales": torch.full((5, 256), torch.inf).half()}, "scales: found a scale of inf, wanted finite numbers"),
        ({"g_idx": torch.full((320,), 5).int()}, "g_idx: found group 5, wanted 0 to 4"),
        ({"bias": torch.ones(256).half()}, "bias: found numbers other than 0, wanted none"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says
    save_file(held, tmp_path / "model.safetensors")
    text = (tmp_path / "config.json").read_text()
    for group, says in ((96, "group_size (96) must divide 256 columns"), ("64", "group_size ('64') must be a number")):
        (tmp_path / "config.json").write_text(text.replace('"group_size": 64', f'"group_size": {json.dumps(group)}'))
        assert says in said_of(tmp_path)


def test_damaged_packed_tensors_get_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    write(tmp_path, packed_int4(32, False), ct(num_bits=4, type="int", strategy="group", group_size=32))
    held = load_file(tmp_path / "model.safetensors")
    for changes, says in (
        ({"weight_packed": torch.zeros(256, 20).int()}, "weight_packed: found [256, 20], wanted [256, 40]"),
        ({"weight_shape": torch.tensor([256, 319])}, "weight_shape: found [256, 319], wanted [256, 320]"),
        (
            {"weight_scale": torch.ones(256, 7)},
            "weight_scale: found 7 groups, wanted a number of groups that",
        ),
        ({"weight_zero_point": torch.zeros(32, 9).int()}, "weight_zero_point: found [32, 9], wanted [32, 10]"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says


@pytest.mark.filterwarnings("ignore:.* become numbers")
def test_damaged_nf4_gets_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write(tmp_path, nf4(True), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    held, state = load_file(tmp_path / "model.safetensors"), "weight.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(held[f"{LAYER}.{state}"].tolist()))

    def stating(**changes: object) -> torch.Tensor:
        return torch.tensor(list(json.dumps(said | changes).encode()), dtype=torch.uint8)

    for changes, says in (
        ({"weight": torch.zeros(99, 1).byte()}, "weight: found [99, 1], wanted [40960, 1]"),
        ({state: None}, "weight.quant_state: found nothing, wanted the bytes of a JSON object"),
        ({state: torch.zeros(9).byte()}, f"{state}: found text that is not JSON"),
        ({state: stating(blocksize=96)}, "weight.quant_state: found blocksize 96, wanted one that divides 320 columns"),
        ({state: stating(nested_offset=None)}, "weight.quant_state: found nested_blocksize 256, offset None, wanted"),
        ({"weight.absmax": torch.zeros(7).byte()}, "weight.absmax: found [7], wanted [1280]"),
        ({"weight.nested_absmax": torch.full((5,), torch.nan)}, "weight.absmax: found an infinite or undefined number"),
    ):
        save_file(held, tmp_path / "model.safetensors")
        change(tmp_path, **changes)
        assert said_of(tmp_path).startswith(f"{LAYER}.{says}"), says
