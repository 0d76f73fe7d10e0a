"""Dialogs to token ids: the folder's own chat template as transformers renders it, else Mistral's."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mixtralkit.config.ranks import rank_of
from mixtralkit.engine.template import Renderer
from mixtralkit.engine.tokenizer import Tokenizer

Message = Mapping[str, Any]
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids up to where the assistant answers, by the tokenizer's template; Mistral's where it has none.

    Args:
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``. Mistral's templates want a system
            message first if at all, then user and assistant in turns, user first and last. An assistant's message may
            have ``tool_calls`` instead, as OpenAI has them but for ``arguments``, which are values; a message of role
            ``tool`` for each of them follows, with its ``tool_call_id``.
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
    check_dialog(messages, tokenizer.version)
    return _mistral_v1(tokenizer, messages) if tokenizer.version == 1 else _mistral_v3(tokenizer, messages, tools)


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's template shows tools to the model; of Mistral's own, version 1 does not."""
    if tokenizer.chat_template is not None:
        return "tools" in tokenizer.chat_template
    return tokenizer.version > 1 and tokenizer.id_of("[AVAILABLE_TOOLS]") is not None


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


def _mistral_v3(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """As version 1, with ``[INST]`` and ``[/INST]`` as control tokens, as Mixtral-8x22B-Instruct was trained.

    The system message goes before the last question, and the tools before that::

        <s>[AVAILABLE_TOOLS] json[/AVAILABLE_TOOLS][INST] question[/INST][TOOL_CALLS] json</s>[TOOL_RESULTS] json…

    Version 2 leaves out calls that were answered before the last question, and names a result's tool, not its call.
    """
    system, turns = _system_and_turns(messages)
    last = max(i for i, message in enumerate(turns) if message["role"] == "user")
    called = {call["id"]: call["function"]["name"] for message in turns for call in message.get("tool_calls") or ()}
    ids = [tokenizer.bos_id]
    for i, message in enumerate(turns):
        is_left_out = tokenizer.version == 2 and i < last
        if message["role"] == "user":
            if tools and i == last:
                ids += _marked(tokenizer, "[AVAILABLE_TOOLS]", _json([_described(tool) for tool in tools]))
            ids += _marked(tokenizer, "[INST]", (system if i == last else "") + message["content"])
        elif message["role"] == "tool":
            call, content = message["tool_call_id"], _value(message["content"])
            if tokenizer.version > 2:
                ids += _marked(tokenizer, "[TOOL_RESULTS]", _json({"content": content, "call_id": call}))
            elif not is_left_out:
                ids += _marked(tokenizer, "[TOOL_RESULTS]", _json([{"name": called[call], "content": content}]))
        elif calls := message.get("tool_calls"):
            if not is_left_out:
                more = ("id",) if tokenizer.version > 2 else ()
                each = [{**call["function"], **{name: call[name] for name in more}} for call in calls]
                ids += [*_marked(tokenizer, "[TOOL_CALLS]", _json(each)), tokenizer.eos_id]
        else:
            ids += tokenizer.encode(message["content"].rstrip(" "), bos=False, eos=True)
    return ids


def _marked(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    """A text behind a control token, and before the one that closes it, where there is one."""
    names = [name] if name == "[TOOL_CALLS]" else [name, f"[/{name[1:]}"]
    ids = [tokenizer.id_of(each) for each in names]
    if None in ids:
        raise ValueError(f"tokenizer ({tokenizer.path}): has no {' and '.join(names)}, which its version has")
    return [ids[0], *tokenizer.encode(text, bos=False), *ids[1:]]


def _described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as Mistral's models were shown them."""
    own = tool["function"]
    named = {
        "name": own["name"],
        "description": own.get("description") or "",
        "parameters": own.get("parameters") or {},
    }
    return {"type": "function", "function": named}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    """JSON's value where a text is JSON, else the text."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


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


def check_dialog(messages: Sequence[Message], version: int = 1) -> None:
    """ValueError that names the first message out of Mistral's order, or without text.

    Args:
        version: of Mistral's control tokens; 1 has no calls.
    """
    check_messages(messages)
    start = 1 if messages[0]["role"] == "system" else 0
    wanted, calls = "user", []
    for i, message in enumerate(messages[start:], start):
        role = message["role"]
        if role == "tool" and calls:
            if message.get("tool_call_id") not in calls:
                raise ValueError(f"message {i} (tool) answers call {message.get('tool_call_id')!r}, none of {calls}")
            calls.remove(message["tool_call_id"])
            wanted = "tool" if calls else "assistant"
            continue
        if role != wanted:
            raise ValueError(f"message {i} has role {role!r}, but {wanted!r} is next")
        if role == "assistant" and message.get("tool_calls"):
            calls = _call_ids(message, i, version)
        elif not message["content"]:
            raise ValueError(f"message {i} ({role}) is empty")
        wanted = "tool" if calls else "assistant" if role == "user" else "user"
    if wanted != "assistant":
        raise ValueError(f"the last message has role {messages[-1]['role']!r}; it must be the user's")


def _call_ids(message: Message, place: int, version: int) -> list[str]:
    """Of an assistant's message with calls; ValueError for what its version does not write."""
    ids = [call["id"] for call in message["tool_calls"]]
    if version == 1:
        raise ValueError(f"message {place} has tool_calls, which the model's chat template does not take")
    if message["content"]:
        raise ValueError(f"message {place} has content and tool_calls, of which the model's chat template takes one")
    if version == 2 and len(ids) > 1:
        raise ValueError(f"message {place} has {len(ids)} tool_calls; Mistral's version 2 answers one at a time")
    wrong = next((id for id in ids if _CALL_ID.fullmatch(id) is None), None)
    if wrong is not None:
        raise ValueError(f"message {place} has call {wrong!r}; Mistral's ids are nine letters and digits")
    return ids
