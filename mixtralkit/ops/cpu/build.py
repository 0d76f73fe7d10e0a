"""Compiles ``kernels.cpp`` for the machine that runs it, once, and loads it; None where that cannot be done.

The first use on a machine takes about ten seconds. ``python -m mixtralkit.ops.cpu.build`` does it beforehand.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("kernels.cpp", "attention.h", "quantised.h", "rows.h", "vectors.h")
)
COMPILERS = ("g++", "c++", "clang++")
# infinities, the order of sums and their roundings stay as they are written
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp",
    "-shared", "-fPIC",
)  # fmt: skip
PATIENCE_S = 120

INT, LONG, POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_void_p


class Rows(ctypes.Structure):
    """``mk_rows`` of ``kernels.cpp``."""

    _fields_ = (("type", INT), ("data", POINTER), ("ld", LONG))


class Weight(ctypes.Structure):
    """``mk_weight`` of ``kernels.cpp``."""

    _fields_ = (
        ("type", INT), ("group", LONG), ("data", POINTER), ("ld", LONG), ("slot", LONG),
        ("scales", POINTER), ("scales_slot", LONG), ("zeros", POINTER), ("zeros_slot", LONG),
    )  # fmt: skip


class Norm(ctypes.Structure):
    """``mk_norm``."""

    _fields_ = (("weight", POINTER), ("eps", ctypes.c_float))


@functools.lru_cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels, or None where no compiler is or it does not know this machine; says so once."""
    if platform.system() == "Windows":
        return None
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    try:
        return _load(_built(compiler))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"kernels for the CPU could not be built, torch's run instead: {reason.strip()}", stacklevel=2)
        return None


def _built(compiler: str) -> Path:
    """The library for this source, compiler and processor, built unless it was; one process builds, others wait."""
    import fcntl  # not on Windows

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    parts = (*(path.read_text("utf-8") for path in SOURCES), version.stdout, _processor(), *FLAGS)
    name = f"kernels-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]}.so"
    folder = _folder()
    library = folder / name
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            made = folder / f"{name}.made"
            command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
            made.replace(library)
    return library


def _folder() -> Path:
    """Where built kernels stay: the user's cache, or a folder of this process where that cannot be written."""
    try:
        folder = Path.home() / ".cache" / "mixtralkit"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="mixtralkit-"))
    return folder


def _processor() -> str:
    """What the machine's processor can do, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.mk_linear.argtypes = (INT, *(LONG,) * 3, *(POINTER,) * 5)
    loaded.mk_gate.argtypes = (INT, *(LONG,) * 4, *(POINTER,) * 7)
    loaded.mk_best.argtypes = (INT, *(LONG,) * 2, POINTER, LONG, *(POINTER,) * 3)
    loaded.mk_rotate_and_store.argtypes = (
        INT, *(LONG,) * 4, *(POINTER,) * 4, *(LONG,) * 4, POINTER, LONG, POINTER, POINTER, POINTER,
    )  # fmt: skip
    loaded.mk_expert_sum.argtypes = (INT, *(LONG,) * 6, *(POINTER,) * 7)
    loaded.mk_attention.argtypes = (
        INT, *(LONG,) * 4, POINTER, INT, POINTER, POINTER, *(LONG,) * 4, POINTER, LONG, POINTER, POINTER, LONG, POINTER,
    )  # fmt: skip
    loaded.mk_read.argtypes, loaded.mk_read.restype = (INT, POINTER, LONG), ctypes.c_float
    return loaded


if __name__ == "__main__":
    print("kernels for the CPU: " + ("ready" if kernels() else "none, for want of a compiler; torch's run instead"))
