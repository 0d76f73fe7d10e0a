"""The words of a command line: spelled out for python-fire on the way in, help and sentences on the way out."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtralkit.config.options import REQUIRED, Option, entries, options_of

_VALUE_NAMES = {int: "N", float: "X", Path: "PATH"}
_BOOLS = ("true", "false", "1", "0", "on", "off", "yes", "no")
_WIDTH = 110


class UsageError(ValueError):
    """The command line itself is wrong."""


def spell(words: Sequence[str], options: Sequence[Option], short: Mapping[str, str], usage: str) -> list[str]:
    """The words as fire reads them without a guess: each option as --NAME=TEXT, several values of one as a JSON list.

    UsageError for an option that is not there or lacks its value.
    """
    known = {option.name: option for option in options}
    short = {letter: name for letter, name in short.items() if name in known}
    rest, loose, found = list(words), [], {}
    while rest:
        word = rest.pop(0)
        if not _is_option(word):
            if word == "-":  # fire's own sign
                raise UsageError(sentence("Could not consume arg: -"))
            loose.append(word)
            continue
        key, equals, text = word.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if not key.startswith("--"):
            name = short.get(name, "")
        positive = known.get(name.removeprefix("no").removeprefix("_"))
        if name not in known and positive is not None and positive.kind is bool and not equals:
            found[positive.name] = ["False"]
            continue
        if name not in known:
            raise UsageError(f"unknown option {key}; {usage} --help lists the options")
        option = known[name]
        values = [text] if equals else _following(option, word, rest)
        found[name] = [*found.get(name, []), *values] if option.several else values
    left = [option for option in options if option.default is REQUIRED and option.name not in found]
    if left and left[-1].several and len(loose) >= len(left):
        found[left[-1].name], loose = loose[len(left) - 1 :], loose[: len(left) - 1]
    texts = {name: json.dumps(texts) if known[name].several else texts[-1] for name, texts in found.items()}
    return [*loose, *(f"--{name}={text}" for name, text in texts.items())]


def parse(option: Option, text: str) -> Any:
    """An option's value of what ``spell`` made of it; fire calls this."""
    try:
        return option.parse(text) if not option.several else tuple(map(option.item.parse, json.loads(text)))
    except ValueError as error:
        raise UsageError(str(error)) from None


def sentence(said: str) -> str:
    """Fire's error in our words."""
    missing = re.search(r"no value for the required argument: (\w+)", said)
    if missing:
        return f"{missing[1].upper()} is missing (give it by position or as --{missing[1]})"
    unexpected = re.search(r"Could not consume arg: (.*)", said, re.S)
    return f"unexpected argument {unexpected[1]!r}; options start with --" if unexpected else said


def _is_option(word: str) -> bool:
    return re.match(r"-[a-zA-Z-]", word) is not None


def _following(option: Option, word: str, rest: list[str]) -> list[str]:
    """Takes the values of ``word`` off the words that follow it."""
    count = next((i for i, w in enumerate(rest) if _is_option(w)), len(rest))
    if option.kind is bool:
        return [rest.pop(0)] if count and rest[0].lower() in _BOOLS else ["True"]
    if not count:
        raise UsageError(f"option {word} needs a value (a value that starts with - goes as {word}=VALUE)")
    taken = rest[: count if option.several else 1]
    del rest[: len(taken)]
    return taken


def help_of(function: Callable[..., None], short: Mapping[str, str], usage: str) -> str:
    """Usage, the docstring's text, and one entry for each option, by group."""
    letters = {name: letter for letter, name in short.items()}
    options = options_of(function)
    positional = "".join(f" {option.name.upper()}" for option in options if option.default is REQUIRED)
    lines = [f"usage: {usage}{positional} [options]", "", *entries(function)[0].splitlines()]
    heads = {option.name: _head(option, letters.get(option.name)) for option in options}
    indent = min(max(map(len, heads.values()), default=0), 30) + 4
    for group in dict.fromkeys(option.group for option in options):
        title = "options" if group is None else entries(group)[0].partition("\n")[0].rstrip(".")
        lines += ["", f"{title}:"]
        for option in options:
            if option.group is group:
                lines += _entry(f"  {heads[option.name]}", option.help + note(option), indent)
    return "\n".join([*lines, "", *_entry("  -h, --help", "Shows this.", indent)])


def note(option: Option) -> str:
    """What holds where the option is left out."""
    default = option.default
    if option.variable:
        return f" (left out: {option.variable}, or {shown(default)})"
    if any(default is nothing for nothing in (REQUIRED, None, False)) or default == ():
        return ""
    return f" (default: {default}; --no{option.name})" if default is True else f" (default: {shown(default)})"


def shown(default: Any) -> str:
    """A default as a person types it."""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) and default >= 1e6 else str(default)


def value_name(option: Option) -> str:
    """How help shows the option's value."""
    name = "|".join(option.choices) or _VALUE_NAMES.get(option.kind, "TEXT")
    return "" if option.kind is bool else f" {name}{' …' if option.several else ''}"


def _head(option: Option, letter: str | None) -> str:
    return f"{f'-{letter}, ' if letter else '    '}--{option.name}{value_name(option)}"


def _entry(head: str, text: str, indent: int) -> list[str]:
    body = textwrap.wrap(text, _WIDTH - indent) or [""]
    if len(head) + 2 > indent:
        return [head, *(" " * indent + line for line in body)]
    return [f"{head:<{indent}}{body[0]}".rstrip(), *(" " * indent + line for line in body[1:])]


def summary(where: Callable[..., None] | str) -> str:
    """A command's first line; one that is not imported yet is read and not run."""
    if not isinstance(where, str):
        return entries(where)[0].partition("\n")[0]
    module, _, name = where.partition(":")
    folder = Path(importlib.util.find_spec("mixtralkit").origin).parents[1]
    tree = ast.parse(folder.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return (ast.get_docstring(function) or "").partition("\n")[0]
