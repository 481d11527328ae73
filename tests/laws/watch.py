"""A manager under watch: every call is made through here, and after every call the laws that hold at all times are checked.

The state machine decides which calls are made; here each is compared with the model and the contract.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from minipaged.memory.types import BlockEvent
from tests.laws.dense import DenseMemory
from tests.laws.model import NEVER_ENDS, BrokenLawError, FoldedTables, FoundContent, FreedAt, Line, View, look
from tests.laws.records import StepRecord


class Handle(NamedTuple):
    """What lookup gave for a prompt, in some step."""

    tokens: list[int]
    salt: str | None
    hit: Any
    twins: Any


class Watch:
    """One manager, the model beside it, and the plan of the step that is being put together."""

    def __init__(
        self,
        make: Callable[..., Any],
        laws: frozenset[str] | None,
        *,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        prefix_caching: bool,
        watermark: float,
        ends_steps: bool = False,
    ) -> None:
        settings = {"num_host_blocks": num_host_blocks, "prefix_caching": prefix_caching, "watermark": watermark}
        self.manager = make(num_blocks, block_size, **settings)
        self.laws = laws
        self.twin = make(num_blocks, block_size, **settings) if self.judges("L54") else None
        self.num_blocks, self.block_size, self.num_host_blocks = num_blocks, block_size, num_host_blocks
        self.prefix_caching, self.watermark = prefix_caching, watermark
        self.lines: dict[int, Line] = {}
        self.pins: Counter[int] = Counter()
        self.found = FoundContent(block_size)
        self.folded = FoldedTables()
        self.dense = DenseMemory(num_blocks, num_host_blocks, block_size)
        self.freed: dict[int, FreedAt] = {}  # cached blocks that nobody holds
        self.calls = 0
        self.executed = True  # whether the step's plan was run
        self.swap_outs: list[tuple[int, int]] = []
        self.swap_ins: list[tuple[int, int]] = []
        self.made_copies: list[tuple[int, int]] = []  # of this step, whose writer has written or left
        # Sources of copies given up, and destinations of swaps in: a manager may hand them out or not.
        self.given_up: set[int] = set()
        self.records: list[StepRecord] = []
        self.step_events: list[BlockEvent] = []
        self.guarded_before: set[int] = set()
        self.broken = False  # a law was broken, or a call raised
        self.ends_steps = ends_steps  # whether end_step is called: if not, only what is written is marked
        self.promised: dict[int, int] = {}  # block that can be found -> who is to write it in the step that is planned
        self.view = self._look()
        if ends_steps:
            self.call("end_step")

    # ---- judging

    def judges(self, *laws: str) -> bool:
        """Whether one of these laws is being watched."""
        return self.laws is None or not self.laws.isdisjoint(laws)

    def hold(self, laws: str, holds: bool, message: str) -> None:
        """Every one of `laws` says so; the first of them that is watched is broken if it is not."""
        if not holds:
            for law in laws.split():
                if self.judges(law):
                    self.broken = True
                    raise BrokenLawError(law, message)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the manager (and its twin)."""
        self.broken = True  # unless it returns
        handle = kwargs.pop("hit", None)
        mine, theirs = ({}, {}) if handle is None else ({"hit": handle.hit}, {"hit": handle.twins})
        result = getattr(self.manager, name)(*args, **kwargs, **mine)
        self.broken = False
        if self.twin is not None:
            same = getattr(self.twin, name)(*args, **kwargs, **theirs)
            self.hold("L54", same == result, f"{name}{args} gave {result}, and {same} the second time")
        return result

    def lookup(self, tokens: list[int], salt: str | None) -> Handle:
        """A handle of a prompt (and the twin's)."""
        twins = self.twin.lookup(tokens, salt=salt) if self.twin is not None else None
        return Handle(tokens, salt, self.manager.lookup(tokens, salt=salt), twins)

    def refused(
        self, laws: str, errors: type[BaseException] | tuple[type[BaseException], ...], name: str, *args: Any
    ) -> None:
        """The call must raise one of `errors` and change nothing."""
        try:
            getattr(self.manager, name)(*args)
        except errors:
            self.unchanged(laws, f"{name}{args} raised")
        else:
            self.hold(laws, False, f"{name}{args} was accepted")
            raise BrokenLawError(laws.split()[0], f"{name}{args} was accepted: the model cannot follow")

    def unchanged(self, laws: str, after: str) -> None:
        """Nothing was changed by what has just happened."""
        events = self.manager.take_events()
        self.hold(laws, not events, f"{after}, yet there are events: {events}")
        view = self._look()
        self.hold(laws, view == self.view, f"{after}, yet something changed:\n  {self.view}\n  {view}")

    # ---- what the step reads, and so may not be handed out

    def pending(self) -> list[Line]:
        """Sequences with a copy of this step that can still be given up."""
        return [line for line in self.lines.values() if line.copy is not None]

    def copies(self) -> list[tuple[int, int]]:
        """The copies of this step."""
        return self.made_copies + [line.copy for line in self.pending() if line.copy is not None]

    def guarded(self) -> set[int]:
        """Device blocks that this step copies or swaps from."""
        return {source for source, _ in self.copies()} | {block for block, _ in self.swap_outs}

    def available(self) -> tuple[int, int]:
        """How many blocks can be handed out, at least and at most."""
        free = {b for b in range(1, self.num_blocks) if not self.view.counts[b]}
        most = free - self.guarded()
        return len(most - self.given_up), len(most)

    def host_available(self) -> tuple[int, int]:
        """The same for the host: what this step's swaps touched may be kept back."""
        free = self.view.usage.host_free
        touched = {host for _, host in self.swap_outs} | {host for host, _ in self.swap_ins}
        return free - len(touched - {h for table in self.view.host_tables.values() for h in table}), free

    # ---- after every call

    @property
    def planning(self) -> bool:
        """Whether what is marked now is a promise of the step that is planned."""
        return self.ends_steps and not self.executed

    def promised_by(self, line: Line, n: int) -> list[int]:
        """Blocks that can be found and that this sequence would not write if it kept only n tokens."""
        if line.promised is None:
            return []
        table = self.view.tables[line.seq_id]
        entries = range(max(line.promised, n) // self.block_size, line.computed // self.block_size)
        return [table[i] for i in entries if self.promised.get(table[i]) == line.seq_id]

    def settle(self, what: str, handed: Iterable[int] = (), *, forgets: Iterable[int] | None = None) -> View:
        """Take in what a call did: events, tables, counts. Returns the view from before.

        handed: the blocks it handed out; forgets: those that can no longer be found after it, beside these; None: not known.
        """
        self.calls += 1
        self.broken = True  # unless all of this holds
        handed = list(handed)
        before, keyed = self.view, set(self.found.key_of)
        guarded = self.guarded_before
        evicted_from = {b: at for b, at in self.freed.items() if b not in guarded}
        evicted = self._take_events(what)
        if forgets is not None:
            gone, expected = evicted - set(handed), set(forgets)
            self.hold("L29", expected <= gone, f"{what}: {expected - gone} can be found, and nobody will write them")
            self.hold("L66 L65", gone <= expected, f"{what}: {gone - expected} can no longer be found")
        for block in handed:
            self.hold("L06", 0 < block < self.num_blocks, f"{what} handed out block {block}")
            self.hold("L04 L09", not before.counts[block], f"{what} handed out block {block}, which somebody holds")
            self.hold("L52", block not in guarded, f"{what} handed out block {block}, which this step reads")
            erased = block not in keyed or block in evicted
            self.hold("L32", erased, f"{what} handed out block {block}, which can still be found")
        self.hold("L09", len(set(handed)) == len(handed), f"{what} handed out a block twice: {handed}")
        self.dense.poison(handed)
        self.view = self._look()
        self._follow_frees(before)
        self._check_evicted(what, [b for b in handed if b in keyed], evicted_from)
        self.check_always(what)
        self.guarded_before = self.guarded()
        self.broken = False
        return before

    def _look(self) -> View:
        return look(self.manager, self.lines, self.num_blocks)

    def _take_events(self, what: str) -> set[int]:
        """Follow the events. Returns the blocks that can no longer be found."""
        events = self.manager.take_events()
        if self.twin is not None:
            same = self.twin.take_events()
            self.hold("L54", same == events, f"{what} gave {events}, and {same} the second time")
        self.step_events.extend(events)
        for event in events:
            self.folded.apply(event)
            if event.kind == "publish":
                self._publish(event)
            elif event.kind == "evict":
                self.hold(
                    "L32", event.block in self.found.key_of, f"{what} evicted block {event.block}, which had no key"
                )
                self.hold("L30", event.block not in self.pins, f"{what} evicted block {event.block}, which is pinned")
                self.promised.pop(event.block, None)
                if event.block in self.found.key_of:
                    self.found.evict(event.block)
        return {event.block for event in events if event.kind == "evict"}

    def _publish(self, event: BlockEvent) -> None:
        line, block, end = self.lines[event.seq_id], event.block, (event.index + 1) * self.block_size
        self.hold("L06", block != 0, "the null block was hashed")
        if end > line.written and line.promised is not None:
            self.promised[block] = line.seq_id  # in the slots when this step has run
        else:
            self.hold("L29 L21", end <= line.written, f"{event}: published with {line.written} of {end} tokens written")
            if line.promised is not None and end > line.promised:
                self.promised[block] = line.seq_id
        self.hold(
            "L28 L21", end <= line.computed, f"{event}: published with {line.computed} of its {end} tokens accepted"
        )
        early = line.before_release is None or end <= line.before_release
        self.hold("L58", early, f"{event}: published, and computed after an eviction")
        self.hold("L32", block not in self.found.key_of, f"{event}: the block has a key already")
        key = (line.salt, tuple(line.tokens[:end]))
        self.found.publish(key, block)

    def _follow_frees(self, before: View) -> None:
        places = {b: i for table in before.tables.values() for i, b in enumerate(table)}
        for block in range(1, self.num_blocks):
            if self.view.counts[block] or block not in self.found.key_of:
                self.freed.pop(block, None)
            elif before.counts[block]:
                high = NEVER_ENDS if block in self.guarded() | self.given_up else self.calls
                self.freed[block] = FreedAt(self.calls, high, self.calls, places.get(block, -1))

    def _check_evicted(self, what: str, evicted: list[int], candidates: dict[int, FreedAt]) -> None:
        if not self.judges("L30"):
            return
        for block in evicted:
            rest = [b for b, at in candidates.items() if b not in evicted and not self.view.counts[b]]
            sooner = [b for b in rest if block in candidates and candidates[b].before(candidates[block])]
            self.hold("L30", not sooner, f"{what} evicted block {block}; {sooner} were to go first: {candidates}")

    def check_always(self, what: str) -> None:
        """The laws about pool and tables that hold at every moment."""
        view, usage = self.view, self.view.usage
        held = Counter(self.pins)
        for table in view.tables.values():
            held.update(b for b in table if b)
        total = usage.free + usage.referenced + usage.null
        self.hold("L01", total == usage.total == self.num_blocks and usage.null == 1, f"after {what}: {usage}")
        self.hold("L01", usage.referenced == len(held), f"after {what}: {len(held)} blocks are held, {usage}")
        wrong = {b: (n, held[b]) for b, n in enumerate(view.counts) if n != held[b]}
        self.hold("L02", not wrong, f"after {what}: block -> (count, entries and pins): {wrong}")
        self.hold("L04", usage.free == view.counts.count(0) - 1, f"after {what}: {usage}, counts {view.counts}")
        free_keyed = sum(not view.counts[b] for b in self.found.key_of)
        self.hold("L04", usage.cached == free_keyed, f"after {what}: {free_keyed} free blocks can be found, {usage}")
        self.hold("L04", usage.pinned == len(+self.pins), f"after {what}: {usage}, pins {self.pins}")
        self.hold("L06", view.counts[0] == 0, f"after {what}: the null block has holders")
        host_held = {b for table in view.host_tables.values() for b in table if b >= 0}
        self.hold(
            "L47",
            usage.host_total - usage.host_free == len(host_held),
            f"after {what}: {usage}, host blocks {host_held}",
        )
        for seq, line in self.lines.items():
            self._check_table(what, line, view.tables[seq], view.host_tables[seq])
        self.hold("L09", not self._overlap(), f"after {what}: {self._overlap()}")
        self.hold("EVENTS", not self.folded.differ(view.tables), f"after {what}: {self.folded.differ(view.tables)}")

    def _check_table(self, what: str, line: Line, table: tuple[int, ...], host: tuple[int, ...]) -> None:
        need = -(-line.reserved // self.block_size)
        here, there = (0, need) if line.swapped else (need, 0)
        said = f"after {what}: sequence {line.seq_id} with room for {line.reserved} tokens has"
        self.hold("L10", len(table) == here and len(host) == there, f"{said} {table} and on the host {host}")
        if not line.released:
            self.hold("L06", 0 not in table, f"{said} the null block in {table}")

    def _overlap(self) -> str:
        """Where two sequences use one slot for different tokens; "" if nowhere."""
        users: dict[int, tuple[int, Line]] = {}
        size = self.block_size
        for line in self.lines.values():
            for index, block in enumerate(self.view.tables[line.seq_id]):
                if not block:
                    continue
                if block not in users:
                    users[block] = (index, line)
                    continue
                first, other = users[block]
                if first != index:
                    return f"block {block} is entry {first} of {other.seq_id} and entry {index} of {line.seq_id}"
                start, end = index * size, (index + 1) * size
                both = min(line.counted, other.counted, end)
                if line.values()[start:both] != other.values()[start:both]:
                    return f"block {block} holds different tokens of {other.seq_id} and {line.seq_id}"
                for writer, reader in ((line, other), (other, line)):
                    if min(writer.reserved, end) > writer.counted and writer.counted < min(reader.counted, end):
                        return f"{writer.seq_id} is to write slots of block {block} that {reader.seq_id} has written"
        return ""

    # ---- contents

    def check_contents(self, what: str, laws: str) -> None:
        """Every written token is where its table says, and what can be found is there."""
        if not self.judges(*laws.split()):
            return
        for line in self.lines.values():
            table = self.view.tables[line.seq_id]
            if line.swapped:
                continue
            for position in range(line.written):
                if not table[position // self.block_size]:
                    continue
                value = self.dense.read(table, position, position + 1)[0]
                if value != line.values()[position]:
                    self.hold(laws, False, f"after {what}: sequence {line.seq_id} lost its token {position} in {table}")
        for block, (_, tokens) in self.found.key_of.items():
            value = Line(-1, None, list(tokens), 0, 0, 0).values()[-self.block_size :]
            held = self.dense.device[block]
            self.hold(
                "L29 L32", held == value, f"after {what}: block {block} can be found as {tokens} and does not hold them"
            )

    def record_as_it_stands(self) -> None:
        """Close the record in the middle of a step that a fault has ended: with what the manager says by now."""
        with suppress(Exception):  # one that is broken may not even say that
            self.step_events.extend(self.manager.take_events())
            self.view = self._look()
        self.record()

    def record(self) -> None:
        """Close the step's record."""
        seen = (self.view, self.lines, self.block_size, self.step_events)
        self.records.append(StepRecord.of(*seen))
        self.step_events = []
