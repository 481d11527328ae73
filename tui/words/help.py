"""What ? shows: the screen in a few lines, then the keys of the pane that has the focus, then all keys."""

from __future__ import annotations

from minipaged.tui.palette import Glyphs

ABOUT = (
    "The memory that a model needs for each token it has read (its keys and values) is cut into blocks of equal size. Each sequence has a "
    "table: its 1st, 2nd, 3rd … block lies in any physical block. So nothing is reserved ahead and any free block will do (paging); two "
    "sequences may name the same block (sharing); and a block that several name is copied when one of them writes to it (copy-on-write).\n"
)

PANES: dict[str, str] = {
    "blocks": "1 Blocks: every block of the pool, in order of its number (left margin).",
    "tables": "2 Tables: each sequence's blocks, first to last: 2→31 reads: its block 2 is physical block 31.",
    "text": "3 Text: what each sequence says; its prompt is dimmed.",
    "timeline": "4 Timeline: how full the pool was at each step, and what happened. Click to go there.",
    "inspector": "5 Inspector: one block from near: who owns it, its text, its past.",
    "waste": "6 Waste: slots that hold no token, here and in other systems on the same traffic.",
    "tree": "7 Tree: which sequence was forked from which.",
    "trends": "8 Trends: who runs and waits, tokens a second, cache hits and waste, over the steps up to here.",
}

KEYS = """space     run, pause              ] [       one step on, one back
} {       next, previous event    / n N     find: cow, seq B, block 31
g G       start, newest           < >       slower, faster
+ - 0     zoom in, out, fit       arrows    move the cursor (or h j k l)
enter     inspect the block       w         why: go to the cause
f         dim all but one         z         one pane alone (escape: back)
1 … 8     go to a pane            a         add a prompt
b         bookmark here           x         abort the request under the cursor
t         a token's journey       c         compare with other systems
e         settings, pool size     L         lessons
B         branch: run again to here, then otherwise
R         run all again, with the pool size that was set
ctrl+p    all commands            ctrl+z    suspend (fg goes on)
q         quit
"""


def legend(glyphs: Glyphs) -> str:
    """Every glyph and its meaning."""
    rows = [
        (glyphs.free, "free"),
        (" ".join(glyphs.filling), "filling: the last block of a sequence"),
        ("A", "full, owned by sequence A"),
        ("2", "shared by two sequences (3 by three …)"),
        (glyphs.cached, "free, but its text is remembered: an equal prompt may use it"),
        (glyphs.copied, "copied in this very step, because its block was shared"),
        (glyphs.swapped, "moved to CPU memory"),
        (glyphs.null, "the null block: never used"),
    ]
    return "\n".join(f"{glyph:<7} {meaning}" for glyph, meaning in rows)


def help_text(focused: str, glyphs: Glyphs) -> str:
    """The whole help, the focused pane first."""
    here = PANES.get(focused)
    panes = "\n".join(([f"You are in {here}", ""] if here else []) + list(PANES.values()))
    return f"{ABOUT}\n{legend(glyphs)}\n\n{KEYS}\n{panes}\n"
