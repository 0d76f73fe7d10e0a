"""Requests that arrive over HTTP as a Poisson stream: latencies, failures, and what is left behind.

    mixtralkit serve -m ckpts --port 8000 &
    python -m benchmarks.serving.bench_server --url http://127.0.0.1:8000 --seconds 60 --requests 2000

Streams completions of random lengths. First ``warmup`` requests run, then ``seconds`` of Poisson arrivals at ``rate``,
then what is left of ``requests``, ``concurrency`` at a time. Memory and pages are compared with those after warming up.
Prints one JSON object with the fields of vLLM's ``bench serve``.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.common.machine import describe_run
from mixtralkit.cli.run import command, run_tool
from mixtralkit.config.options import Count, Positive
from mixtralkit.distributed import RankContext


@dataclass
class Seen:
    """What came of one request."""

    asked_s: float
    times_s: list[float] = field(default_factory=list)
    prompt: int = 0
    tokens: int = 0
    error: str | None = None


@command
def bench_server(
    url: str = "http://127.0.0.1:8000",
    seconds: Positive = 60.0,
    rate: Positive = 8.0,
    requests: Count = 2000,
    concurrency: Count = 32,
    longest_prompt: Count = 64,
    longest_answer: Count = 16,
    warmup: Count = 64,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Sends requests to a running server and says how they fared.

    Args:
        url: where it listens.
        seconds: of Poisson arrivals.
        rate: of these, requests a second.
        requests: in all; those that did not arrive in that time come as fast as they are answered.
        concurrency: of the latter, how many are open at once.
        longest_prompt: tokens; lengths are uniform from 1.
        longest_answer: tokens; lengths are uniform from 1.
        warmup: requests before anything is measured.
        seed: of lengths, prompts and arrivals.
        output: also write the result to this file.
    """
    found = asyncio.run(
        _Load(url, longest_prompt, longest_answer, random.Random(seed)).run(
            seconds, rate, requests, concurrency, warmup
        )
    )
    text = json.dumps(describe_run(RankContext()) | found, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if found["failed"] or found["pages_left"]:
        raise RuntimeError(
            f"{found['failed']} requests failed, {found['pages_left']:.4f} of the pages are still in use"
        )


class _Load:
    def __init__(self, url: str, longest_prompt: int, longest_answer: int, dice: random.Random) -> None:
        self._url, self._dice = url, dice
        self._longest = longest_prompt, longest_answer
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(timeout=600, limits=limits)

    async def run(self, seconds: float, rate: float, requests: int, concurrency: int, warmup: int) -> dict[str, Any]:
        async with self._client:
            await self._many(warmup, concurrency)
            before = await self._state()
            started = time.perf_counter()
            poisson = await self._poisson(seconds, rate)
            poisson_s = time.perf_counter() - started
            rest = await self._many(max(0, requests - len(poisson)), concurrency)
            total_s = time.perf_counter() - started
            after = await self._state()
        seen = poisson + rest
        failed = [each.error for each in seen if each.error is not None]
        return {
            "completed": len(seen) - len(failed), "failed": len(failed), "errors": sorted(set(failed))[:5],
            "duration": round(total_s, 2), "poisson_requests": len(poisson), "poisson_duration": round(poisson_s, 2),
            "request_rate": rate, "total_input_tokens": sum(each.prompt for each in seen),
            "total_output_tokens": sum(each.tokens for each in seen),
            "request_throughput": round(len(seen) / total_s, 3),
            "output_throughput": round(sum(each.tokens for each in seen) / total_s, 2),
            **_latencies("ttft", [e.times_s[0] - e.asked_s for e in poisson if e.times_s]),
            **_latencies("itl", [b - a for e in poisson for a, b in zip(e.times_s, e.times_s[1:], strict=False)]),
            "memory_mb_before": before["memory_mb"], "memory_mb_after": after["memory_mb"],
            "pages_left": after["pages"], "preemptions": after["preemptions"], "ranks": after["ranks"],
        }  # fmt: skip

    async def _poisson(self, seconds: float, rate: float) -> list[Seen]:
        tasks, until = [], time.perf_counter() + seconds
        while (now := time.perf_counter()) < until:
            tasks.append(asyncio.create_task(self._one()))
            await asyncio.sleep(min(self._dice.expovariate(rate), until - now))
        return list(await asyncio.gather(*tasks))

    async def _many(self, count: int, concurrency: int) -> list[Seen]:
        turn = asyncio.Semaphore(concurrency)

        async def one() -> Seen:
            async with turn:
                return await self._one()

        return list(await asyncio.gather(*(one() for _ in range(count))))

    async def _one(self) -> Seen:
        prompt = [self._dice.randrange(3, 1000) for _ in range(self._dice.randint(1, self._longest[0]))]
        asked = {
            "prompt": prompt, "max_tokens": self._dice.randint(1, self._longest[1]), "ignore_eos": True,
            "temperature": self._dice.choice((0.0, 1.0)), "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        seen = Seen(time.perf_counter(), prompt=len(prompt))
        try:
            async with self._client.stream("POST", f"{self._url}/v1/completions", json=asked) as answer:
                if answer.status_code != 200:
                    seen.error = f"{answer.status_code}: {(await answer.aread()).decode()[:200]}"
                    return seen
                await self._read(answer, seen)
        except httpx.HTTPError as error:
            seen.error = type(error).__name__
        if seen.error is None and seen.tokens != asked["max_tokens"]:
            seen.error = f"{seen.tokens} tokens instead of {asked['max_tokens']}"
        return seen

    async def _read(self, answer: httpx.Response, seen: Seen) -> None:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                seen.error = chunk["error"]["message"]
            elif chunk["choices"]:
                seen.times_s.append(time.perf_counter())
            else:
                seen.tokens = chunk["usage"]["completion_tokens"]

    async def _state(self) -> dict[str, float]:
        """Once nothing runs: share of the pages in use, preemptions, and the memory of the server's processes."""
        while True:
            text = (await self._client.get(f"{self._url}/metrics")).text
            values = {name: float(value) for name, value in re.findall(r"^([\w:]+)\{[^}]*\} (\S+)$", text, re.M)}
            if not values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"]:
                break
            await asyncio.sleep(0.1)
        return {
            "pages": values["vllm:kv_cache_usage_perc"], "preemptions": values["vllm:num_preemptions_total"],
            "memory_mb": _memory_mb(int(self._url.rpartition(":")[2])), "ranks": text.count("mixtralkit:rank_load{"),
        }  # fmt: skip


def _memory_mb(port: int) -> float | None:
    """Of all processes of a server on this machine, in 10^6 bytes; None where it is on another."""
    for each in psutil.process_iter():
        try:
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in each.net_connections("tcp")):
                parent = each.parent()
                ranks = [each]
                if parent is not None and any("torch" in word for word in parent.cmdline()):
                    ranks = parent.children()
                return round(sum(rank.memory_info().rss for rank in ranks) / 1e6, 1)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return None


def _latencies(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ms = [1e3 * value for value in seconds]
    return {
        f"mean_{name}_ms": round(mean(ms), 2), f"median_{name}_ms": round(median(ms), 2),
        f"p99_{name}_ms": round(float(np.percentile(ms, 99)), 2),
    }  # fmt: skip


if __name__ == "__main__":
    run_tool(bench_server)
