"""A tiny paged memory that is written by hand and tells what it does as deltas: for tests of the trace and the
screen.

It keeps its state in plain Python lists and tells events beside, so it can judge the fold, which knows the events alone. It decides
nothing by itself: a script says what happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.trace.events import (
    Event,
    Progress,
    Queues,
    SequencePatch,
    Stats,
    StepDelta,
)
from minipaged.trace.observed import progress_of

BLOCK_SIZE = 4


class Line:
    """One sequence of the script."""

    def __init__(self, seq: int, request: int, parent: int, prompt: str) -> None:
        self.seq, self.request, self.parent = seq, request, parent
        self.status = "waiting"
        self.text = prompt
        self.num_prompt = len(prompt)
        self.computed = 0
        self.cached = 0
        self.reason = ""
        self.told = 0  # characters (one token each) already in a delta
        self.table: list[int] = []
        self.on_host = False


class Scene:
    """Blocks of four one-character tokens, and what a script does with them."""

    def __init__(self, num_blocks: int = 32, num_host: int = 8) -> None:
        self.num_blocks, self.num_host = num_blocks, num_host
        self.owners: list[list[int]] = [[] for _ in range(num_blocks)]
        self.fill = [0] * num_blocks
        self.cached = [False] * num_blocks
        self.copied: set[int] = set()
        self.host_owners: list[list[int]] = [[] for _ in range(num_host)]
        self.host_fill = [0] * num_host
        self.lines: dict[int, Line] = {}
        self.step_number = 0
        self.copies = self.preemptions = self.swaps = self.generated = 0
        self.deltas: list[StepDelta] = []
        self._events: list[Event] = []
        self._event_ids = 0
        self._patches_before: dict[int, str] = {}
        self._computed_before: dict[int, int] = {}
        self._letters: set[int] = set()

    # What a script says.

    def add(self, prompt: str, *, request: int | None = None) -> int:
        """A new sequence waits."""
        seq = len(self.lines) if not self.lines else max(self.lines) + 1
        self.lines[seq] = Line(seq, seq if request is None else request, -1, prompt)
        return seq

    def admit(self, seq: int) -> None:
        """Its prompt is computed in one go."""
        line = self.lines[seq]
        line.status = "running"
        cause = self._event("admit", seq, amount=len(line.text))
        self._grow(line, len(line.text), cause)
        line.computed = len(line.text)

    def write(self, seq: int, text: str) -> None:
        """Some tokens are drawn and their KV written."""
        line = self.lines[seq]
        cause = self._event("append", seq, amount=len(text))
        for letter in text:
            line.text += letter
            self._grow(line, len(line.text), cause)
            line.computed = len(line.text)
        self.generated += len(text)

    def fork(self, parent: int) -> int:
        """A child with the parent's table, and the parent's tokens."""
        old = self.lines[parent]
        seq = max(self.lines) + 1
        line = self.lines[seq] = Line(seq, old.request, parent, old.text)
        line.status, line.num_prompt, line.computed, line.table = (
            "running",
            old.num_prompt,
            old.computed,
            list(old.table),
        )
        for block in line.table:
            self.owners[block].append(seq)
        self._event("fork", seq, other=parent, amount=len(line.table))
        return seq

    def finish(self, seq: int, *, cache: bool = False, status: str = "finished") -> None:
        """It ends; its full blocks may stay as cached ones."""
        line = self.lines[seq]
        cause = self._event({"finished": "finish", "aborted": "abort"}[status], seq)
        line.status, line.reason = status, "stop"
        self._release(line, cause, cache=cache)

    def preempt(self, seq: int) -> None:
        """Its blocks go; it will recompute."""
        line = self.lines[seq]
        cause = self._event("preempt", seq)
        line.status, line.computed = "waiting", 0
        self._release(line, cause)
        self.preemptions += 1

    def swap_out(self, seq: int) -> None:
        """Its blocks move to the host."""
        line = self.lines[seq]
        cause = self._event("preempt", seq)
        there = []
        for index, block in enumerate(line.table):
            spot = next(i for i, owners in enumerate(self.host_owners) if not owners)
            self.host_owners[spot], self.host_fill[spot] = [seq], self.fill[block]
            self._event("swap_out", seq, block, spot, cause=cause, amount=index)
            there.append(spot)
        self._release(line, cause, quiet=True)
        line.status, line.table, line.on_host = "swapped", there, True
        self.swaps += 1

    def swap_in(self, seq: int) -> None:
        """And back."""
        line = self.lines[seq]
        back = []
        for index, spot in enumerate(line.table):
            block = self._free_block()
            self.owners[block], self.fill[block] = [seq], self.host_fill[spot]
            self.host_owners[spot], self.host_fill[spot] = [], 0
            self._event("swap_in", seq, block, spot, amount=index)
            back.append(block)
        line.status, line.table, line.on_host = "running", back, False

    def step(self) -> StepDelta:
        """What changed since the last step, as a delta; it joins `deltas`."""
        progress = self._progress()
        new = {token: chr(token).encode() for token in progress.token_ids.tolist() if token not in self._letters}
        self._letters.update(new)
        delta = StepDelta(
            step=self.step_number,
            t_ns=self.step_number * 50_000_000,
            events=tuple(self._events),
            sequences=self._sequence_patches(),
            progress=progress,
            token_bytes=new,
            queues=Queues(
                *(
                    tuple(s for s, line in self.lines.items() if line.status == st)
                    for st in ("running", "waiting", "swapped")
                )
            ),
            stats=self.stats(),
        )
        self.step_number += 1
        self._events = []
        self.copied = set()
        self.deltas.append(delta)
        return delta

    def stats(self) -> Stats:
        """The counters, from the lists."""
        held = [block for block in range(1, self.num_blocks) if self.owners[block]]
        entries = sum(len(line.table) for line in self.lines.values() if not line.on_host)
        return Stats(
            total_blocks=self.num_blocks,
            free_blocks=self.num_blocks - 1 - len(held),
            cached_blocks=sum(self.cached),
            host_total=self.num_host,
            host_free=sum(not owners for owners in self.host_owners),
            block_size=BLOCK_SIZE,
            token_slots=sum(self.fill[block] for block in held),
            tail_slots=sum(BLOCK_SIZE - self.fill[block] for block in held),
            shared_saved_blocks=entries - len(held),
            copies=self.copies,
            preemptions=self.preemptions,
            swaps=self.swaps,
            generated_tokens=self.generated,
            elapsed_ns=50_000_000,
        )

    # How it is done.

    def _event(self, kind: str, seq: int, block: int = -1, other: int = -1, *, cause: int = -1, amount: int = 0) -> int:
        self._events.append(Event(self._event_ids, kind, cause, seq, block, other, amount))
        self._event_ids += 1
        return self._event_ids - 1

    def _free_block(self) -> int:
        plain = [b for b in range(1, self.num_blocks) if not self.owners[b] and not self.cached[b]]
        block = plain[0] if plain else next(b for b in range(1, self.num_blocks) if not self.owners[b])
        if self.cached[block]:
            self._event("evict", -1, block, amount=-1)
        self.cached[block], self.fill[block] = False, 0
        return block

    def _grow(self, line: Line, length: int, cause: int) -> None:
        """Blocks for `length` tokens; the last one is written up to there, and copied first if it is shared."""
        while len(line.table) * BLOCK_SIZE < length:
            block = self._free_block()
            self.owners[block] = [line.seq]
            line.table.append(block)
            self._event("alloc", line.seq, block, cause=cause, amount=len(line.table) - 1)
        last = (length - 1) // BLOCK_SIZE
        if len(self.owners[line.table[last]]) > 1 and line.computed % BLOCK_SIZE:
            old, new = line.table[last], self._free_block()
            self.owners[old].remove(line.seq)
            self.owners[new] = [line.seq]
            line.table[last] = new
            self.fill[new] = self.fill[old]
            self.copied.add(new)
            self.copies += 1
            self._event("copy", line.seq, old, new, cause=cause, amount=last)
        for index in range(len(line.table)):
            self.fill[line.table[index]] = max(
                self.fill[line.table[index]], min(BLOCK_SIZE, length - index * BLOCK_SIZE)
            )

    def _release(self, line: Line, cause: int, *, cache: bool = False, quiet: bool = False) -> None:
        for index in reversed(range(len(line.table))):
            block = line.table[index]
            owners = self.owners if not line.on_host else self.host_owners
            owners[block].remove(line.seq)
            if not owners[block] and not line.on_host:
                self.cached[block] = cache and self.fill[block] == BLOCK_SIZE
                self.fill[block] = BLOCK_SIZE if self.cached[block] else 0
                if self.cached[block]:
                    self._event("publish", line.seq, block, amount=index)
            elif not owners[block]:
                self.host_fill[block] = 0
            if not quiet:
                self._event("free", line.seq, block, cause=cause, amount=index)
        line.table, line.on_host = [], False

    def _sequence_patches(self) -> tuple[SequencePatch, ...]:
        patches = []
        for seq, line in self.lines.items():
            reason = line.reason
            patch = SequencePatch(
                seq, line.request, line.parent, line.status, line.cached, line.num_prompt, math.nan, reason
            )
            if repr(patch) != self._patches_before.get(seq):  # repr: nan equals itself here
                self._patches_before[seq] = repr(patch)
                patches.append(patch)
        return tuple(patches)

    def _progress(self) -> Progress:
        rows, tokens = [], []
        for seq, line in self.lines.items():
            fresh = line.text[line.told :]
            if fresh or self._computed_before.get(seq, 0) != line.computed:
                rows.append((seq, line.computed, 0, len(fresh)))
                tokens += map(ord, fresh)
                self._computed_before[seq] = line.computed
                line.told = len(line.text)
        return progress_of(rows, tokens)


def sharing_scene() -> Scene:
    """Ten steps that show paging, sharing and copy-on-write: A owns three blocks, B forks from it, writes, and copies one block."""
    scene = Scene()
    a = scene.add("The cache ")
    scene.step()
    scene.admit(a)
    scene.step()
    b = scene.fork(a)
    scene.step()
    scene.write(b, "s")
    scene.step()
    scene.write(a, "i")
    scene.write(b, "p")
    scene.step()
    c = scene.add("Once upon a time")
    scene.write(a, "n")
    scene.step()
    scene.admit(c)
    scene.write(a, "to pages")
    scene.write(b, "lit")
    scene.step()
    scene.swap_out(c)
    scene.step()
    scene.finish(b, cache=True)
    scene.swap_in(c)
    scene.step()
    scene.preempt(c)
    scene.finish(a, cache=True)
    scene.step()
    return scene


class ScriptedEngine:
    """The engine's public face over a scene: each prompt's answer is its own text again, one letter a step."""

    def __init__(self, num_blocks: int = 32, *, die_at: int = -1, echo_stdout: bool = False) -> None:
        self.scene = Scene(num_blocks)
        self.trace = self
        self.codec = self
        self.die_at = die_at
        self.echo_stdout = echo_stdout
        self._listeners: list[Callable[[StepDelta], None]] = []
        self._left: dict[int, str] = {}
        self._aborts: list[int] = []

    def subscribe(self, listener: Callable[[StepDelta], None]) -> None:
        """Call the listener with each delta."""
        self._listeners.append(listener)

    def describe(self) -> dict[str, object]:
        """For the header."""
        return {"model": "scripted", "seed": 7, "engine": {"block_size": BLOCK_SIZE}}

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """One character a token."""
        return chr(token).encode()

    def submit(self, prompt: str, params: SamplingParams) -> int:
        """Queue a prompt."""
        if not prompt:
            raise RequestError("the prompt is empty: give at least one character")
        seq = self.scene.add(prompt)
        self._left[seq] = prompt[: params.max_tokens]
        return seq

    def abort(self, request_id: int) -> None:
        """End it in the next step."""
        self._aborts.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return any(line.status in ("waiting", "running") for line in self.scene.lines.values())

    def step(self) -> None:
        """Admit, or write one letter each."""
        if self.scene.step_number == self.die_at:
            raise RuntimeError("the script says: die here")
        if self.echo_stdout:
            print("noise that must not reach the terminal", flush=True)
        for seq in self._aborts:
            if self.scene.lines[seq].status in ("waiting", "running"):
                self.scene.finish(seq, status="aborted")
        self._aborts = []
        for seq, line in list(self.scene.lines.items()):
            if line.status == "waiting":
                self.scene.admit(seq)
            elif line.status == "running":
                text, self._left[seq] = self._left[seq][:1], self._left[seq][1:]
                if text:
                    self.scene.write(seq, text)
                if not self._left[seq]:
                    self.scene.finish(seq, cache=True)
        delta = self.scene.step()
        for listener in self._listeners:
            listener(delta)


def scripted_engine(progress: Callable[[str, int, int], None], **arguments: object) -> ScriptedEngine:
    """The factory that a child process calls."""
    progress("loading weights", 1, 4)
    return ScriptedEngine(**arguments)  # type: ignore[arg-type]


def failing_engine(progress: object) -> ScriptedEngine:
    """A factory that cannot."""
    raise RequestError("unknown model 'nothing': try smollm2-135m")
