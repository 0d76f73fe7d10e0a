"""A server as a user starts it: a process, or ranks under torchrun."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
CKPTS = ROOT / "ckpts"
START_S = 120.0


class Server:
    """Runs ``mixtralkit serve`` on a free port, and ends it with the ``with`` block.

    Args:
        launcher: torchrun's words, where these are not for ``ranks`` on this machine; ``url`` is set by ``listens``.
    """

    def __init__(self, *words: object, ranks: int = 1, launcher: list[str] | None = None) -> None:
        waits = launcher is None
        command = [sys.executable, "-m"]
        if ranks > 1:
            launcher = ["--standalone", f"--nproc_per_node={ranks}"]
        if launcher is not None:
            command += ["torch.distributed.run", *launcher, "-m"]
        command += ["mixtralkit", "serve", "-m", CKPTS, "--device", "cpu", "--port", 0, *words]
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.environ = {**os.environ, **own}
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=self.environ, text=True, start_new_session=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if waits:
            self.listens()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def stderr(self) -> str:
        """What it said so far."""
        return "".join(self.said)

    def listens(self) -> None:
        """Waits until it tells where."""
        self.url = self.wait_for(r"listening on (http://\S+);")

    def ready(self) -> Server:
        """Waits until it takes requests."""
        self.wait_for(r"(is ready)")
        until(lambda: httpx.get(f"{self.url}/health", timeout=60).status_code == 200, START_S)
        return self

    def wait_for(self, pattern: str, within_s: float = START_S) -> str:
        """The group of the first line that matches."""
        end = time.monotonic() + within_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"nothing like {pattern!r} in:\n{self.stderr}") from None
            if line == "":
                raise AssertionError(f"ended with {self.process.wait(10)}:\n{self.stderr}")
            if found := re.search(pattern, line):
                return found[1]

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes that run the model, in rank order."""
        everyone = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        ranks = [p for p in everyone if "mixtralkit" in p.cmdline() and "torch.distributed.run" not in p.cmdline()]
        return sorted(ranks, key=lambda p: int(p.environ().get("RANK", 0)))

    def end(self, within_s: float) -> int:
        """Exit code, once it has ended."""
        return self.process.wait(within_s)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process and its children, whatever they do."""
        if self.process.poll() is None:
            own = psutil.Process(self.process.pid)
            for each in [*own.children(recursive=True), own]:
                each.kill()
        self.process.wait(30)

    def metric(self, name: str) -> float:
        """A metric's value."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{re.escape(name)}(\{{| )", line)
        )

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said.append(line)
            self._lines.put(line)
        self._lines.put("")


def slowdown() -> float:
    """How many times as long work takes now as on an idle machine: so much longer limits of seconds may be."""
    wall, used = time.perf_counter(), time.thread_time()
    while time.thread_time() - used < 0.2:
        pass
    return (time.perf_counter() - wall) / (time.thread_time() - used)


def until(holds: Callable[[], bool], within_s: float) -> None:
    """Waits until something holds; AssertionError where it does not in time."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"not within {within_s:g} s"
        time.sleep(0.02)
