"""Mistral's chat template, as Mixtral-8x7B-Instruct was trained with it (tokenizer version 1 of mistral-common)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixtralkit.engine.tokenizer import Tokenizer

Message = Mapping[str, str]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids up to where the assistant answers: ``<s>[INST] question [/INST] answer</s>[INST] question [/INST]``.

    Each piece of text is encoded by itself, and ``<s>`` and ``</s>`` are ids that no text can give. A system message
    goes before the first question, an empty line between them.

    Args:
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``; a system message may come first,
            then user and assistant take turns, user first and last.
    """
    check_dialog(messages)
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" and messages[0]["content"] else ""
    ids = [tokenizer.bos_id]
    for message in messages:
        if message["role"] == "user":
            ids += tokenizer.encode(f"[INST] {system}{message['content']} [/INST]", bos=False, eos=False)
            system = ""
        elif message["role"] == "assistant":
            ids += tokenizer.encode(message["content"], bos=False, eos=True)
    return ids


def check_dialog(messages: Sequence[Message]) -> None:
    """ValueError that names the first message out of order or without text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("a dialog must be a list of messages and have at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} must have a role and a text as content")
    roles = [message.get("role") for message in messages]
    start = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[start:]):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            raise ValueError(f"message {start + i} has role {role!r}, but {wanted!r} is next")
        if not messages[start + i]["content"]:
            raise ValueError(f"message {start + i} ({role}) is empty")
    if roles[-1] != "user":
        raise ValueError(f"the last message has role {roles[-1]!r}; it must be the user's")
