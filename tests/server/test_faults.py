"""Clients that leave or dawdle, ranks that die, signals: what runs goes on, what cannot ends, and nothing is left."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.server.process import Server, slowdown, until

LONG = {"prompt": "In the beginning", "max_tokens": 900, "ignore_eos": True, "temperature": 1.0}


def idle(server: Server) -> None:
    """Waits until nothing runs, with all pages free."""
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        until(lambda name=name: server.metric(name) == 0, 120)


def stream(server: Server, **asked: object):
    return httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True, **asked}, timeout=120)


def _head(length: int) -> bytes:
    fields = ("Host: x", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", ""]).encode()


def test_a_client_that_leaves_frees_its_pages(server):
    idle(server)
    with stream(server) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.metric("vllm:kv_cache_usage_perc") > 0
        aborted = server.metric("mixtralkit:requests_aborted_total")
    left_s, busy = time.monotonic(), slowdown()
    until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, 60)
    assert time.monotonic() - left_s < 1.2 * max(busy, slowdown()), "a second, and what measuring takes"
    assert server.metric("mixtralkit:requests_aborted_total") == aborted + 1


def test_a_client_that_leaves_while_it_waits_for_the_whole(server):
    idle(server)
    before = server.metric("mixtralkit:requests_aborted_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.5)
    until(lambda: server.metric("mixtralkit:requests_aborted_total") == before + 1, 20)
    idle(server)


def test_two_hundred_leave_at_every_phase(server):
    """While their body is sent, in the queue, in the prompt, between tokens, and the next turn at once."""
    idle(server)
    body = json.dumps({**LONG, "prompt": "a b c " * 200, "max_tokens": 300, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = _head(len(body))

    def leave(i: int) -> None:
        with socket.create_connection((host, int(port)), timeout=60) as link:
            link.sendall(head + body[: len(body) // 2 if i % 4 == 0 else None])
            if i % 4 == 2:
                time.sleep(i / 200)
            elif i % 4 == 3:
                link.recv(100)

    with ThreadPoolExecutor(50) as threads:
        list(threads.map(leave, range(200)))
    idle(server)
    after = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 4}, timeout=60)
    assert after.status_code == 200


def test_a_slow_reader_blocks_nobody(server):
    idle(server)
    body = json.dumps({**LONG, "max_tokens": 300, "n": 4, "logprobs": 20, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect((host, int(port)))
    with link:
        link.sendall(_head(len(body)) + body)
        until(lambda: server.metric("vllm:num_requests_running") == 4, 60)
        other = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 4}, timeout=60)
        assert other.status_code == 200
        idle(server)  # its answers end although nobody reads them
    until(lambda: httpx.get(f"{server.url}/health", timeout=60).status_code == 200, 60)


def test_sigterm_lets_what_runs_end():
    with Server("--max_batch_size", 2, "--drain_s", 60).ready() as own:
        with stream(own, max_tokens=40) as answer:
            lines = answer.iter_lines()
            next(lines)
            own.terminate()
            until(lambda: httpx.get(f"{own.url}/health", timeout=60).status_code == 503, 20)
            refused = httpx.post(f"{own.url}/v1/completions", json={"prompt": "a"}, timeout=60)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert own.end(60) == 0, own.stderr


def test_a_drain_has_an_end():
    with Server("--max_batch_size", 1, "--drain_s", 0.3).ready() as own:
        with ThreadPoolExecutor(1) as threads, stream(own) as answer:
            lines = answer.iter_lines()
            next(lines)
            waits = threads.submit(httpx.post, f"{own.url}/v1/completions", json=LONG, timeout=120)
            until(lambda: own.metric("vllm:num_requests_waiting") == 1, 30)
            own.terminate()
            last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
            assert waits.result().status_code == 503
        assert own.end(60) == 0, own.stderr


def test_a_port_that_is_taken_is_said_at_once(server):
    port = server.url.rpartition(":")[2]
    with pytest.raises(AssertionError, match=rf"error: host and port \(127.0.0.1, {port}\): Address already in use"):
        Server("--port", port)


@pytest.mark.slow
@pytest.mark.parametrize(("signal_", "rank", "attention"), [
    (signal.SIGKILL, 1, "tp"), (signal.SIGKILL, 0, "tp"), (signal.SIGSTOP, 1, "dp"), (signal.SIGSTOP, 0, "tp"),
])  # fmt: skip
def test_a_rank_that_dies_under_load(signal_, rank, attention):
    """503, every open stream ends with an error, exit code not 0, no process left."""
    with Server("--max_batch_size", 4, "--attention", attention, ranks=2).ready() as own:
        ends: list[str] = []

        def follow() -> None:
            try:
                with stream(own) as answer:
                    ends.append([line for line in answer.iter_lines() if line][-1])
            except httpx.HTTPError as error:
                ends.append(type(error).__name__)

        threads = [threading.Thread(target=follow) for _ in range(6)]
        for each in threads:
            each.start()
        until(lambda: own.metric("vllm:num_requests_running") == 4, 60)
        processes, busy = own.ranks, slowdown()
        started = time.monotonic()
        processes[rank].send_signal(signal_)
        if rank:
            until(lambda: _health(own) == 503, 60)
            for each in threads:
                each.join(60)
            assert len(ends) == 6
            assert all(json.loads(end.removeprefix("data: "))["error"]["code"] == "failed" for end in ends), ends
        assert own.end(60) != 0
        took_s = time.monotonic() - started
        assert took_s < 10 * max(busy, slowdown()), "the issue's limit, longer only where the machine is busy"
        assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def _health(server: Server) -> int:
    try:
        return httpx.get(f"{server.url}/health", timeout=10).status_code
    except httpx.HTTPError:
        return 503  # it has ended already


@pytest.mark.slow
def test_two_ranks_answer_as_one(server):
    """With requests of their own, and new plans while they run."""
    asked = {"prompt": ["In the beginning God", "def __init__(self"], "max_tokens": 16, "temperature": 0}
    wanted = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).json()
    with Server("--max_batch_size", 4, "--attention", "dp", "--update_step", 8, ranks=2).ready() as own:
        found = httpx.post(f"{own.url}/v1/completions", json=asked, timeout=120).json()
        assert found["choices"] == wanted["choices"]
        with stream(own) as answer:
            lines = answer.iter_lines()
            next(lines)
        until(lambda: own.metric("vllm:kv_cache_usage_perc") == 0, 20)
        until(lambda: sum(map(sum, _loads(own))) > 0, 20)
        until(lambda: own.metric("mixtralkit:plan_longest_pause_seconds") > 0, 60)
        live = httpx.get(f"{own.url}/live", timeout=60).json()
        assert live["plan"]["considered"] > 0
        shares = live["ranks"]["shares"]
        assert sum(shares) == pytest.approx(1)
        assert len(shares) == 2
        own.terminate()
        own.end(60)
        assert not re.search(r"mixtralkit/\w+/|^error:", own.stderr, re.M), "only torchrun says something"


def _loads(server: Server) -> list[list[int]]:
    return httpx.get(f"{server.url}/live", timeout=60).json()["experts"]["loads"]
