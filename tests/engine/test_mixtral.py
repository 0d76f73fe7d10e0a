"""The public API: MixtralKit's signatures and results, and what OpenCompass reads."""

from __future__ import annotations

import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.config import ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.chat import encode_chat
from mixtralkit.mixtral import choose_layout
from mixtralkit.planning.plan import everywhere
from tests.engine.parts import engine_config, make_checkpoint, make_model, make_tokenizer
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), engine_config())


@pytest.fixture(scope="module")
def mixtral(folder) -> Mixtral:
    return Mixtral.build(str(folder), str(folder / "tokenizer.model"), 64, 4, 1, device="cpu")


def test_opencompass_reads_what_it_needs(mixtral):
    assert (mixtral.model.params.max_seq_len, mixtral.model.params.max_batch_size) == (64, 4)
    tokens = torch.tensor([mixtral.tokenizer.encode("Who are you?", True, True)])
    logits = mixtral.model.forward(tokens, 0)
    assert logits.shape == (*tokens.shape, mixtral.tokenizer.n_words)
    assert logits.dtype == torch.float32
    out, logprobs = mixtral.generate([tokens[0].tolist()], max_gen_len=5, temperature=0)
    assert len(out[0]) <= 5
    assert logprobs is None


def test_echo_and_logprobs_sum_as_a_full_forward_says(mixtral):
    prompts = [mixtral.tokenizer.encode(text) for text in ("Who are you?", "1 + 1", "def add(")]
    tokens, logprobs = mixtral.generate(prompts, 9, temperature=0, logprobs=True, echo=True)
    for prompt, ids, values in zip(prompts, tokens, logprobs, strict=True):
        assert ids[: len(prompt)] == prompt
        assert len(ids) == len(values)
        assert values[0] == 0.0
        scores = mixtral.model.forward(torch.tensor([ids]), 0)[0].log_softmax(-1)
        expected = sum(float(scores[i, token]) for i, token in enumerate(ids[1:]))
        assert sum(values) == pytest.approx(expected, abs=1e-3)
    short, own = mixtral.generate(prompts, 9, temperature=0, logprobs=True)
    assert short == [ids[len(p) :] for ids, p in zip(tokens, prompts, strict=True)]
    assert own[0] == pytest.approx(logprobs[0][len(prompts[0]) :], abs=1e-4)


