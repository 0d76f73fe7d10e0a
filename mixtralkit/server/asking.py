"""From a body to the engine's requests: templates, tokens, sampling options. Runs off the event loop."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mixtralkit.engine.chat import encode_chat, takes_tools
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.grammar import ANY_OBJECT
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.server.errors import bad
from mixtralkit.server.protocol import (
    AnyRequest,
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    Content,
    Message,
    NamedTool,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
)
from mixtralkit.server.tools import call_grammar

_COMPLETION_TOKENS = 16  # OpenAI's, where a completion does not say
_ANSWERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")  # as SamplingOptions


@dataclass(frozen=True)
class Asked:
    """What a body asks of the engine: ``n`` requests for each prompt, one prompt's behind the other's."""

    requests: tuple[Request, ...]
    n: int

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each prompt."""
        return tuple(request.prompt for request in self.requests[:: self.n])


@dataclass(frozen=True)
class Asking:
    """Makes requests.

    Args:
        new_id: an id that no other request has.
    """

    engine: Engine
    tokenizer: Tokenizer
    max_prompts: int
    max_n: int
    new_id: Callable[[], int]

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.engine.model.params.max_seq_len

    def completion(self, body: CompletionRequest) -> Asked:
        """ApiError that names the field that is wrong."""
        check_stream(body)
        prompts = prompts_of(body.prompt)
        if len(prompts) > self.max_prompts:
            raise bad(
                f"prompt has {len(prompts)} prompts; at most {self.max_prompts} are taken (max_prompts)", "prompt"
            )
        ids = [self._ids(prompt, i, len(prompts)) for i, prompt in enumerate(prompts)]
        length = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        told = bool(body.echo) and body.logprobs is not None
        wants = {"logprobs": True, "top_logprobs": body.logprobs or 0, "prompt_logprobs": told}
        return self._asked(body, ids, length, "max_tokens", wants)

    def chat(self, body: ChatRequest) -> Asked:
        """ApiError that names the field that is wrong."""
        check_stream(body)
        if body.top_logprobs and not body.logprobs:
            raise bad(f"top_logprobs ({body.top_logprobs}) needs logprobs to be true", "top_logprobs")
        given = {name: getattr(body, name) for name in ("max_tokens", "max_completion_tokens")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(set(given.values())) > 1:
            raise bad(f"max_tokens ({body.max_tokens}) and max_completion_tokens ({body.max_completion_tokens}) differ")
        ids = self.dialog(body.messages, None if body.tool_choice == "none" else body.tools)
        grammar = self._calls(body)
        room = self.max_seq_len - len(ids)
        name, length = next(iter(given.items()), ("max_tokens", max(room, 1)))
        wants = {"logprobs": True, "top_logprobs": body.top_logprobs or 0, "grammar": grammar}
        return self._asked(body, [ids], length, name, wants)

    def text(self, text: str, add_bos: bool = True) -> tuple[int, ...]:
        """Token ids of a text in which special tokens may stand by name, behind exactly one begin token."""
        tokenizer = self.tokenizer
        named = any(name and name in text for name in tokenizer.special_names.values())
        ids = tokenizer.encode_rendered(text) if named else tokenizer.encode(text, bos=False)
        begins = add_bos and tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]
        return (tokenizer.bos_id,) * begins + tuple(ids)

    def dialog(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> tuple[int, ...]:
        """Token ids of messages in the model's chat template; ApiError where it does not take them."""
        if tools and not takes_tools(self.tokenizer):
            raise bad("tools are not supported: the model's chat template takes none", "tools", "unsupported_field")
        described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        try:
            return tuple(encode_chat(self.tokenizer, [_plain(message) for message in messages], described))
        except ValueError as error:
            raise bad(f"messages: {error}", "messages") from None

    def _calls(self, body: ChatRequest) -> str | None:
        """The grammar of an answer that must call a tool, or whose calls must fit; None for any answer."""
        tools, choice = body.tools or [], body.tool_choice
        if isinstance(choice, NamedTool):
            name = choice.function.name
            tools = [tool for tool in tools if tool.function.name == name]
            if not tools:
                raise bad(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
        elif choice == "required" and not tools:
            raise bad("tool_choice 'required' needs tools", "tool_choice")
        forced = isinstance(choice, NamedTool) or choice == "required"
        if choice == "none" or not (forced or any(tool.function.strict for tool in tools)):
            return None
        if schema_of(body.response_format) is not None:
            raise bad("response_format and calls that must fit cannot both bound an answer", "response_format")
        many = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
        try:
            return call_grammar(self.tokenizer, tools, many, free=not forced)
        except ValueError as error:
            raise bad(str(error), "tool_choice" if forced else "tools", "unsupported_field") from None

    def _ids(self, prompt: str | Sequence[int], number: int, of: int) -> tuple[int, ...]:
        where = "prompt" if of == 1 else f"prompt.{number}"
        ids = self.text(prompt) if isinstance(prompt, str) else tuple(prompt)
        if not ids:
            raise bad(f"{where} is empty", where)
        if max(ids) >= self.engine.model.params.vocab_size:
            raise bad(f"{where} has token id {max(ids)}; ids are below {self.engine.model.params.vocab_size}", where)
        return ids

    def _asked(
        self, body: AnyRequest, prompts: Sequence[tuple[int, ...]], length: int, name: str, wants: dict[str, Any]
    ) -> Asked:
        n = body.n or 1
        if n > self.max_n:
            raise bad(f"n ({n}) must be at most {self.max_n} (max_n)", "n")
        for ids in prompts:
            self._check_length(len(ids), length, name)
        sampling, stop = sampling_of(body), body.stop
        more = {
            **wants, "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()),
            "stop_token_ids": tuple(body.stop_token_ids or ()),
            "ignore_eos": bool(body.ignore_eos), "min_tokens": body.min_tokens or 0,
            "json_schema": schema_of(body.response_format), "routed_experts": bool(body.routed_experts),
        }  # fmt: skip
        try:
            requests = tuple(
                Request(self.new_id(), ids, length, sampling, draw_id=i, **more) for ids in prompts for i in range(n)
            )
            for request in requests[::n]:
                self.engine.check(request)
        except ValueError as error:
            raise bad(str(error)) from None
        return Asked(requests, n)

    def _check_length(self, prompt: int, length: int, name: str) -> None:
        most = self.max_seq_len
        if prompt + max(length, 0) > most:
            raise bad(
                f"This model's maximum context length is {most} tokens. However, you requested {prompt + length} "
                f"tokens ({prompt} in the prompt, {length} in {name}).", name if prompt < most else None,
                "context_length_exceeded",
            )  # fmt: skip


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """The prompts of a completion's ``prompt``."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def sampling_of(body: AnyRequest) -> SamplingOptions:
    """How tokens are drawn; without a seed, differently each time."""
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    given = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else max(body.top_p, 1e-9),  # 0 leaves the likeliest
        "top_k": max(body.top_k or 0, 0),
        "min_p": body.min_p or 0.0,
        **{name: value for name in _ANSWERS if (value := getattr(body, name)) is not None},
    }
    try:
        return SamplingOptions(seed=seed, **given)
    except ValueError as error:
        raise bad(str(error)) from None


def schema_of(wanted: ResponseFormat | None) -> str | None:
    """The JSON schema that an answer is to fit; None for any text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad("response_format.json_schema.schema is missing", "response_format", "missing_field")
    return json.dumps(wanted.json_schema.schema_)


def check_stream(body: AnyRequest) -> None:
    """ApiError where a stream's options stand without one."""
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options needs stream to be true", "stream_options")


def content_text(content: Content | None) -> str:
    """The text of a message's content; parts are lines."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if isinstance(part, TextPart))


def _plain(message: Message) -> dict[str, Any]:
    """As templates take it: the arguments of calls as values, not as JSON."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content_text(message.content)}
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [_called(call) for call in message.tool_calls]
    return plain


def _called(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        raise ValueError(f"the arguments of call {call.id} are not JSON") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
