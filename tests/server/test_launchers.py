"""Two launchers, as on two hosts: one server, and one end."""

from __future__ import annotations

import signal
import socket
import subprocess

import httpx
import psutil
import pytest

from tests.server.process import Server, until


@pytest.mark.slow
def test_two_launchers_are_one_server():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    second = None
    try:
        with Server("--max_batch_size", 4, launcher=[*words, "--node_rank=0"]) as own:
            second = subprocess.Popen(
                [word.replace("--node_rank=0", "--node_rank=1") for word in own.process.args], env=own.environ,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            own.listens()
            own.ready()
            asked = {"prompt": "In the beginning God", "max_tokens": 4, "temperature": 0}
            answer = httpx.post(f"{own.url}/v1/completions", json=asked, timeout=120).json()
            assert answer["choices"][0]["text"] == ", and in the"
            (rank,) = [p for p in psutil.Process(second.pid).children() if "serve" in p.cmdline()]
            rank.send_signal(signal.SIGKILL)
            assert own.end(60) != 0
            assert second.wait(60) != 0
            assert "error: " in own.stderr
    finally:
        if second is not None:
            for each in [*psutil.Process(second.pid).children(recursive=True)] if second.poll() is None else []:
                each.kill()
            second.kill()
            until(lambda: second.poll() is not None, 30)
