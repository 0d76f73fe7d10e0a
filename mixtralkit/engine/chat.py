"""Dialogs to token ids: the folder's own chat template as transformers renders it, else Mistral's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mixtralkit.config.ranks import rank_of
from mixtralkit.engine.template import Renderer
from mixtralkit.engine.tokenizer import Tokenizer

Message = Mapping[str, str]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids up to where the assistant answers, by the tokenizer's template; Mistral's where it has none.

    Args:
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``. Mistral's templates want a system
            message first if at all, then user and assistant in turns, user first and last.
        tools: functions that the model may call, as OpenAI describes them, for templates that show them to it.

    Raises:
        ValueError: naming the first message that the template cannot take; for tools that it would not show.
    """
    if tokenizer.chat_template is not None or tokenizer.version != 1:
        _say(describe_template(tokenizer))
    if tools and not takes_tools(tokenizer):
        raise ValueError("the model's chat template takes no tools")
    if tokenizer.chat_template is not None:
        return tokenizer.encode_rendered(render(tokenizer, messages, tools))
    check_dialog(messages)
    return _mistral_v1(tokenizer, messages) if tokenizer.version == 1 else _mistral_v3(tokenizer, messages)


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's template shows tools to the model; Mistral's own, as written here, do not."""
    return tokenizer.chat_template is not None and "tools" in tokenizer.chat_template


def describe_template(tokenizer: Tokenizer) -> str:
    """Which template dialogs are written in, in words."""
    if tokenizer.chat_template is not None:
        return f"chat template: {tokenizer.template_from}"
    return f"chat template: Mistral's, tokenizer version {tokenizer.version}"


@functools.cache
def _say(sentence: str) -> None:
    """Once, on rank 0."""
    if rank_of() == 0:
        print(sentence, file=sys.stderr)


def _mistral_v1(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """``<s>[INST] question [/INST]answer</s>[INST] question [/INST]``, as Mixtral-8x7B-Instruct was trained.

    Each piece of text is encoded by itself, and ``<s>`` and ``</s>`` are ids that no text can give. A system message
    goes before the first question, an empty line between them.
    """
    system, turns = _system_and_turns(messages)
    ids = [tokenizer.bos_id]
    for i, message in enumerate(turns):
        if message["role"] == "user":
            before = system if i == 0 else ""
            ids += tokenizer.encode(f"[INST] {before}{message['content']} [/INST]", bos=False)
        else:
            ids += tokenizer.encode(message["content"], bos=False, eos=True)
    return ids


def _mistral_v3(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """As version 1, with ``[INST]`` and ``[/INST]`` as control tokens, as Mixtral-8x22B-Instruct was trained.

    The system message goes before the last question. Version 2 differs in tools alone.
    """
    system, turns = _system_and_turns(messages)
    begin, end = (tokenizer.id_of(name) for name in ("[INST]", "[/INST]"))
    if begin is None or end is None:
        raise ValueError(f"tokenizer ({tokenizer.path}): has no [INST] and [/INST], which its version has")
    ids = [tokenizer.bos_id]
    for i, message in enumerate(turns):
        if message["role"] == "user":
            before = system if i == len(turns) - 1 else ""
            ids += [begin, *tokenizer.encode(before + message["content"], bos=False), end]
        else:
            ids += tokenizer.encode(message["content"].rstrip(" "), bos=False, eos=True)
    return ids


def _system_and_turns(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    if messages[0]["role"] != "system":
        return "", messages
    return messages[0]["content"] + "\n\n" if messages[0]["content"] else "", messages[1:]


def render(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The dialog as the tokenizer's template writes it, up to where the assistant answers; ValueError if it refuses."""
    check_messages(messages)
    values = {"messages": [dict(message) for message in messages], "tools": tools or None, "documents": None}
    values |= {"add_generation_prompt": True, **tokenizer.special_names}
    try:
        return _renderer().render(tokenizer.chat_template, values)
    except ValueError as error:
        raise ValueError(f"chat template ({tokenizer.template_from}): {error}") from None


@functools.cache
def _renderer() -> Renderer:
    return Renderer()


def check_messages(messages: Sequence[Message]) -> None:
    """ValueError that names the first message without a role or a text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("a dialog must be a list of messages and have at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} must have a role and a text as content")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} must have a text as its role")


def check_dialog(messages: Sequence[Message]) -> None:
    """ValueError that names the first message out of Mistral's order, or without text."""
    check_messages(messages)
    roles = [message["role"] for message in messages]
    start = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[start:]):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            raise ValueError(f"message {start + i} has role {role!r}, but {wanted!r} is next")
        if not messages[start + i]["content"]:
            raise ValueError(f"message {start + i} ({role}) is empty")
    if roles[-1] != "user":
        raise ValueError(f"the last message has role {roles[-1]!r}; it must be the user's")
