"""What a system that reserves ahead holds, as accounting over the slots of one pool.

There is no time, queue or kernel here, only the prompt, answer and limit of each row. The split of the pool is that of
the PagedAttention paper (section 3.1, Fig. 2): with t slots written of a row that will need p + o, of which R were
reserved and C taken,
  token t . reserved (p + o) - t . internal R - (p + o) . external (C - R) and what is free while somebody waits
and beside it: padding (left padding, rows that ended in a static batch), and idle: what is free while nobody waits.
The systems themselves stand in batches.py, orca.py and tgi.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipaged.config import check_int
from minipaged.errors import InputError
from minipaged.memory.types import PoolBreakdown, Run

Piece = tuple[int, int, str, int]  # start, length, kind, key


@dataclass(slots=True)
class Row:
    """One sequence's place in a pool. All in slots."""

    prompt: int
    output: int  # what it will answer in truth; known in hindsight, used by the accounting and by orca-oracle alone
    max_new: int  # what its client allows
    reserved: int  # R
    chunk: int  # C
    start: int
    tokens: int = 0  # t: slots whose KV is written
    ended: bool = False  # a finished row that its batch still holds


class Reservations:
    """Rows in a pool of `pool` slots. Subclasses say what a row takes and where.

    A row is admitted with nothing written; `grow` counts slots as they are written. Sums over the rows are kept, so
    that `breakdown` is O(1).
    """

    name = ""
    joins = True  # whether a new row may enter while others run

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        self.pool = check_int("pool", pool, 1)
        self.max_len = check_int("max_len", max_len, 1)
        self.block_size = check_int("block_size", block_size, 1)
        self.rows: dict[int, Row] = {}
        # Sums over the rows that have not ended: t, p, p + o, R and C.
        self._tokens = self._prompts = self._needed = self._reserved = self._chunks = 0

    # What a subclass decides

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        """A new row in its place, or None where it does not fit now."""
        raise NotImplementedError

    def _leave(self, key: int, row: Row) -> None:
        """Give the row's place back."""

    def _padding(self) -> int:
        """Slots held for nothing: left padding and ended rows."""
        return 0

    # What all of them do

    def check_row(self, prompt: int, output: int, max_new: int) -> None:
        """Raise InputError for lengths that no system could serve."""
        check_int("prompt", prompt, 1)
        check_int("output", output, 1)
        check_int("max_new", max_new, output)
        if prompt + output > self.max_len:
            raise InputError(f"prompt {prompt} and output {output} exceed the context of {self.max_len} tokens")

    def admit(self, key: int, prompt: int, output: int, max_new: int) -> bool:
        """Take a place for a row; False where there is none now (then nothing changed)."""
        if key in self.rows:
            raise InputError(f"row {key} is already in the pool")
        self.check_row(prompt, output, max_new)
        row = self._place(prompt, output, min(max_new, self.max_len - prompt))
        if row is None:
            return False
        self.rows[key] = row
        self._prompts += prompt
        self._needed += prompt + output
        self._reserved += row.reserved
        self._chunks += row.chunk
        return True

    def grow(self, key: int, tokens: int) -> None:
        """`tokens` more slots of this row are written. Raises InputError past what the row will need."""
        row = self.rows[key]
        need = row.prompt + row.output
        if row.ended or tokens < 0 or row.tokens + tokens > need:
            raise InputError(f"row {key} cannot grow by {tokens}: it holds {row.tokens} of {need} tokens")
        row.tokens += tokens
        self._tokens += tokens

    def finish(self, key: int) -> None:
        """The row's answer is complete. Raises KeyError if it is unknown or already finished."""
        row = self.rows[key]
        if row.ended:
            raise KeyError(key)
        self._tokens -= row.tokens
        self._prompts -= row.prompt
        self._needed -= row.prompt + row.output
        self._reserved -= row.reserved
        self._chunks -= row.chunk
        self._end(key, row)

    def _end(self, key: int, row: Row) -> None:
        del self.rows[key]
        self._leave(key, row)

    def cancel(self, key: int) -> None:
        """Undo an admission before anything was written, as if it had never been. Raises KeyError if the row is unknown."""
        row = self.rows[key]
        if row.tokens:
            raise InputError(f"row {key} cannot be cancelled: {row.tokens} of its tokens are written")
        self._prompts -= row.prompt
        self._needed -= row.prompt + row.output
        self._reserved -= row.reserved
        self._chunks -= row.chunk
        del self.rows[key]
        self._leave(key, row)

    def close(self) -> None:
        """The rows admitted so far start to run: where a batch is static, nobody joins from here on."""

    @property
    def num_live(self) -> int:
        """Rows that have not finished."""
        return len(self.rows)

    def used(self) -> int:
        """Slots that nobody else can take."""
        return self._chunks + self._padding()

    def breakdown(self, *, waiting: bool, tokens: int | None = None) -> PoolBreakdown:
        """The pool by what its slots hold. `waiting`: whether a request waits for room, which makes free slots
        fragmentation. `tokens`: the slots written in all rows, from a caller that counts them instead of calling
        `grow`.
        """
        written = self._tokens if tokens is None else tokens
        padding = self._padding()
        rest = self.pool - self._chunks - padding
        return PoolBreakdown(
            token=written,
            reserved=self._needed - written,
            internal=self._reserved - self._needed,
            external=self._chunks - self._reserved + (rest if waiting else 0),
            padding=padding,
            idle=0 if waiting else rest,
        )

    def runs(self, *, waiting: bool) -> tuple[Run, ...]:
        """The same as runs of consecutive slots, by address, for a picture; they cover the pool."""
        pieces = sorted(piece for key, row in self.rows.items() for piece in self._row_pieces(key, row) if piece[1])
        return cover(pieces, self.pool, "external" if waiting else "idle")

    def _row_pieces(self, key: int, row: Row) -> list[Piece]:
        return lay(row.start, body(row), key)


def body(row: Row) -> tuple[tuple[int, str], ...]:
    """A row's own slots: written, still to come, never needed, rounded up."""
    need = row.prompt + row.output
    return (
        (row.tokens, "token"),
        (need - row.tokens, "reserved"),
        (row.reserved - need, "internal"),
        (row.chunk - row.reserved, "external"),
    )


def lay(start: int, parts: tuple[tuple[int, str], ...], key: int) -> list[Piece]:
    """(length, kind) parts side by side from `start`."""
    pieces = []
    for length, kind in parts:
        pieces.append((start, length, kind, key))
        start += length
    return pieces


def cover(pieces: list[Piece], pool: int, gap: str) -> tuple[Run, ...]:
    """Sorted pieces as runs, with `gap` runs between them and to the pool's end."""
    out: list[Run] = []
    at = 0
    for start, length, kind, key in pieces:
        if start > at:
            out.append(Run(at, start - at, gap, -1))
        out.append(Run(start, length, kind, key))
        at = start + length
    if at < pool:
        out.append(Run(at, pool - at, gap, -1))
    return tuple(out)
