"""The lines at the top (where we are, what happens, how full the pool is), the legend under the map, and the keys at the bottom."""

from __future__ import annotations

import textwrap

from minipaged.trace.words import plural, sentence, summary
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
FULL = 0.95  # share of the pool in use from which on the gauge warns
GAUGE_WORDS = ("shared by several", "held by one", "free, cached", "free")
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
    """`‖ PAUSED · step 418 · 12 behind live · 10 steps/s      3 run · 2 wait · waste 3.1%`."""

    DEFAULT_CSS = "Header { height: 1; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """One line."""
        return [header_line(view, width)]


def header_line(view: View, width: int) -> Line:
    """Where we are, at the left; who runs, and how much is waste, at the right."""
    running = view.word in ("LIVE", "PLAYING")
    if view.caption:
        return spread([(" ", "text"), (view.word, "strong")], _figures(view, width), width)
    mark: Run = ("▶ " if running else "‖ ", "good" if running else "strong")
    words: Line = [(" ", "text"), mark, (f"BRANCH {view.word}" if view.branched else view.word, "strong")]
    replay = view.word in ("REPLAY", "PLAYING") or (view.word == "DONE" and view.hindsight)
    step = f" · step {view.snapshot.step}" if view.position else " · start"
    words.append((step + (f" · {view.position}/{view.length}" if replay else ""), "text"))
    # Each rank has its heads, or its layers, of every block that is shown.
    for name, short in (("tensor_parallel", "TP"), ("pipeline_parallel", "PP")):
        ranks = view.header.engine.get(name, 1)
        if isinstance(ranks, int) and ranks > 1:
            words.append((f" · {short} {ranks}", "text"))
    if view.position < view.length and not replay and view.word != "DONE":
        words.append((f" · {view.length - view.position} behind live", "alert"))
    if view.speed:
        words.append((f" · {view.speed}", "dim"))
    right = _figures(view, width)
    if width_of(words) + width_of(right) > width and view.speed and view.word != "TOUR":
        words = words[:-1]
    if width_of(words) + width_of(right) > width:
        right = []
    return spread(words, right, width)


def _figures(view: View, width: int) -> Line:
    stats, queues = view.snapshot.stats, view.snapshot.queues
    if stats.total_blocks < 2:
        return []
    waiting = max(len(queues.waiting), stats.num_waiting) + len(queues.swapped)
    right: Line = [(f"{len(queues.running)} run · {waiting} wait · waste {waste(view):.1%} ", "text")]
    if width >= 110:
        right.append((f"· {tokens_per_second(view)} ", "dim"))
    return right


class News(Pane, can_focus=False):
    """What happens, in the accent colour: it keeps its lines, so that nothing below moves with the length of a sentence."""

    DEFAULT_CSS = "News { height: 2; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """As many lines as there are."""
        return news_lines(view, width, height)


def news_lines(view: View, width: int, height: int) -> list[Line]:
    """What the program says, else what the step did: broken between words, and cut only where no line is left."""
    words = view.message or (summary(view, view.final) if view.word in ("IDLE", "DONE") else sentence(view))
    if view.word == "LOADING" and view.pending and not view.message:
        words = "the model loads: these prompts wait for it"
    room = max(10, width - 2)
    parts = words.split(" · ") if not view.message else [words]
    if len(parts) == 2 <= height and all(len(part) <= room for part in parts) and len(words) > room:
        rows = parts  # a line each
    else:
        rows = textwrap.wrap(words, room, max_lines=max(1, height), placeholder=" …")
    role = "alert" if view.message else "news"
    return [[(" ", "text"), (row, role)] for row in rows]


class Gauge(Pane, can_focus=False):
    """How the pool is used, over the whole width."""

    DEFAULT_CSS = "Gauge { height: 1; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """The bar, as high as there is room, and the words below it where there are two lines or more."""
        return gauge_lines(view, width, height)


def gauge_lines(view: View, width: int, height: int) -> list[Line]:
    """` 57% █████▓▓▓▓░░░░····  13/23 blocks`: shared, held by one, cached, free; with more lines, what they are in words."""
    stats, pool = view.snapshot.stats, view.snapshot.device
    usable = max(0, stats.total_blocks - 1)
    if not usable:
        return [[(" no pool yet", "faint")]]
    used = max(0, usable - stats.free_blocks)
    cached = min(stats.free_blocks, stats.cached_blocks)
    shared = min(used, len(pool.sharers))
    share = f"{used / usable:.{0 if used * 10 >= usable else 1}%}"
    full = "alert" if used >= FULL * usable else "strong"
    left, right = f" {share:>4} ", f" {used}/{usable} blocks "
    room = max(4, width - len(left) - len(right))
    edges = [round(room * count / usable) for count in (shared, used, used + cached, usable)]
    marks, roles = ("█", "▓", view.glyphs.cached, view.glyphs.free), ("gauge2", "gauge", "cached", "free")
    bar_line: Line = [
        (mark * (end - start), role)
        for mark, role, start, end in zip(marks, roles, (0, *edges), edges, strict=False)
        if end > start
    ]
    rows: list[Line] = [[(left, full), *bar_line, (right, full)]]
    if height >= 3:
        rows = [[(" " * len(left), "text"), *bar_line], *rows]
    if height >= 2:
        words: Line = [(" " * len(left), "text")]
        counts = (shared, used - shared, cached, stats.free_blocks - cached)
        for mark, role, count, word in zip(marks, roles, counts, GAUGE_WORDS, strict=True):
            words += [(mark, role), (f" {count} {word}   ", "dim")]
        if stats.shared_saved_blocks:
            words.append((f"sharing saves {plural(stats.shared_saved_blocks, 'block')} ", "good"))
        rows.append(words)
    return rows[:height] if height > 0 else rows


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


class Legend(Pane, can_focus=False):
    """What the glyphs mean: one line under the map, two where there is room."""

    DEFAULT_CSS = "Legend { height: 1; }"

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """As many entries as fit."""
        return legend_lines(view, width, height)


def legend_lines(view: View, width: int, height: int = 2) -> list[Line]:
    """`· free ▂▄▆ filling A full 2 shared` and `░ cached ◆ copied ▽ swapped`, or what stands for these from farther away."""
    g = view.glyphs
    free = (g.free, "free", "free")
    if view.zoom == Zoom.HEAT:
        first = [free, (g.heat[2] + g.heat[-4] + g.heat[-1], "hue0", "share in use")]
        second = [("", "dim", f"a cell: {plural(view.per_cell, 'block')}, its hue: who holds most")]
    elif view.zoom == Zoom.HALF:
        held, shared, cached = '"2c' if g.ascii else "▀²▘"
        first = [free, (held, "hue0", "held"), (shared, "hue0", "shared"), (cached, "cached", "cached")]
        second = [("", "dim", "half a cell is a block, in its owner's hue")]
    else:
        near = view.zoom >= Zoom.FOUR
        first = [
            free,
            ("".join(g.filling), "hue0", "filling"),
            ("A1", "hue0", "owner") if near else ("A", "hue0", "full"),
            ("A2", "shared0", "shared") if near else ("2", "shared0", "shared"),
        ]
        second = [
            (g.cached, "cached", "cached"),
            (g.copied, "copied", "copied"),
            (g.swapped, "dim", "swapped"),
            (g.null, "null", "null"),
        ]

    def line(entries: list[tuple[str, str, str]], gap: str) -> Line:
        made: Line = []
        for glyph, role, word in entries:
            entry: Line = [(glyph, role), (f"{' ' if glyph else ''}{word}{gap}", "dim")]
            if width_of(made) + width_of(entry) - len(gap) <= width:
                made += entry
        return made

    return [line(first, "  "), line(second, "  ")] if height > 1 else [line([*first, *second], " ")]


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
    done = [("␣", "play it again"), ("G", "the end"), *[pair for pair in IDLE_KEYS if pair[0] != "g ␣"]]
    done = [pair for pair in done if pair[0] not in LIVE_ONLY or not view.hindsight]
    keys = LESSON_KEYS if view.caption else IDLE_KEYS if view.word == "IDLE" else done if view.word == "DONE" else usual
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
    cached = view.snapshot.stats.host_cached
    text = f" {held} of {plural(len(pool), 'block')}" + (f", {cached} cached" if cached else "")
    room = width - 4 - len(text)
    line: Line = [("CPU ", "dim")]
    if len(pool) <= room:
        for owner, refs in zip(pool.owner.tolist(), pool.refs.tolist(), strict=True):
            line.append((view.glyphs.swapped, view.role(owner)) if refs else (view.glyphs.free, "free"))
    else:
        line.append((bar(held / len(pool), max(0, room)), "dim"))
    return [*line, (text, "dim")]
