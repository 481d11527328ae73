"""The state machine's second part: sequences that share blocks, end, shrink, and are pinned."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.laws.machine import PICK, StepMachine
from tests.laws.model import Line


class SharingMachine(StepMachine):
    """Forks, ends, truncations, releases and pins."""

    def teardown(self) -> None:
        """Nothing that was held stays held."""
        if not hasattr(self, "watch") or self.watch.broken:
            return
        watch = self.watch
        if watch.planning:  # who promised something that others hold cannot leave before
            self._execute([0], False)
        for seq in list(watch.lines):
            self._free(seq)
        for block in list(watch.pins.elements()):
            watch.pins -= {block: 1}
            watch.call("unpin", block)
            watch.settle(f"unpin {block}")
        usage = watch.view.usage
        watch.hold("L53 L01", usage.free == usage.total - 1, f"all are gone, yet {usage}")
        watch.hold("L53 L47", usage.host_free == usage.host_total, f"all are gone, yet {usage}")

    # ---- sharing

    @precondition(lambda self: 0 < len(self.watch.lines) < 8)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        """A child, after all that was written is marked and the rest given back."""
        watch, parent = self.watch, self._line(pick)
        if parent is None:
            return
        if parent.reserved > parent.computed or parent.promised is not None:
            watch.refused("L12 L09 L29", ValueError, "fork", parent.seq_id, self.next_id)
        if watch.planning and (parent.computed != parent.written or parent.promised is not None):
            return  # what is marked while a step is planned is written by it, and a copy of that would come too early
        self._truncate(parent, parent.written)  # in the planning of a step this gives up its copy
        self._mark(parent, parent.written - parent.computed)
        child = self.next_id
        self.next_id += 1
        watch.call("fork", parent.seq_id, child)
        line = Line(
            child, parent.salt, list(parent.tokens), parent.reserved, parent.computed, parent.written, parent.seq_id
        )
        line.before_release = parent.before_release
        watch.lines[child] = line
        before = watch.settle(f"fork({parent.seq_id}, {child})", forgets=())
        table = watch.view.tables[child]
        watch.hold("L12", table == before.tables[parent.seq_id], f"the child's table {table} is not the parent's")
        watch.hold("L12", watch.view.usage.free == before.usage.free, f"a fork took blocks: {watch.view.usage}")
        grown = {b for b in range(watch.num_blocks) if watch.view.counts[b] != before.counts[b]}
        one_more = all(watch.view.counts[b] == before.counts[b] + 1 for b in grown)
        watch.hold(
            "L12 L02",
            one_more and grown == set(table) - {0},
            f"fork of {table}: counts {before.counts} -> {watch.view.counts}",
        )

    @precondition(StepMachine._any)
    @rule(pick=PICK, swapped=st.sampled_from([False, False, True]))
    def free(self, pick: int, swapped: bool) -> None:
        """A sequence ends, in whatever state it is."""
        line = self._line(pick, swapped=swapped)
        if line is not None:
            self._free(line.seq_id)

    def _free(self, seq: int) -> None:
        watch = self.watch
        line = watch.lines[seq]
        withdrawn = watch.promised_by(line, 0)
        if any(watch.view.counts[block] > 1 for block in withdrawn):
            watch.refused("L29", ValueError, "free", seq)
            return
        watch.call("free", seq)
        del watch.lines[seq]
        self._give_up(line)
        before = watch.settle(f"free({seq})", forgets=withdrawn)
        others = {i: table for i, table in before.tables.items() if i != seq}
        watch.hold(
            "L20",
            watch.view.tables == others,
            f"free({seq}) changed another table: {before.tables} -> {watch.view.tables}",
        )
        if watch.executed:
            watch.check_contents(f"free({seq})", "L20")
        watch.refused("L03", KeyError, "free", seq)

    def _give_up(self, line: Line) -> None:
        """Its copy of this step is not to be made; where it was made already, its source stays as it was."""
        watch = self.watch
        if line.copy is None:
            return
        if watch.executed:
            watch.made_copies.append(line.copy)
        else:
            watch.given_up.add(line.copy[0])
        watch.given_up.update(line.copy)
        line.copy = line.copied_at = None

    # ---- giving back

    @precondition(StepMachine._any)
    @rule(pick=PICK, keep=PICK, below=st.sampled_from([False, False, True]))
    def truncate(self, pick: int, keep: int, below: bool) -> None:
        """Room goes back, and sometimes computed tokens are rejected."""
        line = self._line(pick)
        if line is None:
            return
        least = 0 if below else line.counted
        self._truncate(line, least + keep % (line.reserved - least + 1))

    def _truncate(self, line: Line, n: int) -> bool:
        """Whether it could be done."""
        watch, size = self.watch, self.watch.block_size
        table = watch.view.tables[line.seq_id]
        if n % size and not table[n // size]:
            watch.refused("L56", ValueError, "truncate", line.seq_id, n)
            return False
        withdrawn = watch.promised_by(line, n)
        writer = watch.promised.get(table[n // size], line.seq_id) if n % size else line.seq_id
        found = writer != line.seq_id and line.reserved >= (n // size + 1) * size
        if found or any(watch.view.counts[block] > 1 for block in withdrawn):
            watch.refused("L29", ValueError, "truncate", line.seq_id, n)
            return False
        if line.copied_at is not None and n <= line.copied_at:
            self._give_up(line)
        watch.call("truncate", line.seq_id, n)
        line.cut(n)
        watch.settle(f"truncate({line.seq_id}, {n})", forgets=withdrawn)
        if watch.executed:
            watch.check_contents(f"truncate({line.seq_id}, {n})", "L14 L16 L20")
        return True

    @precondition(StepMachine._any)
    @rule(pick=PICK, which=st.lists(PICK, max_size=3))
    def release(self, pick: int, which: list[int]) -> None:
        """Some full entries become null, as behind a sliding window."""
        watch, line = self.watch, self._line(pick)
        if line is None:
            return
        full = (line.computed if line.promised is None else line.promised) // watch.block_size
        table = watch.view.tables[line.seq_id]
        if full < len(table):
            watch.refused("L56", ValueError, "release", line.seq_id, [full])
        chosen = [i % full for i in which] if full else []
        watch.call("release", line.seq_id, chosen)
        gone = {table[i] for i in chosen} - {0}
        if gone and not line.released:
            line.before_release = line.computed
        before = watch.settle(f"release({line.seq_id}, {chosen})")
        now = watch.view.tables[line.seq_id]
        expected = tuple(0 if i in chosen else b for i, b in enumerate(table))
        watch.hold("L56", now == expected, f"release({line.seq_id}, {chosen}): {table} -> {now}")
        once = all(watch.view.counts[b] == before.counts[b] - (b in gone) for b in range(watch.num_blocks))
        watch.hold("L56 L02", once, f"release of {gone}: counts {before.counts} -> {watch.view.counts}")

    @precondition(lambda self: self.watch.pins.total() < 3)
    @rule(pick=PICK)
    def pin(self, pick: int) -> None:
        """A block that holds something stays, whoever leaves."""
        watch = self.watch
        blocks = [b for b in range(1, watch.num_blocks) if watch.view.counts[b] or b in watch.found.key_of]
        if blocks:
            block = blocks[pick % len(blocks)]
            watch.call("pin", block)
            watch.pins[block] += 1
            watch.settle(f"pin({block})")

    @precondition(lambda self: bool(self.watch.pins))
    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        """And may go."""
        watch = self.watch
        block = sorted(watch.pins)[pick % len(watch.pins)]
        watch.call("unpin", block)
        watch.pins -= {block: 1}
        watch.settle(f"unpin({block})")
        if block not in watch.pins:
            watch.refused("L03", ValueError, "unpin", block)
