"""The memory of a simulated system, as the event loop sees it: rows that reserve ahead, or blocks on demand.

A request is named by its index in the workload. All decoding rows grow by one token a step, so that blocks on demand
are counted by the phase of a row within its block, not row by row.
"""

from __future__ import annotations

from typing import Protocol

from minipaged.baselines.reservations import Reservations
from minipaged.config import MAX_BLOCK_SIZE, check_int
from minipaged.lab.simulation.beams import BeamTree, beam_tree
from minipaged.lab.simulation.workloads import Workload
from minipaged.memory.types import PoolBreakdown


class SimulatedMemory(Protocol):
    """What the event loop asks of a memory."""

    joins: bool  # a request may enter while others run
    steady: bool  # what is held changes only by `admit` and `leave`, never by a decode step
    regular: bool  # a decode step never frees anything, so that who could not enter before it can't enter after it
    cached: int  # leading tokens of every prompt that are held from the start and need no computing

    def admit(self, index: int, known: int) -> bool:
        """Take room for a request of which `known` tokens are to be computed now (more than its prompt if it was
        preempted).
        """
        ...

    def close(self) -> None:
        """The admitted requests start to run."""
        ...

    def start(self, index: int, known: int) -> int:
        """The request's first token is drawn: its n rows decode from here on. Returns the slots that were copied for
        that.
        """
        ...

    def take_step(self) -> bool:
        """Room for one more token in every decoding row; False: there is none, and nothing changed."""
        ...

    def step_slots(self, rows: int) -> tuple[int, int]:
        """(distinct slots written, slots copied) by the step just taken, of `rows` decoding rows."""
        ...

    def leave(self, index: int, written: int, *, decoding: bool = True) -> None:
        """The request gives everything back; `written`: tokens in each of its rows."""
        ...

    def slots(self, index: int, written: int) -> int:
        """Distinct slots that hold `written` tokens in each of its rows once they decode, cached ones left out."""
        ...

    def breakdown(self, tokens: int, *, waiting: bool) -> PoolBreakdown:
        """The pool by what it holds, given the slots written in all."""
        ...

    def blocks(self) -> tuple[int, int]:
        """(blocks held, blocks saved by sharing); (0, 0) where there are no blocks."""
        ...


class ReservingMemory:
    """A system of baselines/systems.py. Samples and beams are rows of their own: contiguous runs can't be shared."""

    steady = True
    regular = True
    cached = 0

    def __init__(self, pool: Reservations, load: Workload) -> None:
        self.pool = pool
        self.joins = pool.joins
        self._prompts: list[int] = load.prompts.tolist()
        self._outputs: list[int] = load.outputs.tolist()
        self._max_new, self._rows = load.max_new, load.samples

    def admit(self, index: int, known: int) -> bool:
        """Room for all rows, or none."""
        prompt, output = self._prompts[index], self._outputs[index]
        first = index * self._rows
        for i in range(self._rows):
            if not self.pool.admit(first + i, prompt, output, max(self._max_new, output)):
                for done in range(i):
                    self.pool.cancel(first + done)
                return False
        return True

    def close(self) -> None:
        """As the system decides."""
        self.pool.close()

    def start(self, index: int, known: int) -> int:
        """The prompt is computed once and copied to the other rows."""
        return (self._rows - 1) * known

    def take_step(self) -> bool:
        """Room was reserved."""
        return True

    def step_slots(self, rows: int) -> tuple[int, int]:
        """One a row."""
        return rows, 0

    def leave(self, index: int, written: int, *, decoding: bool = True) -> None:
        """Give the rows back."""
        for i in range(self._rows):
            self.pool.finish(index * self._rows + i)

    def slots(self, index: int, written: int) -> int:
        """Every row holds all its tokens."""
        return self._rows * written

    def breakdown(self, tokens: int, *, waiting: bool) -> PoolBreakdown:
        """As the system accounts."""
        return self.pool.breakdown(waiting=waiting, tokens=tokens)

    def blocks(self) -> tuple[int, int]:
        """No blocks."""
        return 0, 0


