"""Every rank hears from rank 0 and it from them, so that none waits for one that is dead or stopped.

A connection that breaks is a process that ended; one that says nothing for ``timeout_s`` belongs to a process that is
stopped, or to a machine that is gone. A silent process of the same machine is killed: a stopped one would never end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mixtralkit.config.ranks import main_address
from mixtralkit.distributed import RankContext

_BEATS = 10  # within the time after which a rank is taken for dead
_GOODBYE = "goodbye"
_JOIN_S = 60.0


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int
    host: str
    pid: int
    link: socket.socket
    heard_s: float = field(default_factory=time.monotonic)
    said: str = ""  # what of its last line has come
    last_line: str = ""


class RankWatch:
    """Watches until it is stopped.

    Args:
        on_dead: called once, in the watch's thread, with one sentence.
        says: a line that goes with each beat, which must not wait for anything.
    """

    def __init__(
        self, peers: list[_Peer], timeout_s: float, on_dead: Callable[[str], None], says: Callable[[], str]
    ) -> None:
        self._timeout_s, self._on_dead, self._says = timeout_s, on_dead, says
        self._peers = {peer.link: peer for peer in peers}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls, context: RankContext, timeout_s: float, on_dead: Callable[[str], None], says: Callable[[], str] = str
    ) -> RankWatch | None:
        """Connects the ranks; None for a single one. Collective."""
        if context.world_size == 1:
            return None
        own = socket.gethostname()
        is_one_host = len(set(context.all_gather_objects(own))) == 1
        address = "127.0.0.1" if is_one_host else main_address()
        listener = token = None
        with context.agreed():
            if context.is_first:
                listener = socket.create_server(("127.0.0.1" if is_one_host else "", 0), backlog=context.world_size)
                token = secrets.token_hex(16)
        port, token = context.broadcast_object((listener and listener.getsockname()[1], token))
        with context.agreed():
            if context.is_first:
                peers = _accept(listener, token, context.world_size - 1)
                listener.close()
            else:
                link = socket.create_connection((address, port), timeout=_JOIN_S)
                link.sendall(f"{token} {context.rank} {os.getpid()} {own}\n".encode())
                host, pid = _line(link).split()
                peers = [_Peer(0, host, int(pid), link)]
        return cls(peers, timeout_s, on_dead, says)

    @property
    def lines(self) -> list[str]:
        """The last that each other rank said."""
        return [peer.last_line for peer in list(self._peers.values())]

    def stop(self) -> None:
        """Says goodbye."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        for link in self._peers:
            link.settimeout(self._timeout_s)
        beat_s, beaten_s = self._timeout_s / _BEATS, 0.0
        while not self._stopping.is_set() and self._peers:
            ready, _, _ = select.select(list(self._peers), [], [], beat_s)
            for link in ready:
                if not self._hear(self._peers[link]):
                    self._on_dead(f"rank {self._peers[link].rank} ended (killed or crashed)")
                    return
                if self._peers[link].last_line == _GOODBYE:
                    del self._peers[link]
            now = time.monotonic()
            silent = next((peer for peer in self._peers.values() if now - peer.heard_s > self._timeout_s), None)
            if silent is not None:
                if silent.host == socket.gethostname():
                    with contextlib.suppress(OSError):
                        os.kill(silent.pid, signal.SIGKILL)
                self._on_dead(f"rank {silent.rank} has said nothing for {self._timeout_s:g} s")
                return
            if now - beaten_s >= beat_s:
                self._say(self._says())
                beaten_s = now
        self._say(_GOODBYE)
        for link in self._peers:
            link.close()

    def _say(self, line: str) -> None:
        for link in self._peers:
            with contextlib.suppress(OSError):  # heard of when it is next listened to
                link.sendall(f"{line}\n".encode())

    def _hear(self, peer: _Peer) -> bool:
        """Takes what a rank says; whether it is still there."""
        try:
            data = peer.link.recv(1 << 16)
        except OSError:
            return False
        *lines, peer.said = (peer.said + data.decode()).split("\n")
        if lines:
            peer.heard_s, peer.last_line = time.monotonic(), lines[-1]
        return data != b""


def _accept(listener: socket.socket, token: str, count: int) -> list[_Peer]:
    """The connections of ``count`` ranks that know the token."""
    peers, until = [], time.monotonic() + _JOIN_S
    while len(peers) < count:
        listener.settimeout(max(0.01, until - time.monotonic()))
        link, _ = listener.accept()
        link.settimeout(_JOIN_S)
        said = _line(link).split()
        if len(said) != 4 or not secrets.compare_digest(said[0], token):
            link.close()
            continue
        link.sendall(f"{socket.gethostname()} {os.getpid()}\n".encode())
        peers.append(_Peer(int(said[1]), said[3], int(said[2]), link))
    return peers


def _line(link: socket.socket) -> str:
    said = b""
    while not said.endswith(b"\n") and len(said) < 1024 and (more := link.recv(1)):
        said += more
    return said.decode("utf-8", "replace")
