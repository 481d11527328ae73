"""The line at the top (where we are, how full, how much is waste), the legend under the map, and the keys at the bottom."""

from __future__ import annotations

import textwrap

from minipaged.trace.words import plural
from minipaged.tui.map.layout import Zoom
from minipaged.tui.panes.pane import Pane
from minipaged.tui.view import Line, Run, View, bar, spread, width_of

KEYS: tuple[tuple[str, str], ...] = (
    ("␣", "run"),
    ("[ ]", "step"),
    ("{ }", "event"),
    ("+-", "zoom"),
    ("⏎", "inspect"),
    ("a", "add"),
    ("c", "compare"),
    ("?", "help"),
)
IDLE_KEYS: tuple[tuple[str, str], ...] = (  # all is done: what next
    ("a", "add a prompt"),
    ("g ␣", "play it again"),
    ("L", "lessons"),
    ("c", "compare"),
    ("q", "quit"),
)
LESSON_KEYS: tuple[tuple[str, str], ...] = (
    ("␣", "on"),
    ("[", "back"),
    ("L", "lessons"),
    ("esc", "leave"),
)
LIVE_ONLY = frozenset({"a", "e"})  # keys that do nothing in a recording
MORE_KEYS: tuple[tuple[str, str], ...] = (
    ("q", "quit"),
    ("/", "find"),
    ("w", "why"),
    ("f", "focus one"),
    ("< >", "speed"),
    ("G", "newest"),
    ("e", "settings"),
    ("L", "lesson"),
)


class Header(Pane, can_focus=False):
    """`‖ step 418 · 12 behind live · 10 steps/s      471/512 blocks 92% · waste 3.1%`."""

    DEFAULT_CSS = "Header { height: 1; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """One line."""
        return [header_line(view, width)]


def header_line(view: View, width: int) -> Line:
    """Where we are, at the left; how full, at the right."""
    running = view.word in ("LIVE", "PLAYING")
    if view.caption:
        return spread([(" ", "text"), (view.word, "strong")], _fullness(view, width), width)
    mark: Run = ("▶ " if running else "‖ ", "good" if running else "strong")
    words: Line = [(" ", "text"), mark, (f"BRANCH {view.word}" if view.branched else view.word, "strong")]
    replay = view.word in ("REPLAY", "PLAYING")
    step = f" · step {view.snapshot.step}" if view.position else " · start"
    words.append((step + (f" · {view.position}/{view.length}" if replay else ""), "text"))
    # Each rank has its heads, or its layers, of every block that is shown.
    for name, short in (("tensor_parallel", "TP"), ("pipeline_parallel", "PP")):
        ranks = view.header.engine.get(name, 1)
        if isinstance(ranks, int) and ranks > 1:
            words.append((f" · {short} {ranks}", "text"))
    if view.position < view.length and not replay:
        words.append((f" · {view.length - view.position} behind live", "alert"))
    if view.speed:
        words.append((f" · {view.speed}", "dim"))
    right = _fullness(view, width)
    if width_of(words) + width_of(right) > width:
        words = words[:-1] if view.speed else words
    return spread(words, right, width)


def _fullness(view: View, width: int) -> Line:
    stats = view.snapshot.stats
    usable = max(0, stats.total_blocks - 1)
    used = usable - stats.free_blocks
    right: Line = []
    if usable:
        right = [
            (f"{used}/{usable} blocks {used / usable:.{0 if used * 10 >= usable else 1}%}", "text"),
            (f" · waste {waste(view):.1%} ", "text"),
        ]
        if width >= 110:
            right.append((f"· {tokens_per_second(view)} {sparkline(view, 8)} ", "dim"))
    return right


def waste(view: View) -> float:
    """Share of the slots in held blocks that hold no token: the tails of last blocks."""
    stats = view.snapshot.stats
    slots = stats.token_slots + stats.tail_slots
    return stats.tail_slots / slots if slots else 0.0


def tokens_per_second(view: View) -> str:
    """Tokens drawn in this step over the step's own time."""
    stats = view.snapshot.stats
    return (
        f"{stats.num_drawn / stats.elapsed_ns * 1e9:.0f} tok/s" if stats.elapsed_ns and stats.num_drawn else "– tok/s"
    )


