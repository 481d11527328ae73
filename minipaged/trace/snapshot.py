"""The state of an engine's memory at one step, and the one fold that makes it: tables, owners and counts follow from the events.

`Snapshot.apply` is the only way in which state changes. So the live screen, a file, a list of deltas, a recorder's keyframes and the
engine's own gauges all say the same of the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from minipaged.trace.events import (
    ENDED,
    FLAG_CACHED,
    FLAG_COPIED,
    FLAG_NULL,
    FLAG_PINNED,
    Event,
    Longs,
    Progress,
    Queues,
    SequencePatch,
    ShadowDelta,
    Stats,
    StepDelta,
    beside_appends,
)

KEPT_DEAD = (
    16  # finished sequences that stay readable; older ones are forgotten, so that a long trace has bounded state
)
MAX_BLOCKS = 1 << 22  # of a pool that can be shown, and entries of a table
NO_HOST_BLOCK = -1  # in a host table: an entry that was released before the swap

COLUMNS = ("owner", "refs", "fill", "flags")
_DTYPES: dict[str, type[np.generic]] = {"owner": np.int32, "refs": np.int32, "fill": np.int32, "flags": np.uint8}


class Pool:
    """One tier's blocks as columns of equal length, indexed by block id.

    owner: the sequence that holds it, the earliest of several; -1: nobody. refs: table entries and pins that name it. fill: slots whose
    keys and values are written. flags: bits of FLAG_*.
    """

    __slots__ = ("fill", "flags", "owner", "refs", "sharers")

    def __init__(self, num_blocks: int = 0) -> None:
        self.owner: npt.NDArray[np.int32] = np.full(num_blocks, -1, np.int32)
        self.refs: npt.NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self.fill: npt.NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self.flags: npt.NDArray[np.uint8] = np.zeros(num_blocks, np.uint8)
        self.sharers: dict[int, tuple[int, ...]] = {}  # the holders of each block that has several, the earliest first

    def __len__(self) -> int:
        return len(self.owner)

    def grow(self, num_blocks: int) -> None:
        """Make room for ids below `num_blocks`; new blocks are free."""
        more = num_blocks - len(self)
        if more <= 0:
            return
        for name in COLUMNS:
            fill = -1 if name == "owner" else 0
            setattr(self, name, np.concatenate([getattr(self, name), np.full(more, fill, _DTYPES[name])]))

    def holders(self, block: int) -> tuple[int, ...]:
        """The sequences whose tables name the block, the earliest first."""
        shared = self.sharers.get(block)
        if shared is not None:
            return shared
        owner = int(self.owner[block])
        return () if owner < 0 else (owner,)

    def copy(self) -> Pool:
        """A pool that shares nothing with this one."""
        twin = Pool()
        for name in COLUMNS:
            setattr(twin, name, getattr(self, name).copy())
        twin.sharers = dict(self.sharers)
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pool):
            return NotImplemented
        return self.sharers == other.sharers and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMNS
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(slots=True, eq=False)
class SequenceState:
    """One line of tokens, as far as the trace goes."""

    sequence: int
    request: int
    parent: int
    status: str
    num_cached: int
    num_prompt: int
    score: float
    finish_reason: str
    label: int  # a small number, stable while the sequence is kept: the screen's letter
    token_bytes: dict[int, bytes] = field(repr=False)  # the snapshot's: what each token reads
    num_computed: int = 0
    token_ids: list[int] = field(default_factory=list)
    # The text is put together when somebody asks for it: an engine or a recorder that folds never does.
    _text: bytearray = field(default_factory=bytearray, repr=False)
    _num_read: int = field(default=0, repr=False)  # tokens that stand in `_text`
    _prompt_bytes: int = field(default=0, repr=False)

    @property
    def alive(self) -> bool:
        """Whether it may still hold blocks."""
        return self.status not in ENDED

    @property
    def text(self) -> bytearray:
        """UTF-8 of its tokens, which may end inside a character. The space that some tokenizers put before the first word is left out."""
        self._read_on()
        return self._text

    @property
    def prompt_bytes(self) -> int:
        """Length of the prompt's part of `text`."""
        self._read_on()
        return self._prompt_bytes

    def _read_on(self) -> None:
        first, count = self._num_read, len(self.token_ids)
        if first == count:
            return
        self._num_read = count
        parts = [self.token_bytes.get(token, b"") for token in self.token_ids[first:]]
        added, of_prompt = b"".join(parts), len(b"".join(parts[: max(0, self.num_prompt - first)]))
        fresh = not self._text and not any(self.token_bytes.get(token) for token in self.token_ids[:first])
        if fresh and added.startswith(b" "):
            added, of_prompt = added[1:], max(0, of_prompt - 1)
        self._text += added
        self._prompt_bytes += of_prompt

    def patch(self) -> SequencePatch:
        """What a trace says of it beside its progress."""
        names = SequencePatch._fields
        return SequencePatch(*(getattr(self, name) for name in names))

    def copy(self, token_bytes: dict[int, bytes]) -> SequenceState:
        """A state that shares nothing with this one, in a snapshot with these bytes."""
        return replace(self, token_bytes=token_bytes, token_ids=list(self.token_ids), _text=bytearray(self._text))

    def __eq__(self, other: object) -> bool:
        """Whether both tell the same, label included."""
        if not isinstance(other, SequenceState):
            return NotImplemented
        return repr(self) == repr(other) and self.text == other.text  # repr: nan equals itself here

    __hash__ = None  # type: ignore[assignment]


