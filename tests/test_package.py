"""The wheel installs and runs away from the checkout, with the files of configs/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import sys
from importlib import resources
site, ckpts = sys.argv[1:]
import torch
import mixtralkit
from mixtralkit import Mixtral
from mixtralkit.cli.generate import generate
from mixtralkit.config import ModelConfig, shipped
from mixtralkit.mixtral import EngineConfig, RankContext, choose_layout
from mixtralkit.ops import runtime

assert mixtralkit.__file__.startswith(site), mixtralkit.__file__
assert resources.files("mixtralkit.server").joinpath("page.html").is_file(), "the server's page"
gpu = torch.device("cuda", 0)
torch.cuda.get_device_name = lambda *_: "NVIDIA H200"
assert runtime.tuned("linear", gpu, 1, outputs=4096, inputs=1024), "settings of kernels"
config = ModelConfig.from_file(shipped("models", "mixtral-8x7b")).with_limits(1024, 8)
auto = EngineConfig.of({}, plan="auto", memory_gb=140.0, explain=True)
layout = choose_layout(config, RankContext(world_size=4, device=gpu), auto)
print(layout.parallel, layout.plan.policy)
generate(model=ckpts, max_gen_len=3, temperature=0.0, device="cpu")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the installed wheel, which was built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("mixtralkit", "lab", "configs"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "tree"]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = folder.glob("mixtralkit-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, timeout=120)
    return folder / "site"


def run(site: Path, *words: object) -> str:
    environ = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=site.parent, env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_wheel_finds_its_files_elsewhere(site):
    said = run(site, "-P", "-c", PROGRAM, site, ROOT / "ckpts")
    assert "budget: 140 GB a rank" in said, "the table of what was predicted"
    assert said.count("Example START") == 3


def test_the_wheel_has_the_command(site):
    assert "usage: mixtralkit COMMAND" in run(site, site / "bin" / "mixtralkit", "--help")
