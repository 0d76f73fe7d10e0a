"""Rank 0's messages to the other ranks, over the CPU: a step ahead of the device, which nobody waits for."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext, RankFailed
from mixtralkit.engine.flight import Flight
from mixtralkit.engine.step_plan import Message

ROOM = 16 << 10  # bytes of a message that take one broadcast
LOOK_S = 0.5  # between two looks at the other ranks while a step does not end


class Control:
    """Collective: every rank makes one, and receives what rank 0 sends, in order."""

    def __init__(self, context: RankContext) -> None:
        self.context, self._group = context, context.group
        if context.group is not None and context.device.type == "cuda":
            self._group = dist.new_group(backend="gloo")
        places = context.all_gather_objects((socket.gethostname(), os.getpid()))
        self._here = {rank: pid for rank, (host, pid) in enumerate(places) if host == places[context.rank][0]}
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)
        self._sent: tuple[dist.Work, torch.Tensor] | None = None

    def send(self, message: Message) -> None:
        """Returns when the message before this one is with all ranks.

        Raises:
            RankFailed: a rank has gone.
        """
        if self._group is None:
            return
        data = self._encoder.encode(message)
        buffer = torch.zeros(max(ROOM, 8 + len(data)), dtype=torch.uint8)
        buffer[:8].view(torch.int64)[0] = len(data)
        buffer[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._wait()
        try:
            work = dist.broadcast(buffer[:ROOM], group_src=0, group=self._group, async_op=True)
            if len(buffer) > ROOM:
                work.wait()
                work = dist.broadcast(buffer[ROOM:], group_src=0, group=self._group, async_op=True)
        except RuntimeError as error:
            raise RankFailed(f"a rank has gone: {error}") from None
        self._sent = (work, buffer)

    def receive(self) -> Message:
        """The next message.

        Raises:
            RankFailed: rank 0 has gone, or says that it failed.
        """
        buffer = torch.empty(ROOM, dtype=torch.uint8)
        try:
            dist.broadcast(buffer, group_src=0, group=self._group)
            size = 8 + int(buffer[:8].view(torch.int64)[0])
            if size > ROOM:
                rest = torch.empty(size - ROOM, dtype=torch.uint8)
                dist.broadcast(rest, group_src=0, group=self._group)
                buffer = torch.cat([buffer, rest])
        except RuntimeError as error:
            raise RankFailed(f"rank 0 has gone: {error}") from None
        message = self._decoder.decode(buffer[8:size].numpy())
        if message.failed is not None:
            raise RankFailed(f"rank 0: {message.failed}")
        return message

    def wait_for(self, flight: Flight) -> None:
        """Waits for a step of all ranks, which never ends when one of them is gone.

        Raises:
            RankFailed: a rank of this host is gone.
        """
        if self._group is None or not flight.is_running:
            return
        looked = time.monotonic()
        while flight.is_running:
            time.sleep(1e-4)
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                for rank, pid in self._here.items():
                    if not _is_alive(pid):
                        raise RankFailed(f"rank {rank} has gone")

    def _wait(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            try:
                sent[0].wait()
            except RuntimeError as error:
                raise RankFailed(f"a rank has gone: {error}") from None


def _is_alive(pid: int) -> bool:
    """Whether a process of this host runs; one that has ended and that nobody has asked about does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except OSError:
        return True
