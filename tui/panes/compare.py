"""Compare: the real pool beside what other systems would hold on the same requests: accounting, not speed."""

from __future__ import annotations

from minipaged.memory.types import PoolBreakdown
from minipaged.trace.events import ShadowDelta
from minipaged.tui.panes.pane import Pane
from minipaged.tui.view import Line, Run, View, width_of
from minipaged.tui.words.cells import fit

WIDE = 130  # columns beside each other from here on
MARKS = {"reserved": "▒", "internal": "▓", "external": "/", "padding": "=", "idle": "·"}
LEGEND = "A tokens  ▒ reserved, unused  ▓ never used  / fragments  · idle"


class ComparePane(Pane):
    """A picture and a line of shares for each system."""

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """Beside each other where there is room, else below each other."""
        return compare_lines(view, width, height)


def compare_lines(view: View, width: int, height: int) -> list[Line]:
    """The systems, then the legend and what the numbers are."""
    foot: list[Line] = [[(fit(f"{LEGEND} · {_honesty(view)}", width), "dim")]]
    room = height - len(foot)
    names = [*view.shadows, "paged (real)"]
    if len(names) == 1:
        return [[("no other system has been followed here yet", "dim")]]
    if width >= WIDE:
        each = (width - 2 * (len(names) - 1)) // len(names)
        columns = [system_lines(view, name, each, room) for name in names]
        gap: Run = ("  ", "text")
        beside: list[Line] = []
        for row in zip(*columns, strict=True):
            line: Line = []
            for at, cell in enumerate(row):
                padding = (" " * max(0, each - width_of(cell)), "text")
                line += [*([gap] if at else []), *cell, padding]
            beside.append(line)
        return [*beside, *foot]
    rows = max(2, room // len(names))
    below = [line for name in names for line in system_lines(view, name, width, rows)]
    return [*below[:room], *foot]


def _honesty(view: View) -> str:
    return "accounting, not speed" + ("" if view.hindsight else "; max_tokens stands for the answer's length")


def system_lines(view: View, name: str, width: int, rows: int) -> list[Line]:
    """`rows` lines: name and shares first, the picture below."""
    shadow = view.shadows.get(name)
    breakdown = shadow.stats if shadow is not None else real_breakdown(view)
    running = _running(view, shadow)
    alive = sum(state.alive for state in view.snapshot.sequences.values())
    none = " · none fits" if alive and not running else ""
    head: Line = [(name, "strong"), (f" · runs {running} · waits {max(0, alive - running)}{none}", "dim")]
    shares = share_text(breakdown, real=shadow is None)
    short = shares.replace("fragments", "frag")
    beside = width - width_of(head) - 2
    fitting = next((text for text in (shares, short, short.partition(" idle")[0]) if len(text) <= beside), "")
    if fitting:
        lines: list[Line] = [[*head, ("  ", "text"), (fitting, "text")]]
    else:
        below: Line = [(fit(shares if len(shares) <= width else short, width), "text")]
        lines = [[(fit("".join(text for text, _ in head), width), "strong")], below]
    room = max(0, rows - len(lines))
    cells = shadow_cells(view, shadow, room * width) if shadow is not None else real_cells(view, room * width)
    for at in range(room):
        lines.append(_merge(cells[at * width : (at + 1) * width]))
    return lines[:rows] + [[] for _ in range(rows - len(lines))]


def _running(view: View, shadow: ShadowDelta | None) -> int:
    if shadow is None:
        return len(view.snapshot.queues.running)
    alive = {seq for seq, state in view.snapshot.sequences.items() if state.alive}
    return len({run.sequence for run in shadow.runs} & alive)


def share_text(breakdown: PoolBreakdown, *, real: bool = False) -> str:
    """`tokens 22% reserved 71% fragments 7%`, zeros left out."""
    total = max(1, sum(breakdown))
    named = (
        ("tokens", breakdown.token),
        ("reserved", breakdown.reserved),
        ("tail" if real else "never used", breakdown.internal),
        ("fragments", breakdown.external),
    )
    more = (("padding", breakdown.padding), ("idle", breakdown.idle))
    return " ".join(f"{name} {count / total:.0%}" for name, count in (*named, *more) if count or name == "tokens")


def real_breakdown(view: View) -> PoolBreakdown:
    """The engine's own pool in the same words: tails of last blocks are its only waste."""
    stats = view.snapshot.stats
    slots = max(0, stats.total_blocks - 1) * stats.block_size
    return PoolBreakdown(
        stats.token_slots, 0, stats.tail_slots, 0, 0, max(0, slots - stats.token_slots - stats.tail_slots)
    )


def shadow_cells(view: View, shadow: ShadowDelta, cells: int) -> list[Run]:
    """One cell for an equal share of the pool's slots: what most of them hold."""
    total = sum(shadow.stats)
    cells = min(cells, total)
    if not cells:
        return []
    weight: list[dict[tuple[str, int], int]] = [{} for _ in range(cells)]
    for run in shadow.runs:
        first, last = run.start * cells // total, (run.start + run.length - 1) * cells // total
        for cell in range(first, min(last, cells - 1) + 1):
            low, high = -(-cell * total // cells), -(-(cell + 1) * total // cells)
            overlap = min(high, run.start + run.length) - max(low, run.start)
            key = (run.kind, run.sequence)
            weight[cell][key] = weight[cell].get(key, 0) + max(1, overlap)
    return [_cell(view, max(found, key=found.__getitem__) if found else ("idle", -1)) for found in weight]


def _cell(view: View, key: tuple[str, int]) -> Run:
    kind, sequence = key
    if kind == "token":
        return view.letter(sequence), view.role(sequence)
    if kind in ("reserved", "internal") and sequence in view.snapshot.sequences:
        return MARKS[kind], view.role(sequence)
    return MARKS.get(kind, "·"), "free" if kind == "idle" else "dim"


def real_cells(view: View, cells: int) -> list[Run]:
    """The engine's pool at the same scale, block by block."""
    pool = view.snapshot.device
    blocks = len(pool) - 1
    cells = min(cells, blocks * view.snapshot.stats.block_size)
    if blocks < 1 or not cells:
        return []
    owners, refs = pool.owner.tolist(), pool.refs.tolist()
    made: list[Run] = []
    for cell in range(cells):
        first = 1 + cell * blocks // cells
        last = max(first + 1, 1 + (cell + 1) * blocks // cells)
        held = [owners[block] for block in range(first, min(last, blocks + 1)) if refs[block]]
        made.append((view.letter(held[0]), view.role(held[0])) if 2 * len(held) >= last - first else ("·", "free"))
    return made


def _merge(cells: list[Run]) -> Line:
    """Neighbours of one role become one run."""
    line: Line = []
    for text, role in cells:
        if line and line[-1][1] == role:
            line[-1] = (line[-1][0] + text, role)
        else:
            line.append((text, role))
    return line
