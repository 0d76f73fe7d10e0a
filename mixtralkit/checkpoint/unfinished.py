"""Files on the way into a folder: what a stopped call leaves there, the same call goes on with."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from pathlib import Path


class Unfinished:
    """A hidden folder beside where its files go, and the tensors that are whole in them.

    Attributes:
        path: where the files are made.
        goes_on: whether an earlier call has left some.
    """

    def __init__(self, folder: Path, call: str | None) -> None:
        """``call`` tells calls that write the same bytes from others; None goes on with no other, nor is gone on with.

        Raises:
            ValueError: another process writes there; something that no call has made is in the way.
        """
        self.path = folder / ".partial"
        self._call, self._done = self.path / "call", self.path / "done"
        is_new = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        if self.path.is_symlink() or not (is_new or self._call.is_file()):
            raise ValueError(f"{self.path}: is in the way, and no conversion's; move it elsewhere")
        key = "" if call is None else hashlib.sha256(call.encode()).hexdigest()
        found = None
        if self._call.is_file():
            self._hold(folder)
            found = self._call.read_text()
        if not key or found != key:
            self.discard()
            self.path.mkdir()
            self._call.write_text(key)
            self._hold(folder)
        lines = self._done.read_text().splitlines() if self._done.is_file() else []
        self._whole, self.goes_on = set(lines), bool(lines)

    def _hold(self, folder: Path) -> None:
        self._held = open(self._call)  # noqa: SIM115
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process writes a checkpoint there") from None

    def has(self, file: str, tensor: str) -> bool:
        """Whether a tensor is whole in a file."""
        return f"{file}\t{tensor}" in self._whole

    def add(self, file: str, tensor: str) -> None:
        """A tensor is whole, and on the disk."""
        with open(self._done, "a", encoding="utf-8") as done:
            done.write(f"{file}\t{tensor}\n")

    def forget(self) -> None:
        """Files are changed again: a call that is stopped from here on starts anew."""
        self._done.unlink(missing_ok=True)
        self._call.write_text("")

    def finish(self) -> list[Path]:
        """The files, all of them whole, to be moved away."""
        self.forget()
        return sorted(set(self.path.iterdir()) - {self._call})

    def discard(self) -> None:
        """Takes all away."""
        shutil.rmtree(self.path, ignore_errors=True)
