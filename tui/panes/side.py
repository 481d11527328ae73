"""Waste on the same traffic, and the tree of forks: side panes on wide terminals, overlays on narrow ones."""

from __future__ import annotations

import math

from minipaged.memory.types import PoolBreakdown
from minipaged.text.safe import clean_bytes
from minipaged.trace.snapshot import SequenceState
from minipaged.trace.words import plural
from minipaged.tui.panes.pane import Pane
from minipaged.tui.view import Line, View, bar
from minipaged.tui.words.cells import fit, tail


class WastePane(Pane):
    """What share of its pool each system does not use for tokens, on the same arrivals and lengths."""

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """A bar a system."""
        return waste_lines(view, width)[: max(1, height)]


def waste_lines(view: View, width: int) -> list[Line]:
    """Shadow systems where the trace has them, then this engine's own blocks."""
    stats = view.snapshot.stats
    rows: list[tuple[str, float, str]] = []
    for name, shadow in view.shadows.items():
        rows.append((name, wasted(shadow.stats) if sum(shadow.stats) != shadow.stats.idle else math.nan, "dim"))
    slots = stats.token_slots + stats.tail_slots
    rows.append(("paged (real)" if rows else "paged", stats.tail_slots / slots if slots else 0.0, "hue2"))
    name_width = max(len(name) for name, _, _ in rows) + 1
    room = max(4, width - name_width - 6)
    anybody = any(state.alive for state in view.snapshot.sequences.values())
    lines: list[Line] = []
    for name, share, role in rows:
        lines.append(
            [
                (f"{fit(name, name_width - 1):<{name_width}}", "text"),
                (
                    bar(share, room)
                    if share == share
                    else fit("not one request fits" if anybody else "nobody is here", room).ljust(room),
                    role,
                ),
                (f"{share:>5.0%}" if share == share else "    –", "strong"),
            ]
        )
    if len(rows) > 1:
        lines.append([(fit("shadows: same requests; accounting, not speed", width), "faint")])
        return lines
    held = max(0, stats.total_blocks - 1 - stats.free_blocks)
    lines += [
        [(fit("slots in held blocks that hold no token:", width), "dim")],
        [(f"{stats.tail_slots} of {slots} slots in {held} blocks", "dim")],
    ]
    if stats.shared_saved_blocks:
        lines.append([(f"sharing saves {plural(stats.shared_saved_blocks, 'block')} now", "good")])
    if stats.queried_tokens:
        lines.append([(f"prefix cache: {stats.hit_tokens} of {stats.queried_tokens} prompt tokens found", "dim")])
    return [[(fit(text, width), role) for text, role in line] if len(line) == 1 else line for line in lines]


def wasted(breakdown: PoolBreakdown) -> float:
    """Share of the pool in use that holds no token: reserved, internal, external, padding."""
    lost = breakdown.reserved + breakdown.internal + breakdown.external + breakdown.padding
    return lost / (lost + breakdown.token) if lost + breakdown.token else 0.0


class TreePane(Pane):
    """Who was forked from whom."""

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """A line a sequence that has relatives."""
        return tree_lines(view, width, height)


def tree_lines(view: View, width: int, height: int) -> list[Line]:
    """`A─┬─B` as indented lines, with score and the last words."""
    children: dict[int, list[SequenceState]] = {}
    for state in view.snapshot.sequences.values():
        children.setdefault(state.parent, []).append(state)
    known = view.snapshot.sequences
    roots = [s for s in known.values() if s.parent not in known and s.sequence in children]
    lines: list[Line] = []

    def walk(state: SequenceState, lead: str, joint: str) -> None:
        mark = "" if state.alive else " x" if state.finish_reason in ("", "prune", "pruned", "abort") else " ✓"
        score = f" {state.score:.2f}" if state.score == state.score else ""
        head = f"{lead}{joint}"
        name = f"{view.letter(state.sequence)}{mark}{score} "
        words = tail(clean_bytes(state.text[state.prompt_bytes :][-4 * width :]), max(0, width - len(head) - len(name)))
        lines.append([(head, "faint"), (name, view.role(state.sequence)), (words, "dim")])
        below = sorted(children.get(state.sequence, []), key=lambda child: child.sequence)
        for at, child in enumerate(below):
            last = at == len(below) - 1
            step = "" if not joint else ("  " if joint.startswith("└") else "│ ")
            walk(child, lead + step, "└─" if last else "├─")

    for root in sorted(roots, key=lambda state: state.sequence):
        walk(root, "", "")
    if not lines:
        return [[(fit("no sequence has forked: add a prompt with n or beam above 1", width), "dim")]]
    return lines[:height]
