"""Hardware files: what ships is valid, what is wrong is named, rates lie between the measured points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixtralkit.planning.hardware import Hardware
from tests.planning.machines import machine

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "hardware").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_named_as_their_file(path):
    hardware = Hardware.load(path)
    assert hardware.name == path.stem
    assert hardware.source
    assert hardware.machine


def test_there_are_shipped_files():
    assert {"h200", "h200-nodes", "cpu-2core"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("across", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path, across):
    machine(across).save(tmp_path / "it.json")
    assert Hardware.load(tmp_path / "it.json") == machine(across)


def test_rates_between_points_lie_on_a_line_of_logarithms():
    rates = machine(matrix_rates=((2, 1e9), (8, 16e9), (32, 16e9))).matrix_rate
    assert rates(4) == pytest.approx(4e9)
    np.testing.assert_allclose(rates([2, 8, 16, 32, 5000]), [1e9, 16e9, 16e9, 16e9, 16e9])
    assert rates(1) == pytest.approx(0.5e9), "below the first point a product takes as long as there"


def test_networks_in_use():
    far = machine(across=True)
    assert far.networks(8, None) == ((far.inside, 8),)
    assert far.networks(8, 8) == ((far.inside, 8),)
    assert far.networks(8, 2) == ((far.inside, 2), (far.across, 4))
    with pytest.raises(ValueError, match="across of hardware test"):
        machine().networks(8, 2)


def test_latency_grows_with_the_logarithm_of_members():
    inside = machine().inside  # 10 us among 4
    assert inside.latency_s("exchange", 4) == pytest.approx(1e-5)
    assert inside.latency_s("all_reduce", 2) == pytest.approx(0.5e-5)
    assert inside.latency_s("broadcast", 16) == pytest.approx(2e-5)
    assert inside.latency_s("exchange", 1) == 0


def _without(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: _without(c, "launch_s"), "hardware lacks launch_s"),
        (lambda c: {**c, "colour": 1}, "hardware has unknown 'colour'"),
        (lambda c: {**c, "memory_bandwidth": 0}, r"memory_bandwidth \(0.0\) must be a number above 0"),
        (lambda c: {**c, "memory_bandwidth": 1e300}, r"memory_bandwidth \(1e\+300\) must be a number above 0 \(1e-18"),
        (lambda c: {**c, "memory_bandwidth": 5e-324}, r"memory_bandwidth \(5e-324\) must be a number above 0"),
        (lambda c: {**c, "memory_bandwidth": float("nan")}, "the number NaN, which is not finite"),
        (lambda c: {**c, "sync_s": -1}, r"sync_s \(-1.0\) must be a number of at least 0"),
        (lambda c: {**c, "launch_s": "3"}, r"launch_s \('3'\) must be a number"),
        (lambda c: {**c, "data_bytes": 3}, r"data_bytes \(3\) must be 1, 2, 4 or 8"),
        (lambda c: {**c, "overlaps": 1}, r"overlaps \(1\) must be true or false"),
        (lambda c: {**c, "matrix_rates": []}, "matrix_rates must have at least one pair"),
        (lambda c: {**c, "matrix_rates": [[1, 2, 3]]}, r"matrix_rates.* must be a list of 2"),
        (lambda c: {**c, "matrix_rates": [[4, 1e9], [2, 1e9]]}, r"matrix_rates: rows \(4, 2\) must rise"),
        (lambda c: {**c, "inside": None}, r"hardware.inside \(None\) must be an object"),
        (lambda c: {**c, "inside": {**c["inside"], "members": 1}}, r"inside: members \(1\) must be"),
        (lambda c: {**c, "inside": _without(c["inside"], "exchange")}, "hardware.inside lacks exchange"),
        (lambda c: {**c, "inside": {**c["inside"], "exchange": {"latency_s": 1}}}, "exchange lacks bandwidth"),
        (lambda c: {**c, "inside": {**c["inside"], "colour": 1}}, "inside has unknown 'colour'"),
        (lambda c: {**c, "memory_bandwidth": 10**400}, "memory_bandwidth"),
        (lambda c: {**c, "name": [1]}, r"hardware.name \(\[1\]\) must be a text"),
    ],
)
def test_bad_files_are_named_with_their_field(tmp_path, change, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(change(machine().to_dict())))
    with pytest.raises(ValueError, match=rf"bad\.json: .*{words}"):
        Hardware.load(path)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
        Hardware.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: "):
        Hardware.load(tmp_path / "broken.json")
