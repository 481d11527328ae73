"""Memory of Text Generation Inference: before version 0.9 padded rows that merge into the running batch, then blocks that are all
taken at admission.
"""

from __future__ import annotations

from minipaged.baselines.reservations import Piece, Reservations, Row, body, lay
from minipaged.memory.types import Run


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
