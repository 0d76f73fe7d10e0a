"""The wheel installs and runs away from the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_runs_elsewhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("mixtralkit-*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, timeout=120)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import mixtralkit; assert mixtralkit.__file__.startswith(sys.argv[1]), mixtralkit.__file__\n"
        "model = mixtralkit.Mixtral.build(sys.argv[2], None, max_seq_len=32, max_batch_size=1)\n"
        "print(model.text_completion(['In the beginning'], max_gen_len=4, temperature=0)[0]['generation'])\n"
    )
    command = [sys.executable, "-P", "-c", program, str(target), str(ROOT / "ckpts")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
