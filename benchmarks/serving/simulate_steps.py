"""What the scheduler's rules are worth on a GPU that is not here: its own plans, timed as steps were measured.

    python -m benchmarks.serving.simulate_steps --mixed_budget 256,512,768

Mixtral 8x7B on one H200 in bfloat16. The parts of a step take by its rows what profiles-h200.json and, between 256 and
16,384 rows, moe-kernels-h200.json in benchmarks/results say, with lines between; reading keys is fitted to the decode
steps of serving-h200.json. The host counts for nothing. Prints a line of JSON a case and budget.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np

from benchmarks.model.check import GREEDY
from benchmarks.model.source import RandomWords
from benchmarks.serving.load import random_prompts
from mixtralkit.cli.run import command, run_tool
from mixtralkit.config.options import Count
from mixtralkit.engine.requests import Progress, Request
from mixtralkit.engine.scheduler import Planned, Scheduler, Sequence

PAGE = 128
EXPERTS_MS = (
    (1, 5.2),
    (8, 18.5),
    (64, 21.1),
    (256, 23.7),
    (1024, 45.0),
    (4096, 150.1),
    (16384, 581.1),
)  # all layers, by rows
OTHERS_MS = (
    (1, 1.2),
    (64, 1.9),
    (256, 2.4),
    (16384, 83.0),
)  # projections, router, norms, sampling and what lies between steps
KEY_MS = 3.13e-5  # a key that a decoding row reads: 256 rows take 31.2 ms with 640 keys each, 32.8 with 843
PAIR_MS = 1.72e-6  # a pair of tokens in a prompt
WORDS = RandomWords(32_000)


@command
def simulate_steps(
    mixed_budget: str = "256,512,768,1024",
    prefill_budget: str = "8192",
    sequences: Count = 256,
    pages: Count = 2343,
    seed: int = 0,
) -> None:
    """Times the scheduler's plans of the cases fixed, equal and uniform of bench_throughput.

    Args:
        mixed_budget: which ones, between commas.
        prefill_budget: which ones, between commas.
        sequences: that run at a time.
        pages: of 128 tokens.
        seed: of the lengths.
    """
    rng = random.Random(seed)
    lengths = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(2 * sequences)]
    cases = {"fixed": [(512, 256)] * sequences, "equal": [(562, 562)] * sequences,
             "uniform": sorted(lengths, key=lambda pair: -pair[1]), "uniform, as they come": lengths}  # fmt: skip
    for most in map(int, prefill_budget.split(",")):
        for mixed in map(int, mixed_budget.split(",")):
            equal = None
            for name, pairs in cases.items():
                scheduler = Scheduler(1, sequences, pages, PAGE, most, mixed, prefix_reuse=False)
                found = simulated(scheduler, pairs)
                equal = found["output_tokens_per_s"] if name == "equal" else equal
                if name.startswith("uniform"):
                    found["share_of_equal"] = round(found["output_tokens_per_s"] / equal, 3)
                print(json.dumps({"case": name, "prefill_budget": most, "mixed_budget": mixed, **found}))


def step_ms(planned: Planned) -> float:
    """Milliseconds of a step on the device."""
    chunks = planned.plan.chunks[0]
    decodes = len(planned.slots[0]) - len(chunks)
    keys = sum(sequence.computed for _, sequence in planned.slots[0][:decodes])
    pairs = sum((chunk.start + len(chunk.ids) / 2) * len(chunk.ids) for chunk in chunks)
    rows = decodes + sum(len(chunk.ids) for chunk in chunks)
    by_rows = sum(np.interp(rows, *zip(*table, strict=True)) for table in (EXPERTS_MS, OTHERS_MS))
    return float(by_rows + KEY_MS * keys + PAIR_MS * pairs)


def simulated(scheduler: Scheduler, pairs: list[tuple[int, int]]) -> dict[str, float]:
    """All requests at once, a plan a step ahead of what is known."""
    prompts = random_prompts([prompt for prompt, _ in pairs], WORDS.n_words, 0)
    for i, (prompt, (_, answer)) in enumerate(zip(prompts, pairs, strict=True)):
        scheduler.add(Sequence(i, Progress(Request(i, prompt, answer, GREEDY), answer, WORDS), i))
    steps = [(planned.plan.has_chunks, ms) for planned, ms in steps_of(scheduler)]
    mixed, clock = [ms for has_chunks, ms in steps if has_chunks], sum(ms for _, ms in steps)
    return {
        "output_tokens_per_s": round(1e3 * sum(answer for _, answer in pairs) / clock, 1), "s": round(clock / 1e3, 2),
        "steps": len(steps), "steps_with_prompts": len(mixed), "s_with_prompts": round(sum(mixed) / 1e3, 2),
        "p99_step_ms": round(float(np.percentile([ms for _, ms in steps], 99)), 1),
    }  # fmt: skip


def steps_of(scheduler: Scheduler) -> Iterator[tuple[Planned, float]]:
    """Every step and its time; what it gives is known when the next one has been planned."""
    newest: Planned | None = None
    while True:
        planned = scheduler.plan()
        ms = None if planned is None else step_ms(planned)
        if newest is not None:
            scheduler.step_ended()
            for sequence in newest.sampled[0]:
                sequence.answer.take(1)
                if sequence.answer.ended:
                    scheduler.leave(sequence)
        elif planned is None:
            return
        newest = planned
        if planned is not None:
            yield planned, ms


if __name__ == "__main__":
    run_tool(simulate_steps)
