"""A folder's chat template, rendered in a process of its own: it is code from outside, which may loop for ever.

Jinja's sandbox keeps templates from files and from Python's inside, and not from time and memory. The process is told
to die beyond both; it is started with the first dialog and serves all that follow.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_S, MOST_BYTES = 1.0, 1 << 29  # of computing for one dialog; of memory
MOST_GROWTH, MOST_ADDED = 20, 1_000_000  # a text has so many times the dialog's characters, and so many more


class Renderer:
    """Templates and their values to texts; threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """The text; ValueError with what the template raises, or which limit it met."""
        with self._lock:
            answer = self._ask(json.dumps([template, values], default=str).encode() + b"\n")
        if not answer:
            raise ValueError(f"takes more than {MOST_S:g} s of computing or {MOST_BYTES >> 20} MB for a dialog")
        text, error = json.loads(answer)
        if error is not None:
            raise ValueError(error)
        return text

    def _ask(self, question: bytes) -> bytes:
        """A line for a line; nothing where the process died of it."""
        if self._process is None:
            program = f"import sys; sys.path[:] = {sys.path!r}; from mixtralkit.engine.template import serve; serve()"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen([sys.executable, "-c", program], **pipes)
        answer = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(question)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
        finally:
            if not answer:  # also on Ctrl-C: what came later would be taken for the next answer
                self._process.kill()
                self._process.communicate()
                self._process = None
        return answer


def serve() -> None:
    """Answers on standard output what comes on standard input, until that ends or a limit is met."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MOST_S)  # whose signal ends the process, also inside one long operation
        answer = json.dumps(_answer(line)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


def _answer(line: bytes) -> tuple[str | None, str | None]:
    """Text and error, one of them None."""
    template, values = json.loads(line)
    most = MOST_GROWTH * len(line) + MOST_ADDED
    try:
        text = _compiled(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        return None, f"line {error.lineno}: {error.message}"
    except MemoryError:
        return None, f"takes more than {MOST_BYTES >> 20} MB for a dialog"
    except Exception as error:  # a template may raise anything
        return None, " ".join(str(error).split()) or type(error).__name__
    return (text, None) if len(text) <= most else (None, f"writes {len(text):,} characters for a dialog")


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """The template in transformers' environment: a sandbox with its filters and functions."""

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks an assistant's text for training; it changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
                sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=lambda format: datetime.now().strftime(format)
    )
    return environment.from_string(template)
