"""Memory of systems whose batch nobody joins: all rows start together, and all places return when the last row ends.

Here stand Hugging Face's `generate` (static), FasterTransformer, and the one-request-at-a-time loop of a web UI.
"""

from __future__ import annotations

from minipaged.baselines.reservations import Piece, Reservations, Row, body, cover, lay
from minipaged.errors import InputError
from minipaged.memory.types import PoolBreakdown, Run


class BatchReservations(Reservations):
    """A batch that nobody joins: rows are admitted until the first slot is written, and all places return when the
    last row ends.
    """

    joins = False

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        super().__init__(pool, max_len=max_len, block_size=block_size)
        self.closed = False
        self._alive = 0

    def admit(self, key: int, prompt: int, output: int, max_new: int) -> bool:
        if self.closed:
            self.check_row(prompt, output, max_new)
            return False
        admitted = super().admit(key, prompt, output, max_new)
        self._alive += admitted
        return admitted

    def grow(self, key: int, tokens: int) -> None:
        super().grow(key, tokens)
        self.closed = True

    def cancel(self, key: int) -> None:
        if self.closed:
            raise InputError(f"row {key} cannot be cancelled: its batch runs")
        super().cancel(key)
        self._alive -= 1

    def close(self) -> None:
        self.closed = bool(self.rows)

    @property
    def num_live(self) -> int:
        return self._alive

    def _end(self, key: int, row: Row) -> None:
        row.ended = True
        self._alive -= 1
        if self._alive == 0:
            self.rows.clear()
            self.closed = False
            self._clear()

    def _clear(self) -> None:
        """Give the batch's buffer back."""


class StaticBatch(BatchReservations):
    """Hugging Face `generate` with the traditional cache: one slab of batch x (longest padded prompt + most new
    tokens).
    """

    name = "static"

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        super().__init__(pool, max_len=max_len, block_size=block_size)
        self._clear()

    def _clear(self) -> None:
        self.longest = self._most_new = 0

    def _leave(self, key: int, row: Row) -> None:
        self.longest = max((other.prompt for other in self.rows.values()), default=0)
        self._most_new = max((other.max_new for other in self.rows.values()), default=0)

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        longest, most_new = max(self.longest, prompt), max(self._most_new, max_new)
        if (len(self.rows) + 1) * (longest + most_new) > self.pool:
            return None
        self.longest, self._most_new = longest, most_new
        return Row(prompt, output, max_new, prompt + max_new, prompt + max_new, 0)

    def _padding(self) -> int:
        """What the slab holds beyond the rows that run: left padding, shorter limits, ended rows."""
        return len(self.rows) * (self.longest + self._most_new) - self._chunks

    def _row_pieces(self, key: int, row: Row) -> list[Piece]:
        width = self.longest + self._most_new
        start = list(self.rows).index(key) * width
        if row.ended:
            return [(start, width, "padding", key)]
        around = (self.longest - row.prompt, "padding"), (self._most_new - row.max_new, "padding")
        return lay(start, (around[0], *body(row), around[1]), key)


class FasterTransformer(BatchReservations):
    """The whole context a row, in a buffer that is kept from batch to batch at the largest size it ever had."""

    name = "fastertransformer"

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        super().__init__(pool, max_len=max_len, block_size=block_size)
        self.buffer_rows = 0

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        start = len(self.rows) * self.max_len
        if start + self.max_len > self.pool:
            return None
        return Row(prompt, output, max_new, self.max_len, self.max_len, start)

    def close(self) -> None:
        super().close()
        self.buffer_rows = max(self.buffer_rows, len(self.rows))

    def grow(self, key: int, tokens: int) -> None:
        super().grow(key, tokens)
        self.close()

    def _padding(self) -> int:
        return max(self.buffer_rows, len(self.rows)) * self.max_len - self._chunks

    def _row_pieces(self, key: int, row: Row) -> list[Piece]:
        return [(row.start, self.max_len, "padding", key)] if row.ended else super()._row_pieces(key, row)

    def runs(self, *, waiting: bool) -> tuple[Run, ...]:
        """Rows stand in order of admission; the kept ones that nobody uses are padding."""
        edge, kept = len(self.rows) * self.max_len, self.buffer_rows * self.max_len
        pieces = [piece for key, row in self.rows.items() for piece in self._row_pieces(key, row) if piece[1]]
        if kept > edge:
            pieces.append((edge, kept - edge, "padding", -1))
        return cover(pieces, self.pool, "external" if waiting else "idle")


class WebUI(Reservations):
    """One request at a time; each step builds a cache one slot longer beside the old one, so two copies stand at the
    peak.
    """

    name = "webui"
    joins = False

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        return None if self.rows or 2 * (prompt + output) > self.pool else Row(prompt, output, max_new, 0, 0, 0)

    def breakdown(self, *, waiting: bool, tokens: int | None = None) -> PoolBreakdown:
        written = self._tokens if tokens is None else tokens
        rest = self.pool - 2 * written
        return PoolBreakdown(written, 0, 0, written + (rest if waiting else 0), 0, 0 if waiting else rest)

    def used(self) -> int:
        return 2 * self._tokens

    def _row_pieces(self, key: int, row: Row) -> list[Piece]:
        return lay(0, ((row.tokens, "token"), (row.tokens, "external")), key)
