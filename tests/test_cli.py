"""Command lines become calls; help, errors and exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixtralkit.cli.ending import describe
from mixtralkit.cli.run import Tool, command
from mixtralkit.cli.running import UpdateOptions
from mixtralkit.cli.words import UsageError
from mixtralkit.config.options import Count, NotNegative, Options

ROOT = Path(__file__).resolve().parent.parent


def make(
    text: str,
    model: Path = Path("ckpts"),
    count: int | None = 3,
    ratio: float = 0.5,
    fast: bool = False,
    stop: tuple[str, ...] = (),
) -> None:
    """Makes something.

    More about it.

    Args:
        text: What to make it
            from.
        count: How many.
    """
    CALLS.append((text, model, count, ratio, fast, stop))


def other() -> None:
    """Does something else."""
    CALLS.append("other")


CALLS: list = []


def run(*arguments: str):
    """What the command line calls."""
    CALLS.clear()
    Tool({"make": make, "other": other}, "make", {"m": "model"}, "tool").call(list(arguments))()
    return CALLS[0]


DEFAULTS = (Path("ckpts"), 3, 0.5, False, ())


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["make", "a"], ("a", *DEFAULTS)),
        (["--text", "a"], ("a", *DEFAULTS)),
        (["--text=a", "-m", "x", "--fast", "--count", "7"], ("a", Path("x"), 7, 0.5, True, ())),
        (["make", "-m=x", "--nofast", "a", "--ratio", "-1e-3"], ("a", Path("x"), 3, -0.001, False, ())),
        (["--text", "a", "--stop", "b", "-1", "--count=none"], ("a", Path("ckpts"), None, 0.5, False, ("b", "-1"))),
        (["--stop=b", "--stop=--c", "--fast", "true", "--text", "a"], ("a", Path("ckpts"), 3, 0.5, True, ("b", "--c"))),
        (["make", "--fast", "a", "--no-fast", "-m", "-"], ("a", Path("-"), 3, 0.5, False, ())),
        (["other"], "other"),
    ],
)
def test_arguments_become_a_call(arguments, call):
    assert run(*arguments) == call


@pytest.mark.parametrize("text", ["1e3", "True", "None", "[1, 2]", "{'a': 1}", "a\nb", "-5", "", '"q"', "日本 😀"])
def test_text_stays_text(text):
    assert run(f"--text={text}")[0] == text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--txt", "a"], "unknown option --txt; tool make --help"),
        (["-x", "a"], "unknown option -x"),
        (["make"], "TEXT is missing"),
        (["make", "a", "b"], "unexpected argument 'b'"),
        (["make", "a", "run"], "unexpected argument 'run'"),
        (["make", "-", "a"], "unexpected argument '-'"),
        (["make", "a", "--", "--trace"], "unknown option --"),
        (["nothing"], "unknown command 'nothing'; the commands are make, other"),
        (["make", "a", "--count"], "option --count needs a value"),
        (["make", "a", "--count", "--fast"], "option --count needs a value"),
        (["make", "a", "--count", "1.5"], "count \\('1.5'\\) must be a whole number"),
        (["make", "a", "--count", "many"], "count \\('many'\\) must be a whole number"),
        (["make", "a", "--ratio", "x"], "ratio \\('x'\\) must be a number"),
        (["make", "a", "--fast=maybe"], "fast \\('maybe'\\) must be true or false"),
        (["other", "--count", "3"], "unknown option --count"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(UsageError, match=says):
        run(*arguments)


def test_help_lists_commands_and_options(capsys):
    Tool({"make": make, "other": other}, "make", {"m": "model"}, "tool").call(["--help"])()
    text = capsys.readouterr().out
    for part in (
        "usage: tool COMMAND",
        "make   Makes something. (when no command",
        "other  Does something else.",
        "-m, --model PATH",
        "--count N",
        "How many. (default: 3)",
        "What to make it from.",
        "--stop TEXT …",
    ):
        assert part in text
    Tool({"make": make, "other": other}, "make", {}, "tool").call(["other", "-h"])()
    assert "Does something else." in capsys.readouterr().out


def test_errors_become_one_line():
    with pytest.raises(OSError, match="nowhere") as caught:
        Path("/nowhere/at/all").read_bytes()
    assert describe(caught.value) == "/nowhere/at/all: No such file or directory"
    assert describe(ValueError("two\n  lines")) == "two lines"
    assert describe(MemoryError()) == "out of memory"
    assert describe(RuntimeError("[x/pair.cc:537] Read error [::1]:9: Connection reset by peer.")).startswith(
        "another rank"
    )


def continued(prompts: Path, output: Path | None = None, plot: Path | None = None) -> None:
    """Writes what it is told to."""
    CALLS.append((prompts, output, plot))


def test_what_is_written_is_never_what_is_read(tmp_path):
    """``--output PROMPTS --overwrite`` emptied the prompts."""
    tool, prompts, link = Tool(continued, None, {}, "tool"), tmp_path / "prompts.txt", tmp_path / "link.txt"
    prompts.write_text("mine")
    link.symlink_to(prompts)
    for output in (prompts, link, tmp_path / "." / "prompts.txt"):
        with pytest.raises(ValueError, match=rf"^output \({output}\) must be another file than prompts$"):
            tool.call([str(prompts), "--output", str(output)])
    with pytest.raises(ValueError, match="must be another file than plot"):
        tool.call([str(prompts), "--output", "new", "--plot", "new"])
    CALLS.clear()
    tool.call([str(prompts), "--output", str(tmp_path), "--plot", "new"])()
    assert [(prompts, tmp_path, Path("new"))] == CALLS


def test_a_sentence_of_any_length_is_cut():
    assert describe(ValueError("x" * 10**6)) == "x" * 3000 + "…"


SCRIPT = """
import sys
from mixtralkit.cli.run import run_tool
def fail(kind: str) -> None:
    '''Fails.'''
    if kind == "pipe":
        print("x" * 100000); sys.stdout.flush(); return
    raise {"value": ValueError("bad value"), "stop": KeyboardInterrupt(), "bug": TypeError("bug")}[kind]
