"""An option, declared once: type and rule in its annotation, text in the docstring's entry, and its default.

    @dataclass(frozen=True)
    class Limits(Options):
        \"\"\"How much runs at a time.

        Attributes:
            max_batch_size: Sequences that run at a time; more of them wait.
        \"\"\"

        max_batch_size: Count = 8

Making a ``Limits`` checks it. Commands take their options, with their help, from such groups and from their own
signatures in the same notation (``Args`` for ``Attributes``), and so does docs/options.md.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from mixtralkit.json_file import shown

T = TypeVar("T", bound="Options")
REQUIRED = dataclasses.MISSING

_NUMBERS = {int: "a whole number", float: "a number"}
_MOST = {int: 10**12, float: 1e18}  # of any number, so that products of several stay what 64 bits hold
_BOOLS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}


@dataclass(frozen=True)
class Rule:
    """What holds of a value beyond its type; ``text`` ends the sentence "NAME (VALUE) must be …".

    ``most`` is the largest number, where it is not the one that holds of all options.
    """

    text: str
    holds: Callable[[Any], bool]
    most: float | None = None


@dataclass(frozen=True)
class Variable:
    """The environment variable that an option is read from where it is left out."""

    name: str


@dataclass(frozen=True)
class Called:
    """The name of an option outside its group, where it is not the field's."""

    name: str


Count = Annotated[int, Rule("of at least 1", lambda value: value >= 1)]
Natural = Annotated[int, Rule("of at least 0", lambda value: value >= 0)]
Seed = Annotated[int, Rule("of at least 0", lambda value: value >= 0, most=2**64 - 1)]
Ranks = Annotated[int, Rule("in 1 … 1024", lambda value: 1 <= value <= 1024)]
Positive = Annotated[float, Rule("above 0", lambda value: value > 0)]
NotNegative = Annotated[float, Rule("of at least 0", lambda value: value >= 0)]
Share = Annotated[float, Rule("in [0, 1]", lambda value: 0 <= value <= 1)]


@dataclass(frozen=True)
class Option:
    """One option, as ``options_of`` finds it; ``group`` is the class that declares it, None for a parameter."""

    name: str
    field: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...]
    rules: tuple[Rule, ...]
    variable: str | None
    several: bool
    may_be_none: bool
    group: type | None

    @property
    def rule(self) -> str:
        """What a value must be, for a person."""
        if self.choices:
            *first, last = map(repr, self.choices)
            return f"{', '.join(first)} or {last}" if first else last
        words = [*filter(None, [_NUMBERS.get(self.kind, "")]), *(rule.text for rule in self.rules)]
        return " ".join(words) or {bool: "true or false", Path: "a path"}.get(self.kind, "a text")

    @property
    def item(self) -> Option:
        """The option of one value, where it takes several."""
        return dataclasses.replace(self, several=False)

    def check(self, value: Any) -> Any:
        """The value, a path as one; ValueError that names the option, the value and the rule."""
        if (value is None and self.may_be_none) or self.kind is object:
            return value
        if self.several:
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise ValueError(f"{self.name} ({shown(value)}) must be several values")
            return tuple(map(self.item.check, value))
        if self.kind is Path:
            return Path(value) if isinstance(value, str) else value
        if self.kind is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif self.kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = bool(self.rules) or isinstance(value, self.kind)
        if not fits or (self.choices and value not in self.choices) or not all(r.holds(value) for r in self.rules):
            raise ValueError(f"{self.name} ({shown(value)}) must be {self.rule}")
        most = next((rule.most for rule in self.rules if rule.most is not None), _MOST.get(self.kind, math.inf))
        if self.kind in _MOST and not -most <= value <= most:
            raise ValueError(f"{self.name} ({shown(value)}) must lie in {-most:g} … {most:g}")
        return value

    def parse(self, text: str) -> Any:
        """The value that a person's text gives; nothing is guessed into it. ValueError as from ``check``."""
        if self.may_be_none and text.lower() == "none" and (self.kind is not str or self.choices):
            return None
        if self.kind is bool:
            return self.check(_BOOLS.get(text.lower(), text))
        return self.check(_number(self.kind, text) if self.kind in _NUMBERS else text)

    def read(self, environ: Mapping[str, str]) -> Any:
        """The value of the option's variable, or REQUIRED where it has none; ValueError that names the variable."""
        text = environ.get(self.variable or "", "")
        if text == "":
            return REQUIRED
        if self.kind is bool:  # what FastMoE takes
            if text not in ("1", "ON", "0", "OFF"):
                raise ValueError(f"{self.variable} ({text!r}) must be 1 or ON to enable, 0 or OFF to disable")
            return text in ("1", "ON")
        return dataclasses.replace(self, name=self.variable).parse(text)


