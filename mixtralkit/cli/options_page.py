"""``mixtralkit options``: docs/options.md, from where the options are declared."""

from __future__ import annotations

from mixtralkit.cli import COMMANDS, words
from mixtralkit.cli.run import command, find
from mixtralkit.config import EngineConfig, TopologyOptions
from mixtralkit.config.options import REQUIRED, Option, entries, groups_of, options_of
from mixtralkit.engine.sampler import SamplingOptions

_INTRODUCTION = """# Options

Every option of MixtralKit. A command takes it as `--name VALUE`; Python takes it by name, in
`Mixtral.build("ckpts", name=value)` or `Mixtral.load(EngineConfig.of(model="ckpts", name=value))`. The command
`mixtralkit options > docs/options.md` writes this page.
"""


@command
def options() -> None:
    """Prints docs/options.md: every option with its values, default and meaning."""
    print(page(), end="")


def page() -> str:
    """The page, from the groups and from the commands' own parameters."""
    parts = [_INTRODUCTION, "## The engine", "What `generate`, `chat`, `evaluate`, `profile` and Python take."]
    groups = [group for group, _ in groups_of(EngineConfig).values()]
    for group in [*groups, SamplingOptions, TopologyOptions]:
        parts += [f"### {_title(group)}", _table(options_of(group))]
    parts.append("## The commands\n\nBeside these, each command has options of its own.")
    shown = {option.group for option in [*options_of(EngineConfig), *options_of(SamplingOptions)]}
    for name, where in COMMANDS.items():
        function = find(where)
        if getattr(function, "takes_words", False):
            continue
        own = [option for option in options_of(function) if option.group not in shown]
        if own:
            parts += [f"### mixtralkit {name}", words.summary(function), _table(own)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _title(group: type) -> str:
    return entries(group)[0].partition("\n")[0].rstrip(".")


def _table(found: list[Option]) -> str:
    lines = ["| option | values | left out | |", "|---|---|---|---|"]
    lines += [f"| `{o.name}` | {_values(o)} | {_default(o)} | {o.help} |" for o in found]
    return "\n".join(lines)


def _values(option: Option) -> str:
    text = ", ".join(f"`{choice}`" for choice in option.choices) or option.rule.removeprefix("a ")
    return f"several: {text}" if option.several else text


def _default(option: Option) -> str:
    if option.default is REQUIRED:
        return "must be given"
    default = "" if option.default in (None, ()) else f"`{words.shown(option.default)}`"
    return f"`{option.variable}`" + (f", else {default}" if default else "") if option.variable else default
