"""What /metrics tells: vLLM's names where the meaning is the same, so that gateways and autoscalers read them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mixtralkit.engine.requests import Completion
from mixtralkit.engine.runs import EngineSnapshot
from mixtralkit.server.live import live

if TYPE_CHECKING:
    from mixtralkit.server.service import Service

_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_RATE_OVER_S = 5.0


class Metrics:
    """Histograms and counters of requests, and the engine's state when it is asked for.

    Attributes:
        registry: what ``prometheus_client.generate_latest`` takes.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = CollectorRegistry()
        self._values = (service.name, "0")
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.")
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self.per_token = self._histogram("request_time_per_output_token_seconds", "Of an answer, behind its first.")
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From a request to its answer's end.")
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_tokens = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._ended = Counter("vllm:request_success", "Answers that ended, by why.", (*_LABELS, "finished_reason"),
                              registry=self.registry)  # fmt: skip
        self.refused, self.aborted = (
            Counter(f"mixtralkit:{name}", text, _LABELS, registry=self.registry).labels(*self._values)
            for name, text in (
                ("requests_refused", "Requests answered 429."), ("requests_aborted", "Answers whose client left."),
            )
        )  # fmt: skip
        self.registry.register(_State(service))
        self._generated: deque[tuple[float, int, int]] = deque()

    def ended(self, completion: Completion, prompt: int, first_s: float, last_s: float) -> None:
        """Counts an answer: its prompt's tokens, and when its first and last token came, from the request's start."""
        count = len(completion.tokens) + (completion.end_token is not None)
        self._ended.labels(*self._values, completion.finish_reason).inc()
        self.end_to_end.observe(last_s)
        self.prompt_tokens.observe(prompt)
        self.answer_tokens.observe(count)
        if count > 1:
            self.per_token.observe((last_s - first_s) / (count - 1))

    def tick(self, snapshot: EngineSnapshot | None) -> None:
        """Keeps what the rate of the last seconds is made of."""
        if snapshot is not None:
            now = time.monotonic()
            self._generated.append((now, snapshot.generation_tokens, snapshot.prompt_tokens))
            while now - self._generated[0][0] > _RATE_OVER_S:
                self._generated.popleft()

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Generated and prompt tokens a second, over the last seconds."""
        if len(self._generated) < 2:
            return 0.0, 0.0
        (start, *before), (end, *after) = self._generated[0], self._generated[-1]
        return tuple((b - a) / (end - start) for a, b in zip(before, after, strict=True))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Any:
        made = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry)
        return made.labels(*self._values)


class _State:
    """The engine's state, read when the registry is."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        values = (self._service.name, "0")
        yield _one(GaugeMetricFamily, "mixtralkit:ready", "1 while requests are taken.", _LABELS, values,
                   float(self._service.state == "ready"))  # fmt: skip
        s = self._service.thread.snapshot
        if s is None:
            return
        for name, text, value in (
            ("num_requests_running", "Answers that run.", s.running),
            ("num_requests_waiting", "Answers that wait for their turn.", self._service.thread.waiting),
            ("kv_cache_usage_perc", "Share of the pages that are in use, 1 for all.", s.pages_used / max(s.pages, 1)),
        ):
            yield _one(GaugeMetricFamily, f"vllm:{name}", text, _LABELS, values, value)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens taken.", s.prompt_tokens),
            ("generation_tokens", "Tokens generated.", s.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", s.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", s.prefix_hits),
            ("num_preemptions", "Answers that were set back for want of pages.", s.preemptions),
        ):
            yield _one(CounterMetricFamily, f"vllm:{name}", text, _LABELS, values, value)
        info = ("block_size", "num_gpu_blocks")
        yield _one(GaugeMetricFamily, "vllm:cache_config_info", "Pages of the cache: their size and number.",
                   (*_LABELS, *info), (*values, str(s.page_size), str(s.pages)), 1.0)  # fmt: skip
        yield _one(GaugeMetricFamily, "mixtralkit:step_seconds", "Time of the last step.", _LABELS, values, s.step_s)
        yield _one(CounterMetricFamily, "mixtralkit:steps", "Steps of the model.", _LABELS, values, s.steps)
        for name, text, value in (
            ("expert_hits", "Experts that rows found on the GPU.", s.tiers.hits),
            ("expert_misses", "Experts that were in host memory when rows wanted them.", s.tiers.misses),
            ("expert_fetches", "Experts brought to the GPU.", s.tiers.fetches),
            ("expert_cpu_products", "Experts computed on the CPU, all or a part.", s.tiers.products),
            ("expert_fetched_bytes", "Bytes of experts brought to the GPU.", s.tiers.fetched_bytes),
        ):
            yield _one(CounterMetricFamily, f"mixtralkit:{name}", text, _LABELS, values, value)
        yield from self._experts(values)

    def _experts(self, values: tuple[str, ...]) -> Iterator[Metric]:
        """Who was chosen, what the plan in force makes of it, and how it changed."""
        seen, total = live(self._service), self._service.loads.total
        layers = seen["ranks"]["layers"]
        cut_2L, hits_2L = total.cut_S2L.sum(0), total.hits_S2L.sum(0)
        for name, text, labels, sums in (
            ("expert_choices", "Rows that chose an expert.", ("layer", "expert"), total.choices_LE),
            ("dropped_rows", "Choices over a capacity that nobody computed.", ("layer",), cut_2L[0]),
            ("rerouted_rows", "Choices over a capacity that went to another expert.", ("layer",), cut_2L[1]),
            ("hot_hits", "Choices of experts that the plan has on every rank.", ("layer",), hits_2L[0]),
            ("shadow_hits", "Choices of experts that are on every rank by a copy.", ("layer",), hits_2L[1]),
        ):
            yield _each(CounterMetricFamily, name, text, labels, values, sums)
        shares_LW, even_L = np.array(layers["shares"]), np.array(layers["balancedness"])
        text = "Share of a layer's rows, in the last seconds, that a rank computes."
        yield _each(GaugeMetricFamily, "rank_load", text, ("layer", "rank"), values, shares_LW)
        text = "Mean load of the ranks by the busiest's, in a layer; 1 is even."
        yield _each(GaugeMetricFamily, "layer_balancedness", text, ("layer",), values, even_L)
        plan, even = seen["plan"], seen["ranks"]["balancedness"]
        for family, name, text, value in (
            (GaugeMetricFamily, "balancedness", "Mean load of the ranks by the busiest's; 1 is even.", even or 0.0),
            (GaugeMetricFamily, "plan_version", "New plans that were adopted.", plan["version"]),
            (CounterMetricFamily, "experts_moved", "Experts that crossed from rank to rank.", plan["experts_moved"]),
            (GaugeMetricFamily, "plan_longest_pause_seconds", "Longest time between two steps for a new plan.",
             plan["longest_pause_ms"] / 1e3),
        ):  # fmt: skip
            yield _one(family, f"mixtralkit:{name}", text, _LABELS, values, value)


def _one(family: Any, name: str, text: str, labels: tuple[str, ...], values: tuple[str, ...], value: float) -> Metric:
    made = family(name, text, labels=labels)
    made.add_metric(values, value)
    return made


def _each(
    family: Any, name: str, text: str, labels: tuple[str, ...], values: tuple[str, ...], figures: np.ndarray
) -> Metric:
    """One of ours with a value for each place of an array, which the labels name."""
    made = family(f"mixtralkit:{name}", text, labels=(*_LABELS, *labels))
    for place, value in np.ndenumerate(figures):
        made.add_metric((*values, *map(str, place)), value.item())
    return made
