"""The systems that paging is compared with, each by the place it gives a row.

Knows the rule of each; knows nothing of time or kernels. Units are slots.
"""

from __future__ import annotations

from collections.abc import Callable

from minipaged.baselines.buddy import BuddyAllocator, next_power_of_two
from minipaged.baselines.reservations import Piece, Reservations, Row, body, cover, lay
from minipaged.errors import InputError
from minipaged.memory.types import PoolBreakdown, Run


class Orca(Reservations):
    """Orca (Yu et al., OSDI 2022) with a buddy allocator: one contiguous run a row, from admission to finish."""

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        super().__init__(pool, max_len=max_len, block_size=block_size)
        self.buddy = BuddyAllocator(pool, next_power_of_two(max_len))

    def reserve(self, prompt: int, output: int) -> int:
        """Slots that a row asks for."""
        raise NotImplementedError

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        reserved = self.reserve(prompt, output)
        start = self.buddy.allocate(reserved)
        if start is None:
            return None
        return Row(prompt, output, max_new, reserved, self.buddy.size_of(start), start)

    def _leave(self, key: int, row: Row) -> None:
        self.buddy.free(row.start)


class OrcaMax(Orca):
    """Reserves the whole context."""

    name = "orca-max"

    def reserve(self, prompt: int, output: int) -> int:
        return self.max_len


class OrcaPow2(Orca):
    """Guesses the answer within a factor of two."""

    name = "orca-pow2"

    def reserve(self, prompt: int, output: int) -> int:
        return min(self.max_len, prompt + next_power_of_two(output))


class OrcaOracle(Orca):
    """Knows the answer's length: not buildable, the best that contiguous reservation can be."""

    name = "orca-oracle"

    def reserve(self, prompt: int, output: int) -> int:
        return prompt + output


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

    def bands(self, *, waiting: bool, tokens: int | None = None) -> PoolBreakdown:
        written = self._tokens if tokens is None else tokens
        rest = self.pool - 2 * written
        return PoolBreakdown(written, 0, 0, written + (rest if waiting else 0), 0, 0 if waiting else rest)

    def used(self) -> int:
        return 2 * self._tokens

    def _row_pieces(self, key: int, row: Row) -> list[Piece]:
        return lay(0, ((row.tokens, "token"), (row.tokens, "external")), key)


class EarlyTGI(Reservations):
    """Text Generation Inference 0.1 to 0.8: new requests merge into the running batch, prompts padded to the longest
    of all rows.
    """

    name = "tgi-early"

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        super().__init__(pool, max_len=max_len, block_size=block_size)
        self.longest = 0

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        longest = max(self.longest, prompt)
        unpadded = self._chunks - self._prompts
        if (len(self.rows) + 1) * longest + unpadded + max_new > self.pool:
            return None
        self.longest = longest
        return Row(prompt, output, max_new, prompt + max_new, prompt + max_new, 0)

    def _leave(self, key: int, row: Row) -> None:
        if row.prompt == self.longest:
            self.longest = max((other.prompt for other in self.rows.values()), default=0)

    def _padding(self) -> int:
        return len(self.rows) * self.longest - self._prompts

    def runs(self, *, waiting: bool) -> tuple[Run, ...]:
        """Rows in order of admission, one after the other: concatenation leaves no holes."""
        at = 0
        for row in self.rows.values():
            row.start = at
            at += self.longest + row.max_new
        return super().runs(waiting=waiting)

    def _row_pieces(self, key: int, row: Row) -> list[Piece]:
        return lay(row.start, ((self.longest - row.prompt, "padding"), *body(row)), key)


class PagedTGI(Reservations):
    """Text Generation Inference from 0.9: blocks, but all that the request may ever need are taken at admission."""

    name = "tgi-paged"

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        super().__init__(pool, max_len=max_len, block_size=block_size)
        self._free = list(range(pool // block_size - 1, -1, -1))  # a stack of block numbers
        self._blocks: dict[int, list[int]] = {}

    def admit(self, key: int, prompt: int, output: int, max_new: int) -> bool:
        admitted = super().admit(key, prompt, output, max_new)
        if admitted:
            count = self.rows[key].chunk // self.block_size
            self._blocks[key] = self._free[-count:][::-1]
            del self._free[-count:]
        return admitted

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        blocks = -(-(prompt + max_new) // self.block_size)
        if blocks > len(self._free):
            return None
        return Row(prompt, output, max_new, blocks * self.block_size, blocks * self.block_size, 0)

    def _leave(self, key: int, row: Row) -> None:
        self._free.extend(reversed(self._blocks.pop(key)))

    def _row_pieces(self, key: int, row: Row) -> list[Piece]:
        pieces: list[Piece] = []
        need = row.prompt + row.output
        edges = (0, row.tokens, need, row.reserved)
        for i, block in enumerate(self._blocks[key]):
            low, high = i * self.block_size, (i + 1) * self.block_size
            for kind, start, end in zip(("token", "reserved", "internal"), edges, edges[1:], strict=False):
                inside = min(high, end) - max(low, start)
                if inside > 0:
                    pieces.append((block * self.block_size + max(low, start) - low, inside, kind, key))
        return pieces


RESERVING: dict[str, Callable[..., Reservations]] = {
    kind.name: kind
    for kind in (WebUI, StaticBatch, FasterTransformer, OrcaMax, OrcaPow2, OrcaOracle, EarlyTGI, PagedTGI)
}
SYSTEMS: tuple[str, ...] = (*RESERVING, "vllm")


def reservations(system: str, pool: int, *, max_len: int = 2048, block_size: int = 16) -> Reservations:
    """The accounting of a system that reserves ahead. Raises InputError that lists the known ones."""
    kind = RESERVING.get(system)
    if kind is None:
        raise InputError(f"unknown system {system!r}; known: {', '.join(RESERVING)}")
    return kind(pool, max_len=max_len, block_size=block_size)
