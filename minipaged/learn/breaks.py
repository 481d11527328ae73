"""Break it: a bug of the past is put into a copy of the block manager, a short story is played with it and recorded, and the learner names
the law that broke.

The bugs are those of `tests/mutants/memory_bugs.py`, which a link brings into the package. Nothing that is installed is changed: each
bug is a subclass. Tokens are letters, so the screen shows what lies where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minipaged.errors import InputError
from minipaged.learn import memory_bugs as bugs
from minipaged.memory.block_manager import BlockManager
from minipaged.trace.file import Header, StreamWriter
from minipaged.trace.observed import Actor, ManagerTrace

BLOCK_SIZE = 4


@dataclass(frozen=True, slots=True)
class Break:
    """A bug, a story that shows it, and the laws that it breaks: the one that names it best comes first."""

    kind: type[BlockManager]
    lesson: int  # whose subject it is
    laws: tuple[str, ...]
    story: Callable[[Stage], None]
    look_at: str
    num_blocks: int = 10


class Stage:
    """A manager on which a story is played. Each call is a step of the recording."""

    def __init__(self, kind: type[BlockManager], num_blocks: int) -> None:
        self.manager = kind(num_blocks=num_blocks, block_size=BLOCK_SIZE, num_host_blocks=8)
        letters = {n: bytes([n]) for n in range(256)}
        self.trace = ManagerTrace(self.manager, BLOCK_SIZE, letters)
        self.num_blocks = num_blocks

    def start(self, seq: int, text: str) -> None:
        """A new sequence, computed at once, but for what is found in the cache."""
        tokens = list(text.encode())
        allocation = self.manager.allocate(seq, tokens)
        if allocation is None:
            raise ValueError(f"no room for {text!r}")
        self.manager.mark_computed(seq, tokens[allocation.cached_tokens :])
        self.trace.actors[seq] = Actor(token_ids=tokens, num_prompt=len(tokens), num_computed=len(tokens))
        self._note()

    def write(self, seq: int, text: str) -> None:
        """The sequence writes, a letter a step."""
        for token in text.encode():
            self.manager.append(seq, 1)
            self.manager.mark_computed(seq, [token])
            actor = self.trace.actors[seq]
            actor.token_ids = [*actor.token_ids, token]
            actor.num_computed += 1
            self._note()

    def give_up(self, seq: int) -> None:
        """It asks for room for a token, and is aborted before the token is written."""
        self.manager.append(seq, 1)
        self.end(seq)

    def fork(self, parent: int, child: int) -> None:
        """A child with the parent's table."""
        self.manager.fork(parent, child)
        was = self.trace.actors[parent]
        self.trace.actors[child] = Actor(parent, "running", list(was.token_ids), was.num_prompt, was.num_computed)
        self._note()

    def release(self, seq: int, *entries: int) -> None:
        """These entries have left the window."""
        self.manager.release(seq, entries)
        self._note()

    def end(self, seq: int) -> None:
        """The sequence is complete, or given up."""
        self.manager.free(seq)
        self.trace.actors[seq].status = "finished"
        self._note()

    def swap_out(self, *seqs: int) -> None:
        """These leave for the host, together."""
        self.manager.swap_out(seqs)
        for seq in seqs:
            self.trace.actors[seq].status = "swapped"
        self._note()

    def _note(self) -> None:
        counts = [self.manager.ref_count(block) if block else 0 for block in range(self.num_blocks)]
        self.trace.step(counts)
        for seq in [seq for seq, actor in self.trace.actors.items() if actor.status == "finished"]:
            del self.trace.actors[seq]
        self.manager.begin_step()


def _uncounted(stage: Stage) -> None:
    stage.start(0, "pages of a")
    stage.fork(0, 1)
    stage.fork(0, 2)


def _held(stage: Stage) -> None:
    stage.start(0, "pages of a")
    stage.fork(0, 1)
    stage.write(1, " book")
    stage.end(0)


def _late(stage: Stage) -> None:
    stage.start(0, "pag")
    stage.write(0, "es")


def _leaks(stage: Stage) -> None:
    stage.start(0, "pages of a")
    for child in (1, 2, 3):
        stage.fork(0, child)
        stage.give_up(child)


def _stale(stage: Stage) -> None:
    stage.start(0, "pages of")
    stage.end(0)
    stage.start(1, "other things altogether, and more!")
    stage.end(1)
    stage.start(2, "a long one that takes back all..")
    stage.start(3, "pages of")


def _whole(stage: Stage) -> None:
    stage.start(0, "pages of")
    stage.start(1, "pages of")
    stage.write(1, " a")


def _steals(stage: Stage) -> None:
    stage.start(0, "pages of")
    stage.start(1, "pages of a book")
    stage.swap_out(0)
    stage.start(2, "another story")


def _doubles(stage: Stage) -> None:
    stage.start(0, "pages of a")
    stage.fork(0, 1)
    stage.swap_out(0, 1)


def _twice(stage: Stage) -> None:
    stage.start(0, "pages of a book")
    stage.release(0, 0)
    stage.start(1, "another story")
    stage.release(0, 0, 1)


BREAKS: tuple[Break, ...] = (
    Break(bugs.UncountedFork, 8, ("L12", "L02"), _uncounted, "Open the inspector on the blocks of the fork."),
    Break(bugs.FreedWhileHeld, 8, ("L20", "L02", "L04", "L09"), _held, "Watch B's blocks when A has ended."),
    Break(bugs.LateBoundary, 6, ("L11", "L10"), _late, "Count what the table has room for, and what was written."),
    Break(bugs.AbortLeaks, 8, ("L53", "L02", "L18"), _leaks, "Count the free blocks. Who holds the others?"),
    Break(bugs.StaleKey, 10, ("L32", "L09", "L22"), _stale, "Read the blocks that the last one has found.", 12),
    Break(bugs.FullHit, 10, ("L24",), _whole, "What is left to compute for the one who finds something?"),
    Break(bugs.SwapStealsShared, 11, ("L47", "L02", "L04", "L09"), _steals, "Who holds the blocks of those who stay?"),
    Break(bugs.SwapDuplicates, 11, ("L47",), _doubles, "Count the blocks before and after the trip to the host."),
    Break(bugs.ReleasedTwice, 16, ("L56", "L02", "L20"), _twice, "Which blocks go back, and how often?", 8),
)


def choose(number: int) -> Break:
    """Break `number`, from 1. InputError if there is none."""
    if not 1 <= number <= len(BREAKS):
        raise InputError(f"break must be from 1 to {len(BREAKS)}, not {number}")
    return BREAKS[number - 1]


def candidates() -> frozenset[str]:
    """The laws to choose from, the same for every break: those that break, and a few that don't."""
    return frozenset({one.laws[0] for one in BREAKS} | {"L13", "L15", "L21", "L31"})


def play(one: Break, kind: type[BlockManager], target: Path) -> str:
    """Play the story with a manager of this kind, and write its trace. Returns what ended it early, or ""."""
    stage = Stage(kind, one.num_blocks)
    ended = ""
    try:
        one.story(stage)
    except Exception as error:  # a broken manager may raise anything
        ended = f"{type(error).__name__}: {error}"
    with target.open("wb") as file:
        writer = StreamWriter(file, Header(model="one bug in it", engine={"block_size": BLOCK_SIZE}))
        for delta in stage.trace.deltas:
            writer.delta(delta)
        writer.finish()
    return ended
