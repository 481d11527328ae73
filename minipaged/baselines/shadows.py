"""Shadow allocators: what other systems would hold, at every step, on the very traffic that an engine serves.

A shadow listens to a trace, live or recorded, and sees in it when sequences arrive, grow and end. This is accounting,
not speed: a shadow's row grows as the engine's sequence does, and a sequence that the shadow has no room for waits in
its line until there is room or the engine has finished it. Nothing is shared: every fork is a row of its own.

The reservations need lengths that only hindsight knows. A recorded trace has them; live, a request's limit stands
for its answer's length, and reserved and internal are then one, called reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minipaged.baselines.systems import RESERVING, reservations
from minipaged.config import check_int
from minipaged.errors import InputError
from minipaged.memory.types import PoolBreakdown
from minipaged.trace.events import ENDED, SequencePatch, ShadowDelta, StepDelta
from minipaged.trace.file import StreamWriter
from minipaged.trace.sources import FileSource

DEFAULT_SYSTEMS = ("static", "fastertransformer", "orca-max", "orca-pow2", "orca-oracle", "tgi-early", "tgi-paged")


@dataclass(slots=True)
class _Line:
    """A sequence as the engine has it."""

    prompt: int
    output: int
    limit: int
    written: int = 0


class Shadow:
    """One system's pool beside the engine's."""

    def __init__(self, system: str, pool: int, *, max_len: int, block_size: int) -> None:
        self.system = system
        self.pool = reservations(system, pool, max_len=max_len, block_size=block_size)
        self._queue: dict[int, None] = {}  # sequences that wait for room, in order of arrival
        self.refused: set[int] = set()

    @property
    def running(self) -> int:
        """Sequences that this system would run now."""
        return self.pool.num_live

    @property
    def waiting(self) -> int:
        """Sequences that this system has no room for."""
        return len(self._queue)

    def arrive(self, sequence: int) -> None:
        """A sequence is asked for."""
        self._queue[sequence] = None

    def end(self, sequence: int) -> None:
        """The engine has done with it."""
        if sequence in self._queue:
            del self._queue[sequence]
        elif sequence in self.pool.rows and not self.pool.rows[sequence].ended:
            self.pool.finish(sequence)

    def admit(self, lines: Mapping[int, _Line]) -> None:
        """Who fits enters; the head blocks the line, unless not even an empty pool could hold it."""
        while self._queue:
            sequence = next(iter(self._queue))
            line = lines[sequence]
            output = min(line.output, self.pool.max_len - line.prompt)
            if output < 1 or not self.pool.admit(sequence, line.prompt, output, max(line.limit, output)):
                if output >= 1 and self.pool.rows:
                    return
                self.refused.add(sequence)
            del self._queue[sequence]

    def follow(self, lines: Mapping[int, _Line]) -> None:
        """Rows grow as the engine's sequences did; they never shrink: these systems do not preempt."""
        for sequence, row in self.pool.rows.items():
            line = lines.get(sequence)
            if line is None or row.ended:
                continue
            gain = min(line.written, row.prompt + row.output) - row.tokens
            if gain > 0:
                self.pool.grow(sequence, gain)

    def delta(self, step: int, *, runs: bool) -> ShadowDelta:
        """What is held after the step."""
        waiting = bool(self._queue)
        picture = self.pool.runs(waiting=waiting) if runs else ()
        return ShadowDelta(step, self.system, picture, self.pool.breakdown(waiting=waiting))


class ShadowListener:
    """Feed it every StepDelta; it answers with a ShadowDelta a system.

    outputs: answer length by sequence, where it is known (see `answer_lengths`). limit_of: the most new tokens that
    a sequence's client asked for; without it the rest of the context. max_len: the context, in tokens. runs: whether
    the deltas carry a picture of the pool.
    """

    def __init__(
        self,
        systems: Sequence[str] = DEFAULT_SYSTEMS,
        *,
        max_len: int = 2048,
        outputs: Mapping[int, int] | None = None,
        limit_of: Callable[[int], int] | None = None,
        runs: bool = True,
    ) -> None:
        for system in systems:
            if system not in RESERVING:
                raise InputError(f"unknown system {system!r}; there are shadows of {', '.join(RESERVING)}")
        self.systems = tuple(systems)
        self.max_len = check_int("max_len", max_len, 2)
        self._outputs, self._limit_of, self._runs = outputs or {}, limit_of, runs
        self._lines: dict[int, _Line] = {}
        self.shadows: tuple[Shadow, ...] = ()

    def __call__(self, delta: StepDelta) -> tuple[ShadowDelta, ...]:
        """What each system would hold after this step. The first delta's pool size is the shadows'."""
        if not self.shadows:
            stats = delta.stats
            pool, block_size = (stats.total_blocks - 1) * stats.block_size, stats.block_size
            if pool < 1:
                return ()
            self.shadows = tuple(Shadow(s, pool, max_len=self.max_len, block_size=block_size) for s in self.systems)
        for patch in delta.sequences:
            self._note(patch)
        for sequence, computed in zip(
            delta.progress.sequence.tolist(), delta.progress.num_computed.tolist(), strict=True
        ):
            line = self._lines.get(sequence)
            if line is not None:
                line.written = max(line.written, computed)
        for shadow in self.shadows:
            shadow.admit(self._lines)
            shadow.follow(self._lines)
        return tuple(shadow.delta(delta.step, runs=self._runs) for shadow in self.shadows)

    def _note(self, patch: SequencePatch) -> None:
        line = self._lines.get(patch.sequence)
        if patch.status in ENDED:
            if line is not None:
                del self._lines[patch.sequence]
                for shadow in self.shadows:
                    shadow.end(patch.sequence)
            return
        if line is None:
            rest = max(1, self.max_len - patch.num_prompt)
            limit = min(rest, self._limit_of(patch.sequence)) if self._limit_of is not None else rest
            output = self._outputs.get(patch.sequence, limit)
            self._lines[patch.sequence] = _Line(patch.num_prompt, max(1, output), max(1, limit))
            for shadow in self.shadows:
                shadow.arrive(patch.sequence)


