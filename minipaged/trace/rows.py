"""Rows of a delta kept as columns: what nearly all running sequences do in a step is the same, so it is told as arrays.

A step of plain decoding changes hundreds of sequences, each by one token. Making a Python object of each takes longer than all else
that the trace does, and an encoder takes them apart again; so they are made only for whoever looks at them one by one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

from minipaged.trace.records import Event, SequencePatch

Row = TypeVar("Row")
Longs = npt.NDArray[np.int64]


class Rows(Sequence[Row]):
    """Reads as the tuple of its rows, and equals it; the rows are made when somebody first looks at one."""

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: tuple[Row, ...] | None = None

    @abstractmethod
    def _make(self) -> tuple[Row, ...]:
        """All rows."""

    @property
    def _rows(self) -> tuple[Row, ...]:
        if self._made is None:
            self._made = self._make()
        return self._made

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return self._rows == tuple(other) if isinstance(other, (tuple, Rows)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._rows)

    def __repr__(self) -> str:
        return repr(self._rows)


class EventRows(Rows[Event]):
    """`first`, then one "append" a row of the step's plan: numbered from `next_id`, `lengths[i]` tokens of sequence `seq_ids[i]`."""

    __slots__ = ("first", "lengths", "next_id", "seq_ids")

    def __init__(self, first: tuple[Event, ...], next_id: int, seq_ids: Longs, lengths: npt.NDArray[np.int32]) -> None:
        super().__init__()
        self.first = first
        self.next_id = next_id
        self.seq_ids = seq_ids
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.first) + len(self.seq_ids)

    def _make(self) -> tuple[Event, ...]:
        rows = enumerate(zip(self.seq_ids.tolist(), self.lengths.tolist(), strict=True), self.next_id)
        return self.first + tuple(Event(number, "append", -1, seq_id, -1, -1, n) for number, (seq_id, n) in rows)


def beside_appends(events: Sequence[Event]) -> Sequence[Event]:
    """The events without most appends, of which there is one a sequence and step: for whoever looks for others. Makes no row."""
    return events.first if isinstance(events, EventRows) else events


class PlainColumns(NamedTuple):
    """Running sequences that were told before and have gained at most one token since; all columns are of equal length but the last two.

    Their status is "running", their score not tracked, their finish reason ""; a fold that has their earlier patches knows all but
    `num_computed`, the tokens and the text.
    """

    sequence: Longs
    request: Longs
    parent: Longs
    num_computed: Longs
    num_cached: Longs
    num_prompt: Longs
    num_tokens: Longs  # 0 or 1
    token_ids: list[int]  # of those that gained one, in order
    texts: list[bytes]  # what each of these reads


class SequenceRows(Rows[SequencePatch]):
    """`first`, then those of `plain`."""

    __slots__ = ("first", "plain")

    def __init__(self, first: tuple[SequencePatch, ...], plain: PlainColumns) -> None:
        super().__init__()
        self.first = first
        self.plain = plain

    def __len__(self) -> int:
        return len(self.first) + len(self.plain.sequence)

    def _make(self) -> tuple[SequencePatch, ...]:
        plain = self.plain
        drawn = zip(plain.token_ids, plain.texts, strict=True)
        made = list(self.first)
        for *known, num_tokens in zip(*(column.tolist() for column in plain[:7]), strict=True):
            token, text = next(drawn) if num_tokens else (None, b"")
            sequence, request, parent, computed, cached, prompt = known
            tokens = () if token is None else (token,)
            made.append(
                SequencePatch(
                    sequence, request, parent, "running", computed, cached, prompt, tokens, text, math.nan, ""
                )
            )
        return tuple(made)
