"""Turns functions into commands: options from signatures, help from docstrings, errors as one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import signal
import sys
import time
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

Command = Callable[..., None]

# Ranks other than 0 leave the first word to rank 0 this long (seconds); torchrun ends them as soon as it has spoken.
_DEFERENCE_S = 3.0
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|NCCL.*(?:abort|remote)", re.I
)


class UsageError(ValueError):
    """The command line itself is wrong."""


def with_fields(**groups: type) -> Callable[[Command], Command]:
    """Replaces parameters of a function by the fields of dataclasses, so that several commands share options.

    ``@with_fields(running=ModelOptions)`` on ``def chat(seed: int = 1, *, running: ModelOptions)`` makes a function
    with the parameter ``seed`` and one for each field, by name, in the place of ``running``. The entries of the
    dataclass's ``Attributes`` join those of the function's ``Args``; both must end their docstrings.
    """

    def expand(function: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        hints = dict(function.__annotations__)
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in groups:
                parameters.append(parameter)
                continue
            types = typing.get_type_hints(groups[name])
            for field in dataclasses.fields(groups[name]):
                hints[field.name] = kind = types[field.name]
                like = {"default": field.default, "annotation": kind}
                parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, **like))
            del hints[name]

        @functools.wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            for group, kind in groups.items():
                own = {f.name: named.pop(f.name) for f in dataclasses.fields(kind) if f.name in named}
                named[group] = kind(**own)
            return function(*values, **named)

        entries = [_section(kind, "Attributes") for kind in groups.values()]
        call.__doc__ = "\n".join([inspect.getdoc(function) or "", *entries])
        call.__signature__ = inspect.Signature(parameters)
        call.__annotations__ = hints
        return call

    return expand


def _section(documented: Any, name: str) -> str:
    """The entries of a docstring's last section."""
    return (inspect.getdoc(documented) or "").partition(f"\n{name}:\n")[2]


def run_tool(
    component: Command | Mapping[str, Command],
    default: str | None = None,
    short: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """Runs a function, or one of several by name, with the options of the command line; ends the process on an error.

    A parameter ``max_gen_len: int | None = None`` is the option ``--max_gen_len N`` (or ``--max-gen-len=N``); its text
    in the help is the docstring's ``Args`` entry. A parameter without a default may be given by position.
    Annotations may be str, int, float, bool, Path, each also ``| None``, and ``tuple[…, ...]`` for several values;
    nothing else is read into the text of an option, so ``--prompt "[1]"`` stays a string.

    ValueError, OSError, RuntimeError, MemoryError and Ctrl-C end the process with one sentence on stderr and exit
    code 1 (130 for Ctrl-C). Under ``torchrun`` rank 0 speaks for all, others only if it does not.

    Args:
        component: a function, or functions by command name.
        default: command that runs when the first argument is an option or missing.
        short: short options, ``{"m": "model"}``.
        argv: arguments instead of ``sys.argv[1:]``.
        name: program name instead of that of ``sys.argv[0]``.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    arguments = list(sys.argv[1:] if argv is None else argv)
    tool = _Tool(component, default, dict(short or {}), name or Path(sys.argv[0]).name)
    try:
        tool.run(arguments)
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read our output left; stdout goes nowhere so that Python's flush at exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        _end(describe(error), 1)


def describe(error: BaseException) -> str:
    """The error as one line for a person."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text}" if text else "out of memory"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, RuntimeError) and _LOST_PEER.search(text):
        return "another rank ended (killed or crashed), so this one stops too; its own message says why, if it had time"
    return text or type(error).__name__


def _end(sentence: str, code: int) -> typing.NoReturn:
    rank = _rank()
    if rank:
        time.sleep(_DEFERENCE_S)
        sentence = f"rank {rank}: {sentence}"
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    # Threads and groups of a broken run may never end by themselves.
    os._exit(code)


def _rank() -> int:
    from mixtralkit.distributed import rank_of

    try:
        return rank_of()
    except ValueError:
        return 0


