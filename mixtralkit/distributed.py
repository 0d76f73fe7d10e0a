"""Ranks: groups, devices, start and stop. The only reader of ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mixtralkit.config.ranks import environ_int


class RankFailed(RuntimeError):
    """Another rank reported an error, so this one stops too."""


@dataclass(frozen=True)
class SymmetricMemory:
    """Memory of one shape on every rank of a host, which kernels of all of them read and write.

    ``own`` is this rank's; ``addresses_W`` are all ranks' as this one's kernels see them. ``handle`` keeps the others'
    mapped.
    """

    own: torch.Tensor
    rank: int
    addresses_W: tuple[int, ...]
    handle: Any = None

    def of_rank(self, rank: int) -> torch.Tensor:
        """That rank's memory, for this one's copies."""
        offset = self.own.data_ptr() - self.handle.buffer_ptrs[self.rank]
        return self.handle.get_buffer(rank, self.own.shape, self.own.dtype, offset // self.own.element_size())

    def meet(self) -> None:
        """What follows on any rank's stream comes after what every rank has put on its own so far. Collective."""
        self.handle.barrier()


@dataclass(frozen=True)
class RankContext:
    """Who this rank is and how it talks to the others.

    ``group`` is fairscale's model-parallel group over all ranks, or None when there is one rank: then every method
    here is the identity and nothing of ``torch.distributed`` is touched.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    owns_process_group: bool = False

    @classmethod
    def start(
        cls,
        device: str | None = None,
        environ: Mapping[str, str] | None = None,
        timeout_s: float = 1800.0,
    ) -> RankContext:
        """Joins the ranks that ``torchrun`` started, or stays alone without it.

        Args:
            device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or None for CUDA where there is one. Each rank takes the GPU
                of its ``LOCAL_RANK``.
            environ: read instead of ``os.environ``.
            timeout_s: seconds after which a collective that nobody answers fails.
        """
        environ = os.environ if environ is None else environ
        rank, world_size, local_rank = (
            environ_int(environ, name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        torch_device = _choose_device(device, local_rank, world_size)
        if torch_device.type == "cuda":
            torch.cuda.set_device(torch_device)
        if world_size == 1:
            return cls(rank=0, world_size=1, device=torch_device)
        if torch_device.type == "cpu" and "OMP_NUM_THREADS" not in environ:
            torch.set_num_threads(threads_of_rank(environ_int(environ, "LOCAL_WORLD_SIZE", world_size)))
        owns = not dist.is_initialized()
        if owns:
            backend = "nccl" if torch_device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
        return cls(rank, world_size, torch_device, _model_parallel_group(world_size), owns)

    def stop(self) -> None:
        """Leaves the group; the last thing a rank does with this context."""
        if self.owns_process_group and dist.is_initialized():
            from fairscale.nn.model_parallel import initialize as fairscale_groups

            fairscale_groups.destroy_model_parallel()
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """True on the rank that prints, draws progress and writes files."""
        return self.rank == 0

    def split_nodes(self, ranks_per_node: int) -> tuple[RankContext, RankContext]:
        """Contexts (across, inside): the ranks with this one's place in every node, and the ranks of its node.

        In each, ``rank`` and ``world_size`` count within the group. Collective; ``ranks_per_node`` must divide the
        world size.
        """
        nodes = self.world_size // ranks_per_node
        across = [[node * ranks_per_node + place for node in range(nodes)] for place in range(ranks_per_node)]
        inside = [[node * ranks_per_node + place for place in range(ranks_per_node)] for node in range(nodes)]
        return self._member_of(across), self._member_of(inside)

    def _member_of(self, parts: list[list[int]]) -> RankContext:
        groups = [dist.new_group(ranks) if len(ranks) > 1 else None for ranks in parts]
        mine = next(i for i, ranks in enumerate(parts) if self.rank in ranks)
        return RankContext(parts[mine].index(self.rank), len(parts[mine]), self.device, groups[mine])

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums ``x`` over the ranks, in place; returns it."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Stacks every rank's ``x`` of one shape: [W, *x.shape], in rank order."""
        if self.group is None:
            return x.unsqueeze(0)
        out = x.new_empty((self.world_size, *x.shape))
        # torch 2.13 renamed it and warns at the old name
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Every rank's small picklable ``value``, in rank order; synchronises host and device."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable ``value`` on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        self.all_gather_objects(None)

    def symmetric_memory(self, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> SymmetricMemory | None:
        """Memory that the kernels of every rank can write, filled with ``fill``; None where GPUs do not reach it.

        Collective, and every rank gets memory or none does. Takes torch's symmetric memory without multicast.
        """
        if self.group is None:
            return None
        memory = self._map_symmetric(shape, dtype, fill) if self.gpus_reach_each_other() else None
        return memory if all(self.all_gather_objects(memory is not None)) else None

    def gpus_reach_each_other(self) -> bool:
        """Whether all ranks are GPUs of one host that write each other's memory. Collective."""
        if self.device.type != "cuda":
            return False
        places = self.all_gather_objects((socket.gethostname(), self.device.index))
        reached = len({host for host, _ in places}) == 1 and all(self._writes_to(index) for _, index in places)
        return all(self.all_gather_objects(reached))

    def _writes_to(self, index: int) -> bool:
        here = self.device.index
        # a GPU that this process does not see may still be mapped, which only trying tells
        return index == here or index >= torch.cuda.device_count() or torch.cuda.can_device_access_peer(here, index)

    def _map_symmetric(self, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> SymmetricMemory | None:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used here, and some hosts have none
        from torch.distributed import _symmetric_memory as symmetric_memory

        try:
            own = symmetric_memory.empty(shape, dtype=dtype, device=self.device).fill_(fill)
            torch.cuda.synchronize(self.device)  # filled before any rank knows the address
            handle = symmetric_memory.rendezvous(own, self.group)
        except RuntimeError:
            return None
        offset = own.data_ptr() - handle.buffer_ptrs[self.rank]  # in its allocation, the same on every rank
        return SymmetricMemory(own, self.rank, tuple(address + offset for address in handle.buffer_ptrs), handle)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Ends a block that may fail on some ranks alike on all of them.

        No collective may run inside the block. A rank whose block raised re-raises it; the others raise
        ``RankFailed`` with the first such rank's words, so that none waits in the next collective.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        reports = self.all_gather_objects(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, report in enumerate(reports):
            if report is not None:
                raise RankFailed(f"rank {rank}: {report}")


def threads_of_rank(local_ranks: int) -> int:
    """This rank's share of the cores that its machine's ranks may use, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks)


def _choose_device(device: str | None, local_rank: int, world_size: int) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device ({device!r}) must be 'cpu', 'cuda' or 'cuda:N'") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise ValueError(f"device ({device!r}) must be 'cpu', 'cuda' or 'cuda:N'")
    if not torch.cuda.is_available():
        raise ValueError(f"device ({device!r}) needs a CUDA GPU and a CUDA build of torch; this torch sees none")
    index = local_rank if chosen.index is None or world_size > 1 else chosen.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device: rank needs GPU {index}, but this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def _model_parallel_group(world_size: int) -> dist.ProcessGroup:
    from fairscale.nn.model_parallel import initialize as fairscale_groups

    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces itself on stdout
            fairscale_groups.initialize_model_parallel(world_size)
    return fairscale_groups.get_model_parallel_group()
