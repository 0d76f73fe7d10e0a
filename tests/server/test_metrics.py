"""What /metrics tells agrees with what was asked, and has every name that the guide promises."""

from __future__ import annotations

import re

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.server.doubles import run
from tests.server.process import ROOT, until


def test_counts_are_those_of_the_requests(server):
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
             "vllm:time_to_first_token_seconds_count", "vllm:request_generation_tokens_sum")  # fmt: skip
    until(lambda: server.metric("vllm:num_requests_running") == 0, 60)
    sums = ("vllm:e2e_request_latency_seconds_sum", "vllm:time_to_first_token_seconds_sum")
    before = {name: server.metric(name) for name in names + sums}
    asked = {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 4, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).status_code == 200
    grown = {name: server.metric(name) - before[name] for name in names}
    assert grown["vllm:prompt_tokens_total"] == 5
    assert 8 <= grown["vllm:generation_tokens_total"] <= 10, "a step in flight may have one more"
    assert list(grown.values())[2:] == [2, 2, 8]
    whole_s, first_s = (server.metric(name) - before[name] for name in sums)
    assert whole_s > first_s > 0


def test_the_experts_loads_are_there(server):
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a b c", "max_tokens": 4}, timeout=120)
    until(lambda: server.metric("mixtralkit:expert_choices_total") > 0, 30)
    loads = httpx.get(f"{server.url}/live", timeout=60).json()["experts"]["loads"]
    assert (len(loads), len(loads[0])) == (6, 8)
    assert len({sum(layer) for layer in loads}) == 1, "each layer routes the same rows"
    assert sum(loads[0]) % 2 == 0, "each row to two experts"
    assert server.metric("mixtralkit:rank_load") == 6.0, "1 in each layer"
    assert server.metric("mixtralkit:layer_balancedness") == 6.0
    assert server.metric("mixtralkit:balancedness") == 1.0
    for name in ("dropped_rows", "rerouted_rows", "hot_hits", "shadow_hits"):
        assert server.metric(f"mixtralkit:{name}_total") == 0, "there is one rank"


def test_every_name_of_the_guide_is_served(server):
    guide = (ROOT / "docs" / "serving.md").read_text()
    promised = set(re.findall(r"`((?:vllm|mixtralkit):\w+)", guide))
    assert len(promised) > 25
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=120)
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    served = {family.name for family in text_string_to_metric_families(text)}
    served = {name for name in served if not name.endswith("_created")}  # when counting began
    assert {name.removesuffix("_total") for name in promised} == served
    labels = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    assert re.search(r'block_size="\d+"', labels)
    assert re.search(r'num_gpu_blocks="\d+"', labels)


def test_what_ranks_counted_is_told_by_layer():
    """Two layers of four experts: choices in large and small batches, then cut and hit ones (engine/expert_rows.py)."""
    sums = np.arange(2 * 2 * (4 + 2))

    async def ask(service, client):
        service.loads.take({0: sums})
        return (await client.get("/metrics")).text, (await client.get("/live")).json()

    text, live = run(ask)
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            place = tuple(sample.labels.get(name) for name in ("layer", "expert", "rank"))
            found[(sample.name.removeprefix("mixtralkit:"), *filter(None, place))] = sample.value
    for layer in range(2):
        for expert in range(4):
            chose = found["expert_choices_total", str(layer), str(expert)]
            assert chose == sums[4 * layer + expert] + sums[8 + 4 * layer + expert]
        for i, name in enumerate(("dropped_rows", "rerouted_rows", "hot_hits", "shadow_hits")):
            assert found[f"{name}_total", str(layer)] == 16 + 2 * i + layer
        assert found["rank_load", str(layer), "0"] == found["layer_balancedness", str(layer)] == 1
    assert live["experts"]["dropped"] == (16 + 17) / sums[:16].sum()
    assert live["experts"]["shadow_hits"] == (22 + 23) / sums[:16].sum()
