"""Turns functions into commands: python-fire chooses and calls them, errors become one sentence."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire

from mixtralkit.cli import words
from mixtralkit.cli.ending import describe, end, speaker
from mixtralkit.cli.words import UsageError
from mixtralkit.config.options import REQUIRED, groups_of, options_of

Command = Callable[..., None]
_OUTPUTS = ("output", "target", "plot", "record_routing")


def command(function: Command) -> Command:
    """The function with the options of its groups (``config.options.Options``) in the place of the groups, by name.

    A parameter ``engine: EngineConfig`` becomes the options that ``EngineConfig`` has; a group's default is a value of
    it. An option that two groups have is one option and goes to both. Values are checked, in Python as well.
    """
    groups, options = groups_of(function), {option.name: option for option in options_of(function)}
    own = [name for name in inspect.signature(function).parameters if name not in groups]
    names = {name: {o.name for o in options_of(kind)} | set(groups_of(kind)) for name, (kind, _) in groups.items()}

    @functools.wraps(function)
    def call(*values: Any, **given: Any) -> None:
        given.update(zip(own, values, strict=False))
        unknown = set(given).difference(own, groups, *names.values())
        if unknown:
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        arguments = {name: options[name].check(given[name]) for name in own if name in given}
        for name, (kind, default) in groups.items():
            mine = {key: value for key, value in given.items() if key in names[name]}
            if name in given:
                arguments[name] = given[name].but(**mine)
            else:
                arguments[name] = kind.of(**mine) if default is REQUIRED else default.but(os.environ, **mine)
        function(**arguments)

    return call


def run_tool(
    component: Command | str | Mapping[str, Command | str],
    default: str | None = None,
    short: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """Runs a function, or one of several by name, with the options of the command line; ends the process on an error.

    A parameter ``max_gen_len: int | None = None`` is the option ``--max_gen_len N`` (or ``--max-gen-len=N``); its text
    in the help is the docstring's ``Args`` entry. A parameter without a default may be given by position. Annotations
    are those of ``config.options``, and ``tuple[…, ...]`` for several values; nothing else is read into the text of an
    option, so ``--prompt "[1]"`` stays a string.

    ValueError, OSError, RuntimeError, MemoryError and Ctrl-C end the process with one sentence on stderr and exit
    code 1 (130 for Ctrl-C). Under ``torchrun`` rank 0 speaks for all, others only if it does not.

    Args:
        component: a function, or functions by command name; or where a function is, as ``"module:function"``.
        default: command that runs when the first argument is an option or missing.
        short: short options, ``{"m": "model"}``.
        argv: arguments instead of ``sys.argv[1:]``.
        name: program name instead of that of ``sys.argv[0]``.
    """
    if name is None:
        name = Path(sys.argv[0]).name.replace("__main__.py", "mixtralkit")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    tool = Tool(component, default, dict(short or {}), name)
    try:
        call = tool.call(list(sys.argv[1:] if argv is None else argv))
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        call()
    except KeyboardInterrupt:
        end("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read our output left; stdout goes nowhere so that Python's flush at exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        end(describe(error), 1)


def find(where: Command | str) -> Command:
    """The function of ``"module:function"``."""
    if not isinstance(where, str):
        return where
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(module), function)


@dataclass(frozen=True)
class _Chosen:
    """What fire found: it shows fire no members, so that a word too many is an error and not one of them."""

    run: Callable[[], None]

    def __dir__(self) -> list[str]:
        return []


def _check_outputs(paths: Mapping[str, Any]) -> None:
    """ValueError where a file to write is one to read, also by a link, or two to write are one."""
    for name in filter(paths.get, _OUTPUTS):
        for other, path in paths.items():
            if other != name and isinstance(path, Path) and _is_same(paths[name], path, other in _OUTPUTS):
                raise ValueError(f"{name} ({paths[name]}) must be another file than {other}")


def _is_same(one: Path, other: Path, both_are_written: bool) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a null byte in the name
        if one.exists() and other.exists():
            return one.is_file() and one.samefile(other)
    return both_are_written and one == other


class Tool:
    """The commands of one program, as a component of fire whose members they are."""

    def __init__(
        self, component: Command | str | Mapping[str, Command | str], default: str | None, short: dict[str, str],
        name: str,
    ) -> None:  # fmt: skip
        self._commands = dict(component) if isinstance(component, Mapping) else {"": component}
        self._default, self._short, self._name = default, short, name

    def __dir__(self) -> list[str]:
        return list(self._commands)

    def __getattr__(self, name: str) -> Callable[..., _Chosen]:
        if name not in self.__dict__["_commands"]:
            raise AttributeError(name)
        function = self._function(name)
        options = options_of(function)
        required = [option.name for option in options if option.default is REQUIRED]

        def component(*values: Any, **given: Any) -> _Chosen:
            given.update(zip(required, values, strict=True))
            _check_outputs({o.name: given.get(o.name, o.default) for o in options if o.kind is Path})
            return _Chosen(functools.partial(function, **given))

        keyword = inspect.Parameter.KEYWORD_ONLY
        component.__signature__ = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in required]
            + [inspect.Parameter(o.name, keyword, default=None) for o in options if o.name not in required]
        )
        return fire.decorators.SetParseFns(**{o.name: functools.partial(words.parse, o) for o in options})(component)

    def call(self, arguments: list[str]) -> Callable[[], None]:
        """What the command line asks for; UsageError for one that is wrong."""
        command, rest = self._choose(arguments)
        if command is not None and getattr(self._function(command), "takes_words", False):
            return functools.partial(self._function(command), rest)
        if any(word in ("-h", "--help") for word in arguments):
            text = self._help(command, named=command in arguments[:1])
            return lambda: print(text) if speaker() == 0 else None
        if command is None:
            raise UsageError(f"a command is missing: {', '.join(self._commands)} (see --help)")
        usage = f"{self._name} {command}".strip()
        spelled = words.spell(rest, options_of(self._function(command)), self._short, usage)
        with contextlib.redirect_stderr(io.StringIO()):  # fire's own words, of which words.sentence makes ours
            try:
                if command:
                    return fire.Fire(self, [command, *spelled], self._name, serialize=lambda _: None).run
                return fire.Fire(getattr(self, ""), spelled, self._name, serialize=lambda _: None).run
            except fire.core.FireExit as error:
                raise UsageError(words.sentence(error.trace.elements[-1].ErrorAsStr())) from None

    def _choose(self, arguments: list[str]) -> tuple[str | None, list[str]]:
        if "" in self._commands:
            return "", arguments
        if arguments and not arguments[0].startswith("-"):
            if arguments[0] not in self._commands:
                raise UsageError(f"unknown command {arguments[0]!r}; the commands are {', '.join(self._commands)}")
            return arguments[0], arguments[1:]
        return self._default, arguments

    def _help(self, command: str | None, named: bool) -> str:
        lines = []
        if command is not None:
            lines = [words.help_of(self._function(command), self._short, f"{self._name} {command}".strip())]
        if named or "" in self._commands:
            return lines[0]
        width = max(map(len, self._commands))
        listed = [f"usage: {self._name} COMMAND [options]", "", "commands:"]
        for name, where in self._commands.items():
            note = " (when no command is named)" if name == self._default else ""
            listed.append(f"  {name:<{width}}  {words.summary(where)}{note}")
        return "\n".join([*listed, "", *lines, f"{self._name} COMMAND --help shows the options of a command."])

    def _function(self, name: str) -> Command:
        return find(self._commands[name])
