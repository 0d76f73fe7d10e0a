"""What the files beside a tokenizer say, against transformers and mistral-common."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV2, InstructTokenizerV3
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from mixtralkit.engine.chat import describe_template, encode_chat, render
from mixtralkit.engine.tokenizer import Tokenizer
from tests.engine.parts import VOCAB_SIZE
from tests.engine.side_files import CHATML, random_texts, theirs, trained, write_folder
from tests.engine.test_chat import DIALOGS, MESSAGES, dialog

ADDED = {"<|im_end|>": 384, "<|im_start|>": 385}
CONTROLS = "[INST],[/INST],[TOOL_CALLS],[AVAILABLE_TOOLS],[/AVAILABLE_TOOLS],[TOOL_RESULTS],[/TOOL_RESULTS],"
CONTROLS += "[IMG],[IMG_BREAK],[IMG_END],[PREFIX],[MIDDLE],[SUFFIX]"
DECODER = {
    "384": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": True, "normalized": False},
    "385": {"content": "<|im_start|>", "special": False, "lstrip": True, "rstrip": False, "normalized": False},
}
FOLDERS = {
    "added_tokens.json": {"added_tokens": ADDED},
    "a llama tokenizer": {"added_tokens": ADDED, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
    "not legacy": {
        "added_tokens": ADDED, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    },
    "sides": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": DECODER}},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_with_added_tokens_are_encoded_as_by_transformers(tmp_path, name):
    """Fine-tunes with added tokens were refused."""
    folder = write_folder(tmp_path, **FOLDERS[name])
    ours, other = Tokenizer.beside(folder, vocab_size=448), theirs(folder)
    assert ours.n_words == 386
    for text in random_texts(400):
        assert ours.encode(text, bos=False) == other.encode(text, add_special_tokens=False), text
    ours.check_vocabulary(448)
    assert ours.decode([385, 400, 447]) == ours.piece(385), "ids without a piece decode to nothing"


@pytest.mark.parametrize("kind", ["saved by transformers", "byte level"])
def test_tokenizer_json_alone(tmp_path, kind):
    """ids equal to transformers' on 5,000 random texts, and texts that stream to what it decodes."""
    if kind == "byte level":
        import tokenizers

        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        made.train_from_iterator(random_texts(300, 5), trainer)
        write_folder(tmp_path, b"", tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast",
                                                      "bos_token": "<s>", "eos_token": "</s>"})  # fmt: skip
        made.save(str(tmp_path / "tokenizer.json"))
    else:
        source = write_folder(tmp_path / "source", tokenizer_config={"tokenizer_class": "LlamaTokenizer"},
                              added_tokens=ADDED)  # fmt: skip
        theirs(source).save_pretrained(tmp_path)
        write_folder(tmp_path, b"")
    ours, other = Tokenizer.beside(tmp_path), theirs(tmp_path)
    assert ours.path.name == "tokenizer.json"
    for text in random_texts(5000):
        ids = ours.encode(text, bos=False)
        assert ids == other.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == other.decode(ids, skip_special_tokens=True), text
    assert (ours.bos_id, ours.eos_id) == (other.bos_token_id, other.eos_token_id)


TEMPLATES = {
    "chatml": CHATML,
    "llama": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "json and namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ m | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }}<|im_end|>",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}\n  {% endfor %}end",
}


@pytest.mark.parametrize("user_defined", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_are_rendered_and_encoded_as_by_transformers(tmp_path, name, user_defined):
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATES[name]}
    model = trained(user_defined_symbols="<|im_start|>,<|im_end|>") if user_defined else None
    folder = write_folder(tmp_path, model, tokenizer_config=config, **({} if user_defined else {"added_tokens": ADDED}))
    ours, other = Tokenizer.beside(folder), theirs(folder)
    for messages in DIALOGS.values():
        wanted = {"add_generation_prompt": True, "tokenize": False}
        assert render(ours, messages) == other.apply_chat_template(messages, **wanted)
        ids = other.apply_chat_template(messages, **{**wanted, "tokenize": True}, return_dict=False)
        assert encode_chat(ours, messages) == ids


def test_where_a_template_comes_from(tmp_path):
    plain = write_folder(tmp_path / "plain")
    assert describe_template(Tokenizer.beside(plain)) == "chat template: Mistral's, tokenizer version 1"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    folder = write_folder(tmp_path / "folder", tokenizer_config={"chat_template": named})
    assert Tokenizer.beside(folder).chat_template == theirs(folder).get_chat_template() == "d"
    (folder / "chat_template.jinja").write_text("own file")
    assert Tokenizer.beside(folder).chat_template == theirs(folder).get_chat_template() == "own file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert Tokenizer.beside(folder, chat_template=tmp_path / "mine.jinja").chat_template == "mine"
    assert Tokenizer.beside(plain, folder).chat_template == "own file", "the tokenizer's own folder says"


