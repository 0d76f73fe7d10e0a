"""benchmarks/model/bench_cpu.py: both programs on a tiny model, its files, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.model import bench_cpu as bench
from mixtralkit.config import ModelConfig
from mixtralkit.layout import RankLayout
from mixtralkit.moe.weights import parse_weights
from tests.configs import small_config

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "ckpts" / "tokenizer.model"
SMALL = {"batch": "1,2", "prompts": "9", "threads": "1", "turns": 2, "new_tokens": 3, "dtype": "float16"}


needs_both = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gguf", "xllamacpp")), reason="needs the extra bench"
)


@pytest.fixture
def architecture(tmp_path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small_config(dim=64, head_dim=16, hidden_dim=96).to_mistral()))
    return path


@needs_both
def test_lines_of_a_tiny_model(architecture, tmp_path, capsys):
    """The benchmark called ``choose_layout`` with an option that it does not have."""
    output = tmp_path / "lines.json"
    ours = {"quantize": "int8", "quantize_attention": "int8"}
    bench.bench_cpu(tmp_path / "models", architecture, TOKENIZER, kind="q8_0", output=output, **ours, **SMALL)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    assert [(line["measurement"], line.get("sequences"), line.get("tokens")) for line in lines] == [
        ("decode", 1, None), ("decode", 2, None), ("prompt", None, 9),
    ]  # fmt: skip
    assert all(line["ours_tokens_s"] > 0 < line["llama_cpp_tokens_s"] for line in lines)
    assert lines[0]["gb_per_step"] > 0
    assert lines[0]["ours"] == "int8, attention int8"
    names = {path.name for path in (tmp_path / "models").iterdir()}
    assert names == {"small-2-64-96-4096-f16.gguf", "small-2-64-96-4096-q8_0.gguf"}, "4096 are the tokenizer's words"


@needs_both
def test_our_weights_are_those_of_the_file(architecture, tmp_path):
    peer = bench.llama_cpp()
    config = ModelConfig.from_file(architecture)
    path = tmp_path / "weights.gguf"
    peer.write_model(path, config, TOKENIZER, "f16")
    layout = RankLayout.single(config)
    ours = bench.Ours(layout, bench.RankContext(), bench.parse_dtype("float16"), lambda t: peer.fill(t, layout, path))
    written = {tensor.name: tensor.data for tensor in peer.gguf.GGUFReader(path).tensors}
    tensors = ours.model.named_tensors()
    assert (tensors["layers.1.feed_forward.w2"].numpy() == written["blk.1.ffn_down_exps.weight"]).all()
    wo = tensors["layers.0.attention.wo.weight"].numpy()
    assert (wo == written["blk.0.attn_output.weight"]).all()
    assert abs(wo).max() > 0
    packed = replace(layout, weights=parse_weights("int8"))
    rounded = bench.Ours(
        packed, bench.RankContext(), bench.parse_dtype("float16"), lambda t: peer.fill(t, packed, path)
    )
    found = rounded.model.store.experts[1].matrices[1].float()
    assert found.equal(packed.weights.quantize(tensors["layers.1.feed_forward.w2"]).float())
    one = sum(weights.expert_bytes(64, 96) for weights in (packed.weights, layout.weights))
    assert ours.bytes_of_one() - rounded.bytes_of_one() == 2 * 3 * (2 * layout.weights.expert_bytes(64, 96) - one)


@needs_both
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "q2"}, r"kind \('q2'\) must be one of f16, q8_0, q4_0"),
        ({"turns": 1}, r"turns \(1\) and new_tokens \(3\) must be at least 2"),
        ({"layers": 4}, r"layers \(4\) must lie in 1 … 3"),
        ({"batch": "0"}, r"'0' must be whole numbers"),
    ],
)
def test_what_is_refused(architecture, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        bench.bench_cpu(tmp_path, architecture, TOKENIZER, **{**SMALL, **options})


def test_one_sentence_without_the_extra():
    """It was a traceback of an import."""
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from benchmarks.model.bench_cpu import bench_cpu, run_tool\n"
        "run_tool(bench_cpu, argv=['.'], name='bench_cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: llama.cpp beside us needs gguf: pip install 'mixtralkit[bench]'"]
