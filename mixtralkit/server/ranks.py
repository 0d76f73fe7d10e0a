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
_ALIVE, _GOODBYE = b".", b"!"
_JOIN_S = 60.0


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int
    host: str
    pid: int
    link: socket.socket
    heard_s: float = field(default_factory=time.monotonic)


class RankWatch:
    """Watches until it is stopped.

    Args:
        on_dead: called once, in the watch's thread, with one sentence.
    """

    def __init__(self, rank: int, peers: list[_Peer], timeout_s: float, on_dead: Callable[[str], None]) -> None:
        self.rank, self._timeout_s, self._on_dead = rank, timeout_s, on_dead
        self._peers = {peer.link: peer for peer in peers}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, context: RankContext, timeout_s: float, on_dead: Callable[[str], None]) -> RankWatch | None:
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
        return cls(context.rank, peers, timeout_s, on_dead)

    def stop(self) -> None:
        """Says goodbye."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        own = socket.gethostname()
        for link in self._peers:
            link.setblocking(False)
        while not self._stopping.wait(0) and self._peers:
            ready, _, _ = select.select(list(self._peers), [], [], self._timeout_s / _BEATS)
            now = time.monotonic()
            for peer in list(self._peers.values()):
                said = self._hear(peer) if peer.link in ready else None
                if said == b"":
                    self._on_dead(f"rank {peer.rank} ended (killed or crashed)")
                    return
                if said:
                    peer.heard_s = now
                    if said.endswith(_GOODBYE):
                        del self._peers[peer.link]
                        continue
                if now - peer.heard_s > self._timeout_s:
                    if peer.host == own:
                        with contextlib.suppress(OSError):
                            os.kill(peer.pid, signal.SIGKILL)
                    self._on_dead(f"rank {peer.rank} has said nothing for {self._timeout_s:g} s")
                    return
                with contextlib.suppress(OSError):  # heard of when it is next listened to
                    peer.link.send(_ALIVE)
            # a rank that writes much wakes nobody more often than that
            self._stopping.wait(self._timeout_s / _BEATS / 2)
        for link in self._peers:
            with contextlib.suppress(OSError):
                link.send(_GOODBYE)
            link.close()

    def _hear(self, peer: _Peer) -> bytes | None:
        try:
            return peer.link.recv(4096)
        except BlockingIOError:
            return None
        except OSError:
            return b""


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
