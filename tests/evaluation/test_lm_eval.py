"""lm-evaluation-harness on local tasks: scores as its own Hugging Face model gives them, on one rank and on two."""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers

from mixtralkit import Mixtral
from mixtralkit.checkpoint import open_checkpoint, save_checkpoint
from mixtralkit.engine.chat import encode_chat
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation import likelihood
from mixtralkit.planning.plan import everywhere
from tests.ranks import Done, command_of_rank, run_ranks

ROOT = Path(__file__).resolve().parents[2]
CKPTS, TASKS = ROOT / "ckpts", Path(__file__).resolve().parent / "tasks"
NAMES = ["mixtralkit_choice", "mixtralkit_answer", "mixtralkit_text"]
WINDOW = 96  # tokens; some of the tasks' texts have more


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory) -> Any:
    """The harness reads local files, writes no cache of the user's and finds the tasks' data."""
    with pytest.MonkeyPatch.context() as patch:
        _quiet(patch.setenv, str(tmp_path_factory.mktemp("hf")))
        patch.chdir(ROOT)
        yield


def _quiet(setenv: Any, folder: str) -> None:
    """Before the first import of lm_eval."""
    setenv("HF_HOME", folder)
    setenv("HF_HUB_OFFLINE", "1")
    setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    setenv("LMEVAL_LOG_LEVEL", "ERROR")


class SentencePieceTokenizer(transformers.PreTrainedTokenizer):
    """The shipped tokenizer as transformers sees one: the oracle's, by sentencepiece itself."""

    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text: str) -> list[str]:
        return self.model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        if len(tokens) == 1 and tokens[0] in self.all_special_tokens:
            return tokens[0]  # the harness asks for the begin and end tokens' texts
        return self.model.decode(tokens)

    def build_inputs_with_special_tokens(self, ids: list[int], other: list[int] | None = None) -> list[int]:
        return [self.bos_token_id, *ids]


def scores(model: Any, tasks: list[str] = NAMES, **options: Any) -> dict[str, Any]:
    """Metrics of each task, and each document's answers in order."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    metrics = {t: {k: v for k, v in found["results"][t].items() if isinstance(v, float)} for t in tasks}
    answers = {
        t: [list(d["filtered_resps"]) for d in sorted(found["samples"][t], key=lambda d: d["doc_id"])] for t in tasks
    }
    return {"metrics": metrics, "answers": answers}


def ours(**arguments: Any) -> dict[str, Any]:
    import mixtralkit.evaluation.lm_eval

    assert mixtralkit.evaluation.lm_eval
    return scores("mixtralkit", model_args={"ckpt_dir": str(CKPTS), "max_length": WINDOW, **arguments}, device="cpu")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Any:
    """The harness's own model over the weights as transformers reads them."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("hugging_face")
    with open_checkpoint(CKPTS) as reader:
        save_checkpoint(folder, reader.config, reader, "hf", dtype="float32")
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = SentencePieceTokenizer(CKPTS / "tokenizer.model")
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=WINDOW, batch_size=4)


@pytest.fixture(scope="module")
def oracle(hugging_face) -> dict[str, Any]:
    return scores(hugging_face)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return ours(batch_size=4)


def assert_alike(found: dict[str, Any], expected: dict[str, Any], nats: float) -> None:
    """Equal texts, greediness and accuracies; log-probabilities within ``nats``."""
    assert found["answers"]["mixtralkit_answer"] == expected["answers"]["mixtralkit_answer"]
    for task in ("mixtralkit_choice", "mixtralkit_text"):
        for own, other in zip(found["answers"][task], expected["answers"][task], strict=True):
            for a, b in zip(own, other, strict=True):
                (logprob, *greedy), (wanted, *wanted_greedy) = (x if isinstance(x, tuple) else (x,) for x in (a, b))
                assert logprob == pytest.approx(wanted, abs=nats)
                assert greedy == wanted_greedy
    for task, metrics in expected["metrics"].items():
        assert found["metrics"][task] == pytest.approx(metrics, rel=1e-5)


def test_scores_are_those_of_the_harness_s_hugging_face_model(alone, oracle):
    assert_alike(alone, oracle, 2e-4)
    flat = [answer for document in oracle["answers"]["mixtralkit_choice"] for answer in document]
    assert {greedy for _, greedy in flat} == {True, False}
    assert oracle["metrics"]["mixtralkit_choice"]["acc,none"] > 0.7
    assert 0 < oracle["metrics"]["mixtralkit_answer"]["exact_match,none"] < 1