Tables = dict[int, tuple[int, ...]]


class Snapshot:
    """Everything that a screen may show of one moment. `apply` folds a delta in; `copy` is whole and shares nothing mutable.

    Never raises for what a delta says: events that do not fit the state leave it as it is, and `misfit` says which was the first.
    """

    def __init__(self, *, num_blocks: int = 0, num_host_blocks: int = 0) -> None:
        self.step = -1
        self.t_ns = 0
        self.device = Pool()
        self.host = Pool(num_host_blocks)
        self.tables: Tables = {}  # sequence -> physical blocks; entry i holds the tokens [i * B, (i + 1) * B)
        self.host_tables: Tables = {}  # of swapped sequences
        self.sequences: dict[int, SequenceState] = {}  # in order of appearance
        self.token_bytes: dict[int, bytes] = {}  # what each token reads that was named so far
        self.queues = Queues()
        self.stats = Stats()
        self.events: Sequence[Event] = ()  # of the last step
        self.shadows: dict[str, ShadowDelta] = {}  # the newest of each system
        self.misfit = ""  # a sentence on the first event that did not fit; "" while all do
        self.changed: list[int] = []  # device blocks that the last step changed, in no order; some more than once
        self.token_slots = 0  # device slots that hold a live token's keys and values, each physical slot once
        self._counted: npt.NDArray[np.int32] = np.zeros(0, np.int32)  # each block's part in token_slots
        self._copied: list[int] = []  # device blocks that carry the copy mark
        self.resize(num_blocks, 0)

    # ---- what is asked of it

    @property
    def shared_saved_blocks(self) -> int:
        """Table entries less distinct blocks."""
        return sum(map(len, self.device.sharers.values())) - len(self.device.sharers)

    def owners(self, block: int, *, host: bool = False) -> list[tuple[int, int]]:
        """(sequence, logical index) of each table entry that names the block."""
        tables = self.host_tables if host else self.tables
        return [(seq, index) for seq, table in tables.items() for index, found in enumerate(table) if found == block]

    def gauge(self) -> Stats:
        """Complete the stats of the last step with what follows from its tables, and return them."""
        stats = self.stats
        held = max(0, stats.total_blocks - 1 - stats.free_blocks)
        self.stats = stats._replace(
            token_slots=self.token_slots,
            tail_slots=max(0, held * stats.block_size - self.token_slots),  # a broken memory frees what it still names
            shared_saved_blocks=self.shared_saved_blocks,
        )
        return self.stats

    # ---- the fold

    def apply(self, delta: StepDelta) -> None:
        """Fold one step in. Costs the size of the delta, not of the pool."""
        self.step, self.t_ns, self.events = delta.step, delta.t_ns, delta.events
        self.queues, self.stats = delta.queues, delta.stats
        self.resize(delta.stats.total_blocks, delta.stats.host_total)
        self.changed = list(self._copied)  # the mark means "in this very step": it fades by itself
        self.device.flags[self._copied] &= np.uint8(0xFF ^ FLAG_COPIED)
        self._copied = []
        edits = _TableEdits(self)
        for event in beside_appends(delta.events):
            edit = _EDITS.get(event.kind)
            if edit is not None and not edit(edits, event) and not self.misfit:
                self.misfit = (
                    f"its event {event.id}, {event.kind} of block {event.block}, does not fit what came before"
                )
        edits.finish()
        self.token_bytes.update(delta.token_bytes)
        for patch in delta.sequences:
            self._apply_patch(patch)
        self._apply_progress(delta.progress, edits.first_edited)
        if any(patch.status in ENDED for patch in delta.sequences):
            self._forget_oldest_dead()
        self._count_slots()

    def apply_shadow(self, shadow: ShadowDelta) -> None:
        """Fold in what another system would hold."""
        self.shadows[shadow.system] = shadow

    def resize(self, num_blocks: int, num_host_blocks: int) -> None:
        """Have at least this many blocks; block 0 of the device is the null block."""
        if num_blocks > len(self.device):
            self.device.grow(num_blocks)
            self.device.flags[0] |= FLAG_NULL
            self._counted = np.concatenate([self._counted, np.zeros(num_blocks - len(self._counted), np.int32)])
        self.host.grow(num_host_blocks)

    def recount(self) -> None:
        """Find what follows from the columns, after they were filled in from a keyframe."""
        self._copied = np.flatnonzero(self.device.flags & FLAG_COPIED).tolist()
        self._counted = self.device.fill * (self.device.owner >= 0)
        self.token_slots = int(self._counted.sum())

    def _count_slots(self) -> None:
        ids = np.unique(np.array(self.changed, np.int64))
        now = self.device.fill[ids] * (self.device.owner[ids] >= 0)
        self.token_slots += int(now.sum()) - int(self._counted[ids].sum())
        self._counted[ids] = now

    def _apply_patch(self, patch: SequencePatch) -> None:
        state = self.sequences.get(patch.sequence)
        if state is None:
            state = SequenceState(*patch, label=self._free_label(), token_bytes=self.token_bytes)
            self.sequences[patch.sequence] = state
        elif not state.alive:
            return  # the dead do not change
        state.request, state.parent, state.status = patch.request, patch.parent, patch.status
        state.num_cached, state.num_prompt = patch.num_cached, patch.num_prompt
        state.score, state.finish_reason = patch.score, patch.finish_reason
        if not state.alive:  # the dead stand in the order in which they died
            self.sequences[patch.sequence] = self.sequences.pop(patch.sequence)

    def _apply_progress(self, progress: Progress, first_edited: dict[int, int]) -> None:
        """Tokens, and how full that makes the blocks. first_edited: where the tables change that this step has edited."""
        known, tables, size = self.sequences, self.tables, self.stats.block_size
        tokens, at = progress.token_ids.tolist(), 0
        blocks: list[int] = []
        fills: list[int] = []
        rows = zip(progress.sequence.tolist(), progress.num_computed.tolist(), progress.num_new.tolist(), strict=True)
        for sequence, computed, new in rows:
            state = known.get(sequence)
            if state is None:  # it has ended, and is forgotten
                at += new
                continue
            if new == 1:
                state.token_ids.append(tokens[at])
            elif new:
                state.token_ids += tokens[at : at + new]
            at += new
            before, state.num_computed = state.num_computed, computed
            table = tables.get(sequence, ())
            start = before if before < computed else computed
            if sequence in first_edited:
                start = min(start, first_edited[sequence] * size)
            if not size or start >= len(table) * size:
                continue
            first = start // size
            if computed == start + 1:  # plain decoding
                blocks.append(table[first])
                fills.append(computed - first * size)
                continue
            for index in range(first, min(len(table), -(-computed // size))):
                blocks.append(table[index])
                fills.append(min(size, computed - index * size))
            if computed < before:
                self._take_back(table, range(computed // size, min(len(table), -(-before // size))))
        np.maximum.at(self.device.fill, blocks, fills)
        self.device.fill[:1] = 0  # nobody's tokens are in the null block
        self.changed += blocks

    def _take_back(self, table: tuple[int, ...], indices: Iterable[int]) -> None:
        """Fewer tokens are written than were: these entries' blocks are as full as those who hold them say."""
        for index in indices:
            if table[index]:
                self.refill(table[index], index)

    def refill(self, block: int, index: int) -> None:
        """Find how full a device block is that stands at `index` of its holders' tables."""
        if not self.device.flags[block] & FLAG_CACHED:
            written = (self.written(sequence, index) for sequence in self.device.holders(block))
            self.device.fill[block] = max(written, default=0)
        self.changed.append(block)

    def written(self, sequence: int, index: int) -> int:
        """Slots of the block at `index` of its table that the sequence has written."""
        state, size = self.sequences.get(sequence), self.stats.block_size
        return max(0, min(size, state.num_computed - index * size)) if state is not None else 0

    def _free_label(self) -> int:
        taken = {state.label for state in self.sequences.values()}
        label = 0
        while label in taken:
            label += 1
        return label

    def _forget_oldest_dead(self) -> None:
        dead = [seq for seq, state in self.sequences.items() if not state.alive]
        for seq in dead[: max(0, len(dead) - KEPT_DEAD)]:
            del self.sequences[seq]

    # ---- copies

    def copy(self) -> Snapshot:
        """A snapshot that shares nothing mutable with this one."""
        twin = Snapshot()
        twin.step, twin.t_ns, twin.events = self.step, self.t_ns, self.events
        twin.device, twin.host = self.device.copy(), self.host.copy()
        twin.tables, twin.host_tables = dict(self.tables), dict(self.host_tables)
        twin.token_bytes = dict(self.token_bytes)
        twin.sequences = {seq: state.copy(twin.token_bytes) for seq, state in self.sequences.items()}
        twin.queues, twin.stats = self.queues, self.stats
        twin.shadows, twin.misfit = dict(self.shadows), self.misfit
        twin.token_slots, twin._counted, twin._copied = self.token_slots, self._counted.copy(), list(self._copied)
        return twin

    def __eq__(self, other: object) -> bool:
        """Whether both tell the same state; the order in which tables were opened does not count, that of sequences does."""
        if not isinstance(other, Snapshot):
            return NotImplemented
        plain: tuple[str, ...] = (
            "step",
            "t_ns",
            "device",
            "host",
            "tables",
            "host_tables",
            "token_bytes",
            "queues",
            "stats",
        )
        plain += ("events", "shadows", "token_slots")
        same = all(getattr(self, name) == getattr(other, name) for name in plain)
        return same and list(self.sequences.values()) == list(other.sequences.values())

    __hash__ = None  # type: ignore[assignment]


class _Tier:
    """A pool while a step is folded: single entries are read and written faster through a memoryview than in an array."""

    __slots__ = ("fill", "flags", "owner", "refs", "sharers", "size")

    def __init__(self, pool: Pool) -> None:
        self.size = len(pool)
        self.owner, self.refs = memoryview(pool.owner), memoryview(pool.refs)  # type: ignore[arg-type]
        self.fill, self.flags = memoryview(pool.fill), memoryview(pool.flags)  # type: ignore[arg-type]
        self.sharers = pool.sharers

    def hold(self, block: int, sequence: int) -> None:
        """One more table entry names the block."""
        owner = self.owner[block]
        if owner < 0:
            self.owner[block] = sequence
        else:
            self.sharers[block] = (*self.sharers.get(block, (owner,)), sequence)
        self.refs[block] += 1

    def leave(self, block: int, sequence: int) -> bool:
        """One table entry less names the block; a block that nobody holds and the cache does not know is empty. False if none did."""
        shared = self.sharers.get(block)
        if shared is None:
            if self.owner[block] != sequence:
                return False
            self.owner[block] = -1
            if not self.flags[block] & FLAG_CACHED:
                self.fill[block] = 0
        elif sequence in shared:
            left = list(shared)
            left.remove(sequence)
            self.owner[block] = left[0]
            if len(left) > 1:
                self.sharers[block] = tuple(left)
            else:
                del self.sharers[block]
        else:
            return False
        if self.refs[block] > 0:
            self.refs[block] -= 1
        return True


class _TableEdits:
    """The tables that one step's events change, as lists until the step is folded. Each edit returns whether the event fits."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.first_edited: dict[int, int] = {}  # sequence -> the first entry that may hold another block than before
        self._device, self._host = _Tier(snapshot.device), _Tier(snapshot.host)
        self._tables: dict[int, list[int]] = {}
        self._host_tables: dict[int, list[int]] = {}
        self._padding = MAX_BLOCKS  # null entries that this step may still make

    def finish(self) -> None:
        """Put the tables back. One that names no block is none."""
        snapshot = self.snapshot
        for edited, tables, least in (
            (self._tables, snapshot.tables, 1),
            (self._host_tables, snapshot.host_tables, 0),
        ):
            for sequence, table in edited.items():
                if table and (table[-1] >= least or any(block >= least for block in table)):
                    tables[sequence] = tuple(table)
                else:
                    tables.pop(sequence, None)

    def _table(self, sequence: int) -> list[int]:
        table = self._tables.get(sequence)
        if table is None:
            table = self._tables[sequence] = list(self.snapshot.tables.get(sequence, ()))
        return table

    def _host_table(self, sequence: int) -> list[int]:
        table = self._host_tables.get(sequence)
        if table is None:
            table = self._host_tables[sequence] = list(self.snapshot.host_tables.get(sequence, ()))
        return table

    def _put(self, table: list[int], index: int, block: int, null: int) -> bool:
        """table[index] = block, where nothing stands; entries that left without a word are null."""
        more = index - len(table)
        if more == 0:
            table.append(block)
            return True
        if index < 0 or more > self._padding or (more < 0 and table[index] != null):
            return False
        if more > 0:
            self._padding -= more
            table.extend([null] * (more + 1))
        table[index] = block
        return True

    def _hold(self, sequence: int, index: int, block: int) -> bool:
        if not 0 < block < self._device.size or not self._put(self._table(sequence), index, block, 0):
            return False
        self._device.hold(block, sequence)
        if index < self.first_edited.get(sequence, MAX_BLOCKS):
            self.first_edited[sequence] = index
        self.snapshot.changed.append(block)
        return True

    def _leave(self, sequence: int, index: int, block: int) -> bool:
        """The sequence's entry `index` no longer names the block; those who still hold it say how full it is."""
        if not 0 < block < self._device.size or not self._device.leave(block, sequence):
            return False
        if self._device.owner[block] >= 0:
            self.snapshot.refill(block, index)
        self.snapshot.changed.append(block)
        return True

    def alloc(self, event: Event) -> bool:
        """A new block: nothing is written in it."""
        if not self._hold(event.sequence, event.amount, event.block):
            return False
        self._device.fill[event.block] = 0
        return True

    def cache_hit(self, event: Event) -> bool:
        """A full block that was found by its content."""
        return self._hold(event.sequence, event.amount, event.block) and self.publish(event)

    def fork(self, event: Event) -> bool:
        """A child with its parent's table; or one entry that another holds as well."""
        if event.block >= 0:
            return self._hold(event.sequence, event.amount, event.block)
        parent = self._table(event.other)
        if any(self._table(event.sequence)):
            return False
        self._tables[event.sequence] = []
        return all(self._hold(event.sequence, i, block) for i, block in enumerate(parent) if block)

    def copy(self, event: Event) -> bool:
        """Its entry now names the copy, which is as full as what the sequence has written."""
        sequence, index, other = event.sequence, event.amount, event.other
        table, device = self._table(sequence), self._device
        if not 0 <= index < len(table) or table[index] != event.block or not 0 < other < device.size:
            return False
        if not self._leave(sequence, index, event.block):
            return False
        table[index] = 0
        self._hold(sequence, index, other)
        device.fill[other] = self.snapshot.written(sequence, index)
        device.flags[other] |= FLAG_COPIED
        self.snapshot._copied.append(other)
        return True

    def free(self, event: Event) -> bool:
        """Its table ends before the entry. A swapped sequence has no blocks on the device: what it frees is on the host."""
        sequence, block, index = event.sequence, event.block, event.amount
        table = self._table(sequence)
        if any(table):
            return self._cut(table, index, block) and self._leave(sequence, index, block)
        return self._cut(self._host_table(sequence), index, block) and self._host.leave(block, sequence)

    @staticmethod
    def _cut(table: list[int], index: int, block: int) -> bool:
        """End the table before the block at `index`. Nothing but null entries may stand behind it: those leave without a word."""
        if not 0 <= index < len(table) or table[index] != block or any(b > 0 for b in table[index + 1 :]):
            return False
        del table[index:]
        return True

    def release(self, event: Event) -> bool:
        """Its entry is null from now on."""
        table = self._table(event.sequence)
        if not 0 <= event.amount < len(table) or table[event.amount] != event.block:
            return False
        table[event.amount] = 0
        return self._leave(event.sequence, event.amount, event.block)

    def swap_out(self, event: Event) -> bool:
        """An entry moves to the host. Block -1: it was there before the trace began."""
        sequence, index, block, other = event.sequence, event.amount, event.block, event.other
        host, fill = self._host, self.snapshot.written(sequence, index)
        if not 0 <= other < host.size or not self._put(self._host_table(sequence), index, other, NO_HOST_BLOCK):
            return False
        host.hold(other, sequence)
        if 0 <= block < self._device.size:
            fill = self._device.fill[block]
        host.fill[other] = max(fill, host.fill[other])
        return block < 0 or self.release(event)

    def swap_in(self, event: Event) -> bool:
        """The reverse."""
        sequence, index, block, other = event.sequence, event.amount, event.block, event.other
        host, table = self._host, self._host_table(sequence)
        if not 0 <= index < len(table) or not 0 <= other < host.size or table[index] != other:
            return False
        fill = host.fill[other]
        table[index] = NO_HOST_BLOCK
        if not host.leave(other, sequence) or not self._hold(sequence, index, block):
            return False
        self._device.fill[block] = fill
        return True

    def _on_device(self, block: int) -> bool:
        """Whether it is a block that may be cached, pinned or counted; it changes."""
        if not 0 < block < self._device.size:
            return False
        self.snapshot.changed.append(block)
        return True

    def publish(self, event: Event) -> bool:
        """It can be found by its content, and is full."""
        block, device = event.block, self._device
        if not self._on_device(block):
            return False
        device.flags[block] |= FLAG_CACHED
        device.fill[block] = self.snapshot.stats.block_size
        return True

    def evict(self, event: Event) -> bool:
        """It can no longer; if nobody holds it, it is empty."""
        block, device = event.block, self._device
        if not self._on_device(block):
            return False
        device.flags[block] &= 0xFF ^ FLAG_CACHED
        if device.owner[block] < 0:
            device.fill[block] = 0
        return True

    def pin(self, event: Event) -> bool:
        """One more reference that no table holds."""
        block, device = event.block, self._device
        if not self._on_device(block):
            return False
        device.refs[block] += 1
        device.flags[block] |= FLAG_PINNED
        return True

    def unpin(self, event: Event) -> bool:
        """One less."""
        block, device = event.block, self._device
        if not self._on_device(block) or not device.flags[block] & FLAG_PINNED or not device.refs[block]:
            return False
        device.refs[block] -= 1
        if device.refs[block] <= len(self.snapshot.device.holders(block)):
            device.flags[block] &= 0xFF ^ FLAG_PINNED
        return True

    def count(self, event: Event) -> bool:
        """The manager says another reference count than its events do."""
        if not 0 <= event.amount < 1 << 31 or not self._on_device(event.block):
            return False
        self._device.refs[event.block] = event.amount
        return True


_EDITS: dict[str, Callable[[_TableEdits, Event], bool]] = {
    "alloc": _TableEdits.alloc,
    "cache_hit": _TableEdits.cache_hit,
    "fork": _TableEdits.fork,
    "copy": _TableEdits.copy,
    "free": _TableEdits.free,
    "release": _TableEdits.release,
    "swap_out": _TableEdits.swap_out,
    "swap_in": _TableEdits.swap_in,
    "publish": _TableEdits.publish,
    "evict": _TableEdits.evict,
    "pin": _TableEdits.pin,
    "unpin": _TableEdits.unpin,
    "count": _TableEdits.count,
}


def as_longs(values: Iterable[object], width: int = 0) -> Longs:
    """Whole numbers, or rows of `width` of them, as an array."""
    found = np.array(list(values), np.int64)
    return found.reshape(-1, width) if width else found


def fold(deltas: Iterable[StepDelta], start: Snapshot | None = None) -> Snapshot:
    """The state after all of them."""
    snapshot = Snapshot() if start is None else start.copy()
    for delta in deltas:
        snapshot.apply(delta)
    return snapshot
