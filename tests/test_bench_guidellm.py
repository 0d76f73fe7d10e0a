"""What the benchmark asks of guidellm, and what it makes of its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from benchmarks.serving.bench_guidellm import bench_guidellm

FAKE = """#!{python}
import json, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
path = words["--output"].partition("path=")[2]
prompts = [json.loads(line) for line in open(words["--data"].partition("path=")[2])]
values = {{"median": 1.234, "max": 5.0, "mean": 9.0}}
names = ["time_to_first_token_ms", "inter_token_latency_ms", "prompt_token_count", "output_token_count",
         "output_tokens_per_second"]
metrics = {{name: {{"successful": values}} for name in names}}
metrics["request_totals"] = {{"successful": len(prompts), "errored": {errored}, "incomplete": 0}}
with open({told!r}, "a") as told:
    told.write(json.dumps(words) + "\\n")
with open(path, "w") as report:
    json.dump({{"metadata": {{"guidellm_version": "0"}}, "benchmarks": [{{"metrics": metrics}}]}}, report)
"""


def fake(tmp_path: Path, errored: int) -> Path:
    path = tmp_path / "guidellm"
    path.write_text(FAKE.format(python=sys.executable, errored=errored, told=str(tmp_path / "told")))
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _one_model(monkeypatch):
    monkeypatch.setattr(httpx, "get", lambda *_, **__: SimpleNamespace(json=lambda: {"data": [{"id": "ckpts"}]}))


def test_both_paths_are_asked(tmp_path):
    bench_guidellm("http://there:1", str(fake(tmp_path, 0)), (2, 5), 7, 3, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(run["path"], run["streams"], run["successful"]) for run in found["runs"]] == [
        (path, streams, 7) for path in ("/v1/completions", "/v1/chat/completions") for streams in (2, 5)
    ]
    assert found["runs"][0]["time_to_first_token_ms"] == {"median": 1.23, "max": 5.0}
    first = json.loads((tmp_path / "told").read_text().splitlines()[0])
    assert first["--backend"] == "kind=openai_http,target=http://there:1,model=ckpts,request_format=/v1/completions"
    assert first["--profile"] == "kind=concurrent,streams=2"


def test_a_request_that_failed_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="3 requests failed"):
        bench_guidellm("http://there:1", str(fake(tmp_path, 3)), (1,), 7, 3)
