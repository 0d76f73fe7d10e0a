"""Requests that come at given times to an engine in this process, when their tokens came, and what peers call that."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, median, stdev
from unittest.mock import patch

import numpy as np

from mixtralkit.engine.control import Control
from mixtralkit.engine.flight import Flight
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.leader import Leader
from mixtralkit.engine.requests import Request


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens of these lengths."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, vocab_size) for _ in range(length)) for length in lengths]


def poisson_starts(count: int, per_s: float, seed: int) -> list[float]:
    """Seconds from the beginning at which requests come that know nothing of each other."""
    rng, now, starts = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(per_s)
        starts.append(now)
    return starts


@dataclass
class Load:
    """Requests and when they come (s); an engine's ``Arrivals``."""

    requests: list[Request]
    starts: list[float]
    began: float = 0.0
    given: int = 0

    def poll(self, wait: bool) -> list[Request] | None:
        if self.given == len(self.requests):
            return None
        now = time.perf_counter() - self.began
        if wait and self.starts[self.given] > now:
            time.sleep(min(1.0, self.starts[self.given] - now))
            now = time.perf_counter() - self.began
        first = self.given
        while self.given < len(self.requests) and self.starts[self.given] <= now:
            self.given += 1
        return self.requests[first : self.given]


class Coming:
    """The first requests come at once, the others one by one, in every fourth turn."""

    def __init__(self, requests: list[Request], at_once: int) -> None:
        self._requests, self._at_once, self._polls = requests, at_once, 0

    def poll(self, wait: bool) -> list[Request] | None:
        """As ``Arrivals.poll``."""
        self._polls += 1
        if self._polls == 1:
            return self._requests[: self._at_once]
        if self._polls % 4:
            return []
        late = self._at_once + self._polls // 4 - 1
        return self._requests[late : late + 1] or None


@dataclass
class Record:
    """What a load gave: times of every request's tokens, from its coming (s), and the number of running sequences at
    each step; ``host_s`` is what rank 0's host did in each turn but wait for the device; ``steps`` are kind, rows that
    decode, prompt tokens and seconds since the step before of each."""

    requests: list[Request]
    duration_s: float = 0.0
    tokens_s: dict[int, list[float]] = field(default_factory=dict)
    running: list[int] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)
    steps: list[tuple[str, int, int, float]] = field(default_factory=list)

    @property
    def gaps_s(self) -> list[float]:
        """Times between two tokens of a request, of all requests."""
        return [gap for times in self.tokens_s.values() for gap in np.diff(times).tolist()]

    @property
    def first_s(self) -> list[float]:
        return [times[0] for times in self.tokens_s.values()]

    @property
    def output_per_s(self) -> float:
        return sum(map(len, self.tokens_s.values())) / self.duration_s


def run(
    engine: Engine, requests: list[Request], starts: list[float] | None = None, at_once: int | None = None
) -> Record:
    """Serves the requests, which come at ``starts``, or so many ``at_once`` and then one by one (``Coming``), or runs
    them as one list; every token must have a text."""
    load, record = Load(requests, starts or [0.0] * len(requests)), Record(requests)
    record.tokens_s = {request.id: [] for request in requests}
    came = {request.id: start for request, start in zip(requests, load.starts, strict=True)}
    load.began = time.perf_counter()
    with watched(record):
        if at_once is not None:
            steps = engine.serve(Coming(requests, at_once))
        else:
            steps = ([event] for event in engine.run(requests)) if starts is None else engine.serve(load)
        for events in steps:
            now = time.perf_counter() - load.began
            for event in events:
                if event.error is not None:
                    raise RuntimeError(event.error)
                if event.text:
                    record.tokens_s[event.id].append(now - came[event.id])
    record.duration_s = time.perf_counter() - load.began
    for request in requests:
        assert len(record.tokens_s[request.id]) == request.max_gen_len
    return record


@contextmanager
def watched(record: Record) -> Iterator[None]:
    """Measures the host's part of each turn."""
    advance, take = Engine._advance, Leader._take
    wait, wait_for, poll = Flight.wait, Control.wait_for, Load.poll
    waited = [0.0]

    def timed_wait(*args):
        started = time.perf_counter()
        value = args[0](*args[1:])
        waited[0] += time.perf_counter() - started
        return value

    def timed(engine):
        waited[0], started = 0.0, time.perf_counter()
        advance(engine)
        record.host_s.append(time.perf_counter() - started - waited[0])

    def noted(leader, message, control):
        flight, planned = leader.flights[0]
        take(leader, message, control)
        chunks = sum(len(chunk.ids) for own in flight.plan.chunks for chunk in own)
        decodes = sum(len(own) for own in planned.slots) - sum(len(own) for own in flight.plan.chunks)
        record.steps.append((flight.kind, decodes, chunks, leader._step_s))
        record.running.append(decodes + sum(len(own) for own in flight.plan.chunks))

    with (
        patch.object(Engine, "_advance", timed),
        patch.object(Leader, "_take", noted),
        patch.object(Flight, "wait", lambda flight: timed_wait(wait, flight)),
        patch.object(Control, "wait_for", lambda control, flight: timed_wait(wait_for, control, flight)),
        patch.object(Load, "poll", lambda load, is_idle: timed_wait(poll, load, is_idle)),
    ):
        yield


def throughput_fields(record: Record) -> dict[str, float]:
    """As vLLM's ``bench throughput`` writes them, and tokens of answers a second."""
    outputs = sum(map(len, record.tokens_s.values()))
    total = sum(len(request.prompt) for request in record.requests) + outputs
    return {
        "elapsed_time": record.duration_s, "num_requests": len(record.requests), "total_num_tokens": total,
        "requests_per_second": len(record.requests) / record.duration_s, "tokens_per_second": total / record.duration_s,
        "output_tokens_per_second": outputs / record.duration_s,
    }  # fmt: skip


def serve_fields(record: Record, per_s: float | None = None) -> dict[str, float | None]:
    """As vLLM's ``bench serve`` writes them; ``per_s`` is the rate of requests, None for all at once."""
    prompts = sum(len(request.prompt) for request in record.requests)
    outputs = sum(map(len, record.tokens_s.values()))
    per_token = [(t[-1] - t[0]) / (len(t) - 1) for t in record.tokens_s.values() if len(t) > 1]
    found = {
        "num_prompts": len(record.requests), "request_rate": per_s, "duration": record.duration_s,
        "completed": len(record.requests), "total_input_tokens": prompts, "total_output_tokens": outputs,
        "request_throughput": len(record.requests) / record.duration_s,
        "output_throughput": outputs / record.duration_s,
        "total_token_throughput": (prompts + outputs) / record.duration_s,
    }  # fmt: skip
    for name, values in (("ttft", record.first_s), ("tpot", per_token), ("itl", record.gaps_s)):
        ms = [1e3 * value for value in values] or [0.0]
        found |= {
            f"mean_{name}_ms": mean(ms), f"median_{name}_ms": median(ms),
            f"std_{name}_ms": stdev(ms) if len(ms) > 1 else 0.0, f"p99_{name}_ms": float(np.percentile(ms, 99)),
        }  # fmt: skip
    return found