def sparkline(view: View, width: int) -> str:
    """Occupancy of the last steps."""
    heat = view.glyphs.heat
    shares = view.occupied[max(0, view.position - width) : view.position]
    return "".join(heat[min(len(heat) - 1, int(share) * len(heat) // 10001)] for share in shares).rjust(width)


class Legend(Pane, can_focus=False):
    """What the glyphs mean: two lines under the map."""

    DEFAULT_CSS = "Legend { height: 2; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """As many entries as fit."""
        return legend_lines(view, width)


def legend_lines(view: View, width: int) -> list[Line]:
    """`· free ▂▄▆ filling A full 2 shared` and `░ cached ▽ swapped ◆ copied now`, or what stands for these from farther away."""
    g = view.glyphs
    free, cached = (g.free, "free", "free"), (g.cached, "cached", "cached")
    if view.zoom == Zoom.HEAT:
        first = [free, (g.heat[2] + g.heat[-4] + g.heat[-1], "hue0", "share in use")]
        second = [("", "dim", f"a cell: {plural(view.per_cell, 'block')}, its hue: who holds most")]
    elif view.zoom == Zoom.HALF:
        half = '"' if g.ascii else "▀"
        first = [free, (half, "hue0", "held"), (half, "shared0", "shared"), (half, "cached", "cached")]
        second = [("", "dim", "half a cell is a block, in its owner's hue")]
    else:
        near = view.zoom >= Zoom.FOUR
        first = [
            free,
            ("".join(g.filling), "hue0", "filling"),
            ("A1", "hue0", "owner") if near else ("A", "hue0", "full"),
            ("A2", "shared0", "shared") if near else ("2", "shared0", "shared by 2"),
        ]
        second = [
            cached,
            (g.swapped, "dim", "swapped"),
            (g.copied, "copied", "copied now"),
            (g.null, "null", "null"),
        ]

    def line(entries: list[tuple[str, str, str]]) -> Line:
        made: Line = []
        for glyph, role, word in entries:
            entry: Line = [(glyph, role), (f"{' ' if glyph else ''}{word}  ", "dim")]
            if width_of(made) + width_of(entry) - 2 <= width:
                made += entry
        return made

    return [line(first), line(second)]


class Keys(Pane, can_focus=False):
    """The keys, as many as fit."""

    DEFAULT_CSS = "Keys { height: 1; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """One line."""
        return [keys_line(view, width)]


def keys_line(view: View, width: int) -> Line:
    """`␣ run  [ ] step  …`."""
    ascii_names = {"␣": "space", "⏎": "enter"}

    def entry(key: str, word: str) -> Line:
        shown = " ".join(ascii_names.get(part, part) for part in key.split()) if view.glyphs.ascii else key
        word = "pause" if word == "run" and view.word in ("LIVE", "PLAYING") else word
        return [(shown, "strong"), (f" {word}  ", "dim")]

    line: Line = [(" ", "text")]
    last = entry(*KEYS[-1])
    usual = [*KEYS[:-1], *(MORE_KEYS if width > 100 else ())]
    if view.hindsight:  # a recording: what does nothing makes room for the lessons
        lessons = ("L", "lessons")
        usual = [*[pair for pair in KEYS[:-1] if pair[0] not in LIVE_ONLY], lessons]
        usual += [pair for pair in MORE_KEYS if pair[0] not in (*LIVE_ONLY, "L") and width > 100]
    keys = LESSON_KEYS if view.caption else IDLE_KEYS if view.word == "IDLE" else usual
    for key, word in keys:
        if width_of(line) + width_of(entry(key, word)) + width_of(last) <= width + 2:
            line += entry(key, word)
    return [*line, *last]


class Caption(Pane, can_focus=False):
    """A lesson's words, wrapped."""

    DEFAULT_CSS = "Caption { height: auto; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """As many lines as there are."""
        return caption_lines(view, width)[:height]


def caption_lines(view: View, width: int) -> list[Line]:
    """The caption, then how to go on."""
    role = "alert" if view.caption.endswith("?") or "press space" in view.caption else "strong"
    lines: list[Line] = [[(text, role)] for text in textwrap.wrap(view.caption, max(10, width))]
    return [*lines, [(view.message or "space: on · [ back · escape: leave the lesson", "dim")]]


class HostStrip(Pane, can_focus=False):
    """Swapped blocks: a line of CPU memory under the map."""

    DEFAULT_CSS = "HostStrip { height: 1; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """`CPU ▽▽▽▽············  4 of 16`."""
        return [host_line(view, width)]


def host_line(view: View, width: int) -> Line:
    """The host pool in one line: a cell a block where it fits, else a bar."""
    pool = view.snapshot.host
    held = int((pool.refs > 0).sum())
    text = f" {held} of {plural(len(pool), 'block')}"
    room = width - 4 - len(text)
    line: Line = [("CPU ", "dim")]
    if len(pool) <= room:
        for owner, refs in zip(pool.owner.tolist(), pool.refs.tolist(), strict=True):
            line.append((view.glyphs.swapped, view.role(owner)) if refs else (view.glyphs.free, "free"))
    else:
        line.append((bar(held / len(pool), max(0, room)), "dim"))
    return [*line, (text, "dim")]
