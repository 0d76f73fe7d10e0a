"""The manifests name what the code has: options, paths, ports, variables, metrics."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from mixtralkit.cli.serve import serve
from mixtralkit.config.options import options_of
from tests.server.doubles import run
from tests.server.process import ROOT

FILE = ROOT / "deploy" / "leader_worker_set.yaml"
LWS = {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}  # what LeaderWorkerSet gives each pod


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(FILE.read_text())}


@pytest.fixture(scope="module")
def containers(parts) -> list[dict[str, Any]]:
    template = parts["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return [template[name]["spec"]["containers"][0] for name in ("leaderTemplate", "workerTemplate")]


def test_options_and_variables(containers, parts):
    options = {option.name: option for option in options_of(serve)}
    grace = parts["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]
    for container in containers:
        (words,) = container["args"]
        assert set(re.findall(r"\$(\w+)", words)) == LWS
        ours = words.partition("-m mixtralkit serve ")[2]
        given = dict(re.findall(r"--(\w+) (\S+)", ours))
        for name, value in given.items():
            options[name].parse(value)
        assert given["max_batch_size"] == "256", "the same on every rank"
    leader = dict(re.findall(r"--(\w+) (\S+)", containers[0]["args"][0]))
    assert float(leader["drain_s"]) < grace["terminationGracePeriodSeconds"]
    assert leader["port"] == str(containers[0]["ports"][0]["containerPort"])
    assert [variable["name"] for variable in containers[0]["env"]] == [options["api_key"].variable]


def test_paths_ports_and_metrics(containers, parts):
    port = containers[0]["ports"][0]["name"]
    probes = [containers[0][name]["httpGet"] for name in ("startupProbe", "readinessProbe")]
    endpoint = parts["PodMonitor"]["spec"]["podMetricsEndpoints"][0]
    assert {probe["port"] for probe in probes} == {port, endpoint["port"]}
    assert parts["Service"]["spec"]["ports"][0]["targetPort"] == port

    async def ask(service, client):
        paths = {endpoint["path"], *(probe["path"] for probe in probes)}
        return [await client.get(path) for path in sorted(paths)]

    health, metrics = run(ask)
    assert (health.status_code, metrics.status_code) == (200, 200)
    for metric in parts["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        assert re.search(rf"^{metric['pods']['metric']['name']}\{{", metrics.text, re.M)


def test_the_service_reaches_leaders_alone(parts):
    template = parts["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    wanted = parts["Service"]["spec"]["selector"]
    assert wanted.items() <= template["leaderTemplate"]["metadata"]["labels"].items()
    assert "metadata" not in template["workerTemplate"]
    assert parts["PodMonitor"]["spec"]["selector"]["matchLabels"] == wanted
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
