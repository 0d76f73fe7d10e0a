"""A load whose domain shifts half way, with and without a plan manager: what moves, how long steps wait, same tokens.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.model.bench_plan_manager
    torchrun --standalone --nproc_per_node=4 -m benchmarks.model.bench_plan_manager --model mixtral-8x7b

Prints one line of JSON a way, a table on stderr. The ways take turns, and each line is its run of median tokens/s.
docs/plan-manager.md says what the fields mean.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.common.machine import describe_run
from benchmarks.model.source import RandomWords
from benchmarks.model.watch import Watch, manager_fields, ms, restore
from mixtralkit.checkpoint import load_into, open_checkpoint
from mixtralkit.cli.run import run_tool
from mixtralkit.config import EngineConfig, ModelConfig, MoEOptions, parse_dtype, shipped
from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.plan_judge import MoveJudge
from mixtralkit.engine.plan_manager import PlanManager
from mixtralkit.engine.plan_policies import Policy, make_policy
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation.prompt_sets import read_prompts
from mixtralkit.mixtral import choose_layout, encode_prompt
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import ExpertPlan

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingOptions(temperature=0)
NEVER = 2**62  # steps of a window that does not end


def bench_plan_manager(
    ckpt: Path = ROOT / "ckpts",
    model: Path | None = None,
    layers: int | None = None,
    attention: str = "tp,dp",
    policies: str = "none,balanced,random",
    prompts: int = 96,
    prompt_len: int = 64,
    new_tokens: int = 64,
    max_batch_size: int = 16,
    update_step: int = 64,
    slots_per_rank: int | None = None,
    margin: float = 1.0,
    symmetric_rows: int | None = 1,
    repeats: int = 3,
    hardware: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Runs the same prompts with each policy and compares.

    Args:
        ckpt: folder of a checkpoint; prompts are held-out text, scripture and then Python.
        model: architecture, a params.json or the name of one in configs/models, for random weights instead; prompts
            are random tokens, of the lower half of the vocabulary and then of the upper.
        layers: blocks of such a model, fewer than it has.
        attention: tp, dp, or both between commas.
        policies: ways between commas: none, for no manager; a policy of docs/plan-manager.md, judged; random, for
            another placement of every layer in every window, whatever it costs.
        prompts: requests.
        prompt_len: most tokens of each.
        new_tokens: most tokens of each answer.
        max_batch_size: requests that run at a time; as one ends the next comes in.
        update_step: steps of a window.
        slots_per_rank: most experts of a rank in each layer; left out, as many as without a manager.
        margin: how many times its price a move must save, where moves are judged.
        symmetric_rows: as in tools/example.py, for attention dp; left out, at least as many as a decode step has, on
            CPUs too.
        repeats: runs of each way.
        hardware: the machine's speeds, for the judge: a file or the name of one in configs/hardware; left out, h200 on
            CUDA and cpu-2core on a CPU.
        dtype: bfloat16 on CUDA, float32 on a CPU when not given.
        device: cpu or cuda.
        seed: of weights, random prompts and random plans.
        output: file that takes the lines of JSON.
    """
    for name, value, least in (("prompts", prompts, 2), ("new_tokens", new_tokens, 8), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
    if layers is not None and model is None:
        raise ValueError(f"layers ({layers}) works with model only: a checkpoint keeps its blocks")
    context = RankContext.start(device)
    kind = parse_dtype(dtype or ("bfloat16" if context.device.type == "cuda" else "float32"))
    if hardware is None:
        hardware = Path("h200" if context.device.type == "cuda" else "cpu-2core")
    hardware = shipped("hardware", hardware)
    source, machine = Source(ckpt, model, layers, seed), Hardware.load(hardware)
    limits, settings = (prompt_len + new_tokens, max_batch_size), (machine, update_step, slots_per_rank, margin, seed)
    lines = []
    for way in attention.split(","):
        engine = source.build(context, kind, way, limits, MoEOptions.of(symmetric_rows=symmetric_rows))
        bench = Bench(engine, source.requests(engine, prompts, prompt_len, new_tokens), *settings)
        for found in bench.compare(policies.split(","), repeats):
            lines.append({
                **found, "model": source.name, "layers": engine.model.params.n_layers,
                "dtype": str(kind).removeprefix("torch."), "attention": way, "experts": "ep", "prompts": prompts,
                "max_batch_size": max_batch_size, "update_step": update_step, "hardware": hardware.name,
                **describe_run(context),
            })  # fmt: skip
            if context.is_first:
                print(json.dumps(lines[-1]), flush=True)
                print(_row(lines[-1]), file=sys.stderr, flush=True)
        del engine, bench
        gc.collect()  # the next model takes the place of this one and its graphs
    if context.is_first and output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    context.stop()
    if kind == torch.float32 and not all(line["same_tokens"] for line in lines):
        raise RuntimeError("a run gave other tokens than the undisturbed one")


@dataclass(frozen=True)
class Source:
    """Where weights and prompts come from: a checkpoint and text, or an architecture and chance."""

    ckpt: Path
    model: Path | None
    layers: int | None
    seed: int

    @property
    def name(self) -> str:
        return self.ckpt.resolve().name if self.model is None else self.model.stem

    def build(
        self, context: RankContext, dtype: torch.dtype, attention: str, limits: tuple[int, int], options: MoEOptions
    ) -> Engine:
        reader = open_checkpoint(self.ckpt) if self.model is None else None
        config = reader.config if reader is not None else ModelConfig.from_file(shipped("models", self.model))
        if self.layers is not None:
            if not 1 <= self.layers <= config.n_layers:
                raise ValueError(f"layers ({self.layers}) must lie in 1 … {config.n_layers}")
            config = replace(config, n_layers=self.layers)
        layout = choose_layout(
            config.with_limits(*limits), context, EngineConfig.of(attention=attention, experts="ep", moe=options)
        )
        built = Transformer(layout, context, dtype, options)
        if reader is None:
            built.initialize(self.seed)
            return Engine(built, RandomWords(config.vocab_size))
        load_into(built.named_tensors(), layout, reader, context, False)
        return Engine(built, Tokenizer.beside(self.ckpt))

    def requests(self, engine: Engine, count: int, length: int, new_tokens: int) -> list[Request]:
        """The first half of one domain, the second of another; answers of different lengths."""
        if self.model is None:
            records = read_prompts(ROOT / "configs" / "prompts" / "heldout.jsonl")
            texts = [
                [r.prompt for r in records if r.id.startswith(name) and r.prompt] for name in ("scripture", "python")
            ]
            drawn = [[encode_prompt(engine.tokenizer, i, text)[:length] for i, text in enumerate(t)] for t in texts]
        else:
            half, rng = engine.model.params.vocab_size // 2, np.random.default_rng(self.seed)
            drawn = [
                [tuple((rng.integers(half, size=length) + half * part).tolist()) for _ in range(count)]
                for part in (0, 1)
            ]
        found = []
        for i in range(count):
            domain = drawn[2 * i // count]
            found.append(Request(i, domain[i % len(domain)], new_tokens - i % 4 * (new_tokens // 8), GREEDY))
        return found


@dataclass
class Bench:
    """The ways of one model; collective, like its engine."""

    engine: Engine
    requests: list[Request]
    hardware: Hardware
    update_step: int
    slots_per_rank: int | None
    margin: float
    seed: int

    def __post_init__(self) -> None:
        self.model, self.context = self.engine.model, self.engine.context
        self.first_plan = self.model.layout.plan
        self.judge = MoveJudge.for_model(self.model, self.hardware, self.update_step, self.margin)
        self.wanted: list[list[int]] | None = None

    def compare(self, policies: list[str], repeats: int) -> Iterator[dict[str, object]]:
        """A line for each policy, the ways in turn."""
        runs: dict[str, list[dict[str, object]]] = {policy: [] for policy in policies}
        self.wanted = self._answers()  # the undisturbed run, which also warms up
        for _ in range(repeats):
            for policy in policies:
                runs[policy].append(self._run(policy))
        for policy, found in runs.items():
            by_speed = sorted(found, key=lambda run: run["tokens_per_s"])
            chosen = by_speed[len(found) // 2]
            every = {
                "tokens_per_s_all": [run["tokens_per_s"] for run in found],
                "longest_pause_ms_all": [run["pauses"]["longest_ms"] for run in found if "pauses" in run],
                "same_tokens": all(run["same_tokens"] for run in found),
            }
            yield {"policy": policy, **chosen, **every}

    def _run(self, policy: str) -> dict[str, object]:
        restore(self.model, self.first_plan)
        manager = None if policy == "none" else self._manager(policy)
        self.engine.reset()  # its steps count choices for a manager alone
        self._warm_up(manager)
        self.engine.plan_manager = manager
        watch = Watch()
        self._wait()
        self.context.barrier()
        started = time.perf_counter()
        with watch.on():
            answers = self._answers()
        self._wait()
        ended = time.perf_counter()
        self.engine.plan_manager = None
        seconds = max(self.context.all_gather_objects(ended - started))
        steps_s = np.diff([*watch.starts, ended])
        slowest_s = np.max(self.context.all_gather_objects(steps_s), axis=0)
        found = {
            "tokens_per_s": round(sum(map(len, answers)) / seconds, 2),
            "seconds": round(seconds, 3),
            "same_tokens": answers == self.wanted,
            "steps": dict(Counter(watch.kinds)),
            "step_ms": _spread_ms(slowest_s),
            "decode_step_ms": _spread_ms(slowest_s[np.array(watch.kinds) != "mixed"]),
        }
        return found if manager is None else {**found, **manager_fields(manager, self.context)}

    def _manager(self, policy: str) -> PlanManager:
        if policy == "random":
            return PlanManager(self.model, self._random(), self.update_step)
        make_plan = make_policy(policy, self.model, self.judge, self.slots_per_rank)
        return PlanManager(self.model, make_plan, self.update_step, self.judge)

    def _random(self) -> Policy:
        """Every rank's slots as many as at first, the experts in them anyhow."""
        rng, world = np.random.default_rng(self.seed), self.context.world_size
        num_experts = self.model.params.num_experts
        if num_experts % world:
            raise ValueError(f"policy 'random' needs ranks ({world}) that divide the experts ({num_experts})")
        return lambda loads_1E, tokens: ExpertPlan(rng.permutation(num_experts).reshape(1, world, -1), num_experts)

    def _warm_up(self, manager: PlanManager | None) -> None:
        """Captures the graphs of such steps, where there are any."""
        if self.context.device.type == "cuda":
            self.engine.plan_manager = manager and PlanManager(self.model, manager.policy, NEVER)
            self._answers()

    def _answers(self) -> list[list[int]]:
        return [completion.tokens for completion in self.engine.complete(self.requests)]

    def _wait(self) -> None:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)


def _spread_ms(steps_s: np.ndarray) -> dict[str, float]:
    if not len(steps_s):
        return {}
    return {"median": ms(median(steps_s)), "p99": ms(np.quantile(steps_s, 0.99)), "longest": ms(steps_s.max())}


def _row(line: dict[str, object]) -> str:
    words = [
        f"{line['attention']} {line['policy']:<9} {line['tokens_per_s']:>9.1f} tokens/s  step ms {line['step_ms']}"
    ]
    if "pauses" in line:
        pauses = line["pauses"]
        words.append(f"pauses {pauses['longest_ms']} longest, {pauses['mean_ms']} mean of {pauses['count']}")
        words.append(f"{line['layers_moved']} layers, {line['experts_moved']} experts, {line['mb_moved']} MB")
    words.append(f"steps {line['steps']}")
    return "  ".join([*words, "same tokens" if line["same_tokens"] else "OTHER TOKENS"])


if __name__ == "__main__":
    run_tool(bench_plan_manager)
