"""What the side files of a checkpoint's folder say beside the architecture: one reader, one value that the rest asks.

Read are ``config.json``, ``generation_config.json``, ``tokenizer_config.json``, ``special_tokens_map.json``,
``added_tokens.json``, ``tokenizer.json`` (its added tokens), ``chat_template.jinja``, ``chat_template.json``. What is
stated and not followed is in ``notes``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from mixtralkit.json_file import conform, load_json, read_as, read_text, shown

# Small files that go with the weights whatever the format, and are copied byte for byte.
SIDE_FILES = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_MOST_TOKENS = 2**24

_Id = Annotated[int, msgspec.Meta(ge=0, le=_MOST_TOKENS)]


class AddedToken(msgspec.Struct, frozen=True):
    """A token that was added to a tokenizer: ``special`` ones have no text in an answer; ``lstrip`` and ``rstrip`` take
    the white space on that side of them in a prompt."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


_Token = str | AddedToken | None


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[_Id] | None = None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    additional_special_tokens: list[str | AddedToken] | None = None
    added_tokens_decoder: dict[str, AddedToken] = {}
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    legacy: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    chat_template: str | list[_NamedTemplate] | None = None


class _SpecialTokens(msgspec.Struct):
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    additional_special_tokens: list[str | AddedToken] | None = None


class _TokenizerJsonToken(AddedToken, frozen=True, kw_only=True):
    id: _Id


class _TokenizerJson(msgspec.Struct):
    added_tokens: list[_TokenizerJsonToken] | None = None


class _ChatTemplateJson(msgspec.Struct):
    chat_template: str


_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Statements:
    """The side files' statements.

    Attributes:
        end_ids: token ids that end an answer, as ``generation_config.json``, else the model's parameters, say; None
            where neither does.
        names: texts of the special tokens by role, ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``.
        special: texts of all tokens that have no text in an answer.
        added: added tokens by id.
        add_bos: whether a text begins with the begin token; None where nothing says so.
        legacy: whether every piece of a text between added tokens begins as a text does; as transformers has it.
        chat_template: a jinja template, and ``template_from`` the file that it is in.
        notes: what is said and not followed, a sentence each.
    """

    end_ids: tuple[int, ...] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    add_bos: bool | None = None
    legacy: bool = True
    chat_template: str | None = None
    template_from: Path | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str | Path, tokenizer_folder: str | Path | None = None) -> Statements:
        """Reads what there is; ValueError names file and key.

        Args:
            folder: the checkpoint's.
            tokenizer_folder: where the tokenizer's files are, if not there.
        """
        folder = Path(folder)
        beside = folder if tokenizer_folder is None else Path(tokenizer_folder)
        end_ids, notes = _end_ids(folder)
        said = replace(_of_tokenizer(beside), end_ids=end_ids)
        template = _chat_template(beside)
        if template is not None:
            said = replace(said, chat_template=template[0], template_from=template[1])
        return replace(said, notes=(*notes, *said.notes))


def _end_ids(folder: Path) -> tuple[tuple[int, ...] | None, list[str]]:
    """End tokens as transformers takes them: of ``generation_config.json`` where there is one, else of the model's own
    parameters; and what is not followed."""
    generation, model = folder / "generation_config.json", folder / "config.json"
    beside, notes = {}, []
    for path in (generation, model):
        if path.exists():
            beside[path] = load_json(path, lambda content: _ids(conform(content, _GenerationConfig).eos_token_id))
    if generation.exists():
        notes += _unfollowed(load_json(generation, lambda content: conform(content, dict)), generation)
        if beside.get(model) and beside[generation] and set(beside[model]) - set(beside[generation]):
            notes.append(
                f"eos_token_id is {_list(beside[generation])} in {generation.name} and {_list(beside[model])} in "
                f"{model.name}; {generation.name} decides, as in transformers"
            )
    return beside.get(generation) or beside.get(model), notes


def _ids(stated: int | list[int] | None) -> tuple[int, ...] | None:
    if stated is None:
        return None
    ids = tuple(dict.fromkeys(stated if isinstance(stated, list) else [stated]))
    if not all(0 <= id <= _MOST_TOKENS for id in ids):
        raise ValueError(f"eos_token_id ({shown(stated)}) must be token ids of at least 0")
    return ids


def _list(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids))


