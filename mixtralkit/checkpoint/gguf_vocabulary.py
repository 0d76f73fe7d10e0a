"""The tokenizer that a llama.cpp file holds in its keys, as a sentencepiece model and as what side files would say."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixtralkit.checkpoint.files import ByteFile
from mixtralkit.checkpoint.gguf import read_header
from mixtralkit.checkpoint.statements import Statements
from mixtralkit.json_file import shown

_BYTE_PAIRS = 2  # a kind of sentencepiece model
_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # types of a token, which are sentencepiece's
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def keys_of(path: Path) -> Mapping[str, Any]:
    """The keys of a file; ValueError names it."""
    file = ByteFile((path,))
    try:
        return read_header(file).keys
    finally:
        file.close()


def sentencepiece_model(path: Path, keys: Mapping[str, Any]) -> bytes:
    """The vocabulary as a ``tokenizer.model`` with the same ids; ValueError names the key that is missing or wrong."""
    kind = keys.get("tokenizer.ggml.model")
    if kind != "llama":
        raise ValueError(f"{path}: tokenizer.ggml.model ({shown(kind)}) must be 'llama', as Mixtral's is")
    tokens, scores, types = (_list(path, keys, name) for name in ("tokens", "scores", "token_type"))
    if not len(tokens) == len(scores) == len(types):
        raise ValueError(f"{path}: has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types of tokens")
    if list(types).count(_UNKNOWN) != 1:
        raise ValueError(f"{path}: {list(types).count(_UNKNOWN)} tokens are of the unknown type, wanted one")
    if len(set(tokens)) < len(tokens) or "" in tokens:
        twice = next(token for i, token in enumerate(tokens) if not token or token in tokens[:i])
        raise ValueError(f"{path}: token {shown(twice)} is there twice or has no text")
    pieces = b"".join(
        _bytes(1, _bytes(1, token.encode()) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    names = {role: tokens[id] for role, id in _ids(path, keys, len(tokens)).items()}
    trainer = _number(3, _BYTE_PAIRS) + _number(4, len(tokens)) + _number(35, int(_BYTE in types))
    for field, role in ((45, "unk_token"), (46, "bos_token"), (47, "eos_token"), (48, "pad_token")):
        trainer += _bytes(field, names[role].encode()) if role in names else b""
    normalizer = _bytes(1, b"identity")
    normalizer += _number(3, _flag(path, keys, "add_space_prefix", True))
    normalizer += _number(4, _flag(path, keys, "remove_extra_whitespaces", False))
    return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


def statements(path: Path, keys: Mapping[str, Any]) -> Statements:
    """End tokens, special tokens and chat template; ``statements.Statements`` of a file that stands alone."""
    tokens, types = _list(path, keys, "tokens"), _list(path, keys, "token_type")
    ids, template = _ids(path, keys, len(tokens)), keys.get("tokenizer.chat_template")
    ends = [ids.get("eos_token"), _id(path, keys, "eot", len(tokens))]
    names = {role: tokens[id] for role, id in ids.items()}
    return Statements(
        end_ids=tuple(dict.fromkeys(id for id in ends if id is not None)) or None,
        names=names,
        special=frozenset(token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL),
        add_bos=_flag(path, keys, "add_bos_token", None),
        chat_template=template if isinstance(template, str) else None,
        template_from=path if isinstance(template, str) else None,
        notes=tuple(_unfollowed(keys)),
    )


def side_files(path: Path) -> dict[str, bytes]:
    """The vocabulary as the files that go with other formats."""
    keys = keys_of(path)
    said = statements(path, keys)
    config: dict[str, Any] = {**said.names, "add_bos_token": said.add_bos, "chat_template": said.chat_template}
    config["additional_special_tokens"] = sorted(said.special - set(said.names.values()))
    kept = {key: value for key, value in config.items() if value not in (None, [])}
    files = {
        "tokenizer.model": sentencepiece_model(path, keys),
        "tokenizer_config.json": (json.dumps(kept, indent=2) + "\n").encode(),
    }
    if said.end_ids:
        files["generation_config.json"] = (json.dumps({"eos_token_id": list(said.end_ids)}, indent=2) + "\n").encode()
    return files


def _unfollowed(keys: Mapping[str, Any]) -> Iterable[str]:
    if keys.get("tokenizer.ggml.add_eos_token"):
        yield "tokenizer.ggml.add_eos_token is stated and not followed, for the answer goes on"


def _list(path: Path, keys: Mapping[str, Any], name: str) -> list[Any] | tuple[Any, ...]:
    wanted = {"tokens": str, "scores": float, "token_type": int}[name]
    found = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list | tuple) or not found or not all(type(one) is wanted for one in found):
        raise ValueError(f"{path}: tokenizer.ggml.{name} ({shown(found)}) must be a list of {_KINDS[wanted]}")
    return found


_KINDS = {str: "texts", float: "numbers", int: "whole numbers"}


def _ids(path: Path, keys: Mapping[str, Any], size: int) -> dict[str, int]:
    """Token ids by role, of those that are stated."""
    found = {role: _id(path, keys, name, size) for role, name in _ROLES.items()}
    return {role: id for role, id in found.items() if id is not None}


def _id(path: Path, keys: Mapping[str, Any], name: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    id = keys.get(key)
    if id is not None and (type(id) is not int or not 0 <= id < size):
        raise ValueError(f"{path}: {key} ({shown(id)}) must be one of {size} tokens")
    return id


def _flag(path: Path, keys: Mapping[str, Any], name: str, otherwise: bool | None) -> bool | None:
    found = keys.get(f"tokenizer.ggml.{name}", otherwise)
    if found is not otherwise and type(found) is not bool:
        raise ValueError(f"{path}: tokenizer.ggml.{name} ({shown(found)}) must be true or false")
    return found


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
