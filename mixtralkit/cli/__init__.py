"""The command ``mixtralkit``; ``tools/*.py`` are parts of it."""

from __future__ import annotations

import signal

from mixtralkit.cli.ending import end

# Command → where it is. Its module is imported when it is chosen.
COMMANDS = {
    "generate": "mixtralkit.cli.generate:generate",
    "chat": "mixtralkit.cli.chat:chat",
    "serve": "mixtralkit.cli.serve:serve",
    "evaluate": "mixtralkit.cli.evaluate:evaluate",
    "lm-eval": "mixtralkit.cli.lm_eval:lm_eval",
    "convert": "mixtralkit.cli.convert:convert",
    "profile": "mixtralkit.cli.profile:profile",
    "show": "mixtralkit.cli.profile:show",
    "popularity": "mixtralkit.cli.profile:popularity",
    "plan": "mixtralkit.cli.plan:plan",
    "quantise-report": "mixtralkit.cli.quantise_report:quantise_report",
    "convert-plan": "mixtralkit.planning.convert:convert_plan",
    "simulate": "mixtralkit.cli.simulate:simulate",
    "measure": "mixtralkit.cli.measure:measure",
    "tune": "lab.tune_kernels:tune",
    "train": "mixtralkit.cli.train:train",
    "prepare-text": "mixtralkit.cli.prepare_text:prepare_text",
    "prompt-sets": "mixtralkit.cli.prompt_sets:prompt_sets",
    "options": "mixtralkit.cli.options_page:options",
}


def main(*names: str) -> None:
    """Runs this process's command line.

    Args:
        names: commands to choose from, the first of them where none is named; without any, all that there are.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: end("interrupted", 128 + signal.SIGINT))  # while modules are imported
    from mixtralkit.cli.run import run_tool

    chosen = {name: COMMANDS[name] for name in names or COMMANDS}
    short = {"m": "model", "t": "tokenizer"}
    run_tool(chosen[names[0]] if len(names) == 1 else chosen, names[0] if names else None, short)
