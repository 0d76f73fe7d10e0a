"""What decides a run's results, in a file beside them: the same run goes on, another's results are never touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mixtralkit.config import ModelConfig
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation.prompt_sets import PromptRecord
from mixtralkit.json_file import read_bytes, read_object, shown
from mixtralkit.planning.plan import ExpertPlan
from mixtralkit.version import __version__
from mixtralkit.whole_file import writing

FORMAT = 2


def fingerprint(
    config: ModelConfig,
    weights: Sequence[Path],
    tokenizer: Path | Tokenizer,
    prompts: Path | Sequence[PromptRecord],
    options: Mapping[str, Any],
    dtype: str,
    max_seq_len: int,
    placed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What decides a run's results, as JSON values without machine paths; ``RunRecord.confirm`` adds the weights' hash.

    Args:
        placed: ``facts_of_plan``, where the plan is known already. The number of ranks, the plan and the batch size are
            only in it where they change results: beside float32, and where a capacity may drop rows.
    """
    files = [{"name": path.name, "bytes": (s := path.stat()).st_size, "modified_ns": s.st_mtime_ns} for path in weights]
    facts = {
        "format": FORMAT,
        "versions": {"mixtralkit": __version__, "torch": torch.__version__},
        "model": {"config": _limitless(config), "files": files, "weights": None},
        "tokenizer": _text_facts(tokenizer),
        "prompts": hashlib.sha256(_prompt_bytes(prompts)).hexdigest(),
        "options": {**options, "max_seq_len": max_seq_len, "dtype": dtype},
    }
    return json.loads(json.dumps({**facts, **(placed or {})}))


def facts_of_plan(plan: ExpertPlan, world_size: int, attention: str, max_batch_size: int, dtype: str) -> dict[str, Any]:
    """The parts of ``fingerprint`` that wait for the plan: ``capacity``, ``formats`` and ``spread``."""
    placed = (plan, world_size, attention, max_batch_size)
    formats = None if plan.precision is None else {"precision": _hash(plan.precision)}
    spread = None if dtype == "float32" else what_rounds(*placed)
    return {"capacity": what_cuts(*placed), "formats": formats, "spread": spread}


def what_cuts(plan: ExpertPlan, world_size: int, attention: str, max_batch_size: int) -> dict[str, Any] | None:
    """What decides which rows a plan with a capacity drops; None for a plan without."""
    if plan.cold_capacity_factor is None:
        return None
    return {
        **what_rounds(plan, world_size, attention, max_batch_size),
        "cold_capacity_factor": plan.cold_capacity_factor,
        "cold_token_percent": plan.cold_token_percent,
        "overflow": plan.overflow,
        "cut_order": plan.cut_order,
    }


def what_rounds(plan: ExpertPlan, world_size: int, attention: str, max_batch_size: int) -> dict[str, Any]:
    """What decides in which order numbers are added, and so their last bits: the ``spread`` of ``fingerprint``."""
    return {
        "plan": _hash(plan.slots_LWS.tolist()),
        "ranks": world_size,
        "attention": attention,
        "max_batch_size": max_batch_size,
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _limitless(config: ModelConfig) -> dict[str, Any]:
    """The model's numbers without those that a caller chooses."""
    return {name: value for name, value in asdict(config).items() if name not in ("max_seq_len", "max_batch_size")}


def _prompt_bytes(prompts: Path | Sequence[PromptRecord]) -> bytes:
    if isinstance(prompts, Path):
        return read_bytes(prompts)
    return json.dumps([{**asdict(record), "line": None} for record in prompts]).encode()


def _text_facts(tokenizer: Path | Tokenizer) -> dict[str, Any]:
    path = tokenizer.path if isinstance(tokenizer, Tokenizer) else tokenizer
    facts: dict[str, Any] = {"file": hashlib.sha256(read_bytes(path)).hexdigest()}
    if isinstance(tokenizer, Tokenizer):
        facts |= {
            "end_ids": sorted(tokenizer.end_ids), "chat_template": tokenizer.chat_template,
            "version": tokenizer.version, "special": tokenizer.special_names, "n_words": tokenizer.n_words,
        }  # fmt: skip
    return facts


class RunRecord:
    """The record at ``path``, found or still to be written.

    ValueError, naming ``what`` and how it differs, where it is of another run; nothing is written then.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], what: Path, advice: str) -> None:
        self.path, self._facts, self._what, self._advice = path, facts, what, advice
        self._old = read_object(path) if path.exists() else None
        if self._old is not None:
            self._check(difference(self._old, facts))

    @property
    def needs_weights(self) -> bool:
        """Whether the weights' hash has to be known: the first time, and where a weight file's size or time changed."""
        return self._old is None or _of_model(self._old, "files") != _of_model(self._facts, "files")

    def confirm(self, weights: str | None, **more: Any) -> None:
        """Writes the record, with the hash of the weights; ValueError where these are another model's.

        Args:
            more: parts of the facts that were not known before the model was there.
        """
        self._facts = {**self._facts, **json.loads(json.dumps(more))}
        if self._old is not None:
            self._check(difference(self._old, self._facts))
        if not self.needs_weights:
            return
        if self._old is not None:
            found = _of_model(self._old, "weights")
            self._check("" if found is not None and found == weights else "another model (its weights differ)")
        self._old = dict(self._facts)
        if weights is not None:
            self._old["model"] = {**self._facts["model"], "weights": weights}
        write_json(self.path, self._old)

    def _check(self, different: str) -> None:
        if different:
            raise ValueError(f"{self._what}: holds a run of {different}; {self._advice}")


def claim_output(output: Path, facts: Mapping[str, Any], overwrite: bool = False) -> RunRecord | None:
    """The record beside a file of results, ``OUTPUT.run.json``; None for a pipe or a device.

    ValueError where the file is another run's or nobody knows whose; with ``overwrite`` it is emptied instead.
    """
    beside = output.with_name(f"{output.name}.run.json")
    if output.exists() and not output.is_file():
        return None
    if overwrite:
        for path in (beside, output):
            path.unlink(missing_ok=True)
    if not beside.exists() and output.exists() and output.stat().st_size:
        raise ValueError(
            f"{output}: is there and {beside.name}, which would say of what run, is not; name another output, or "
            "replace it with --overwrite"
        )
    return RunRecord(beside, facts, output, "name another output, or replace it with --overwrite")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How a found run differs from the wanted one but in its weights, in words; empty where it does not."""
    if old.get("format") != new.get("format"):
        return "another format"
    if _of_model(old, "config") != _of_model(new, "config"):
        return "another model"
    for name, words in (("tokenizer", "another tokenizer"), ("prompts", "another set")):
        if old.get(name) != new.get(name):
            return words
    for part, words in (
        ("options", "another setting"), ("capacity", "another setting"), ("formats", "another setting"),
        ("spread", "another setting"), ("versions", "another version"),
    ):  # fmt: skip
        if part not in new:
            continue
        before, now = old.get(part), new[part]
        before, now = (value if isinstance(value, Mapping) else {} for value in (before, now))
        for name in dict.fromkeys((*now, *before)):
            if before.get(name) != now.get(name):
                return f"{words}: {name} was {shown(before.get(name))}, is {shown(now.get(name))}"
    return ""


def _of_model(facts: Mapping[str, Any], name: str) -> Any:
    model = facts.get("model")
    return model.get(name) if isinstance(model, Mapping) else None if name != "config" else model


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with writing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
