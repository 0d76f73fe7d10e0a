"""guidellm against a running server: does a benchmark of others take it as it takes vLLM, and what does it measure?

    pip install guidellm        # in an environment of its own: it brings much
    mixtralkit serve -m ckpts --port 8000 &
    python -m benchmarks.serving.bench_guidellm --url http://127.0.0.1:8000 --guidellm GUIDELLM

Streams completions and chats from guidellm's clients, some numbers of clients at a time. RuntimeError where a request
failed. Prints one JSON object, times in milliseconds.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.machine import describe_run
from mixtralkit.cli.run import command, run_tool
from mixtralkit.config.options import Count
from mixtralkit.distributed import RankContext

_PATHS = ("/v1/completions", "/v1/chat/completions")
_TOLD = ("time_to_first_token_ms", "inter_token_latency_ms", "prompt_token_count", "output_token_count")


@command
def bench_guidellm(
    url: str = "http://127.0.0.1:8000",
    guidellm: str = "guidellm",
    streams: tuple[Count, ...] = (1, 4, 16),
    requests: Count = 48,
    answer: Count = 16,
    output: Path | None = None,
) -> None:
    """Has guidellm ask a running server, and says what it saw.

    Args:
        url: where it listens.
        guidellm: its command.
        streams: clients at a time, in one run after the other.
        requests: of each run.
        answer: tokens of each answer.
        output: keep the JSON here.
    """
    (model,) = [each["id"] for each in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
    found: dict[str, Any] = {**describe_run(RankContext()), "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        rows = ({"prompt": f"Name {i} animals of the ark. " * (1 + i % 5), "output_tokens_count": answer}
                for i in range(requests))  # fmt: skip
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for path in _PATHS:
            for count in streams:
                report = Path(folder) / "report.json"
                words = [
                    guidellm, "run", "--backend", f"kind=openai_http,target={url},model={model},request_format={path}",
                    "--profile", f"kind=concurrent,streams={count}",
                    "--constraint", f"kind=max_requests,count={requests}",
                    "--data", f"kind=json_file,path={prompts}",
                    "--output", f"kind=json,path={report}", "--disable-console",
                ]  # fmt: skip
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                found["runs"].append({"path": path, "streams": count, **_summary(json.loads(report.read_text()))})
                found["guidellm"] = json.loads(report.read_text())["metadata"]["guidellm_version"]
    text = json.dumps(found, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """What guidellm's report says of its one benchmark; RuntimeError where a request failed."""
    (run,) = report["benchmarks"]
    metrics = run["metrics"]
    totals = metrics["request_totals"]
    if totals["errored"] or totals["incomplete"]:
        raise RuntimeError(f"guidellm: {totals['errored']} requests failed, {totals['incomplete']} did not end")
    told = {name: {key: round(metrics[name]["successful"][key], 2) for key in ("median", "max")} for name in _TOLD}
    rate = metrics["output_tokens_per_second"]["successful"]["mean"]
    return {"successful": totals["successful"], "output_tokens_per_second": round(rate, 2), **told}


if __name__ == "__main__":
    run_tool(bench_guidellm)
