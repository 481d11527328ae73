"""The state of an engine's memory at one step, as the fold of the trace's deltas.

Knows the trace's vocabulary and numpy; knows nothing of engines, files or screens. `Snapshot.apply` is the only way
that state changes, so a live engine, a file and a list of deltas that tell the same steps give the same snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from minipaged.trace.records import (
    FLAG_COPIED,
    TIER_DEVICE,
    TIER_HOST,
    BlockPatch,
    Event,
    Queues,
    SequencePatch,
    ShadowDelta,
    Stats,
    StepDelta,
    TablePatch,
)
from minipaged.trace.rows import SequenceRows

DEAD = frozenset({"finished", "aborted", "refused"})
KEPT_DEAD = (
    16  # finished sequences that stay readable; older ones are forgotten, so that a long trace has bounded state
)

COLUMNS = ("owner", "refs", "fill", "flags", "group")
_DTYPES: dict[str, type[np.generic]] = {
    "owner": np.int32,
    "refs": np.int32,
    "fill": np.int32,
    "flags": np.uint8,
    "group": np.int32,
}


class Pool:
    """One tier's blocks as columns of equal length, indexed by block id."""

    __slots__ = ("fill", "flags", "group", "owner", "refs")

    def __init__(self, num_blocks: int = 0) -> None:
        self.owner: npt.NDArray[np.int32] = np.full(num_blocks, -1, np.int32)
        self.refs: npt.NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self.fill: npt.NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self.flags: npt.NDArray[np.uint8] = np.zeros(num_blocks, np.uint8)
        self.group: npt.NDArray[np.int32] = np.zeros(num_blocks, np.int32)

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

    def patch(self, patch: BlockPatch, rows: npt.NDArray[np.intp] | slice) -> None:
        """Overwrite the blocks that `rows` of the patch name."""
        ids = patch.ids[rows]
        if len(ids) == 0:
            return
        self.grow(int(ids.max()) + 1)
        self.owner[ids] = patch.owner[rows]
        self.refs[ids] = patch.refs[rows]
        self.fill[ids] = patch.fill[rows]
        self.flags[ids] = patch.flags[rows]
        self.group[ids] = patch.group[rows]

    def copy(self) -> Pool:
        """A pool that shares nothing with this one."""
        twin = Pool()
        for name in COLUMNS:
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pool):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMNS)

    __hash__ = None  # type: ignore[assignment]


@dataclass(slots=True)
class SequenceState:
    """One line of tokens, as far as the trace has told it."""

    sequence: int
    request: int
    parent: int
    status: str
    num_computed: int
    num_cached: int
    num_prompt: int
    label: int  # a small number, stable while the sequence is kept: the screen's letter
    token_ids: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    prompt_bytes: int = 0  # length of the prompt's part of `text`
    score: float = math.nan
    finish_reason: str = ""

    @property
    def alive(self) -> bool:
        """Whether it may still hold blocks."""
        return self.status not in DEAD

    def copy(self) -> SequenceState:
        """A state that shares nothing with this one."""
        return replace(self, token_ids=list(self.token_ids), text=bytearray(self.text))