class _Tool:
    """One command line: finds the command, checks its options, calls it through fire."""

    def __init__(
        self, component: Command | Mapping[str, Command], default: str | None, short: dict[str, str], name: str
    ):
        self.commands = dict(component) if isinstance(component, Mapping) else {}
        self.single = None if self.commands else component
        self.default, self.short, self.name = default, short, name

    def run(self, arguments: list[str]) -> None:
        if any(argument in ("-h", "--help") for argument in arguments):
            if _rank() == 0:
                print(self.help(arguments))
            return
        command, rest = self._choose(arguments)
        function = self.single or self.commands[command]
        options = _Options(function, self.short, f"{self.name} {command or ''}".strip()).parse(rest)
        self._through_fire(command, function, options)

    def _choose(self, arguments: list[str]) -> tuple[str | None, list[str]]:
        if self.single:
            return None, arguments
        if arguments and not arguments[0].startswith("-"):
            if arguments[0] not in self.commands:
                raise UsageError(f"unknown command {arguments[0]!r}; the commands are {', '.join(self.commands)}")
            return arguments[0], arguments[1:]
        if self.default is None:
            raise UsageError(f"a command is missing: {', '.join(self.commands)} (see --help)")
        return self.default, arguments

    def _through_fire(self, command: str | None, function: Command, options: dict[str, Any]) -> None:
        import fire

        # Values are parsed and checked already; fire gets them as JSON so that it guesses nothing.
        @fire.decorators.SetParseFn(json.loads)
        def call(**values: Any) -> None:
            function(**_converted(function, values))

        words = [f"--{name}={json.dumps(value)}" for name, value in options.items()]
        target = call if command is None else {command: call}
        fire.Fire(target, command=words if command is None else [command, *words], name=self.name)

    def help(self, arguments: list[str]) -> str:
        named = [argument for argument in arguments[:1] if argument in self.commands]
        if self.single or named:
            command = named[0] if named else ""
            return _Options(self.single or self.commands[command], self.short, f"{self.name} {command}".strip()).help()
        width = max(map(len, self.commands))
        lines = [f"usage: {self.name} COMMAND [options]", "", "commands:"]
        for command, function in self.commands.items():
            note = " (when no command is named)" if command == self.default else ""
            lines.append(f"  {command:<{width}}  {_summary(function)[0].partition(chr(10))[0]}{note}")
        if self.default:
            lines += ["", _Options(self.commands[self.default], self.short, f"{self.name} {self.default}").help()]
        others = [command for command in self.commands if command != self.default]
        lines += ["", *(f"{self.name} {command} --help shows the options of {command}." for command in others)]
        return "\n".join(lines)