def test_scoring_needs_no_generated_token(mixtral):
    ids = mixtral.tokenizer.encode("In the beginning")
    tokens, logprobs = mixtral.generate([ids], 0, logprobs=True, echo=True)
    scores = mixtral.model.forward(torch.tensor([ids]), 0)[0].log_softmax(-1)
    assert tokens == [ids]
    assert logprobs[0] == pytest.approx([0.0] + [float(scores[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)


def test_text_completion(mixtral):
    results = mixtral.text_completion(
        ["Who are you?", "In"], 0, None, max_gen_len=6, logprobs=True, stop=None, seed=None, stop_token_ids=None
    )
    assert all("".join(r["tokens"]) == r["generation"] for r in results)
    ids, _ = mixtral.generate([mixtral.tokenizer.encode(p) for p in ("Who are you?", "In")], 6, temperature=0)
    assert [r["generation"] for r in results] == [mixtral.tokenizer.decode(i) for i in ids]
    assert [len(r["tokens"]) for r in results] == [len(r["logprobs"]) for r in results] == [len(i) for i in ids]
    assert {r["finish_reason"] for r in results} <= {"stop", "length"}
    echoed = mixtral.text_completion(["Who are you?"], temperature=0, max_gen_len=6, echo=True)[0]
    assert echoed["generation"].startswith("Who are you?")
    assert set(echoed) == {"generation", "finish_reason"}


def test_chat_completion_is_the_template_continued(mixtral):
    dialog = [{"role": "user", "content": "Who are you?"}]
    answer = mixtral.chat_completion([dialog], temperature=0, max_gen_len=8)[0]
    ids, _ = mixtral.generate([encode_chat(mixtral.tokenizer, dialog)], 8, temperature=0)
    assert answer["generation"] == {"role": "assistant", "content": mixtral.tokenizer.decode(ids[0])}


def test_streams_texts_ids_and_dialogs_together(mixtral):
    prompts = ["Who are you?", mixtral.tokenizer.encode("In"), [{"role": "user", "content": "1 + 1"}]]
    texts = dict.fromkeys(range(3), "")
    for event in mixtral.stream(prompts, max_gen_len=5, temperature=0.7, seed=3):
        texts[event.id] += event.text
    whole = mixtral.complete(prompts, 5, temperature=0.7, seed=3)
    assert texts == {c.id: c.text for c in whole}


def test_the_seed_decides_the_text(folder, mixtral):
    def text(model, **options):
        return [r["generation"] for r in model.text_completion(["In the"] * 3, 1.0, 1.0, 12, **options)]

    assert text(mixtral) == text(mixtral)
    assert len(set(text(mixtral))) == 3, "prompts of one call are drawn apart"
    assert text(mixtral, seed=2) != text(mixtral)
    assert text(Mixtral.build(folder, max_seq_len=64, seed=2)) == text(mixtral, seed=2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.text_completion(["a", ""]), "prompt 1 is empty"),
        (lambda m: m.text_completion("a text"), "must be a list of texts"),
        (lambda m: m.text_completion(["a", None]), "prompt 1 \\(None\\)"),
        (lambda m: m.generate([[1], []], 3), "prompt 1 is empty"),
        (lambda m: m.generate([[1, 5], [1] * 65], 3), "prompt 1 has 65 tokens, more than max_seq_len \\(64\\)"),
        (lambda m: m.generate([[1, 5]], 3, temperature=-1), "temperature \\(-1\\)"),
        (lambda m: m.generate([[1, 5]], 3, top_p=0.0), "top_p \\(0.0\\)"),
        (lambda m: m.generate([[1, 5]], -3), "max_gen_len \\(-3\\)"),
        (lambda m: m.chat_completion([[{"role": "system", "content": "x"}]]), "prompt 0: the last message"),
    ],
)
def test_wrong_input_is_named(mixtral, call, says):
    with pytest.raises(ValueError, match=says):
        call(mixtral)


def test_building_names_what_does_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match=r"num_gpus \(4\) must equal the number of ranks \(1\); start with: torchrun"):
        Mixtral.build(folder, num_gpus=4)
    with pytest.raises(ValueError, match="attention \\('pp'\\)"):
        Mixtral.build(folder, attention="pp")
    with pytest.raises(ValueError, match="dtype \\('int8'\\)"):
        Mixtral.build(folder, dtype="int8")
    with pytest.raises(ValueError, match="missing"):
        Mixtral.build(tmp_path / "missing")


def test_prefill_budget_and_graphs_reach_the_engine(folder, mixtral):
    built = Mixtral.build(folder, max_seq_len=64, prefill_budget=3, cuda_graphs=False)
    assert (built.engine.prefill_budget, built.engine.cuda_graphs) == (3, False)
    prompts = ["Who are you?", "In the beginning"]
    assert built.text_completion(prompts, temperature=0, max_gen_len=8) == mixtral.text_completion(
        prompts, temperature=0, max_gen_len=8
    )
    with pytest.raises(ValueError, match=r"prefill_budget \(0\) must be a whole number of at least 1"):
        Mixtral.build(folder, prefill_budget=0)


def test_auto_splits_heads_only_where_the_ranks_divide_them():
    def chosen(world_size, **changes):
        config = engine_config(**changes)
        return choose_layout(config, RankContext(world_size=world_size)).parallel

    assert chosen(4) == ParallelConfig("tp", "ep")
    assert chosen(3) == ParallelConfig("dp", "ep")
    assert chosen(4, n_heads=12, n_kv_heads=3) == ParallelConfig("dp", "ep")
    assert chosen(4, n_heads=4, n_kv_heads=1) == ParallelConfig("tp", "ep")


def _built(context, folder, attention, plans):
    built = [Mixtral.build(folder, max_seq_len=64, attention=attention, plan=plan, context=context) for plan in plans]
    return [m.text_completion(["Who are you?", "In the", "1 +"], temperature=0, max_gen_len=10) for m in built]


@pytest.mark.parametrize("attention", ["auto", "dp"])
def test_builds_the_same_model_on_two_ranks_with_a_plan(folder, tmp_path, attention):
    everywhere(3, 8, 2).save(tmp_path / "plan.json")
    alone = Mixtral.build(folder, max_seq_len=64).text_completion(
        ["Who are you?", "In the", "1 +"], temperature=0, max_gen_len=10
    )
    assert run_ranks(_built, 2, folder, attention, [None, tmp_path / "plan.json"]) == [[alone] * 2] * 2


def test_from_parts(tmp_path):
    mixtral = Mixtral.from_parts(make_model(RankContext(), engine_config()), make_tokenizer(tmp_path))
    assert len(mixtral.complete(["a"], 3, temperature=0)) == 1
