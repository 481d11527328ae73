"""The state machine: any mix of legal calls on a block manager, step by step, with tiny dense contents and a simple model beside it.

A step is planned (allocate, append, swap, promise), executed (transfers in their order, then writes), and committed (marked, forked,
freed); planning again begins the next one. Half of the runs end their plans: what they mark while they plan is a promise of the
step, and is written when it is executed. Rules take plain integers and read them modulo what there is, so that every call is legal, few
do nothing, and a counterexample shrinks to a handful. This part: coming in, growing, and the step itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from minipaged.memory.types import Admission
from tests.laws.model import NEVER_ENDS, Line
from tests.laws.watch import Handle, Watch

PICK = st.integers(0, 31)
TAIL = st.lists(st.integers(0, 1), max_size=9)
RUN = st.sampled_from([True, True, False])  # whether the step is run at once, all its tokens written and marked
SALT = st.sampled_from([None, None, None, "", "x"])


class StepMachine(RuleBasedStateMachine):
    """Drives one manager. `make` and `laws` are set by subclasses; laws None means all."""

    make: Callable[..., Any]
    laws: frozenset[str] | None = None
    last: Watch | None = None  # of the newest run, for its replay

    watch: Watch

    @initialize(
        num_blocks=st.sampled_from([3, 5, 8, 12, 16, 24]),
        block_size=st.integers(1, 4),
        num_host_blocks=st.sampled_from([0, 2, 8]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        watermark=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
        ends_steps=st.booleans(),
        first=TAIL,
    )
    def start(self, first: list[int], **settings: Any) -> None:
        """A pool of a handful of blocks, and a first sequence."""
        cls = type(self)
        self.watch = cls.last = Watch(cls.make, cls.laws, **settings)
        self.next_id = 0
        self.stems: list[list[int]] = [[]]
        self.handles: list[Handle] = []
        self._allocate(first or [1, 0, 1, 1, 0], None, 1, True)

    # ---- choosing

    def _line(self, pick: int, *, swapped: bool = False) -> Line | None:
        lines = [line for line in self.watch.lines.values() if line.swapped is swapped]
        return lines[pick % len(lines)] if lines else None

    def _any(self) -> bool:
        return bool(self.watch.lines)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.watch.block_size)

    def _least_watermark(self) -> int:
        return int(self.watch.watermark * (self.watch.num_blocks - 1)) if self._held() else 0

    def _most_watermark(self) -> int:
        return -int(-self.watch.watermark * self.watch.num_blocks // 1) if self._held() else 0

    def _held(self) -> bool:
        return any(any(table) for table in self.watch.view.tables.values())

    # ---- coming in

    @precondition(lambda self: len(self.watch.lines) < 8)
    @rule(
        stem=PICK,
        cut=PICK,
        tail=TAIL,
        chunk=PICK,
        salt=SALT,
        read_cache=st.sampled_from([True, True, True, False]),
        run=RUN,
    )
    def allocate(
        self, stem: int, cut: int, tail: list[int], chunk: int, salt: str | None, read_cache: bool, run: bool
    ) -> None:
        """A new sequence that may begin like an earlier one, or go on like a living one."""
        bases = [*self.stems, *(line.tokens for line in self.watch.lines.values())]
        base = bases[stem % len(bases)]
        cut = len(base) if cut > 15 else cut % (len(base) + 1)
        self._allocate(base[:cut] + tail or [0], salt, chunk, read_cache)
        if run:
            self._execute([11], True)

    @rule(stem=PICK, tail=TAIL, salt=SALT)
    def look_up(self, stem: int, tail: list[int], salt: str | None) -> None:
        """A handle, for a prompt that comes in later or never."""
        tokens = self.stems[stem % len(self.stems)] + tail or [0]
        self.handles = [*self.handles, self.watch.lookup(tokens, salt)][-4:]
        self.watch.unchanged("L07", "lookup was asked")

    @precondition(lambda self: bool(self.handles) and len(self.watch.lines) < 8)
    @rule(pick=PICK, chunk=PICK, read_cache=st.sampled_from([True, True, True, False]), other=SALT, run=RUN)
    def allocate_by_handle(self, pick: int, chunk: int, read_cache: bool, other: str | None, run: bool) -> None:
        """A new sequence of a prompt that was looked up before, in this step or long ago; sometimes under another salt."""
        handle = self.handles[pick % len(self.handles)]
        self._allocate(handle.tokens, handle.salt if pick > 3 else other, chunk, read_cache, handle)
        if run:
            self._execute([11], True)

    def _allocate(
        self, tokens: list[int], salt: str | None, chunk: int, read_cache: bool, handle: Handle | None = None
    ) -> None:
        self._plan()
        watch, size, seq = self.watch, self.watch.block_size, self.next_id
        found = self._check_match(tokens, salt)
        hits = found if read_cache else []
        least = max(1, len(hits) * size)
        wanted = len(tokens) if chunk % 3 else least + chunk % (len(tokens) - least + 1)
        need = self._blocks_for(wanted) - len(hits)
        revived = sum(not watch.view.counts[b] and b not in watch.guarded() for b in set(hits))
        least_free, most_free = watch.available()
        order = {"num_tokens": wanted, "salt": salt, "read_cache": read_cache}
        got = watch.call("allocate", seq, tokens, **order, hit=handle)
        said = f"allocate({seq}, {tokens}, {order})"
        if got is None:
            watch.hold(
                "L08 L04",
                need + revived > least_free,
                f"{said} found no room: needs {need}, {least_free} free, {revived} revived",
            )
            watch.unchanged("L07", f"{said} found no room")
            return
        watch.hold(
            "L08 L04",
            need + revived <= most_free,
            f"{said} needs {need}; {most_free} are free, {revived} of them found",
        )
        self.next_id += 1
        cached = got.cached_tokens
        watch.hold("L24", cached <= (len(tokens) - 1) // size * size, f"{said} found all {cached} tokens")
        watch.hold(
            "L27" if not read_cache else "L22 L23 L25 L35 L65",
            cached == len(hits) * size,
            f"{said} found {cached}, not {hits}",
        )
        watch.lines[seq] = Line(seq, salt, list(tokens), wanted, cached, cached)
        self.stems = [*self.stems, tokens][-12:]
        watch.hold("L14", got.copies == (), f"{said} copies {got.copies}")
        watch.settle(said, got.new_blocks)
        table = watch.view.tables[seq]
        watch.hold("L11", len(got.new_blocks) == need, f"{said} took {got.new_blocks}; {need} are needed")
        watch.hold("L31 L33", list(table[: len(hits)]) == hits, f"{said} has table {table}; the cache held {hits}")
        watch.hold(
            "L10", table[len(hits) :] == got.new_blocks, f"{said} returned {got.new_blocks}, its table is {table}"
        )

    def _check_match(self, tokens: list[int], salt: str | None) -> list[int]:
        """match_prefix against what the events say. Returns the blocks to be found."""
        watch, size = self.watch, self.watch.block_size
        most = (len(tokens) - 1) // size
        hits = watch.found.hits(tokens, salt, most)
        got = watch.call("match_prefix", tokens, salt=salt)
        said = f"match_prefix({tokens}, {salt!r}) is {got}, where {hits} hold"
        watch.hold("L24", got <= most * size, said)
        watch.hold("L25" if salt is not None else "L22 L23 L32", got <= len(hits) * size, said)
        watch.hold("L22 L23 L29", got == len(hits) * size, said)
        for handle in self.handles:
            expected = len(watch.found.hits(handle.tokens, handle.salt, (len(handle.tokens) - 1) // size)) * size
            found = handle.hit.num_tokens
            watch.hold("L29 L65", found == expected, f"a handle of {handle.tokens} finds {found}, not {expected}")
        return hits

    @precondition(_any)
    @rule(stem=PICK, tail=TAIL, salt=SALT, new=PICK, width=st.sampled_from([1, 1, 2, 3]), known=st.booleans())
    def ask(self, stem: int, tail: list[int], salt: str | None, new: int, width: int, known: bool) -> None:
        """Whether a request could come in: asked, nothing done."""
        watch = self.watch
        tokens = self.stems[stem % len(self.stems)] + tail or [0]
        extra: dict[str, Any] = {"token_ids": tokens, "salt": salt} if known else {}
        if known and self.handles and new % 2:
            handle = self.handles[new % len(self.handles)]
            tokens, salt, extra = handle.tokens, handle.salt, {"hit": handle}
        hits = self._check_match(tokens, salt) if known else []
        n = len(tokens)
        got = watch.call("can_admit", n, new, num_sequences=width, **extra)
        shared = n // watch.block_size  # the samples' full blocks of the prompt
        never = shared + width * (self._blocks_for(n + new) - shared) > watch.num_blocks - 1
        watch.hold(
            "L68 L41", (got is Admission.NEVER) == never, f"can_admit({n}, {new}, num_sequences={width}) is {got}"
        )
        revived = sum(not watch.view.counts[b] and b not in watch.guarded() for b in hits)
        need = shared + width * (self._blocks_for(n) - shared) - len(hits) + revived
        least, most = watch.available()
        said = f"can_admit({n}, {new}, num_sequences={width}, {extra}) is {got}: needs {need}, {least} to {most} free"
        watch.hold("L42 L08", got is not Admission.OK or need + self._least_watermark() <= most, said)
        watch.hold("L42 L08", got is not Admission.LATER or need + self._most_watermark() > least, said)
        watch.unchanged("L07", "can_admit was asked")

    # ---- growing

    @precondition(_any)
    @rule(pick=PICK, num_tokens=st.integers(0, 9), run=RUN)
    def append(self, pick: int, num_tokens: int, run: bool) -> None:
        """Room for more tokens, copied on write."""
        line = self._line(pick)
        if line is not None:
            self._append(line, num_tokens)
            if run:
                self._execute([11], True)

    @precondition(_any)
    @rule(ahead=st.sampled_from([1, 1, 3]), run=RUN)
    def append_all(self, ahead: int, run: bool) -> None:
        """A decode step: one more token for each, or room for several."""
        for line in list(self.watch.lines.values()):
            if not line.swapped and line.reserved == line.written:
                self._append(line, ahead)
        if run:
            self._execute([11], True)

    def _append(self, line: Line, n: int) -> None:
        self._plan()
        watch, size, seq = self.watch, self.watch.block_size, line.seq_id
        table, counts = watch.view.tables[seq], watch.view.counts
        have, need = len(table), self._blocks_for(line.reserved + n)
        writes_tail = n > 0 and line.reserved < have * size
        shared = writes_tail and counts[table[-1]] > 1
        read_here = {source for source, _ in watch.copies()}
        slots = line.reserved - (have - 1) * size
        # Somebody may come back to slots that this one would write: a copy is allowed.
        disputed = writes_tail and any(
            other.copy is not None
            and other.copy[0] == table[-1]
            and other.copied_at is not None
            and other.copied_at - (have - 1) * size > slots
            for other in watch.pending()
        )
        least_free, most_free = watch.available()
        got = watch.call("append", seq, n)
        said = f"append({seq}, {n}) with room for {line.reserved} in {table}"
        if got is None:
            short = need - have + (shared or disputed) > least_free
            watch.hold("L04 L11", short, f"{said} found no room: {least_free} free")
            watch.unchanged("L07", f"{said} found no room")
            return
        watch.hold("L04", need - have + shared <= most_free, f"{said} found room where only {most_free} are free")
        watch.hold("L13", bool(got.copies) or not shared, f"{said} shares its tail {counts} and did not copy")
        if got.copies and not shared and not disputed:
            law = "L13 L15" if writes_tail else "L13 L17"
            watch.hold(law, False, f"{said} copied {got.copies}; counts {counts}")
        watch.hold("L11", len(got.new_blocks) == max(0, need - have), f"{said} took {got.new_blocks}")
        line.reserved += n
        destinations = [destination for _, destination in got.copies]
        if got.copies:
            if line.copy is None:
                line.copied_at = line.reserved - n
            else:
                watch.made_copies.append(line.copy)
            line.copy = got.copies[0]
        before = watch.settle(said, [*destinations, *got.new_blocks])
        now = watch.view.tables[seq]
        expected = (*table[: have - 1], *destinations, *got.new_blocks) if got.copies else (*table, *got.new_blocks)
        watch.hold("L14 L10", now == expected, f"{said} returned {got}, its table is {now}")
        if not got.copies:
            return
        (source, destination), tail = got.copies[0], table[-1]
        watch.hold("L14", len(got.copies) == 1, f"{said} copied {got.copies}")
        watch.hold(
            "L14",
            watch.view.counts[destination] == 1,
            f"{said}: {destination} has count {watch.view.counts[destination]}",
        )
        watch.hold("L14", watch.view.counts[tail] == before.counts[tail] - 1, f"{said}: {tail} lost no holder")
        ends = {there for _, there in watch.copies()}
        watch.hold("L14 L16", source not in ends, f"{said}: {source} is source and destination in {watch.copies()}")
        watch.hold("L16 L14", source == tail or tail not in read_here, f"{said}: copied {source}, the tail was {tail}")

    # ---- a step

    @rule(choices=st.lists(st.integers(0, 11), min_size=1, max_size=8), mark=st.sampled_from([True, True, True, False]))
    def execute(self, choices: list[int], mark: bool) -> None:
        """Run the plan, then write some of the promised tokens, and say so or keep it for later."""
        self._execute(choices, mark)

    def _execute(self, choices: list[int], mark: bool) -> None:
        self._plan()
        watch = self.watch
        self._end_plan()
        copies = watch.copies()
        for batch in (watch.swap_outs, watch.swap_ins, copies):
            to = [there for _, there in batch]
            watch.hold("L16", len(set(to)) == len(to), f"written twice in one batch: {batch}")
        overlap = {here for here, _ in copies} & {there for _, there in copies}
        watch.hold("L16 L14", not overlap, f"{overlap} are sources and destinations in {copies}")
        watch.dense.run(watch.swap_outs, watch.swap_ins, copies)
        for i, line in enumerate(watch.lines.values()):
            if not line.swapped:
                choice = choices[i % len(choices)]
                most, least = line.reserved - line.written, line.counted - line.written
                self._write(line, most if choice > 3 else max(least, choice % (most + 1)), choice)
        watch.executed = True
        watch.promised.clear()
        for line in watch.lines.values():
            line.promised = None
        watch.check_contents("a step", "L02 L09 L13 L15 L16 L20 L22 L29 L31 L32 L33 L36 L47 L52 L65 L66")
        for line in list(watch.lines.values()) if mark else []:
            if not line.swapped and line.computed < line.written:
                self._mark(line, line.written - line.computed)

    def _end_plan(self) -> None:
        """Nobody leaves the step any more."""
        watch = self.watch
        if watch.ends_steps:
            watch.call("end_step")
            watch.unchanged("L29 L65", "the plan was ended")
            for line in watch.pending():
                watch.made_copies.extend([line.copy] if line.copy is not None else [])
                line.copy = line.copied_at = None

    @staticmethod
    def _know(line: Line, end: int, choice: int) -> None:
        """Its tokens up to `end` are drawn, if they are not known."""
        line.tokens.extend((choice + i) % 2 for i in range(end - len(line.tokens)))

    def _write(self, line: Line, count: int, choice: int) -> None:
        watch, table = self.watch, self.watch.view.tables[line.seq_id]
        self._know(line, line.written + count, choice)
        for position in range(line.written, line.written + count):
            block = table[position // watch.block_size]
            watch.hold("L06", block != 0, f"sequence {line.seq_id} writes into the null block")
            watch.hold(
                "L29 L32",
                block not in watch.found.key_of or watch.promised.get(block) == line.seq_id,
                f"sequence {line.seq_id} writes into {block}, which can be found",
            )
            watch.dense.write(table, position, line.values()[position])
        line.written += count

    def _plan(self) -> None:
        """Begin the next step, if the last one was executed."""
        watch = self.watch
        if not watch.executed:
            return
        watch.record()
        watch.call("begin_step")
        for block, at in watch.freed.items():
            if at.high == NEVER_ENDS:  # read until now, so later than what was freed beside it and was not: no tie
                watch.freed[block] = at._replace(high=watch.calls, call=-at.call)
        for line in watch.lines.values():
            line.copy = line.copied_at = None
        watch.swap_outs, watch.swap_ins, watch.made_copies, watch.given_up = [], [], [], set()
        watch.executed = False
        watch.guarded_before = set()
        watch.settle("begin_step")

    @precondition(lambda self: any(line.computed < line.written for line in self.watch.lines.values()))
    @rule(pick=PICK, count=st.sampled_from([1, 2, 5, 99, 99]))
    def mark(self, pick: int, count: int) -> None:
        """Report tokens as computed, now or late."""
        line = self._line(pick)
        if line is not None and (self.watch.executed or self.watch.ends_steps or line.copy is None):
            self._mark(line, max(0, min(count, line.written - line.computed)))

    @precondition(lambda self: self.watch.ends_steps and self._any())
    @rule(pick=PICK, count=st.sampled_from([1, 3, 99, 99]), choice=st.integers(0, 1), more=RUN)
    def promise(self, pick: int, count: int, choice: int, more: bool) -> None:
        """Report, while the step is planned, what it is to write: from then on its full blocks can be found."""
        self._plan()
        line = self._line(pick)
        if line is None:
            return
        if more and line.reserved == line.counted:
            self._append(line, count % 7)
        end = line.computed + min(count, line.reserved - line.computed)
        self._know(line, end, choice)
        self._mark(line, end - line.computed)

    def _mark(self, line: Line, count: int) -> None:
        watch, size = self.watch, self.watch.block_size
        first = line.computed // size
        watch.call("mark_computed", line.seq_id, line.tokens[line.computed : line.computed + count])
        if count and watch.planning and line.promised is None:
            line.promised = line.computed
        line.computed += count
        if count and line.copy is not None and not watch.planning:
            watch.made_copies.append(line.copy)
            line.copy = line.copied_at = None
        watch.settle(f"mark_computed({line.seq_id}, {count} tokens)", forgets=())
        if watch.prefix_caching and not line.released:
            table = watch.view.tables[line.seq_id]
            for end in range((first + 1) * size, line.computed + 1, size):
                found = watch.found.blocks_of.get((line.salt, tuple(line.tokens[:end])), [])
                said = f"full block {end // size - 1} of {line.seq_id} cannot be found"
                watch.hold("L21 L27 L65", bool(found), said)
                watch.hold("L66", table[end // size - 1] in found, f"{said}, though its content can")