class _Options:
    """The options that a function's signature makes."""

    def __init__(self, function: Command, short: dict[str, str], usage: str):
        self.function, self.usage = function, usage
        self.parameters = inspect.signature(function).parameters
        self.kinds = {name: _kind(hint) for name, hint in _hints(function).items() if name in self.parameters}
        self.short = {letter: name for letter, name in short.items() if name in self.parameters}
        self.required = [n for n, p in self.parameters.items() if p.default is inspect.Parameter.empty]

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """Option name → text, list of texts, or bool; UsageError names what is wrong."""
        values: dict[str, Any] = {}
        loose: list[str] = []
        rest = list(arguments)
        while rest:
            word = rest.pop(0)
            if not word.startswith("-") or _is_number(word) or word == "-":
                loose.append(word)
                continue
            name, value = self._option(word)
            several = self.kinds[name][1]
            if value is None:
                value = self._following(name, word, rest, several)
            values[name] = [*values.get(name, []), *value] if several else value
        for name in [name for name in self.required if name not in values]:
            if not loose:
                raise UsageError(f"{name.upper()} is missing (give it by position or as --{name})")
            values[name], loose = (loose, []) if self.kinds[name][1] else (loose[0], loose[1:])
        if loose:
            raise UsageError(f"unexpected argument {loose[0]!r}; options start with --")
        return values

    def _option(self, word: str) -> tuple[str, Any]:
        key, equals, text = word.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if not key.startswith("--"):
            name = self.short.get(name, "")
        negated = name.startswith("no") and self.kinds.get(name[2:], (None,))[0] is bool
        if negated and not equals:
            return name[2:], False
        if name not in self.parameters:
            raise UsageError(f"unknown option {key}; {self.usage} --help lists the options")
        if not equals:
            return name, None
        return name, [text] if self.kinds[name][1] else text

    def _following(self, name: str, word: str, rest: list[str], several: bool) -> Any:
        """Takes the value of ``word`` off the arguments that follow it."""
        has_value = bool(rest) and (not rest[0].startswith("-") or _is_number(rest[0]) or rest[0] == "-")
        if self.kinds[name][0] is bool:
            return rest.pop(0) if has_value and rest[0].lower() in _BOOLS else True
        if not has_value:
            raise UsageError(f"option {word} needs a value (a value that starts with - goes as {word}=VALUE)")
        if not several:
            return rest.pop(0)
        count = next((i for i, w in enumerate(rest) if w.startswith("-") and not _is_number(w)), len(rest))
        taken, rest[:count] = rest[:count], []
        return taken

    def help(self) -> str:
        """Usage, the docstring's text, and one entry for each option."""
        letters = {name: letter for letter, name in self.short.items()}
        heads = {}
        for name, (kind, several) in self.kinds.items():
            head = f"-{letters[name]}, " if name in letters else "    "
            value = "" if kind is bool else f" {_VALUE_NAMES.get(kind, 'TEXT')}{' …' if several else ''}"
            heads[name] = f"{head}--{name}{value}"
        positional = "".join(f" {name.upper()}" for name in self.required)
        summary, entries = _summary(self.function)
        lines = [f"usage: {self.usage}{positional} [options]", "", *summary.splitlines(), "", "options:"]
        width = min(max(map(len, heads.values()), default=0), 30)
        for name, head in heads.items():
            text = entries.get(name, "")
            default = self.parameters[name].default
            if not (default is inspect.Parameter.empty or default is None or default is False or default == ()):
                text += f" (default: {default})"
            lines += _entry(f"  {head}", text, width + 4)
        return "\n".join([*lines, *_entry("  -h, --help", "Shows this.", width + 4)])


_BOOLS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
_VALUE_NAMES = {int: "N", float: "X", Path: "PATH"}


def _entry(head: str, text: str, indent: int) -> list[str]:
    import textwrap

    body = textwrap.wrap(text, 110 - indent) or [""]
    if len(head) + 2 > indent:
        return [head, *(" " * indent + line for line in body)]
    return [f"{head:<{indent}}{body[0]}".rstrip(), *(" " * indent + line for line in body[1:])]


def _summary(function: Command) -> tuple[str, dict[str, str]]:
    """The docstring's text before ``Args:``, and its entries by parameter."""
    text, _, section = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    entries: dict[str, str] = {}
    last = None
    for line in section.splitlines():
        match = re.match(r" {4}(\w+): *(.*)", line)
        if match:
            last = match[1]
            entries[last] = match[2]
        elif last and line.startswith(" " * 8):
            entries[last] += " " + line.strip()
        elif line and not line.startswith(" "):
            break
    return text.strip(), entries


def _hints(function: Command) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    return {name: hints.get(name, str) for name in inspect.signature(function).parameters}


def _kind(hint: Any) -> tuple[type, bool]:
    """(type of a value, whether the option takes several)."""
    several = typing.get_origin(hint) in (tuple, list)
    if several:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not NoneType)
    return hint, several


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _converted(function: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    hints = _hints(function)
    converted = {}
    for name, value in values.items():
        kind, several = _kind(hints[name])
        if several:
            converted[name] = tuple(_convert(name, kind, item) for item in value)
        elif (
            isinstance(value, str) and value.lower() == "none" and kind is not str
            and NoneType in typing.get_args(hints[name])
        ):  # fmt: skip
            converted[name] = None
        else:
            converted[name] = _convert(name, kind, value)
    return converted


def _convert(name: str, kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, str):
            if value.lower() not in _BOOLS:
                raise UsageError(f"{name} ({value!r}) must be true or false")
            return _BOOLS[value.lower()]
        return value
    if kind in (int, float):
        try:
            number = float(value)
            if kind is float:
                return number
            if number == int(number):
                return int(value) if value.lstrip("+-").isdigit() else int(number)
        except (ValueError, OverflowError):
            pass
        raise UsageError(f"{name} ({value!r}) must be a {'whole ' if kind is int else ''}number")
    return kind(value)