def answer_lengths(deltas: Iterable[StepDelta]) -> dict[int, int]:
    """How many tokens each sequence was answered with, from a whole recorded trace; forks count from their own
    prompt.
    """
    tokens: dict[int, int] = {}
    prompts: dict[int, int] = {}
    for delta in deltas:
        for patch in delta.sequences:
            prompts[patch.sequence] = patch.num_prompt
        for sequence, new in zip(delta.progress.sequence.tolist(), delta.progress.num_new.tolist(), strict=True):
            tokens[sequence] = tokens.get(sequence, 0) + new
    return {sequence: max(1, count - prompts[sequence]) for sequence, count in tokens.items()}


def shadow_deltas(
    deltas: Sequence[StepDelta], systems: Sequence[str] = DEFAULT_SYSTEMS, *, max_len: int = 2048, runs: bool = False
) -> Iterator[tuple[StepDelta, tuple[ShadowDelta, ...]]]:
    """Each step of a recorded trace with what the shadows would hold after it, lengths known in hindsight."""
    listener = ShadowListener(systems, max_len=max_len, outputs=answer_lengths(deltas), runs=runs)
    for delta in deltas:
        yield delta, listener(delta)


@dataclass(frozen=True, slots=True)
class ShadowSummary:
    """A shadow over a whole trace, each step weighing the same."""

    system: str
    shares: dict[str, float]  # of the pool
    running: float  # mean sequences it would run
    waiting: float
    refused: int  # sequences that it could never hold


def summarise(
    deltas: Sequence[StepDelta], systems: Sequence[str] = DEFAULT_SYSTEMS, *, max_len: int = 2048
) -> tuple[ShadowSummary, ...]:
    """Averages over a recorded trace. Raises InputError for a trace without steps or without a pool."""
    listener = ShadowListener(systems, max_len=max_len, outputs=answer_lengths(deltas), runs=False)
    sums = {system: [0] * len(PoolBreakdown._fields) for system in systems}
    running, waiting = dict.fromkeys(systems, 0), dict.fromkeys(systems, 0)
    steps = 0
    for delta in deltas:
        told = listener(delta)
        steps += bool(told)
        for shadow, heard in zip(listener.shadows, told, strict=True):
            running[shadow.system] += shadow.running
            waiting[shadow.system] += shadow.waiting
            for i, slots in enumerate(heard.stats):
                sums[shadow.system][i] += slots
    if not steps:
        raise InputError("the trace holds no step of an engine with a pool")
    pool = listener.shadows[0].pool.pool
    return tuple(
        ShadowSummary(
            shadow.system,
            {name: n / steps / pool for name, n in zip(PoolBreakdown._fields, sums[shadow.system], strict=True)},
            running[shadow.system] / steps,
            waiting[shadow.system] / steps,
            len(shadow.refused),
        )
        for shadow in listener.shadows
    )


def read_deltas(path: Path) -> list[StepDelta]:
    """Every step of a trace file. Raises TraceError if it is none."""
    source = FileSource(path)
    try:
        return [source.delta(i) for i in range(len(source))]
    finally:
        source.close()


def write_with_shadows(path: Path, out: Path, systems: Sequence[str], *, max_len: int) -> None:
    """Write the trace at `path` again with a ShadowDelta of every system behind each step."""
    if out.exists() and out.samefile(path):
        raise InputError(f"{out} is the trace itself: write to another file")
    source = FileSource(path)
    try:
        deltas = [source.delta(i) for i in range(len(source))]
        try:
            file = out.open("wb")
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}") from None
        with file:
            writer = StreamWriter(file, source.header)
            for delta, shadows in shadow_deltas(deltas, systems, max_len=max_len, runs=True):
                writer.delta(delta)
                for shadow in shadows:
                    writer.shadow(shadow)
            writer.finish()
    finally:
        source.close()
