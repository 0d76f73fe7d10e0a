"""Two replicas behind one address on Ray Serve: what one server answers, and a replica that dies comes again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.server.process import CKPTS, ROOT, until

pytest.importorskip("ray.serve", reason="needs ray[serve]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ASKED = {"prompt": "In the beginning God", "max_tokens": 4, "temperature": 0}
STARTED = """
import sys, time, ray
from ray import serve
from deploy.ray_serve import Arguments, app
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True, object_store_memory=80_000_000)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(app(Arguments(model=sys.argv[2], replicas=2, cpus=0.5, options="--max_batch_size 4")), route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


def servers() -> list[psutil.Process]:
    """The replicas' own processes, wherever Ray has them."""
    found = []
    for each in psutil.process_iter():
        try:
            if "mixtralkit" in each.cmdline() and each.environ().get("MIXTRALKIT_TEST") == str(os.getpid()):
                found.append(each)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_AUTH_MODE": "disabled",
           "RAY_USAGE_STATS_ENABLED": "0", "MIXTRALKIT_TEST": str(os.getpid())}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, str(port), str(CKPTS)], cwd=ROOT, env={**os.environ, **own}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        assert any(line.strip() == "ready" for line in process.stdout), "it ended"
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()
        process.wait(120)
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                each.kill()
    until(lambda: not servers(), 60)


def test_two_replicas_answer_as_one(url):
    assert len(servers()) == 2
    with httpx.Client(base_url=url, timeout=120) as client:
        texts = {client.post("/v1/completions", json=ASKED).json()["choices"][0]["text"] for _ in range(12)}
        assert texts == {", and in the"}
        with client.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
        assert "".join(pieces) == ", and in the"
        assert len(pieces) > 1
        refused = client.post("/v1/completions", json={**ASKED, "colour": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_field")
        assert client.get("/v1/models").json()["data"][0]["id"] == "ckpts"


def test_a_client_that_leaves_frees_pages(url):
    with httpx.Client(base_url=url, timeout=120) as client:
        asked = {**ASKED, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            next(answer.iter_lines())

        def aborted() -> bool:
            texts = [client.get("/metrics").text for _ in range(6)]  # of one replica or the other
            return any(line.startswith("mixtralkit:requests_aborted_total{") and float(line.split()[-1]) >= 1
                       for text in texts for line in text.splitlines())  # fmt: skip

        until(aborted, 60)


def test_a_replica_that_dies_comes_again(url):
    before = {each.pid for each in servers()}
    servers()[0].kill()
    until(lambda: len({each.pid for each in servers()} - before) == 1 and len(servers()) == 2, 180)

    def answers() -> bool:
        found = [httpx.post(f"{url}/v1/completions", json=ASKED, timeout=120) for _ in range(6)]
        return all(answer.status_code == 200 for answer in found)

    until(answers, 120)
