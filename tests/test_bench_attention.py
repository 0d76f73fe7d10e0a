"""The benchmark of attention by page size: what it reports, and that it times nothing wrong."""

from __future__ import annotations

import json

import pytest

from benchmarks.layer import bench_attention as bench
from mixtralkit.ops.attention import rotate_and_store

SMALL = {
    "sequences": "1,3", "lengths": "20", "prompts": "2x33", "page_sizes": "16,64", "repeats": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings take seconds."""
    monkeypatch.setattr(bench.Ceilings, "measure", lambda *given: bench.Ceilings(1e10, 1e10, 1e11, 1e11))


def test_every_case_is_reported(tmp_path, capsys):
    bench.bench_attention(**SMALL, output=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    cases = [(r["kind"], r["sequences"], r["length"], r["page_size"]) for r in found["results"]]
    assert cases == [
        ("decode", 1, 20, 16), ("decode", 1, 20, 64), ("decode", 3, 20, 16), ("decode", 3, 20, 64),
        ("prompts", 2, 33, 16), ("prompts", 2, 33, 64),
    ]  # fmt: skip
    for result in found["results"]:
        assert result["ms"] > 0
        assert result["error"] < 1e-5
    decode = found["results"][2]  # 3 sequences of 20 tokens: keys, values, and the rows themselves, in float32
    read = (2 * 8 * 60 + (2 * 32 + 2 * 8) * 3) * 128 * 4
    assert decode["share_of_bound"] == pytest.approx(1e3 * read / 1e10 / decode["ms"], rel=1e-2)


def test_a_kernel_that_reads_the_wrong_pages_is_not_timed(monkeypatch):
    def wrong(qkv_BQ, keys_NJPC, values_NJPC, tables_SM, *rest):
        return rotate_and_store(qkv_BQ, keys_NJPC, values_NJPC, tables_SM.flip(0), *rest[:4]).flatten(1)

    monkeypatch.setattr(bench, "decode_attention", wrong)
    with pytest.raises(RuntimeError, match=r"Case\(kind='decode', .* from its reference"):
        bench.bench_attention(**SMALL)
