"""A trace as frames: what changed on the picture from one moment to the next, as plain values that become JSON.

The trace is folded here, by the one fold that there is (trace/snapshot.py); the page's script only puts values into arrays. A
frame holds new values, never differences of values, so that frames can be left out: the next one then holds what they all changed.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minipaged.errors import InputError
from minipaged.text.safe import printable
from minipaged.trace.events import Event, Stats, StepDelta, beside_appends
from minipaged.trace.player import Player
from minipaged.trace.snapshot import COLUMNS, Pool, SequenceState, Snapshot, Tables
from minipaged.trace.sources import Source
from minipaged.trace.words import (
    NUM_HUES,
    PAST,
    TICK_ORDER,
    TICKS,
    block_state,
    letter,
    other_hues,
    sentence,
    summary,
)

MOST_FRAMES = 4_000
MOST_BLOCKS = 1 << 18
MOST_SAID = 400  # characters of a name, a setting or a sentence
SHOWN_SETTINGS = ("block_size", "kv_cache_dtype", "policy", "preemption", "retention")
# The stats that a frame holds, in this order.
GAUGES = (
    *("total_blocks", "free_blocks", "cached_blocks", "host_total", "host_free", "token_slots", "tail_slots"),
    *("shared_saved_blocks", "copies", "hit_tokens", "preemptions", "swaps", "generated_tokens", "num_drawn"),
    *("elapsed_ns", "num_waiting"),
)
Document = dict[str, Any]
Values = list[int]


def document(source: Source, *, most_frames: int = MOST_FRAMES) -> Document:
    """All that the page shows of a trace. InputError if its pool is too large to be drawn."""
    folder = _Folder(source)
    positions = chosen_positions(source, most_frames)
    frames = [folder.frame()]
    for position in positions:
        if not folder.advance_to(position):
            break
        frames.append(folder.frame())
    header = source.header
    last = folder.view
    return {
        "model": printable(header.model)[:MOST_SAID],
        "about": printable(str(header.extra.get("about", "")))[:MOST_SAID],
        "finding": printable(header.finding)[:MOST_SAID],
        "damage": printable(source.damage)[:MOST_SAID],
        "settings": {
            name: printable(str(header.engine[name]))[:MOST_SAID] for name in SHOWN_SETTINGS if header.engine.get(name)
        },
        "steps": len(source),
        "block_size": last.snapshot.stats.block_size,
        "blocks": len(last.snapshot.device),
        "host_blocks": len(last.snapshot.host),
        "summary": summary(last),
        "gauges": list(GAUGES),
        "kinds": list(map(printable, folder.kinds)),
        "tokens": list(folder.tokens),
        "ticks": [[TICKS[kind], kind] for kind in TICK_ORDER],
        "past": PAST,
        "states": [[block_state(refs, flags) for flags in range(16)] for refs in range(3)],
        "frames": frames,
    }


def chosen_positions(source: Source, most: int) -> list[int]:
    """The positions that become frames: all; of a long trace those where something but writing happened, and others evenly."""
    length = len(source)
    if length <= most:
        return list(range(1, length + 1))
    marked = np.flatnonzero(source.marks) + 1
    if len(marked) > most * 3 // 4:
        marked = marked[np.linspace(0, len(marked) - 1, most * 3 // 4).astype(int)]
    rest = np.linspace(1, length, most - len(marked)).astype(int)
    found: list[int] = np.union1d(marked, rest).tolist()
    return found


@dataclass(slots=True)
class _Moment:
    """What the sentences are made of."""

    snapshot: Snapshot
    delta: StepDelta | None = None
    word: str = ""

    def letter(self, sequence: int) -> str:
        """A sequence's letter."""
        state = self.snapshot.sequences.get(sequence)
        return letter(state.label) if state is not None else "?"


@dataclass(slots=True)
class _Told:
    """What the frames so far say of a sequence."""

    values: list[Any] = field(default_factory=list)
    num_computed: int = 0
    num_tokens: int = 0
    reader: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), repr=False
    )