def test_the_batch_does_not_matter(alone):
    assert_alike(ours(batch_size=1), alone, 1e-4)


def _on_ranks(context, folder: str, ways: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The scores of each way, and what a rank says when the others have other requests."""
    _quiet(os.environ.__setitem__, f"{folder}/{context.rank}")
    os.chdir(ROOT)
    os.environ.update(RANK=str(context.rank), WORLD_SIZE=str(context.world_size))
    found = [ours(**way) for way in ways]

    from mixtralkit.evaluation.lm_eval import MixtralLM

    model = MixtralLM(Mixtral.build(CKPTS, max_seq_len=WINDOW, context=context))
    with pytest.raises(RuntimeError) as error:
        model.loglikelihood([_request("loglikelihood", "a", f" b{context.rank}")])
    return found, str(error.value)


@pytest.mark.slow
def test_two_ranks_give_one_rank_s_scores(alone, tmp_path):
    everywhere(open_checkpoint(CKPTS).config.n_layers, 8, 2).save(tmp_path / "plan.json")
    ways = [
        {"attention": "dp", "experts": "ep", "plan": str(tmp_path / "plan.json"), "batch_size": 4},
        {"attention": "tp", "experts": "tp", "batch_size": 3},
    ]
    for found, error in run_ranks(_on_ranks, 2, str(tmp_path), ways):
        for way in found:
            assert_alike(way, alone, 1e-4)
        assert error.startswith("the ranks are left with different loglikelihood requests")


@pytest.fixture(scope="module")
def model() -> Any:
    from mixtralkit.evaluation.lm_eval import MixtralLM

    return MixtralLM(Mixtral.build(CKPTS, max_seq_len=WINDOW + 1, max_batch_size=4, device="cpu"))


def test_a_dialog_s_text_has_the_template_s_tokens(model):
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A small Mixtral."},
        {"role": "user", "content": "Name a prophet.\nOr two."},
    ]
    text = model.apply_chat_template(dialog)
    assert model.tok_encode(text) == encode_chat(Tokenizer(CKPTS / "tokenizer.model"), dialog)
    begun = [*dialog, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == text + " It is"
    with pytest.raises(ValueError, match="the last message has role 'assistant'"):
        model.apply_chat_template(begun)


@pytest.mark.parametrize("text", ["", "a", " a", "<s>a </s> b", "a<unk></s>\n", "</s>", "<s>", "<s", "Grüße <s> 日本"])
@pytest.mark.parametrize("special", [None, True, False])
def test_texts_have_the_tokens_of_the_harness_s_hugging_face_model(model, hugging_face, text, special):
    assert model.tok_encode(text, add_special_tokens=special) == hugging_face.tok_encode(text, special)


def _request(kind: str, *arguments: Any, id: int = 0) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, id, metadata=("a task", 7, 1))


def test_a_long_prompt_keeps_the_end_that_the_harness_s_hugging_face_model_keeps(model, hugging_face):
    text = "word " * 200
    question, is_cut = model._question(0, _request("generate_until", text, {"max_gen_toks": 20}))
    theirs, _ = hugging_face.tok_batch_encode([text], left_truncate_len=WINDOW - 20)
    assert is_cut
    assert list(question.prompt) == theirs[0].tolist()


def test_answers_are_kept_for_a_stopped_run(model, tmp_path, monkeypatch):
    """With a cache of answers, what was scored before the stop is not scored again."""
    from lm_eval.api.model import CachingLM

    from mixtralkit.evaluation import lm_eval as adapter

    pairs = [("In the", f" beginning {i}") for i in range(5)]
    requests = [_request("loglikelihood", *pair, id=i) for i, pair in enumerate(pairs)]
    expected = model.loglikelihood(requests)
    seen: list[int] = []

    def stops_at_the_third_part(mixtral, part, progress):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(part))
        return likelihood.loglikelihoods(mixtral, part)

    monkeypatch.setattr(adapter, "SAVED_TOGETHER", 2)
    cached = CachingLM(model, str(tmp_path / "answers.db"))
    monkeypatch.setattr(adapter, "loglikelihoods", stops_at_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(requests)
    seen.clear()
    answers = cached.loglikelihood(requests)
    assert seen == [1]
    assert [a for a, _ in answers] == pytest.approx([e for e, _ in expected], abs=1e-4)
    assert [g for _, g in answers] == [g for _, g in expected]


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("loglikelihood", ("a", ""), "task a task, document 7: the continuation is empty"),
        ("loglikelihood", ("a", " b" * 99), "has 99 tokens; it must have 1 … 96"),
        ("generate_until", ("a", {"num_beams": 4}), "task a task, document 7: generation option num_beams \\(4\\)"),
        ("generate_until", ("a", {"max_gen_toks": 96}), "document 7: max_gen_toks \\(96\\) must lie in 1 … 95"),
        ("generate_until", ("a", {"do_sample": True, "top_p": 2.0, "max_tokens": 5}), "top_p \\(2.0\\)"),
    ],
)
def test_what_cannot_be_answered_is_named(model, kind, arguments, says):
    with pytest.raises(ValueError, match=says):
        getattr(model, kind)([_request(kind, *arguments)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("experts=ep", "ckpt_dir is missing"),
        ("ckpt_dir=ckpts,pretrained=gpt2", "unknown name 'pretrained'; the names are ckpt_dir, "),
        ("ckpt_dir=ckpts,max_length=0", "max_length \\(0\\) must be a whole number of at least 1"),
        ("ckpt_dir=ckpts,batch_size=many", "batch_size \\('many'\\) must be a whole number"),
        ("ckpt_dir=ckpts,attention=pp", "attention \\('pp'\\)"),
        ("ckpt_dir=missing", "missing"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, says):
    from mixtralkit.evaluation.lm_eval import MixtralLM

    with pytest.raises(ValueError, match=says):
        MixtralLM.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})


def test_automatic_batches_and_the_command_line_s_numbers(model):
    from mixtralkit.evaluation import lm_eval as adapter

    given = [("auto", None), ("auto:4", 12), ("16", None), (3, 12)]
    assert [adapter._batch(*values) for values in given] == [8, 12, 16, 3]


def _only_given_tasks(setattr: Any) -> None:
    """The harness's own tasks are thousands of files, which its command would read first: fourteen seconds."""
    from lm_eval.tasks import TaskManager

    setattr(TaskManager, "__init__", functools.partialmethod(TaskManager.__init__, include_defaults=False))


def _harness_of_rank(context, folder: str, words: tuple[str, ...]) -> Done:
    _quiet(os.environ.__setitem__, f"{folder}/{context.rank}")
    os.chdir(ROOT)
    _only_given_tasks(setattr)
    return command_of_rank(context, "lm-eval", words)


@pytest.mark.slow
def test_the_command_runs_the_harness_on_two_ranks_and_prints_once(alone, tmp_path):
    words = (
        "--model", "mixtralkit", "--model_args", f"ckpt_dir=ckpts,experts=ep,attention=dp,max_length={WINDOW}",
        "--batch_size", "4", "--device", "cpu", "--include_path", str(TASKS), "--tasks", NAMES[0],
        "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    done, other = run_ranks(_harness_of_rank, 2, str(tmp_path), words)
    assert done.returncode == other.returncode == 0, done.stderr
    (row,) = re.findall(r"mixtralkit_choice.*\|acc +\|.*?\|(0\.\d+)\|", done.stdout)
    assert float(row) == pytest.approx(alone["metrics"][NAMES[0]]["acc,none"], abs=1e-4)
    assert other.stdout == ""
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 1


def test_the_command_says_what_is_wrong_in_one_sentence(command_line, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    _only_given_tasks(monkeypatch.setattr)
    line = ["--model", "mixtralkit", "--model_args", "ckpt_dir=nowhere", "--tasks", NAMES[0]]
    done = command_line("lm-eval", *line, "--include_path", TASKS)
    assert done.returncode == 1
    (said,) = [text for text in done.stderr.splitlines() if text.startswith("error")]
    assert said.startswith("error: nowhere")


def test_a_missing_harness_is_one_sentence(command_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mixtralkit.evaluation.lm_eval", raising=False)
    done = command_line("lm-eval", "--help")
    assert done.returncode == 1
    assert done.stderr.startswith("error: lm-evaluation-harness is missing")
    assert len(done.stderr.splitlines()) == 1
