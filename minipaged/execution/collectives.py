"""What ranks compute together: sums and exchanges of tensors, on CPUs through gloo, on GPUs through peers' memory or NCCL.

The only module that calls torch.distributed on tensors. Sums are added in the order of the ranks, so every rank has the same bits: the
ranks go on to draw the same tokens, each for itself.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

# On two H200, in a graph: one shot 9.4 us at 256 KB and 11.3 at 512, two shots 10.2 and 11.1 with a copy to the buffer and one back.
ONE_SHOT_BYTES = 256 * 1024
BUFFER_BYTES = 16 * 2**20  # of each rank, which the others read; NCCL does what is larger
MOST_LEAVING = 4  # tensors on their way to the next stage
PEER_DTYPES = (torch.bfloat16, torch.float32)  # that torch's peer-to-peer kernels can add
ALIGNED_BYTES = 16


class GlooCollectives:
    """Ranks on CPUs. Sums gather first, so that the order of adding is fixed. group: theirs, None for all ranks."""

    def __init__(self, rank: int, ranks: int, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.ranks, self._group = rank, ranks, group

    def all_reduce(self, x: Tensor) -> Tensor:
        gathered = self.all_gather(x)
        total = gathered[0]
        for other in gathered[1:]:
            total.add_(other)
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.ranks, *x.shape))
        # As bytes: gloo does not know every dtype.
        parts = [part.view(-1).view(torch.uint8) for part in gathered]
        dist.all_gather(parts, x.contiguous().view(-1).view(torch.uint8), group=self._group)
        return gathered

    def exchange(self, x: Tensor) -> Tensor:
        return self.all_gather(x)


class CudaCollectives:
    """Ranks on the GPUs of one host that reach each other's memory, by torch's kernels; NCCL where they don't, and for large tensors.

    A peer-to-peer sum takes a buffer that all ranks have mapped: it copies the tensor there, waits for the others at a barrier on the
    device and reads theirs. Graphs may hold all of it. NVLink's multicast is never used.
    """

    def __init__(self, rank: int, ranks: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self._ranks = group or _all_ranks()
        self._group = self._ranks.group_name
        self._buffer = _peer_buffer(device, self._ranks)
        # NCCL makes its connections at its first call, which must not be in a capture.
        self.nccl(torch.zeros(1, device=device))

    @property
    def reaches_peers(self) -> bool:
        """Whether sums go through peers' memory; else NCCL does them all."""
        return self._buffer is not None

    def all_reduce(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        unit = ALIGNED_BYTES * self.ranks  # two shots cut the tensor into one piece a rank
        if self._buffer is None or x.dtype not in PEER_DTYPES or size > BUFFER_BYTES or size % unit or not size:
            return self.nccl(x)
        return self.one_shot(x) if size <= ONE_SHOT_BYTES else self.two_shot(x)

    def one_shot(self, x: Tensor) -> Tensor:
        """Every rank reads all of every other's: one barrier before, one after. A new tensor."""
        summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(self._shared(x), x.view(-1), "sum", self._group)
        return summed.view(x.shape)

    def two_shot(self, x: Tensor) -> Tensor:
        """Every rank sums its piece, then reads the others' sums. The sum lies in the buffer: it is good until the next one, into which it
        may go as it lies there.
        """
        shared = self._shared(x).view(x.shape)
        if shared.data_ptr() != x.data_ptr():
            shared.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._group)
        return shared

    def nccl(self, x: Tensor) -> Tensor:
        """By NCCL. Changes x."""
        dist.all_reduce(x, group=self._ranks)
        return x

    def _shared(self, x: Tensor) -> Tensor:
        """As many of the buffer's first elements as x has."""
        if self._buffer is None:
            raise RuntimeError("this GPU cannot reach its peers' memory")
        return self._buffer[: x.numel() * x.element_size()].view(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.ranks, *x.shape))
        dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=self._ranks)
        return gathered

    def exchange(self, x: Tensor) -> Tensor:
        """A sum in which every number has one rank that adds something: exact, and a graph can hold it."""
        pieces = x.new_zeros((self.ranks, -(-x.numel() // 4) * 4))  # padded to what a peer-to-peer sum takes
        pieces[self.rank, : x.numel()] = x.reshape(-1)
        return self.all_reduce(pieces)[:, : x.numel()].view(self.ranks, *x.shape)


class Pipe:
    """A stage's ends to the stages before and after it: hidden states come in, and go out. Each rank has its own pair.

    before, after: the ranks at the other ends; None where there is no such stage. Stages run plans in the same order, so what is
    received is what is due.
    """

    def __init__(
        self, before: int | None, after: int | None, dtype: torch.dtype, size: int, device: torch.device
    ) -> None:
        self.before, self.after = before, after
        self._dtype, self._size, self._device = dtype, size, device
        self._leaving: deque[tuple[dist.Work | None, Tensor]] = deque()

    def receive(self, num_tokens: int) -> Tensor:
        """Hidden states of the stage before, [num_tokens, hidden_size]."""
        hidden = torch.empty((num_tokens, self._size), dtype=self._dtype, device=self._device)
        dist.recv(_sendable(hidden), self.before)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Give hidden states to the stage after; it may take them later."""
        # On a CPU the stage after may be at an earlier step: this one goes on, and waits when too much is under way.
        while len(self._leaving) > MOST_LEAVING:
            work, _ = self._leaving.popleft()
            if work is not None:
                work.wait()
        hidden = hidden.clone()
        self._leaving.append((dist.isend(_sendable(hidden), self.after), hidden))


def _sendable(x: Tensor) -> Tensor:
    """The same memory in a type that gloo and NCCL both know."""
    return x.view(-1).view(torch.uint8)


def _all_ranks() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("the ranks have not been joined")
    return group


def _peer_buffer(device: torch.device, group: dist.ProcessGroup) -> Tensor | None:
    """A buffer that every rank of the group has mapped; None where one of them cannot reach a peer's memory."""
    import torch.distributed._symmetric_memory as symmetric

    try:
        buffer = symmetric.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, group)
    except RuntimeError:
        buffer = None
    # All or none: a rank that went on by NCCL would wait for those that did not.
    reached = torch.tensor([buffer is not None], dtype=torch.int32)
    dist.all_reduce(reached, op=dist.ReduceOp.MIN, group=group)
    return buffer if reached.item() else None
