"""Moving whole groups of sequences between the device and the host, each block once, with the sharing among them kept.

Each function decides first and changes nothing if it returns None. The pairs of a swap, once told, are executed even if the sequence
leaves in the same step: the blocks they read stay out of reach until the next step begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from minipaged.memory.block_pool import BlockPool
from minipaged.memory.host_pool import HostPool
from minipaged.memory.sequence_blocks import NO_HOST_BLOCK, SequenceBlocks
from minipaged.memory.types import NULL_BLOCK

Tell = Callable[..., None]
Pairs = list[tuple[int, int]]


def blocks_to_move(group: list[SequenceBlocks]) -> dict[int, None]:
    """The distinct device blocks of a group, as they stand when its pending copies are given up."""
    return dict.fromkeys(block for sequence in group for block in sequence.table_without_copy() if block != NULL_BLOCK)


def move_out(group: list[SequenceBlocks], pool: BlockPool, host: HostPool, tell: Tell) -> Pairs:
    """Put the group's tables on the host. (device, host) pairs; a block that others hold is copied out and stays."""
    home = {block: host.take() for block in blocks_to_move(group)}
    left: list[tuple[int, int]] = []  # (index, block) of every entry that goes
    for sequence in group:
        sequence.host = []
        for index, block in enumerate(sequence.table):
            if block == NULL_BLOCK:
                sequence.host.append(NO_HOST_BLOCK)
                continue
            host.share(home[block])
            sequence.host.append(home[block])
            left.append((index, block))
            tell("swap_out", sequence.seq_id, block, home[block], index)
        sequence.table = []
    for block in home:
        pool.guard(block)
    for _, block in sorted(left, key=lambda entry: -entry[0]):  # the deepest is the first to be evicted
        pool.drop(block)
    return list(home.items())


def next_step_blocks(group: list[SequenceBlocks], host: HostPool, block_size: int) -> int:
    """Device blocks that one more token for each sequence will take, copies of shared tails included."""
    grown = 0
    writers: Counter[int] = Counter()
    entries = Counter(block for sequence in group for block in sequence.host or ())
    for sequence in group:
        table = sequence.host or []
        if sequence.room >= len(table) * block_size:
            grown += 1
        else:
            writers[table[-1]] += 1
    copies = sum(
        count - (count == entries[block]) for block, count in writers.items()
    )  # the last sharer writes in place
    return grown + copies


def move_in(
    group: list[SequenceBlocks], pool: BlockPool, host: HostPool, take: Callable[[int], int], tell: Tell
) -> Pairs:
    """Bring the group's tables back. (host, device) pairs; `take` hands out a block for a sequence, with count 1."""
    home: dict[int, int] = {}
    for sequence in group:
        table = sequence.host or []
        for index, block in enumerate(table):
            if block == NO_HOST_BLOCK:
                sequence.table.append(NULL_BLOCK)
                continue
            if block in home:
                pool.share(home[block])
            else:
                home[block] = take(sequence.seq_id)
                host.touch(block)
            sequence.table.append(home[block])
            host.drop(block)
            tell("swap_in", sequence.seq_id, home[block], block, index)
        sequence.host = None
    return list(home.items())
