"""Two replicas behind one address on Ray Serve: they answer as one server, what begins alike goes to one of them, and a
replica that dies comes again."""

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
from deploy.ray_serve import beginning_of, in_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ASKED = {"prompt": "In the beginning God", "max_tokens": 4, "temperature": 0}
STARTED = """
import sys, time, ray
from ray import serve
from deploy.ray_serve import Arguments, app
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True, object_store_memory=80_000_000)
serve.start(http_options={"port": int(sys.argv[1])})
options = "--max_batch_size 4 --page_size 16"
serve.run(app(Arguments(model=sys.argv[2], replicas=2, cpus=0.5, options=options)), route_prefix="/")
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
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
           "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
           "MIXTRALKIT_TEST": str(os.getpid())}  # fmt: skip
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


def test_what_begins_alike_goes_to_one_replica(url):
    cached = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for first in "ABCD":
            messages = [{"role": "user", "content": f"{first} tells a long story about the sea. " * 6}]
            for turn in range(3):
                asked = {"messages": messages, "max_tokens": 4, "temperature": 0}
                answer = client.post("/v1/chat/completions", json=asked).json()
                cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
                said = answer["choices"][0]["message"]["content"]
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"And then? {turn}"}]
    assert [number > 0 for number in cached] == 4 * [False, True, True]


def test_where_a_request_goes():
    replicas = dict.fromkeys("abcdefgh", 0)
    first = [in_order(f"story {i}", replicas)[0] for i in range(400)]
    assert all(20 < first.count(replica) < 90 for replica in replicas)
    left = {replica: 0 for replica in replicas if replica != "c"}
    assert [in_order(f"story {i}", left)[0] for i, was in enumerate(first) if was != "c"] == [
        w for w in first if w != "c"
    ]
    assert in_order("story 7", replicas | {first[7]: 3})[-1] == first[7], "others wait there"
    assert len({in_order("", replicas)[0] for _ in range(100)}) > 3
    asks, more = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    beginning = beginning_of(json.dumps({"messages": [asks]}).encode())
    assert beginning == beginning_of(json.dumps({"model": "m", "messages": [asks, more, asks]}).encode()) != ""
    assert beginning_of(b'{"prompt": "once"}') == "once"
    for body in (b"", b"{", b"[1]", b'{"prompt": []}', b'{"messages": 3}', b"\xff", b"[" * 10**5):
        beginning_of(body)


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
