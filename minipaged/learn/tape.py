"""Records a lesson's own small block manager for the screen: after each operation it is given the tables and lengths, and writes a step.

Everything that the screen shows is computed from the tables and lengths, whichever class keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minipaged.learn.replays import RECORDINGS
from minipaged.learn.workspace import PROGRESS
from minipaged.trace.events import Queues, SequencePatch, Stats, StepDelta
from minipaged.trace.file import Header, StreamWriter
from minipaged.trace.observed import Line, ObservedSteps

Names = Mapping[str, Sequence[int]]


@dataclass
class _Player:
    """A sequence of the learner's. Nobody says which tokens it has: each gets a number of its own."""

    number: int
    token_ids: list[int] = field(default_factory=list)
    sent: str = ""  # the text that its tokens read so far


class Tape:
    """A trace of a pool of `num_blocks` blocks, the null block among them, of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._observed = ObservedSteps()
        self._players: dict[str, _Player] = {}  # those that have not ended
        self._num_players = 0
        self._token_bytes: list[bytes] = []  # by token

    @property
    def deltas(self) -> list[StepDelta]:
        """One for each operation."""
        return self._observed.deltas

    def note(self, tables: Names, lengths: Mapping[str, int], texts: Mapping[str, str] | None = None) -> None:
        """How things stand after one operation. A sequence that is missing has ended."""
        for name in tables:
            if name not in self._players:
                self._players[name] = _Player(self._num_players)
                self._num_players += 1
        lines = []
        for name, player in self._players.items():
            if name in tables:
                self._grow(player, lengths[name], (texts or {}).get(name, ""))
            lines.append(self._line(player, lengths[name] if name in tables else 0, ended=name not in tables))
        held = len({block for table in tables.values() for block in table if block})
        self._observed.add(
            lines=lines,
            stats=Stats(
                total_blocks=self.num_blocks, free_blocks=self.num_blocks - 1 - held, block_size=self.block_size
            ),
            queues=Queues(running=tuple(self._players[name].number for name in tables)),
            tables={self._players[name].number: tuple(table) for name, table in tables.items()},
            token_bytes=self._token_bytes.__getitem__,
        )
        self._players = {name: player for name, player in self._players.items() if name in tables}

    def _grow(self, player: _Player, length: int, text: str) -> None:
        """Give it as many tokens; what its text has gained is shared out among those that are new."""
        new = length - len(player.token_ids)
        if new <= 0:
            return
        added = text.removeprefix(player.sent).encode()
        part = -(-len(added) // new)
        first = len(self._token_bytes)
        player.token_ids += range(first, first + new)
        self._token_bytes += [added[i * part : (i + 1) * part] for i in range(new)]
        player.sent = text or player.sent

    @staticmethod
    def _line(player: _Player, length: int, *, ended: bool) -> Line:
        status, reason = ("finished", "stop") if ended else ("running", "")
        patch = SequencePatch(player.number, player.number, -1, status, 0, 0, math.nan, reason)
        return Line(patch, length, tuple(player.token_ids))

    def save(self, lesson: str) -> Path | None:
        """Write the trace where `minipaged learn show` looks for it. None outside of a learner's folder: nothing is written there."""
        if not Path(PROGRESS).is_file():
            return None
        Path(RECORDINGS).mkdir(exist_ok=True)
        path = Path(RECORDINGS) / f"{lesson}.trace"
        self.write(path)
        return path

    def write(self, path: Path) -> None:
        """Write the trace to a file."""
        with path.open("wb") as file:
            writer = StreamWriter(file, Header(model="your own code", engine={"block_size": self.block_size}))
            for delta in self.deltas:
                writer.delta(delta)
            writer.finish()