class Snapshot:
    """Everything that a screen may show of one moment. `apply` folds a delta in; `copy` is whole and shares nothing mutable."""

    def __init__(self, *, num_blocks: int = 0, num_host_blocks: int = 0) -> None:
        self.step = -1
        self.t_ns = 0
        self.device = Pool(num_blocks)
        self.host = Pool(num_host_blocks)
        # (sequence, group) -> physical blocks; entry i holds the tokens [i * B, (i + 1) * B)
        self.tables: dict[tuple[int, int], tuple[int, ...]] = {}
        self.host_tables: dict[tuple[int, int], tuple[int, ...]] = {}  # of swapped sequences
        self.sequences: dict[int, SequenceState] = {}  # in order of appearance
        self.queues = Queues()
        self.stats = Stats()
        self.events: Sequence[Event] = ()  # of the last step
        self.shadows: dict[str, ShadowDelta] = {}  # the newest of each system
        self._copied: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    def apply(self, delta: StepDelta) -> None:
        """Fold one step in. Costs the size of the delta, not of the pool."""
        self.step, self.t_ns, self.events = delta.step, delta.t_ns, delta.events
        if len(self._copied):  # the mark means "in this very step": it fades by itself
            self.device.flags[self._copied] &= np.uint8(0xFF ^ FLAG_COPIED)
        self.device.grow(delta.stats.total_blocks)
        self.host.grow(delta.stats.host_total)
        for table in delta.tables:
            self._apply_table(table, delta.stats.block_size)
        self._apply_blocks(delta.blocks)
        if isinstance(delta.sequences, SequenceRows):
            self._apply_rows(delta.sequences)
        else:
            for sequence in delta.sequences:
                self._apply_sequence(sequence)
        self.queues, self.stats = delta.queues, delta.stats

    def _apply_blocks(self, patch: BlockPatch) -> None:
        if len(patch.ids) and patch.tier.any():
            self.device.patch(patch, np.flatnonzero(patch.tier == TIER_DEVICE))
            self.host.patch(patch, np.flatnonzero(patch.tier == TIER_HOST))
            here = patch.tier == TIER_DEVICE
            self._copied = patch.ids[here & ((patch.flags & FLAG_COPIED) != 0)]
        else:
            self.device.patch(patch, slice(None))
            self._copied = patch.ids[(patch.flags & FLAG_COPIED) != 0]

    def _apply_table(self, patch: TablePatch, block_size: int) -> None:
        tables = self.host_tables if patch.tier == TIER_HOST else self.tables
        key = (patch.sequence, patch.group)
        old = tables.get(key, ())
        ids = old[: patch.start] + tuple(patch.ids)
        if ids:
            tables[key] = ids
        else:
            tables.pop(key, None)
        if patch.tier == TIER_HOST:
            self._move_host(patch.sequence, old[patch.start :], patch.ids, block_size)

    def _move_host(self, sequence: int, gone: tuple[int, ...], come: tuple[int, ...], block_size: int) -> None:
        """The host pool follows from its tables; a block patch may say more."""
        pool = self.host
        gone, come = tuple(b for b in gone if b >= 0), tuple(b for b in come if b >= 0)  # -1: an entry released before
        pool.grow(max((*gone, *come), default=-1) + 1)
        for block in gone:
            pool.refs[block] -= 1
            if pool.refs[block] <= 0:
                pool.refs[block], pool.owner[block], pool.fill[block] = 0, -1, 0
        for block in come:
            if pool.refs[block] == 0:
                pool.owner[block], pool.fill[block] = sequence, block_size
            pool.refs[block] += 1

    def _apply_rows(self, rows: SequenceRows) -> None:
        """As their patches one by one, but of those that only grow no more is touched than grows."""
        for patch in rows.first:
            self._apply_sequence(patch)
        plain = rows.plain
        growth = iter(zip(plain.token_ids, plain.texts, strict=True))
        known = self.sequences
        for sequence, computed, grown in zip(
            plain.sequence.tolist(), plain.num_computed.tolist(), plain.num_tokens.tolist(), strict=True
        ):
            token, text = next(growth) if grown else (None, b"")
            state = known.get(sequence)
            if state is None:  # a fold that began in the middle: it is known from here on
                self._apply_sequence(next(patch for patch in rows if patch.sequence == sequence))
                continue
            state.num_computed = computed
            if token is not None:
                state.token_ids.append(token)
                state.text += text

    def _apply_sequence(self, patch: SequencePatch) -> None:
        state = self.sequences.get(patch.sequence)
        if state is None:
            state = SequenceState(*patch[:7], label=self._free_label())
            parent = self.sequences.get(patch.parent)
            state.prompt_bytes = min(len(patch.text), parent.prompt_bytes) if parent is not None else len(patch.text)
            self.sequences[patch.sequence] = state
        elif not state.alive and patch.status in DEAD:
            return  # the dead do not change
        state.request, state.parent, state.status = patch.request, patch.parent, patch.status
        state.num_computed, state.num_cached, state.num_prompt = patch.num_computed, patch.num_cached, patch.num_prompt
        state.token_ids.extend(patch.token_ids)
        state.text.extend(patch.text)
        state.score, state.finish_reason = patch.score, patch.finish_reason
        if not state.alive:
            self._forget_oldest_dead(patch.sequence)

    def _free_label(self) -> int:
        taken = {state.label for state in self.sequences.values()}
        label = 0
        while label in taken:
            label += 1
        return label

    def _forget_oldest_dead(self, latest: int) -> None:
        self.sequences[latest] = self.sequences.pop(latest)  # the dead stand in the order in which they died
        dead = [seq for seq, state in self.sequences.items() if not state.alive]
        for seq in dead[: max(0, len(dead) - KEPT_DEAD)]:
            del self.sequences[seq]

    def apply_shadow(self, shadow: ShadowDelta) -> None:
        """Fold in what another system would hold."""
        self.shadows[shadow.system] = shadow

    def mark_copied(self) -> None:
        """Find the blocks that carry the copy mark, after a pool was filled in from a keyframe."""
        self._copied = np.flatnonzero(self.device.flags & FLAG_COPIED).astype(np.int32)

    def copy(self) -> Snapshot:
        """A snapshot that shares nothing mutable with this one."""
        twin = Snapshot()
        twin.step, twin.t_ns, twin.events = self.step, self.t_ns, self.events
        twin.device, twin.host = self.device.copy(), self.host.copy()
        twin.tables = dict(self.tables)
        twin.host_tables = dict(self.host_tables)
        twin.sequences = {seq: state.copy() for seq, state in self.sequences.items()}
        twin.queues, twin.stats = self.queues, self.stats
        twin.shadows = dict(self.shadows)
        twin._copied = self._copied
        return twin

    def owners(self, block: int, *, host: bool = False) -> list[tuple[int, int]]:
        """(sequence, logical index) of each table entry that names the block."""
        found = []
        for (sequence, _group), table in (self.host_tables if host else self.tables).items():
            found += [(sequence, index) for index, physical in enumerate(table) if physical == block]
        return found

    def __eq__(self, other: object) -> bool:
        """Whether both tell the same state; the order in which tables were opened does not count, that of sequences does."""
        if not isinstance(other, Snapshot):
            return NotImplemented
        plain = ("step", "t_ns", "device", "host", "tables", "host_tables", "queues", "stats", "events", "shadows")
        return all(getattr(self, name) == getattr(other, name) for name in plain) and _same_sequences(
            self.sequences.values(), other.sequences.values()
        )

    __hash__ = None  # type: ignore[assignment]


def _same_sequences(left: Iterable[SequenceState], right: Iterable[SequenceState]) -> bool:
    def plain(state: SequenceState) -> tuple[object, ...]:
        return tuple(repr(getattr(state, name)) for name in state.__slots__)  # repr: nan equals itself here

    return [plain(state) for state in left] == [plain(state) for state in right]


def fold(deltas: Iterable[StepDelta], start: Snapshot | None = None) -> Snapshot:
    """The state after all of them."""
    snapshot = Snapshot() if start is None else start.copy()
    for delta in deltas:
        snapshot.apply(delta)
    return snapshot


def empty_patch() -> BlockPatch:
    """A patch that changes no block."""
    none = np.zeros(0, np.int32)
    return BlockPatch(none, none, none, none, none.astype(np.uint8), none.astype(np.uint8), none)
