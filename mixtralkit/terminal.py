"""Ctrl-C in an interactive session: it ends an answer, never the session, on one rank and under torchrun."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import Any

try:
    import readline as _readline  # noqa: F401  (gives input() line editing and history)
    import termios
except ImportError:  # not on Windows
    termios = None

_CTRL_C = b"\x03"


class Session:
    """Reads a person's lines and notices Ctrl-C between them; a context manager around the whole session.

    One rank alone gets Ctrl-C as a signal. Under ``torchrun`` the signal would reach torchrun, which then ends all
    ranks; so while the session runs on a terminal, Ctrl-C is switched from a signal to a character that ends a line,
    and rank 0 finds it in its input. Other ranks ignore the signal and neither read nor print.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.reads = rank == 0
        self.is_terminal = self.reads and sys.stdin.isatty()
        self._as_character = self.is_terminal and world_size > 1 and termios is not None
        self._pressed = self._in_prompt = False
        self._at_start = True  # a byte order mark may be there
        self._early_lines: list[str] = []
        self._settings: list[Any] | None = None

    def __enter__(self) -> Session:
        self._handler = signal.signal(signal.SIGINT, self._on_signal if self.reads else signal.SIG_IGN)
        if self._as_character:
            self._settings = termios.tcgetattr(sys.stdin)
            changed = termios.tcgetattr(sys.stdin)
            changed[6][termios.VINTR] = os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE").to_bytes(1, "little")
            changed[6][termios.VEOL] = _CTRL_C
            termios.tcsetattr(sys.stdin, termios.TCSANOW, changed)
        return self

    def __exit__(self, *error: object) -> None:
        if self._settings is not None:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._settings)
        signal.signal(signal.SIGINT, self._handler)

    def read_line(self, prompt: str) -> str | None:
        """The next line without its end; None at the end of the input. ``prompt`` is shown on a terminal only."""
        self._pressed = False
        if self._early_lines:
            return self._early_lines.pop(0)
        while True:
            self._in_prompt = True
            try:
                if not self.is_terminal:
                    line = sys.stdin.readline()
                    line, self._at_start = line.removeprefix("\ufeff") if self._at_start else line, False
                    return line.rstrip("\r\n") if line else None
                line = input(prompt)
                if _CTRL_C.decode() not in line:
                    return line
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                if not self.is_terminal:
                    return None
                print("\n(Ctrl-D or /quit leaves)")
            finally:
                self._in_prompt = False

    def interrupted(self) -> bool:
        """True once Ctrl-C was pressed since the last ``read_line``; lines typed meanwhile are kept as next lines."""
        if self._as_character and select.select([sys.stdin], [], [], 0)[0]:
            typed = os.read(sys.stdin.fileno(), 65536)
            self._pressed |= typed.endswith(_CTRL_C)
            with contextlib.suppress(UnicodeDecodeError):
                self._early_lines += [typed.decode().rstrip("\r\n")] if typed.endswith(b"\n") else []
        return self._pressed

    def _on_signal(self, *_: object) -> None:
        if self._in_prompt:
            raise KeyboardInterrupt
        self._pressed = True
