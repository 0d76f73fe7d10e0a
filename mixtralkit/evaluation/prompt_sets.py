"""Prompt files and result files: read strictly, written line by line, continued after a stop."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mixtralkit.engine.chat import check_messages
from mixtralkit.json_file import check_ordinary, shown

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_OWN_KEYS = ("id", "prompt", "messages", "max_gen_len", "choices", "answer", "target")


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a set.

    Attributes:
        id: from the file, else its place in the file, counted from 0.
        prompt: a text, or a list of chat messages.
        is_text: it is a text to be scored, not to be continued.
        max_gen_len: tokens to generate, where the file says so.
        choices, answer, target: for scoring; kept as they are.
        more: every other key of the line.
        line: where it stands in its file, from 1, for errors.
    """

    id: int | str
    prompt: str | list[dict[str, str]]
    max_gen_len: int | None = None
    choices: list[str] | None = None
    answer: Any = None
    target: Any = None
    more: Mapping[str, Any] = field(default_factory=dict)
    is_text: bool = False
    line: int | None = field(default=None, compare=False)

    @property
    def prompt_key(self) -> str:
        """The key that the prompt has in files: ``prompt``, ``messages`` or ``text``."""
        return "text" if self.is_text else "prompt" if isinstance(self.prompt, str) else "messages"


def read_prompts(path: str | Path, ranks: int = 1) -> list[PromptRecord]:
    """Reads ``.jsonl`` (an object a line) or ``.txt`` (a prompt a line); ValueError names file and line.

    A pipe is read to its end, where only one of ``ranks`` reads.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{path}: a prompts file ends in .jsonl or .txt")
    if ranks > 1:
        check_ordinary(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    records: list[PromptRecord] = []
    lines_of: dict[int | str, int] = {}
    for number, raw in enumerate(lines, 1):
        if path.suffix == ".jsonl" and not raw.strip():
            continue
        try:
            record = _record(_text(raw), len(records), number, path.suffix == ".jsonl")
            if record.id in lines_of:
                raise ValueError(f"id {record.id!r} is already that of line {lines_of[record.id]}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        lines_of[record.id] = number
        records.append(record)
    if not records:
        raise ValueError(f"{path}: has no prompts")
    return records


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x})") from None


def _record(line: str, index: int, number: int, is_json: bool) -> PromptRecord:
    if not is_json:
        if not line.strip():
            raise ValueError("the prompt is empty")
        return PromptRecord(index, line, line=number)
    try:
        content = json.loads(line, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError("not JSON (nested too deep)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, not {type(content).__name__}")
    keys = [key for key in ("prompt", "messages") if key in content] or [key for key in ("text",) if key in content]
    if len(keys) != 1:
        raise ValueError("must have either prompt or messages, or a text to be scored")
    record = PromptRecord(
        id=content.get("id", index),
        prompt=content[keys[0]],
        is_text=keys == ["text"],
        line=number,
        more={key: value for key, value in content.items() if key not in (*_OWN_KEYS, keys[0])},
        **{key: content[key] for key in ("max_gen_len", "choices", "answer", "target") if key in content},
    )
    _check(record, keys[0])
    return record


def _not_finite(text: str) -> float:
    raise ValueError(f"not JSON (the number {text} is not finite)")


def _check(record: PromptRecord, key: str) -> None:
    if isinstance(record.id, bool) or not isinstance(record.id, int | str):
        raise ValueError(f"id ({record.id!r}) must be a text or a whole number")
    if key == "messages":
        check_messages(record.prompt)
    elif not isinstance(record.prompt, str):
        raise ValueError(f"{key} must be a text, not {type(record.prompt).__name__}")
    elif not record.prompt:
        raise ValueError(f"the {key} is empty")
    length = record.max_gen_len
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < 2**31):
        raise ValueError(f"max_gen_len ({shown(length)}) must be a whole number of at least 0 and below 2^31")


class ResultsWriter:
    """Writes results in the order of the prompts, each line as soon as all before it are there.

    A file that already holds the results of the first prompts is continued: ``done`` says how many. What a stop left
    of a line is cut off with the first result; nothing is written before it. Every line goes to the operating system at
    once, so a killed run leaves whole lines. The file is locked while it is open: a rank that outlived its killed
    launcher may still be writing.
    """

    def __init__(self, path: str | Path, records: Sequence[PromptRecord]) -> None:
        self.path, self._records = Path(path), records
        self._held: dict[int, dict[str, Any]] = {}
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            self._lock()
            self.done, self._end = self._existing()
            self._is_cut = False
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def add(self, index: int, result: Mapping[str, Any]) -> None:
        """Takes the result of prompt ``index``: its keys beside ``id`` and the prompt's; the record's own keys follow.

        OSError, one sentence, when it cannot be written; the lines before it stay.
        """
        record = self._records[index]
        kept = {k: getattr(record, k) for k in ("choices", "answer", "target") if getattr(record, k) is not None}
        more = {k: value for k, value in {**kept, **record.more}.items() if k not in result}
        self._held[index] = {"id": record.id, record.prompt_key: record.prompt, **result, **more}
        while self.done in self._held:
            line = json.dumps(self._held.pop(self.done), ensure_ascii=False)
            self._write(line.encode("utf-8", "backslashreplace") + b"\n")
            self.done += 1

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, data: bytes) -> None:
        if not self._is_cut:
            self._cut()
            self._is_cut = True
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            self._cut()
            raise OSError(
                f"{self.path}: result {self.done} could not be written ({error.strerror}); {self.done} results are kept"
            ) from None
        self._end += len(data)

    def _lock(self) -> None:
        """ValueError where another process writes the file; nothing where the system or its disk has no locks."""
        if fcntl is None or not stat.S_ISREG(os.fstat(self._file).st_mode):
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another process is writing it, perhaps a rank of a run that was killed; wait or end it"
            ) from None
        except OSError:
            return

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # a pipe or a device has no end to cut at
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)

    def _existing(self) -> tuple[int, int]:
        """(results, bytes) of the whole lines that are there; ValueError if they are not these prompts'."""
        done = end = 0
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            return done, end
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._match(done, line)
                done, end = done + 1, end + len(line)
        return done, end

    def _match(self, done: int, line: bytes) -> None:
        try:
            found = json.loads(line)["id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            found = None
        wanted = self._records[done].id if done < len(self._records) else None
        if found is None or found != wanted:
            expected = f"the result of prompt {wanted!r} belongs there" if wanted is not None else "no prompt is left"
            raise ValueError(
                f"{self.path}, line {done + 1}: is not a result of these prompts ({expected}); "
                "name another output file, or remove this one"
            )