run_tool(fail)
"""


def start(kind: str, **environ: str) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run([sys.executable, "-c", SCRIPT, kind], env=environ, capture_output=True, text=True, timeout=60)


def test_an_error_ends_with_one_sentence_and_a_code():
    done = start("value")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: bad value\n")
    assert (start("stop").returncode, start("stop").stderr) == (130, "error: interrupted\n")
    assert "Traceback" in start("bug").stderr, "a bug of ours is not hidden"


def test_another_rank_than_the_first_says_which_it_is():
    done = start("value", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (1, "error: rank 1: bad value\n")


def test_ctrl_c_while_modules_are_imported_is_one_sentence(tmp_path):
    """Ctrl-C in the first seconds showed the traceback of whatever import was under way."""
    (tmp_path / "slow.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    program = "from mixtralkit.cli import COMMANDS, main; COMMANDS['generate'] = 'slow:f'; main()"
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    child = subprocess.Popen(
        [sys.executable, "-c", program, "generate"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=30)[1] == "error: interrupted\n"
        assert child.returncode == 130
    finally:
        child.kill()


def test_help_needs_no_torch():
    """``mixtralkit --help`` answers at once."""
    program = "import sys; from mixtralkit.cli import main; main(); assert 'torch' not in sys.modules"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, "--help"], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search("prepare-text +Writes OUTPUT/train", done.stdout)


def test_every_tool_is_a_command():
    """As started by its path, one after the other in one process, which imports torch once."""
    program = "import runpy, sys\nfor sys.argv in [[path, '--help'] for path in sys.argv[1:]]:\n"
    program += "    runpy.run_path(sys.argv[0], run_name='__main__')"
    tools = sorted((ROOT / "tools").glob("*.py"))
    command = [sys.executable, "-c", program, *map(str, tools)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for tool in tools:
        assert f"usage: {tool.name}" in done.stdout


@dataclass(frozen=True)
class Shared(Options):
    """What several commands take.

    Attributes:
        speed: How fast,
            in m/s.
        rows: How many, or none.
    """

    speed: NotNegative = 1.0
    rows: Count | None = 5


@dataclass(frozen=True)
class Other(Options):
    """What one takes.

    Attributes:
        rows: The same option.
    """

    rows: Count | None = 5


@command
def drive(
    where: str,
    last: bool = False,
    *,
    shared: Shared,
    other: Other,
    own: Shared = Shared(speed=2.0),
) -> None:
    """Drives.

    Args:
        where: The place.
    """
    CALLS.append((where, shared, other, own, last))


@pytest.mark.parametrize("given", [{"policy": "hot_cold"}, {"slots_per_rank": 3}, {"hot_experts": 0}])
def test_options_of_new_plans_need_the_steps_between_them(given):
    """They were ignored."""
    with pytest.raises(ValueError, match=rf"{next(iter(given))} \(.*\) needs update_step"):
        UpdateOptions(**given)
    assert UpdateOptions(update_step=4, **given)


def test_options_of_groups_are_options_of_their_own(capsys):
    tool = Tool({"drive": drive}, None, {}, "tool")
    CALLS.clear()
    tool.call(["drive", "home", "--rows=none", "--last"])()
    tool.call(["drive", "home", "--speed", "3"])()
    drive("away", rows=3)
    drive("away", shared=Shared(speed=4.0), rows=3)
    assert [
        ("home", Shared(rows=None), Other(rows=None), Shared(2.0, None), True),
        ("home", Shared(speed=3.0), Other(), Shared(3.0), False),
        ("away", Shared(rows=3), Other(3), Shared(2.0, 3), False),
        ("away", Shared(4.0, rows=3), Other(3), Shared(2.0, 3), False),
    ] == CALLS
    tool.call(["drive", "--help"])()
    text = capsys.readouterr().out
    assert text.index("--where") < text.index("--last") < text.index("What several") < text.index("--speed X")
    assert "How fast, in m/s. (default: 1.0)" in text
    assert text.count("--rows N") == 1
    with pytest.raises(TypeError, match="colour"):
        drive("home", colour=1)
    with pytest.raises(UsageError, match=r"rows \(0\) must be a whole number of at least 1"):
        tool.call(["drive", "home", "--rows", "0"])