# Keys of a generation_config.json that change a text, and the value that changes nothing.
_PROCESSORS = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "suppress_tokens": None, "begin_suppress_tokens": None, "num_beams": 1,
    "guidance_scale": None, "sequence_bias": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0, "exponential_decay_length_penalty": None, "watermarking_config": None,
    "penalty_alpha": None, "min_length": 0, "min_new_tokens": None, "stop_strings": None,
}  # fmt: skip
_OPTIONS = ("do_sample", "temperature", "top_p", "top_k", "min_p", "max_length", "max_new_tokens")


def _unfollowed(content: Mapping[str, Any], path: Path) -> Iterator[str]:
    stated = [f"{k} {shown(content[k])}" for k, idle in _PROCESSORS.items() if content.get(k, idle) not in (idle, None)]
    stated += [f"{key} {shown(content[key])}" for key in _OPTIONS if content.get(key) is not None]
    if stated:
        yield f"{path.name} states {', '.join(stated)}: not followed, the options of the call decide"


def _of_tokenizer(folder: Path) -> Statements:
    """What the tokenizer's files say but for the template. The later of these files decides where they disagree:
    ``tokenizer.json``, ``added_tokens.json``, ``special_tokens_map.json``, ``tokenizer_config.json``."""
    added: dict[int, AddedToken] = {}
    names: dict[str, str] = {}
    special: set[str] = set()
    config, notes, is_read = _TokenizerConfig(), [], False
    path = folder / "tokenizer.json"
    if path.exists():
        for token in read_as(path, _TokenizerJson).added_tokens or ():
            added[token.id] = AddedToken(**{name: getattr(token, name) for name in AddedToken.__struct_fields__})
    path = folder / "added_tokens.json"
    if path.exists():
        for content, id in read_as(path, dict[str, _Id]).items():
            if id not in added or added[id].content != content:
                added[id] = AddedToken(content)
    for path, kind in (
        (folder / "special_tokens_map.json", _SpecialTokens),
        (folder / "tokenizer_config.json", _TokenizerConfig),
    ):
        if not path.exists():
            continue
        said = read_as(path, kind)
        for role in _ROLES:
            token = getattr(said, role)
            if token is not None:
                names[role] = token if isinstance(token, str) else token.content
        special.update(t if isinstance(t, str) else t.content for t in said.additional_special_tokens or ())
        if isinstance(said, _TokenizerConfig):
            config, is_read = said, True
    for id, token in config.added_tokens_decoder.items():
        if not (id.isascii() and id.isdigit() and len(id) < 9):
            raise ValueError(f"{path}: added_tokens_decoder: {shown(id)} must be a token id")
        added[int(id)] = token
    special.update(names.values())
    special.update(token.content for token in added.values() if token.special)
    added = {id: msgspec.structs.replace(t, special=t.content in special) for id, t in sorted(added.items())}
    if config.add_eos_token:
        notes.append("tokenizer_config.json states add_eos_token: not followed, for the answer goes on")
    if config.clean_up_tokenization_spaces:
        notes.append("tokenizer_config.json states clean_up_tokenization_spaces: not followed, spaces stay")
    legacy = config.legacy is not False if is_read else True
    return Statements(None, names, frozenset(special), added, config.add_bos_token, legacy, notes=tuple(notes))


def _chat_template(folder: Path) -> tuple[str, Path] | None:
    """The folder's template and its file, in transformers' order: a file of its own goes first."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path, 1 << 20), path
    path = folder / "chat_template.json"
    if path.exists():
        return read_as(path, _ChatTemplateJson).chat_template, path
    path = folder / "tokenizer_config.json"
    stated = read_as(path, _TokenizerConfig).chat_template if path.exists() else None
    if isinstance(stated, list):
        by_name = {entry.name: entry.template for entry in stated}
        if "default" not in by_name:
            names = ", ".join(by_name)
            raise ValueError(f"{path}: chat_template has {names} and none named default; name a file with one")
        stated = by_name["default"]
    return None if stated is None else (stated, path)


def with_end_ids(text: str | None, end_ids: tuple[int, ...]) -> str:
    """A ``generation_config.json`` that also states these end tokens."""
    content = {} if text is None else json.loads(text)
    content["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else list(end_ids)
    return json.dumps(content, indent=2) + "\n"
