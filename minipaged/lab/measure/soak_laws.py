"""Are the laws of sharing (L65 to L68) kept by a scheduler that runs? A witness reads the events of every step and the tables at some.

It folds the events into tables, and into the content that can be found, with keys of its own: the tokens themselves. So it sees what the
block manager forgets or rewrites without an event, and a hit that it misses.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from typing import Any

from minipaged.memory import blocks, tables
from minipaged.memory.types import BlockEvent
from minipaged.scheduling.request import Sequence
from minipaged.scheduling.running_set import SchedulerEvent
from minipaged.scheduling.scheduler import Scheduler


class SharingWitness:
    """Watches one scheduler. RuntimeError, naming the law, where one is broken.

    At every admission (L65): the blocks found are those of the longest prefix that can be found, and each holds what its reader wants. At
    `look` (L66, L67): every full block that a running sequence has published can be found, tables are what the events made of them, a
    request's sequences hold their prompt's full blocks once. At `end` (L68): a prompt was looked up once for each time that it waited,
    and each of its blocks hashed once.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._size = scheduler.block_size
        self._known: dict[int, Sequence] = {}  # those that have not ended, by number
        self._tables: dict[int, list[int]] = {}
        self._content: dict[int, bytes] = {}  # of the blocks that can be found
        self._copies: defaultdict[bytes, int] = defaultdict(int)  # how many blocks with this content can be found
        self._away: set[int] = set()  # requests that wait without memory: they come in, or come back, as one sequence
        self.admissions = self.admissions_with_hits = self.group_looks = self.block_looks = 0
        self.lookups = self.may_look_up = self.hashed = self.may_hash = 0
        self._restore: list[tuple[Any, str, Any]] = []

    # ---- listening

    def __enter__(self) -> SharingWitness:
        """Hear the events where the trace takes them, and count lookups and hashes."""
        scheduler, manager = self._scheduler, self._scheduler.manager
        take, lookup, next_key = scheduler.take_events, manager.lookup, blocks.next_key

        def take_events() -> list[SchedulerEvent | BlockEvent]:
            events = take()
            self._read(events)
            return events

        def counted_lookup(token_ids: Any, **options: Any) -> Any:
            self.lookups += 1
            self.may_hash += max(0, len(token_ids) - 1) // self._size
            return lookup(token_ids, **options)

        def counted_key(parent: bytes, tokens: bytes) -> bytes:
            self.hashed += 1
            return next_key(parent, tokens)

        for owner, name, value in (
            (scheduler, "take_events", take_events),
            (manager, "lookup", counted_lookup),
            (blocks, "next_key", counted_key),
            (tables, "next_key", counted_key),
        ):
            self._restore.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, value)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave scheduler and modules as they were."""
        for owner, name, value in self._restore:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._restore.clear()

    def _read(self, events: list[SchedulerEvent | BlockEvent]) -> None:
        # A sequence that was forked and ended within this step is named by its last event alone.
        self._known.update(self._scheduler.sequences)
        self._known.update({e.seq_id: e.sequence for e in events if isinstance(e, SchedulerEvent) and e.sequence})
        entered: list[Sequence] = []  # in this step, in order
        to_host = {e.seq_id for e in events if isinstance(e, BlockEvent) and e.kind == "swap_out"}
        for event in events:
            if isinstance(event, BlockEvent):
                self._fold(event)
            elif event.sequence is None:
                continue
            elif event.kind == "submit" or (event.kind == "preempt" and event.seq_id not in to_host):
                self.may_look_up += 1
                self._away.add(event.sequence.request.request_id)
            elif event.kind == "admit":
                self._admitted(event.sequence, event.amount, entered)
            elif event.kind in ("finish", "abort", "prune"):
                self._known.pop(event.seq_id, None)
                if event.sequence.request.finished:
                    self._away.discard(event.sequence.request.request_id)

    # ---- what the events say

    def _fold(self, event: BlockEvent) -> None:
        kind, seq, block, other, index, tier, _ = event
        if kind == "publish":
            key = self._key(seq, index)
            self._forget(block)
            self._content[block] = key
            self._copies[key] += 1
            self.may_hash += 1
        elif kind == "evict":
            self._forget(block)
        elif kind in ("alloc", "cache_hit", "swap_in"):
            if kind == "cache_hit" and self._content.get(block) != self._key(seq, index):
                raise RuntimeError(
                    f"L65: sequence {seq} was given block {block} for entry {index}, which holds other tokens"
                )
            table = self._tables.setdefault(seq, [])
            if kind == "swap_in":
                table.extend([0] * (index + 1 - len(table)))
                table[index] = block
            elif index != len(table):
                raise RuntimeError(f"L66: entry {index} of sequence {seq} follows {len(table)} entries")
            else:
                table.append(block)
        elif kind == "fork":
            if block >= 0:
                self._tables.setdefault(seq, [])[index:] = [block]
            else:
                self._tables[seq] = self._tables[other][:index]
        elif kind == "copy":
            self._tables[seq][index] = other
        elif kind == "free" and tier == "device":
            del self._tables[seq][index:]
            if not index:
                del self._tables[seq]
        elif kind == "swap_out":
            self._tables.pop(seq, None)

    def _key(self, seq: int, index: int) -> bytes:
        return array("I", self._known[seq].token_ids[: (index + 1) * self._size]).tobytes()

    def _forget(self, block: int) -> None:
        key = self._content.pop(block, None)
        if key is not None:
            self._copies[key] -= 1
            if not self._copies[key]:
                del self._copies[key]

    def _admitted(self, sequence: Sequence, num_cached: int, entered: list[Sequence]) -> None:
        """L65. What was evicted to make room for it is forgotten by now, so nothing is asked of the cache that it could not keep."""
        if sequence.request.request_id not in self._away:
            return  # back from the host, or forked again: from its own request's blocks
        self._away.discard(sequence.request.request_id)
        self.admissions += 1
        self.admissions_with_hits += num_cached > 0
        size, tokens = self._size, sequence.token_ids
        most = (len(tokens) - 1) // size
        found = next((i for i in range(most) if self._key(sequence.seq_id, i) not in self._copies), most)
        for other in entered:  # what the step computes for those before it, whenever that was published
            if other.token_ids[:size] == tokens[:size]:
                ends = range(size, size * min(most, other.num_computed // size) + 1, size)
                found = max([found, *(end // size for end in ends if other.token_ids[:end] == tokens[:end])])
        entered.append(sequence)
        if num_cached < found * size:
            raise RuntimeError(f"L65: {sequence} found {num_cached} tokens; {found * size} could be found")

    # ---- what the tables say

    def look(self) -> None:
        """L66 and L67, of everything that runs now."""
        manager, size = self._scheduler.manager, self._size
        for request in self._scheduler.running:
            present = [s for s in request.alive if s.slot >= 0]
            held: set[int] = set()
            allowed = shared = request.num_prompt // size
            for sequence in present:
                table = manager.table(sequence.seq_id)
                if list(table) != self._tables.get(sequence.seq_id, []):
                    raise RuntimeError(f"L66: the table of {sequence} is not what its events made of it")
                for index in range(sequence.num_published // size):
                    self.block_looks += 1
                    if self._content.get(table[index]) != self._key(sequence.seq_id, index):
                        raise RuntimeError(
                            f"L66: {sequence} holds block {table[index]}, which nobody can find any more"
                        )
                used = -(-sequence.num_computed // size)
                held.update(table[:used])
                allowed += max(0, used - shared)
            if len(present) > 1 and request.forked:
                self.group_looks += 1
                if len(held) > allowed:
                    raise RuntimeError(
                        f"L67: the sequences of {request.request_id} hold {len(held)} blocks, not {allowed}"
                    )

    def end(self) -> None:
        """L68, of the whole run; and nothing is held any more."""
        if self._tables:
            raise RuntimeError(f"by the events, sequences {sorted(self._tables)[:5]} still hold blocks")
        if self.lookups > self.may_look_up:
            raise RuntimeError(f"L68: {self.lookups} lookups for {self.may_look_up} times that somebody began to wait")
        if self.hashed > self.may_hash:
            raise RuntimeError(f"L68: {self.hashed} blocks were hashed, of prompts and answers with {self.may_hash}")