class _Folder:
    """Walks a source, and knows what the frames so far say."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._player = Player(source)
        self._events: list[Event] = []  # since the last frame
        self._told: dict[int, _Told] = {}
        self._tables: Tables = {}
        self._host_tables: Tables = {}
        self._host = Pool()
        self._queues: tuple[tuple[int, ...], ...] = ()
        self._num_blocks = 0
        self.kinds: dict[str, int] = {}
        self.tokens: dict[str, int] = {"": 0}

    @property
    def view(self) -> _Moment:
        """Where it stands."""
        return _Moment(self._player.snapshot, self._player.delta)

    def advance_to(self, position: int) -> bool:
        """Go on to there; False where the trace ends before."""
        player = self._player
        for delta in player.advance(position - player.position):
            self._events += [event for event in beside_appends(delta.events) if event.kind != "append"]
        if len(player.snapshot.device) > MOST_BLOCKS:
            raise InputError(
                f"the pool has {len(player.snapshot.device) - 1:,} blocks, and a page draws at most {MOST_BLOCKS:,}:"
                " open this trace with minipaged tui --replay"
            )
        return player.position == position

    def frame(self) -> Document:
        """What has changed since the last one. Empty parts are left out."""
        snapshot, view = self._player.snapshot, self.view
        changed = self._player.take_changed()
        if len(snapshot.device) > self._num_blocks:  # at the start, which of a server's recording may be in the middle
            self._num_blocks = len(snapshot.device)
            changed = np.arange(self._num_blocks, dtype=np.int32)
        tables = _changed_tables(self._tables, snapshot.tables)
        host_tables = _changed_tables(self._host_tables, snapshot.host_tables)
        self._tables, self._host_tables = dict(snapshot.tables), dict(snapshot.host_tables)
        queues = tuple(snapshot.queues)
        found: Document = {
            "at": self._player.position,
            "step": snapshot.step,
            "say": sentence(view)[:MOST_SAID],
            "blocks": _block_values(snapshot.device, changed),
            "host": self._host_values(snapshot.host),
            "tables": tables,
            "host_tables": host_tables,
            **self._sequences(snapshot),
            "queues": [list(queue) for queue in queues] if queues != self._queues else [],
            "events": [self._event(event) for event in self._events],
            "stats": _gauges(snapshot.stats),
        }
        self._queues = queues
        self._events = []
        return {name: values for name, values in found.items() if values or name in ("at", "step")}

    def _event(self, event: Event) -> Values:
        kind = self.kinds.setdefault(event.kind, len(self.kinds))
        return [kind, event.sequence, event.block, event.other]

    def _host_values(self, host: Pool) -> Values:
        before = self._host
        before.grow(len(host))
        differs = np.zeros(len(host), bool)
        for name in COLUMNS:
            differs |= getattr(before, name) != getattr(host, name)
        self._host = host.copy()
        return _block_values(host, np.flatnonzero(differs).astype(np.int32))

    def _sequences(self, snapshot: Snapshot) -> Document:
        others = other_hues(snapshot)
        changed: list[list[Any]] = []
        computed: Values = []
        written: dict[str, Values] = {}
        for sequence, state in snapshot.sequences.items():
            told = self._told.get(sequence)
            if told is None:
                told = self._told[sequence] = _Told()
            hue = others.get(sequence, state.label % NUM_HUES)
            values = [letter(state.label), hue, state.request, state.parent, printable(state.status)]
            values += [state.num_prompt, state.num_cached, printable(state.finish_reason)]
            if values != told.values:
                told.values = values
                changed.append([sequence, *values])
            if state.num_computed != told.num_computed:
                told.num_computed = state.num_computed
                computed += [sequence, state.num_computed]
            if len(state.token_ids) > told.num_tokens:
                written[str(sequence)] = self._pieces(told, state)
        gone = [sequence for sequence in self._told if sequence not in snapshot.sequences]
        for sequence in gone:
            del self._told[sequence]
        return {"sequences": changed, "computed": computed, "written": written, "gone": gone}

    def _pieces(self, told: _Told, state: SequenceState) -> Values:
        """The new tokens' texts, by their number in `tokens`. A character that several tokens make stands in the last one's."""
        pieces: Values = []
        for token in state.token_ids[told.num_tokens :]:
            known = state.token_bytes.get(token)
            text = f"‹{token}›" if known is None else printable(told.reader.decode(known))
            if not told.num_tokens and not pieces:
                text = text.removeprefix(" ")
            pieces.append(self.tokens.setdefault(text, len(self.tokens)))
        told.num_tokens = len(state.token_ids)
        return pieces


def _gauges(stats: Stats) -> Values:
    return [getattr(stats, name) for name in GAUGES]


def _block_values(pool: Pool, ids: npt.NDArray[np.int32]) -> Values:
    """Five numbers a block: its id, owner, reference count, fill and flags."""
    if not len(ids):
        return []
    columns = [ids, *(getattr(pool, name)[ids] for name in COLUMNS)]
    found: Values = np.stack(columns, axis=1, dtype=np.int64, casting="same_kind").ravel().tolist()
    return found


def _changed_tables(before: Mapping[int, tuple[int, ...]], now: Mapping[int, tuple[int, ...]]) -> dict[str, Values]:
    """Sequence -> how many entries stay, and those that follow."""
    found: dict[str, Values] = {}
    for sequence in before.keys() | now.keys():
        old, new = before.get(sequence, ()), now.get(sequence, ())
        if old is new or old == new:
            continue
        kept = 0
        while kept < min(len(old), len(new)) and old[kept] == new[kept]:
            kept += 1
        found[str(sequence)] = [kept, *new[kept:]]
    return found
