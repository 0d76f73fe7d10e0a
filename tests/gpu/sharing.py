"""Collectives of ranks that share a GPU, which NCCL refuses: by gloo on the host, in CUDA graphs by peer memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mixtralkit.distributed import RankContext

STAGED = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "all_to_all_single", "broadcast", "send", "recv")
GRAPH_BYTES = 2**20  # that a rank may give to a gather in a graph


def share_collectives(context: RankContext) -> None:
    """Replaces what the package calls of ``torch.distributed``, in this process, for good. Collective."""
    gather = GraphGather(context)
    for name in STAGED:
        if hasattr(dist, name):  # torch 2.13 has a new name for one
            setattr(dist, name, _staged(getattr(dist, name), gather))
    dist.batch_isend_irecv = _staged_batch(dist.batch_isend_irecv)


class GraphGather:
    """An all-gather that a CUDA graph can hold: every rank copies the others' bytes between two barriers."""

    def __init__(self, context: RankContext) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        # not by ``symmetric_memory``, which says None where this says why ranks of one GPU have no memory in common
        self.own = symmetric_memory.empty((GRAPH_BYTES,), dtype=torch.uint8, device=context.device)
        self.handle = symmetric_memory.rendezvous(self.own, context.group)
        offset = self.own.data_ptr() - self.handle.buffer_ptrs[context.rank]
        self.all_W = [
            self.handle.get_buffer(rank, (GRAPH_BYTES,), torch.uint8, offset) for rank in range(context.world_size)
        ]

    def __call__(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """``out`` = the ranks' ``x`` one after the other; both flat, of one dtype."""
        count = x.nbytes
        assert count <= GRAPH_BYTES
        self.own[:count].copy_(x.view(torch.uint8))
        self.handle.barrier(0)
        for part, theirs in zip(out.view(torch.uint8).chunk(len(self.all_W)), self.all_W, strict=True):
            part.copy_(theirs[:count])
        self.handle.barrier(1)  # before anyone's next bytes


def _staged(function: Callable[..., Any], gather: GraphGather) -> Callable[..., Any]:
    """``function`` on copies in the host's memory, which return to its CUDA tensors. Waits for the device."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in given):
            return function(*given, **named)
        assert not named.get("async_op")
        if torch.cuda.is_current_stream_capturing():
            assert function.__name__.startswith("all_gather"), f"{function.__name__} in a graph"
            return gather(*given)
        hosts = [x.cpu() if isinstance(x, torch.Tensor) else x for x in given]
        result = function(*hosts, **named)
        for x, host in zip(given, hosts, strict=True):
            if x is not host:
                x.copy_(host)
        return result

    return call


class _Arrivals:
    """The end of a batch of sends and receives."""

    def __init__(self, works: list[dist.Work], arriving: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.works, self.arriving = works, arriving

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for x, host in self.arriving:
            x.copy_(host)


def _staged_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """``batch_isend_irecv`` on copies in the host's memory, which return to the CUDA tensors that receive."""

    @functools.wraps(function)
    def call(operations: list[dist.P2POp]) -> list[_Arrivals]:
        hosts = [operation.tensor.cpu() for operation in operations]
        pairs = list(zip(operations, hosts, strict=True))
        works = function([dist.P2POp(o.op, host, o.peer, o.group, o.tag) for o, host in pairs])
        return [_Arrivals(works, [(o.tensor, host) for o, host in pairs if o.op is dist.irecv])]

    return call
