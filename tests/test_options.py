"""Every option is declared once, and commands, Python and docs/options.md take it from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtralkit.cli import COMMANDS
from mixtralkit.cli.options_page import page
from mixtralkit.cli.run import find
from mixtralkit.config import EngineConfig, FasterOptions, MoEOptions
from mixtralkit.config.options import options_of
from mixtralkit.engine.sampler import SamplingOptions

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_is_current():
    assert (ROOT / "docs" / "options.md").read_text() == page(), "mixtralkit options > docs/options.md"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lm-eval"])
def test_every_option_of_a_command_has_help(name):
    for option in options_of(find(COMMANDS[name])):
        assert option.help, f"{name}: {option.name}"


@pytest.mark.parametrize("name", ["generate", "chat", "evaluate", "profile"])
def test_every_command_that_runs_a_model_has_those_of_the_engine(name):
    found = {option.name: option for option in options_of(find(COMMANDS[name]))}
    changed = {"max_batch_size", "temperature"}  # other defaults
    for option in [*options_of(EngineConfig), *options_of(SamplingOptions)]:
        assert option.name in changed or found[option.name].default == option.default


def test_options_and_groups_by_name():
    engine = EngineConfig.of({}, model="a", faster_schedule=True, moe_backend="fastmoe", attention="dp")
    assert (engine.source.model, engine.parallel.attention) == (Path("a"), "dp")
    assert engine.moe == MoEOptions(FasterOptions(schedule=True), backend="fastmoe")
    moe = MoEOptions(exchange="static", symmetric_rows=7)
    assert EngineConfig.of({"FMOE_FASTER_SHADOW_ENABLE": "1"}, moe=moe).moe == moe
    changed = engine.but(moe=moe, seed=3)
    assert (changed.moe, changed.limits.seed, changed.source) == (moe, 3, engine.source)
    with pytest.raises(TypeError, match="unknown options: colour"):
        EngineConfig.of(colour=1)


def test_an_option_beside_its_group_changes_the_group():
    """It was dropped without a word."""
    moe = MoEOptions(symmetric_rows=7)
    environ = {"FMOE_FASTER_SHADOW_ENABLE": "1"}
    assert EngineConfig.of(environ, moe=moe, exchange="static").moe == MoEOptions(exchange="static", symmetric_rows=7)
    assert EngineConfig.of(environ, moe=moe, faster_group_size=2).moe.faster == FasterOptions(group_size=2)
    faster = FasterOptions(schedule=True)
    assert EngineConfig.of(environ, moe=moe, faster=faster, seed=3).moe == MoEOptions(faster, symmetric_rows=7)
    assert EngineConfig().but(moe=moe, exchange="static").moe == MoEOptions(exchange="static", symmetric_rows=7)


def test_what_is_left_out_is_the_environment_s():
    environ = {"FMOE_FASTER_SHADOW_ENABLE": "ON", "FMOE_FASTER_GROUP_SIZE": "8", "FMOE_FASTER_GLBPLC_ALPHA": ""}
    assert EngineConfig.of(environ).moe.faster == FasterOptions(shadow=True, group_size=8)
    assert EngineConfig.of(environ, faster_shadow=False).moe.faster == FasterOptions(group_size=8)
    assert MoEOptions() == MoEOptions.of({})


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"FMOE_FASTER_SHADOW_ENABLE": "yes"}, r"FMOE_FASTER_SHADOW_ENABLE \('yes'\) must be 1 or ON to enable"),
        ({"FMOE_FASTER_GROUP_SIZE": "1.5"}, r"FMOE_FASTER_GROUP_SIZE \('1.5'\) must be a whole number of at least 1"),
        ({"FMOE_FASTER_GLBPLC_NETBW": "inf"}, r"FMOE_FASTER_GLBPLC_NETBW \(inf\) must be a number above 0"),
    ],
)
def test_a_wrong_variable_is_named(environ, says):
    with pytest.raises(ValueError, match=says):
        EngineConfig.of(environ)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seed": True}, r"seed \(True\) must be a whole number of at least 0"),
        ({"max_batch_size": 0}, r"max_batch_size \(0\) must be a whole number of at least 1"),
        ({"cuda_graphs": 1}, r"cuda_graphs \(1\) must be true or false"),
        ({"memory_gb": float("nan")}, r"memory_gb \(nan\) must be a number above 0"),
        ({"max_batch_size": int("1" * 31)}, r"max_batch_size \(1{31}\) must lie in -1e\+12 … 1e\+12"),
        ({"cache_tokens": 10**400}, r"cache_tokens \(a whole number of 401 digits\) must lie"),
        ({"memory_gb": 1e300}, r"memory_gb \(1e\+300\) must lie in -1e\+18 … 1e\+18"),
        ({"seed": 2**64}, r"seed \(18446744073709551616\) must lie"),
        ({"format": "x" * 10**6, "max_batch_size": "y" * 10**6}, r"^max_batch_size \('y{58}…\) must be a whole number"),
        ({"attention": "pp"}, r"attention \('pp'\) must be 'auto', 'tp', 'dp' or 'coherent'"),
        ({"dtype": "int3"}, r"dtype \('int3'\) must be one of float32"),
        ({"finetune_threshold": 0.1}, r"finetune_threshold \(0.1\) needs dynamic 'two_phase'"),
        ({"dynamic": "two_phase"}, "popularity must name a profile"),
    ],
)
def test_wrong_values_are_named(given, says):
    with pytest.raises(ValueError, match=says):
        EngineConfig.of({}, **given)
