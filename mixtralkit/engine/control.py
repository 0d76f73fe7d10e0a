"""Rank 0's messages to the other ranks, over the CPU: a step ahead of the device, which nobody waits for."""

from __future__ import annotations

import msgspec
import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext, RankFailed
from mixtralkit.engine.step_plan import Message

ROOM = 16 << 10  # bytes of a message that take one broadcast


class Control:
    """Collective: every rank makes one, and receives what rank 0 sends, in order."""

    def __init__(self, context: RankContext) -> None:
        self.context, self._group = context, context.group
        if context.group is not None and context.device.type == "cuda":
            self._group = dist.new_group(backend="gloo")
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

    def _wait(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            try:
                sent[0].wait()
            except RuntimeError as error:
                raise RankFailed(f"a rank has gone: {error}") from None
