"""lm-evaluation-harness through its own clients of OpenAI's protocol: the scores of the adapter in this process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.evaluation.test_lm_eval import CKPTS, NAMES, TASKS, _offline, assert_alike  # noqa: F401
from tests.server.process import Server

WINDOW = 96
ANSWER = "mixtralkit_answer"


def scores(model: Any, tasks: list[Any], **options: Any) -> dict[str, Any]:
    """Metrics of each task, and each document's answers in order."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    metrics = {t: {k: v for k, v in r.items() if isinstance(v, float)} for t, r in found["results"].items()}
    answers = {t: [list(d["filtered_resps"]) for d in sorted(of, key=lambda d: d["doc_id"])]
               for t, of in found["samples"].items()}  # fmt: skip
    return {"metrics": metrics, "answers": answers}


def in_process(tasks: list[Any], **options: Any) -> dict[str, Any]:
    import mixtralkit.evaluation.lm_eval

    assert mixtralkit.evaluation.lm_eval
    arguments = {"ckpt_dir": str(CKPTS), "max_length": WINDOW, "add_bos_token": False, "batch_size": 4}
    return scores("mixtralkit", tasks, model_args=arguments, device="cpu", **options)


def over_http(server: Server, kind: str, tasks: list[Any], max_length: int, **options: Any) -> dict[str, Any]:
    """The harness finds the server's tokenizer by itself, over /tokenizer_info, /tokenize and /detokenize."""
    path = "chat/completions" if kind == "local-chat-completions" else "completions"
    given = {"model": "ckpts", "base_url": f"{server.url}/v1/{path}", "max_retries": 1, "timeout": 120,
             "max_length": max_length, "num_concurrent": 4}  # fmt: skip
    return scores(kind, tasks, model_args=given, **options)


def without_space(name: str) -> dict[str, Any]:
    """The task with answers that lose the space before their first word, which a completion keeps."""
    import yaml

    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    strip = {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    return {**task, "filter_list": [strip]}


@pytest.mark.slow
def test_local_completions(server):
    """Likelihoods by ``echo`` and ``logprobs``; the harness's own window is two tokens larger than the adapter's.

    The seventh answer begins with a stop text, space and all, which ends a completion at once.
    """
    names = [name for name in NAMES if name != ANSWER]
    found, wanted = over_http(server, "local-completions", names, WINDOW + 2), in_process(names)
    found["answers"][ANSWER] = wanted["answers"][ANSWER] = []
    assert_alike(found, wanted, 2e-4)
    task = without_space(ANSWER)
    found = over_http(server, "local-completions", [task], WINDOW + 1, limit=6)
    wanted = in_process([task], limit=6)
    assert found["answers"] == wanted["answers"]
    assert found["metrics"] == wanted["metrics"]
    assert len({str(answer) for answer in found["answers"][ANSWER]}) > 3


@pytest.mark.slow
def test_local_chat_completions(server):
    options = {"apply_chat_template": True, "limit": 6}  # the adapter cuts the seventh, which is too long
    found = over_http(server, "local-chat-completions", [ANSWER], WINDOW + 1, **options)
    wanted = in_process([ANSWER], **options)
    assert found == wanted
    assert len({str(answer) for answer in found["answers"][ANSWER]}) > 3