class Options:
    """A frozen group of options: a base for dataclasses. ``prefix`` goes before their names outside the group."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for option in own_options(type(self)):
            object.__setattr__(self, option.field, option.check(getattr(self, option.field)))
        self.check()

    def check(self) -> None:
        """Rules between several options; ValueError."""

    @classmethod
    def of(cls: type[T], environ: Mapping[str, str] | None = None, **given: Any) -> T:
        """The group from the names of its options and of groups inside it; TypeError for any other name.

        What is not given is read from its environment variable (``environ`` instead of the process's), or has its
        default.
        """
        return _build(cls, _known(cls, given), os.environ if environ is None else environ, None)

    def but(self: T, environ: Mapping[str, str] | None = None, **changes: Any) -> T:
        """The same with other values, named as in ``of``: ``dataclasses.replace`` for options at any depth."""
        return _build(type(self), _known(type(self), changes), environ or {}, self)


def options_of(documented: Any, *, nested: bool = True) -> list[Option]:
    """The options of a dataclass or a function, those of groups inside it where they stand; each name once."""
    found: dict[str, Option] = {}
    for name, hint, default in _declared(documented):
        group = _group(hint)
        if group is None:
            option = _option(documented, name, hint, default)
            found.setdefault(option.name, option)
        elif nested:
            instances = {} if default is REQUIRED else _instances(default)
            for option in options_of(group):
                if option.group in instances:
                    option = dataclasses.replace(option, default=getattr(instances[option.group], option.field))
                found.setdefault(option.name, option)
    return list(found.values())


def _instances(group: Options) -> dict[type, Options]:
    """A group and the groups inside it, by class."""
    inner = (_instances(getattr(group, name)) for name in groups_of(type(group)))
    return {type(group): group} | {kind: value for found in inner for kind, value in found.items()}


@functools.lru_cache
def own_options(kind: type) -> tuple[Option, ...]:
    """Those of a dataclass itself."""
    return tuple(options_of(kind, nested=False))


def groups_of(documented: Any) -> dict[str, tuple[type, Any]]:
    """Class and default of each group inside a dataclass or a function, by its name there."""
    return {n: (g, default) for n, hint, default in _declared(documented) if (g := _group(hint)) is not None}


def entries(documented: Any) -> tuple[str, dict[str, str]]:
    """A docstring's text before ``Args`` or ``Attributes``, and the texts of these by name."""
    text, _, section = re.sub(r"\n(Args|Attributes):\n", "\0", inspect.getdoc(documented) or "", count=1).partition(
        "\0"
    )
    found: dict[str, str] = {}
    last = None
    for line in section.splitlines():
        match = re.match(r" {4}(\w+): *(.*)", line)
        if match:
            last = match[1]
            found[last] = match[2]
        elif last and line.startswith(" " * 8):
            found[last] += " " + line.strip()
        elif line and not line.startswith(" "):
            break
    return text.strip(), found


def _declared(documented: Any) -> list[tuple[str, Any, Any]]:
    """Name, annotation and default of each field or parameter."""
    hints = typing.get_type_hints(documented, include_extras=True)
    if not inspect.isclass(documented):
        parameters, empty = inspect.signature(documented).parameters.items(), inspect.Parameter.empty
        return [(n, hints.get(n, str), REQUIRED if p.default is empty else p.default) for n, p in parameters]
    fields = dataclasses.fields(documented)
    made = [f.default if f.default_factory is REQUIRED else f.default_factory() for f in fields]
    return [(f.name, hints[f.name], default) for f, default in zip(fields, made, strict=True)]


def _group(hint: Any) -> type | None:
    return hint if inspect.isclass(hint) and issubclass(hint, Options) else None


@functools.lru_cache
def _texts(documented: Any) -> dict[str, str]:
    return entries(documented)[1]


def _option(documented: Any, name: str, hint: Any, default: Any) -> Option:
    more: list[Any] = []
    several = may_be_none = False
    choices: tuple[str, ...] = ()
    while not inspect.isclass(hint) or typing.get_origin(hint) is not None:  # peel until a plain type is left
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            more += hint.__metadata__
            hint = parts[0]
        elif origin in (typing.Union, UnionType):
            may_be_none |= NoneType in parts
            hint = next(part for part in parts if part is not NoneType)
        elif origin is tuple:
            several, hint = True, parts[0]
        elif origin is Literal:
            choices, hint = parts, type(parts[0])
        else:
            hint = object
    by_kind = {kind: [item for item in more if isinstance(item, kind)] for kind in (Rule, Variable, Called)}
    group = documented if inspect.isclass(documented) else None
    public = by_kind[Called][0].name if by_kind[Called] else getattr(documented, "prefix", "") + name
    variable = by_kind[Variable][0].name if by_kind[Variable] else None
    return Option(
        public, name, hint, default, _texts(documented).get(name, ""), choices, tuple(by_kind[Rule]), variable,
        several, may_be_none, group,
    )  # fmt: skip


def _number(kind: type, text: str) -> Any:
    """The number, or the text where it is none of the kind: 1e3 is a whole number, 1.5 is not."""
    try:
        number = float(text)
        if kind is float:
            return number
        return int(text) if text.lstrip("+-").isdigit() else int(number) if number == int(number) else text
    except (ValueError, OverflowError):
        return text


def _known(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    unknown = set(given) - {option.name for option in options_of(kind)} - _group_names(kind)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    return given


def _group_names(kind: type) -> set[str]:
    groups = groups_of(kind)
    return set(groups).union(*(_group_names(group) for group, _ in groups.values()))


def _build(kind: type[T], given: Mapping[str, Any], environ: Mapping[str, str], base: T | None) -> T:
    values: dict[str, Any] = {}
    for option in own_options(kind):
        if option.name in given:
            values[option.field] = given[option.name]
        elif (read := option.read(environ)) is not REQUIRED:
            values[option.field] = read
        elif base is not None:
            values[option.field] = getattr(base, option.field)
    for name, (group, _) in groups_of(kind).items():
        inner = given.get(name, None if base is None else getattr(base, name))
        values[name] = _build(group, given, {} if name in given else environ, inner)
    return kind(**values)
