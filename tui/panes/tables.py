"""The tables pane: each sequence's logical -> physical list, and who runs, waits, is swapped."""

from __future__ import annotations

from minipaged.trace.snapshot import SequenceState
from minipaged.trace.words import plural
from minipaged.tui.panes.pane import ListPane
from minipaged.tui.view import Line, Run, View, shown, width_of


class TablesPane(ListPane):
    """Logical to physical, a line or more a sequence."""

    def count(self, view: View) -> int:
        """Sequences that have a table."""
        return len(holders(view))

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """The tables, then the queues at the bottom."""
        foot = queue_lines(view, width)
        room = max(0, height - len(foot))
        body = table_lines(view, width, room, self.first)
        blank: list[Line] = [[] for _ in range(max(0, room - len(body)))]
        return [*body[:room], *blank, *foot]


def holders(view: View) -> list[SequenceState]:
    """Living sequences that hold blocks, here or on the host, in order of appearance."""
    states = view.snapshot.sequences.values()
    return sorted((s for s in states if s.alive and s.status != "waiting"), key=lambda state: state.sequence)


def table_lines(view: View, width: int, room: int, first: int = 0) -> list[Line]:
    """A line a sequence, from the `first` on; more lines each when there is room for all."""
    states = holders(view)
    if not states:
        return [[("no sequence holds a block", "dim")]]
    states = states[min(first, len(states) - 1) :]
    each = max(1, room // max(1, len(states)))
    lines: list[Line] = []
    for at, state in enumerate(states):
        if len(lines) >= room - 1 and at < len(states) - 1:
            lines.append([(f"… and {len(states) - at} more", "dim")])
            break
        lines += sequence_lines(view, state, width, each)
    return lines


def sequence_lines(view: View, state: SequenceState, width: int, most: int) -> list[Line]:
    """`A 0→7 1→8 2→31▆`; entries that are shared stand in reverse, the block copied now carries its mark."""
    name: Run = (f"{view.letter(state.sequence)} ", view.role(state.sequence))
    snapshot = view.snapshot
    if state.status == "swapped":
        count = len(snapshot.host_tables.get(state.sequence, ()))
        return [[name, (f"{view.glyphs.swapped} on CPU: {plural(count, 'block')}", "dim")]]
    table = snapshot.tables.get(state.sequence, ())
    numbered = len(table) <= 6
    entries = [_entry(view, state, index, block, numbered=numbered) for index, block in enumerate(table)]
    was = _copied_from(view, state.sequence)
    if was is not None:
        entries.append([(f" was {was}", "strong")])
    return _wrap(name, entries, width, most)


def _entry(view: View, state: SequenceState, index: int, block: int, *, numbered: bool) -> Line:
    pool, size = view.snapshot.device, max(1, view.snapshot.stats.block_size)
    if block == 0:
        return [("∅" if not view.glyphs.ascii else "0", "faint"), (" ", "text")]
    refs, copied = int(pool.refs[block]), bool(pool.flags[block] & 4)
    line: Line = [(f"{index}→", "faint")] if numbered else []
    if copied:
        line.append((view.glyphs.copied, "copied"))
    role = (
        "mark"
        if block in view.flash
        else "select"
        if block == view.block
        else "copied"
        if copied
        else view.role(state.sequence, shared=refs > 1)
    )
    line.append((str(block), role))
    fill = state.num_computed - index * size
    if 0 <= fill < size:
        line.append((view.fill_glyph(fill) if fill else view.glyphs.free, view.role(state.sequence)))
    line.append((" ", "text"))
    return line


def _copied_from(view: View, sequence: int) -> int | None:
    events = view.delta.events if view.delta is not None else ()
    return next((event.block for event in events if event.kind == "copy" and event.sequence == sequence), None)


def _wrap(name: Run, entries: list[Line], width: int, most: int) -> list[Line]:
    """Entries on up to `most` lines; if they do not fit, the middle is left out, for the end is where things happen."""
    lines: list[Line] = [[name]]
    for entry in entries:
        if width_of(lines[-1]) + width_of(entry) > width + 1:
            lines.append([("  ", "text")])
        lines[-1] = [*lines[-1], *entry]
    if len(lines) <= most:
        return lines
    room = width - 2 - 2  # the name, the mark of the gap
    last: Line = []
    at = len(entries)
    while at > 0 and width_of(entries[at - 1]) + width_of(last) <= (room + 1 if most > 1 else room * 2 // 3):
        at -= 1
        last = [*entries[at], *last]
    gap: Line = [("… ", "faint")]
    if most > 1:
        return [*lines[: most - 1], [("  ", "text"), *gap, *last]]
    first: Line = []
    for entry in entries[:at]:
        if width_of(first) + width_of(entry) + width_of(last) > room + 1:
            break
        first = [*first, *entry]
    return [[name, *first, *gap, *last]]


def queue_lines(view: View, width: int) -> list[Line]:
    """`run A B C · wait E F` and, where there are any, `swapped D · preempted 1`."""
    queues, stats = view.snapshot.queues, view.snapshot.stats
    first: Line = [("run ", "dim"), *_letters(view, queues.running, width - 18)]
    waiting = max(len(queues.waiting), stats.num_waiting)
    if waiting:
        first += [(" · wait ", "dim"), *_letters(view, queues.waiting, 8)]
    lines: list[Line] = [first]
    second: Line = []
    if queues.swapped:
        second += [("swapped ", "dim"), *_letters(view, queues.swapped, 8)]
    for count, word in (
        (stats.preemptions, "preempted"),
        (stats.copies, "copies"),
        (stats.shared_saved_blocks, "saved"),
    ):
        entry: Run = (f"{' · ' if second else ''}{word} {count}", "dim")
        if count and width_of([*second, entry]) <= width:
            second.append(entry)
    if second:
        lines.append(second)
    return lines


def _arrow(view: View, move: str) -> str:
    """How it came into its queue: preempted ↓, swapped out ▽ and in △, started or forked again +."""
    arrows = {"preempt": "↓", "swap_out": view.glyphs.swapped, "swap_in": "△", "admit": "+", "rejoin": "+"}
    return shown(arrows.get(move, ""), view)


def _letters(view: View, sequences: tuple[int, ...], width: int) -> Line:
    if not sequences:
        return [("–", "faint")]
    most = max(1, width // 2)
    moved = sorted(sequences, key=lambda sequence: sequence not in view.moves)  # who has just come is always named
    named = sequences if len(sequences) <= most else tuple(moved[: max(1, most - 1)])
    line: Line = []
    for sequence in named:
        move = view.moves.get(sequence, "")
        line += [(_arrow(view, move) + view.letter(sequence), "mark" if move else view.role(sequence)), (" ", "text")]
    rest = len(sequences) - len(named)
    return [*line[:-1], *([(f" +{rest}", "dim")] if rest else [])]