@pytest.mark.parametrize(
    ("template", "says"),
    [("{% for %}", "line 1"), ("{{ raise_exception('roles must take turns') }}", "roles must take turns"),
     ("{{ messages[7].content }}", "has no"), ("{{ ''.__class__.__mro__ }}", "unsafe")],
)  # fmt: skip
def test_templates_that_fail_are_one_sentence(tmp_path, template, says):
    folder = write_folder(tmp_path, tokenizer_config={"chat_template": template})
    with pytest.raises(ValueError, match=r"chat template \(.*tokenizer_config\.json\): .*" + says):
        encode_chat(Tokenizer.beside(folder), dialog("a"))


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDLESS = {
    "loops": (LOOPS + "{% endfor %}" * 3, "takes more than 1 s"),
    "loops that write": (LOOPS + "x{% endfor %}{% endfor %}{% endfor %}", "takes more than"),
    "one long operation": ("{{ 10 ** 9999999999 }}", "takes more than"),
    "much memory": ("{{ 'a' * 10 ** 10 }}", "takes more than"),
    "a text that doubles": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "takes more than",
    ),
    "a macro that calls itself": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "takes more than",
    ),
    "a long text": ("{% for a in range(9999) %}{{ 'a' * 1000 }}{% endfor %}", "writes 9,999,000 characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_end_are_stopped_and_the_next_is_rendered(tmp_path, name):
    """They hung, or ate the memory, of the whole run."""
    template, says = ENDLESS[name]
    bad = write_folder(tmp_path / "bad", tokenizer_config={"chat_template": template})
    good = write_folder(tmp_path / "good", tokenizer_config={"chat_template": "{{ messages[0].content * 3 }}"})
    with pytest.raises(ValueError, match=rf"chat template \(.*tokenizer_config\.json\): {says}"):
        encode_chat(Tokenizer.beside(bad), dialog("a"))
    assert render(Tokenizer.beside(good), dialog("a")) == "aaa"


def test_threads_render_their_own_dialogs(tmp_path):
    folder = write_folder(tmp_path, tokenizer_config={"chat_template": "{{ messages[0].content }}"})
    tokenizer = Tokenizer.beside(folder)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: render(tokenizer, dialog(f"<{i}>")), range(200)))
    assert found == [f"<{i}>" for i in range(200)]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("suffix", [True, False])
def test_control_tokens_of_versions_2_and_3(tmp_path, version, suffix):
    """8x22B-Instruct's dialogs were written with [INST] as text, and the system message first."""
    name = f"tokenizer.model.v{version}" if suffix else "tokenizer.model"
    (tmp_path / name).write_bytes(trained(control_symbols=CONTROLS))
    ours = Tokenizer.beside(tmp_path)
    assert ours.version == (version if suffix else 3)
    kind = TokenizerVersion(f"v{version}")
    pieces = SentencePieceTokenizer(tmp_path / name, tokenizer_version=kind)
    theirs = {2: InstructTokenizerV2, 3: InstructTokenizerV3}[version](pieces)
    for messages in DIALOGS.values():
        request = ChatCompletionRequest(messages=[MESSAGES[m["role"]](content=m["content"]) for m in messages])
        request = get_normalizer(kind, None).from_chat_completion_request(request)
        assert encode_chat(ours, messages) == theirs.encode_instruct(request).tokens


@pytest.mark.parametrize(
    ("generation", "model", "tokenizer", "ids"),
    [
        (None, None, None, {2}),
        (None, 384, None, {384}),
        (None, [2, 384], None, {2, 384}),
        ([5, 384], 2, None, {5, 384}),
        (None, 2, "<|im_end|>", {2, 384}),
        (385, None, "<|im_end|>", {384, 385}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_end_tokens(tmp_path, generation, model, tokenizer, ids):
    files = {"added_tokens": ADDED, "config": {"eos_token_id": model}}
    files |= {} if generation is None else {"generation_config": {"eos_token_id": generation}}
    files |= {} if tokenizer is None else {"tokenizer_config": {"eos_token": {"content": tokenizer, "special": True}}}
    write_folder(tmp_path, **files)
    assert Tokenizer.beside(tmp_path).end_ids == ids
    assert Tokenizer.beside(tmp_path, stop_token_ids=[7]).end_ids == ids | {7}


def test_what_is_not_followed_is_said(tmp_path):
    write_folder(
        tmp_path, generation_config={"eos_token_id": 2, "repetition_penalty": 1.1, "temperature": 0.7},
        config={"eos_token_id": 384}, added_tokens={"[PAD]": 384},
    )  # fmt: skip
    with pytest.warns(UserWarning, match=".") as said:
        assert Tokenizer.beside(tmp_path, vocab_size=VOCAB_SIZE).n_words == VOCAB_SIZE
    texts = "\n".join(str(one.message) for one in said)
    assert "repetition_penalty 1.1, temperature 0.7: not followed" in texts
    assert "eos_token_id is 2 in generation_config.json and 384 in config.json" in texts
    assert r"added tokens beyond vocab_size (384) are left out: [PAD] (384)" in texts


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config", {"eos_token": 3}, r"tokenizer_config\.json: eos_token \(3\) must be a text"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "must be a token id"),
        ("added_tokens", {"a": -1}, r"added_tokens\.json: .* must be a whole number >= 0"),
        ("added_tokens", {"a": 10**12}, r"added_tokens\.json: "),
        ("generation_config", {"eos_token_id": "2"}, r"eos_token_id \('2'\) must be a whole number"),
        ("generation_config", {"eos_token_id": -2}, r"eos_token_id \(-2\) must be"),
        ("config", [], r"config\.json: it \(\[\]\) must be an object"),
        ("tokenizer_config", {"chat_template": [{"name": "a", "template": "t"}]}, "none named default"),
    ],
)
def test_side_files_of_wrong_types_are_one_sentence(tmp_path, name, content, says):
    write_folder(tmp_path, **{name: content})
    with pytest.raises(ValueError, match=says):
        Tokenizer.beside(tmp_path)


def test_pointers_and_missing_files_are_named(tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model\): is a Git LFS pointer"):
        Tokenizer.beside(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json: is a Git LFS pointer"):
        Tokenizer.beside(tmp_path)
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "tekken.json")
    with pytest.raises(ValueError, match="tekken is not read"):
        Tokenizer.beside(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    with pytest.raises(ValueError, match="decoder"):
        Tokenizer.beside(tmp_path)