class PagedMemory:
    """Blocks on demand, full prompt blocks shared by the samples of a request, a common prefix shared by all requests.

    The common prefix is computed and held before the first request, as a provider of the service would do (paper,
    section 4.4).
    """

    joins = True
    steady = False
    regular = True

    def __init__(self, pool: int, load: Workload, *, block_size: int = 16, watermark: float = 0.01) -> None:
        self.pool, self.block_size = pool, check_int("block_size", block_size, 1, MAX_BLOCK_SIZE)
        self.total = pool // block_size
        self._reserve = int(watermark * self.total)
        self._prompts: list[int] = load.prompts.tolist()
        self._rows = load.samples
        self._prefix_blocks = load.prefix // block_size
        self.cached = self._prefix_blocks * block_size
        self.free = self.total - self._prefix_blocks
        self._phases = [0] * block_size  # decoding rows by (tokens written - steps taken) mod block size
        self._turn = 0
        self._saved = 0
        self._holders = 0

    def _held(self, index: int, written: int) -> int:
        """Blocks of a request whose rows each hold `written` tokens, the common prefix left out. A prompt's last,
        partly filled block is counted once a row: each row will write into its own.
        """
        full = self._prompts[index] // self.block_size
        return full + self._rows * (-(-written // self.block_size) - full) - self._prefix_blocks

    def _common(self, index: int) -> int:
        """Table entries that sharing saves for a running request."""
        return (self._rows - 1) * (self._prompts[index] // self.block_size) + self._prefix_blocks

    def admit(self, index: int, known: int) -> bool:
        """Blocks for the known tokens, above the watermark unless nobody else holds any."""
        need = self._held(index, known)
        if need > self.free - (self._reserve if self._holders else 0):
            return False
        self._holders += 1
        self.free -= need
        return True

    def close(self) -> None:
        """Anybody may join at any time."""

    def start(self, index: int, known: int) -> int:
        """The rows part: each but the last to write copies the partly filled block."""
        self._phases[(known - self._turn) % self.block_size] += self._rows
        self._saved += self._common(index)
        return (self._rows - 1) * (known % self.block_size)

    def take_step(self) -> bool:
        """A row whose blocks are full needs one more."""
        need = self._phases[-self._turn % self.block_size]
        if need > self.free:
            return False
        self.free -= need
        self._turn = (self._turn + 1) % self.block_size
        return True

    def step_slots(self, rows: int) -> tuple[int, int]:
        """One a row: after the fork nothing that is written is shared."""
        return rows, 0

    def leave(self, index: int, written: int, *, decoding: bool = True) -> None:
        """Blocks return."""
        if decoding:
            self._phases[(written - self._turn) % self.block_size] -= self._rows
            self._saved -= self._common(index)
        self._holders -= 1
        self.free += self._held(index, written)

    def slots(self, index: int, written: int) -> int:
        """Full prompt blocks are shared and count once."""
        shared = self._prompts[index] // self.block_size * self.block_size
        return shared + self._rows * (written - shared) - self.cached

    def breakdown(self, tokens: int, *, waiting: bool) -> PoolBreakdown:
        """Tails of blocks are internal; what is free is external only while somebody waits."""
        tokens += self.cached
        used = (self.total - self.free) * self.block_size
        rest = self.pool - used
        return PoolBreakdown(tokens, 0, used - tokens, rest if waiting else 0, 0, 0 if waiting else rest)

    def blocks(self) -> tuple[int, int]:
        """What is held and what sharing saves now."""
        return self.total - self.free, self._saved


class BeamMemory(PagedMemory):
    """Blocks on demand under beam search: the tree of beams decides what is shared."""

    regular = False

    def __init__(
        self,
        pool: int,
        load: Workload,
        *,
        block_size: int = 16,
        watermark: float = 0.01,
        persistence: float | None = None,
    ) -> None:
        super().__init__(pool, load, block_size=block_size, watermark=watermark)
        longest = int(load.outputs.max())
        keep = {} if persistence is None else {"persistence": persistence}
        self._trees: list[BeamTree] = [
            beam_tree(load.samples, f, block_size, longest, **keep) for f in range(block_size)
        ]
        self._decoding: dict[int, int] = {}  # request -> tokens of answer written
        self._last = 0, 0

    def _tree(self, index: int) -> BeamTree:
        return self._trees[self._prompts[index] % self.block_size]

    def _held(self, index: int, written: int) -> int:
        prompt = self._prompts[index]
        return prompt // self.block_size + self._tree(index).blocks[max(0, written - prompt)] - self._prefix_blocks

    def _saved_by(self, index: int, written: int) -> int:
        return self._rows * -(-written // self.block_size) - self._held(index, written)

    def start(self, index: int, known: int) -> int:
        """Nothing is copied before the beams write."""
        self._decoding[index] = known - self._prompts[index]
        self._saved += self._saved_by(index, known)
        return 0

    def take_step(self) -> bool:
        """Every tree grows by a token, which may free more blocks than it takes."""
        need = saved = slots = copies = 0
        for index, g in self._decoding.items():
            tree, prompt = self._tree(index), self._prompts[index]
            grown = tree.blocks[g + 1] - tree.blocks[g]
            need += grown
            saved += self._rows * ((prompt + g) % self.block_size == 0) - grown
            slots += tree.slots[g + 1] - tree.slots[g]
            copies += tree.copies[g + 1]
        if need > self.free:
            return False
        self.free -= need
        self._saved += saved
        self._last = slots, copies * self.block_size
        for index in self._decoding:
            self._decoding[index] += 1
        return True

    def step_slots(self, rows: int) -> tuple[int, int]:
        """What the trees wrote and copied."""
        return self._last

    def leave(self, index: int, written: int, *, decoding: bool = True) -> None:
        """Blocks return."""
        if decoding:
            del self._decoding[index]
            self._saved -= self._saved_by(index, written)
        self._holders -= 1
        self.free += self._held(index, written)

    def slots(self, index: int, written: int) -> int:
        """Distinct slots of the tree."""
        prompt = self._prompts[index]
        full = prompt // self.block_size * self.block_size
        return full + self._tree(index).slots[written - prompt] - self.cached
