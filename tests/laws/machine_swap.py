"""The state machine's last part: swapping groups to the host and back, resetting the cache, and calls that must be refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.laws.machine import PICK, TAIL, StepMachine
from tests.laws.machine_share import SharingMachine
from tests.laws.model import Line

NAN = float("nan")
UNKNOWN = 999


class FullMachine(SharingMachine):
    """Everything that the contract allows, and much that it does not."""

    # ---- the host

    @precondition(StepMachine._any)
    @rule(picks=st.lists(PICK, min_size=1, max_size=3), as_they_are=st.booleans())
    def swap_out(self, picks: list[int], as_they_are: bool) -> None:
        """Victims leave together, their reserved room (or only their promises) given back first; refused for what this very step brings
        in, copies of it too, and for what it is to write."""
        self._plan()
        watch = self.watch
        lines = [line for line in watch.lines.values() if not line.swapped]
        lines = [line for line in lines if line.written] or lines
        if not lines:
            return
        group = list({lines[pick % len(lines)].seq_id: lines[pick % len(lines)] for pick in picks}.values())
        self._swap_out(group, as_they_are)

    def _swap_out(self, group: list[Line], as_they_are: bool) -> None:
        watch = self.watch
        ids = [line.seq_id for line in group]
        tables, withdrawn = {}, []
        for line in group:
            stays = as_they_are and line.promised is not None and line.copy is None
            if not stays and not self._truncate(line, line.written):
                return
            if line.promised is not None:
                withdrawn += watch.promised_by(line, line.promised)
                tables[line.seq_id] = watch.view.tables[line.seq_id][: self._blocks_for(line.promised)]
        if any(watch.view.counts[block] > 1 for block in withdrawn):
            watch.refused("L29", ValueError, "swap_out", ids)
            return
        tables |= {i: watch.view.tables[i] for i in ids if i not in tables}
        blocks = {b for table in tables.values() for b in table if b}
        arriving = blocks & ({device for _, device in watch.swap_ins} | watch.promised.keys() - set(withdrawn))
        least, most = watch.host_available()
        pairs = watch.call("swap_out", ids)
        said = f"swap_out({ids}) of {tables}"
        if pairs is None:
            short = len(blocks) > least or bool(arriving)
            watch.hold("L47 L48", short, f"{said} found no room on the host: {least} are free")
            watch.unchanged("L07", f"{said} found no room")
            return
        watch.hold("L16 L47", not arriving, f"{said} reads {arriving} before this step writes them")
        watch.hold("L47", len(blocks) <= most, f"{said} found room where {most} are free")
        home = dict(pairs)
        once = len(pairs) == len(home) == len(set(home.values())) and set(home) == blocks
        watch.hold("L47", once, f"{said} moves {pairs}")
        for line in group:
            if line.promised is not None:
                line.cut(line.promised)
            line.swapped = True
        busy = {host for _, host in watch.swap_outs} | {host for host, _ in watch.swap_ins}
        reused = busy & set(home.values())
        watch.hold("L16 L52", not reused, f"{said}: host blocks {reused} are in another swap of this step")
        watch.swap_outs.extend(pairs)
        before = watch.settle(said, forgets=withdrawn)
        for seq, table in tables.items():
            there = watch.view.host_tables[seq]
            kept = (
                all(home.get(b) == h for b, h in zip(table, there, strict=True) if b)
                if len(table) == len(there)
                else False
            )
            watch.hold("L47", kept, f"{said} moves {pairs}; {seq} has {table} -> {there}")
        others = {i: t for i, t in before.tables.items() if i not in ids}
        same = {i: t for i, t in watch.view.tables.items() if i not in ids} == others
        watch.hold("L47 L20", same, f"{said} changed another table")

    @precondition(lambda self: any(line.swapped for line in self.watch.lines.values()))
    @rule(picks=st.lists(PICK, min_size=1, max_size=3))
    def swap_in(self, picks: list[int]) -> None:
        """Some of them come back, together."""
        self._plan()
        watch = self.watch
        lines = [line for line in watch.lines.values() if line.swapped]
        group = list({lines[pick % len(lines)].seq_id: lines[pick % len(lines)] for pick in picks}.values())
        ids = [line.seq_id for line in group]
        tables = {i: watch.view.host_tables[i] for i in ids}
        blocks = {b for table in tables.values() for b in table if b >= 0}
        grown, copies = self._next_step(group, tables)
        least, most = watch.available()
        wet, dry = self._most_watermark(), self._least_watermark()
        pairs = watch.call("swap_in", ids)
        said = f"swap_in({ids}) of {tables}"
        if pairs is None:
            short = len(blocks) + grown + copies + wet > least
            watch.hold("L49", short, f"{said} found no room: {least} free, {grown} + {copies} for its next step")
            watch.unchanged("L07", f"{said} found no room")
            return
        needed = len(blocks) + grown + dry
        watch.hold(
            "L49", needed <= most, f"{said} needs {needed} with its next step and the watermark; {most} are free"
        )
        home = dict(pairs)
        once = len(pairs) == len(home) == len(set(home.values())) and set(home) == blocks
        watch.hold("L47", once, f"{said} moves {pairs}")
        for line in group:
            line.swapped = False
        watch.swap_ins.extend(pairs)
        watch.given_up.update(home.values())
        watch.settle(said, home.values())
        for seq, there in tables.items():
            table = watch.view.tables[seq]
            kept = (
                all(home.get(h) == b for h, b in zip(there, table, strict=True) if b)
                if len(table) == len(there)
                else False
            )
            watch.hold("L47", kept, f"{said} moves {pairs}; {seq} has {there} -> {table}")
            line = watch.lines[seq]
            full = table[: line.computed // watch.block_size] if watch.prefix_caching and not line.released else ()
            lost = [block for block in full if block not in watch.found.key_of]
            watch.hold("L66", not lost, f"{said}: {lost} hold full blocks of {seq}, and cannot be found")

    def _next_step(self, group: list[Line], tables: dict[int, tuple[int, ...]]) -> tuple[int, int]:
        """(blocks, copies) that one more token for each sequence takes."""
        size = self.watch.block_size
        entries = Counter(b for table in tables.values() for b in table)
        tails = Counter(tables[line.seq_id][-1] for line in group if line.reserved < len(tables[line.seq_id]) * size)
        grown = sum(line.reserved >= len(tables[line.seq_id]) * size for line in group)
        return grown, sum(n - (n == entries[b]) for b, n in tails.items())

    # ---- one step

    @precondition(lambda self: self.watch.ends_steps and len(self.watch.lines) < 7)
    @rule(
        stem=PICK,
        tail=TAIL,
        who=st.integers(0, 1),
        way=st.sampled_from(["stay", "free", "truncate", "swap_out", "swap_out as it is"]),
        keep=PICK,
    )
    def come_together(self, stem: int, tail: list[int], who: int, way: str, keep: int) -> None:
        """Two requests of one prefix in one step: the second counts on what the first is to write. Then one of them wants to leave."""
        self._plan()
        watch, tokens = self.watch, self.stems[stem % len(self.stems)] + tail or [0]
        pair = []
        for more in ([], [1]):
            seq = self.next_id
            self._allocate(tokens + more, None, 1, True)
            if seq not in watch.lines:
                return
            pair.append(watch.lines[seq])
            self._mark(pair[-1], pair[-1].reserved - pair[-1].computed)
        line = pair[who]
        if way == "free":
            self._free(line.seq_id)
        elif way == "truncate":
            self._truncate(line, keep % (line.reserved + 1))
        elif way != "stay":
            self._swap_out([line], way == "swap_out as it is")

    # ---- the cache

    @precondition(lambda self: bool(self.watch.found.key_of))
    @rule()
    def reset(self) -> None:
        """Forget all content, if nobody holds any."""
        watch = self.watch
        holds = self._held() or any(any(b >= 0 for b in table) for table in watch.view.host_tables.values())
        if watch.pins and not holds:
            return
        done = watch.call("reset_prefix_cache")
        watch.hold(
            "L34",
            done is not holds,
            f"reset_prefix_cache gave {done} with tables {watch.view.tables}, {watch.view.host_tables}",
        )
        if not done:
            watch.unchanged("L34", "the reset was refused")
            return
        watch.settle("reset_prefix_cache")
        watch.hold("L34", not watch.found.key_of, f"after a reset {watch.found.key_of} can be found")
        for stem in self.stems:
            watch.hold("L34", not stem or watch.call("match_prefix", stem) == 0, f"after a reset {stem} is found")

    # ---- what must be refused

    @rule(which=st.integers(0, 255), pick=PICK)
    def misuse(self, which: int, pick: int) -> None:
        """Each of these raises and changes nothing."""
        watch = self.watch
        line = self._line(pick)
        calls: list[tuple[Any, ...]] = [
            (KeyError, "free", UNKNOWN),
            (KeyError, "append", UNKNOWN, 1),
            (KeyError, "mark_computed", UNKNOWN, [1]),
            (KeyError, "truncate", UNKNOWN, 0),
            (KeyError, "fork", UNKNOWN, UNKNOWN + 1),
            (KeyError, "table", UNKNOWN),
            (KeyError, "swap_out", [UNKNOWN]),
            (KeyError, "swap_in", [UNKNOWN]),
            (ValueError, "pin", 0),
            (ValueError, "pin", watch.num_blocks),
            (ValueError, "pin", NAN),
            (ValueError, "can_admit", -1),
            (ValueError, "can_admit", NAN),
            (ValueError, "match_prefix", [1.5]),
            (ValueError, "match_prefix", [NAN]),
            (ValueError, "match_prefix", "tokens"),
            (ValueError, "allocate", -1, [1]),
            (ValueError, "allocate", True, [1]),
            (ValueError, "allocate", UNKNOWN, [1, -1]),
            (ValueError, "allocate", UNKNOWN, [1, None]),
            (ValueError, "ref_count", -1),
        ]
        empty = [b for b in range(1, watch.num_blocks) if not watch.view.counts[b] and b not in watch.found.key_of]
        calls += [(ValueError, "pin", empty[0]), (ValueError, "unpin", empty[0])] if empty else []
        swapped = self._line(pick, swapped=True)
        if swapped is not None:
            seq = swapped.seq_id
            calls += [
                (ValueError, "append", seq, 1),
                (ValueError, "swap_out", [seq]),
                (ValueError, "fork", seq, UNKNOWN),
            ]
        if line is not None:
            seq, over = line.seq_id, line.reserved - line.computed + 1
            calls += [
                (ValueError, "allocate", seq, [1]),
                (ValueError, "fork", seq, seq),
                (ValueError, "append", seq, -1),
                (ValueError, "append", seq, 1.0),
                (ValueError, "append", seq, NAN),
                (ValueError, "append", seq, True),
                (ValueError, "mark_computed", seq, [1] * over),
                (ValueError, "mark_computed", seq, [2**70]),
                (ValueError, "truncate", seq, line.reserved + 1),
                (ValueError, "truncate", seq, -1),
                (ValueError, "release", seq, [-1]),
                (ValueError, "swap_in", [seq]),
                (ValueError, "swap_out", [seq, seq]),
            ]
            if line.reserved > line.computed:
                calls.append((ValueError, "fork", seq, UNKNOWN))
        errors, name, *args = calls[which % len(calls)]
        watch.refused("L03 L07", errors, name, *args)
