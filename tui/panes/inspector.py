"""The inspector: one block (or one sequence's token) from near: owners, count, fill, its tokens as text, its past."""

from __future__ import annotations

import textwrap
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from minipaged.text.safe import clean_bytes
from minipaged.trace.events import Event
from minipaged.trace.words import PAST, block_state, listing, plural
from minipaged.tui.panes.pane import Pane
from minipaged.tui.reading.history import Past
from minipaged.tui.view import Line, View
from minipaged.tui.words.cells import fit, rows_of, tail, to_ascii


class Inspector(Pane, can_focus=True):
    """A block from near. up and down choose a line of its past, enter goes there."""

    class Sought(Message):
        """A line of the past was chosen."""

        def __init__(self, position: int) -> None:
            super().__init__()
            self.position = position

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "choose(-1)", "earlier", show=False, id="inspector.up"),
        Binding("down,j", "choose(1)", "later", show=False, id="inspector.down"),
        Binding("enter", "seek", "go there", show=False, id="inspector.seek"),
    ]

    def __init__(self, view: View, *, id: str | None = None) -> None:
        super().__init__(view, id=id)
        self.chosen = -1  # counted from the newest: -1 is the newest

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """Facts, text, past."""
        facts = block_lines(view, width)
        return [*facts, *past_lines(view, width, height - len(facts), self.chosen if self.has_focus else 0)]

    def action_choose(self, by: int) -> None:
        """Another line of the past."""
        self.chosen = max(-len(self.view.past), min(-1, self.chosen + by))
        self.show(self.view)

    def action_seek(self) -> None:
        """Go to the chosen line."""
        if self.view.past and -len(self.view.past) <= self.chosen < 0:
            self.post_message(self.Sought(self.view.past[self.chosen].position))

    def on_focus(self, _: events.Focus) -> None:
        """Mark the chosen line."""
        self.show(self.view)

    def on_blur(self, _: events.Blur) -> None:
        """Unmark it."""
        self.show(self.view)


def block_lines(view: View, width: int) -> list[Line]:
    """What the block is now."""
    block, pool = view.inspected, view.snapshot.device
    if not 0 <= block < len(pool):
        return [[("move the cursor over the map,", "dim")], [("or click a block", "dim")]]
    size = view.snapshot.stats.block_size
    refs, fill, flags = int(pool.refs[block]), int(pool.fill[block]), int(pool.flags[block])
    lines: list[Line] = [
        [(f"block {block}", "strong"), (f"  ref {refs}  {fill}/{size} slots", "text")],
        *([(text, "dim")] for text in textwrap.wrap(block_state(refs, flags), max(10, width))),
    ]
    owners = view.snapshot.owners(block)
    if owners:
        line: Line = [("owner " if len(owners) == 1 else "owners ", "dim")]
        for sequence, index in owners[:6]:
            line += [(f"{view.letter(sequence)}", view.role(sequence)), (f"[{index}] ", "text")]
        if len(owners) > 6:
            line.append((f"and {len(owners) - 6} more", "dim"))
        lines += [line, *_text(view, owners[0], fill, width)]
    return lines


def _text(view: View, owner: tuple[int, int], fill: int, width: int) -> list[Line]:
    """The block's tokens as text where the trace tells it, else as ids."""
    sequence, index = owner
    state = view.snapshot.sequences.get(sequence)
    if state is None or not fill:
        return []
    size = view.snapshot.stats.block_size
    tokens = state.token_ids[index * size : index * size + fill]
    if all(token in view.token_bytes for token in tokens):
        text = "“" + clean_bytes(b"".join(view.token_bytes[token] for token in tokens)) + "”"
    else:
        text = "tokens " + " ".join(map(str, tokens))
    return [[(text[start:end], "text")] for start, end in rows_of(text, max(1, width))[:3]]


def past_lines(view: View, width: int, room: int, chosen: int) -> list[Line]:
    """The block's events, the newest last; `chosen` counts from the newest, 0 for none."""
    watching = view.block < 0 <= view.inspected
    if room < 2 or view.inspected < 0:
        return []
    if not view.past:
        return [[("newest event's; arrows: another" if watching else "nothing has happened to it yet", "faint")]]
    marked = len(view.past) + chosen if chosen else -1
    first = max(0, len(view.past) - (room - 1))
    if 0 <= marked < first:
        first = marked
    lines: list[Line] = [[("its past (enter goes there)" if chosen else "its past", "faint")]]
    for at in range(first, min(len(view.past), first + room - 1)):
        past = view.past[at]
        role = "mark" if at == marked else "strong" if past.position == view.position else "text"
        lines.append([(fit(f"{past.step:>4} {describe(view, past)}", width), role)])
    return lines


def describe(view: View, past: Past) -> str:
    """One event of a block in a few words."""
    event: Event = past.event
    who = view.letter(event.sequence)
    if event.kind == "copy":
        here = event.block == view.inspected
        return PAST["copy" if here else "copied"].format(who=who, block=event.other if here else event.block)
    return PAST.get(event.kind, event.kind).format(who=who)


def journey_lines(view: View, sequence: int, position: int, width: int) -> list[Line]:
    """A token's journey: position → logical block → physical block → slot → sharers → bytes read for it."""
    state = view.snapshot.sequences.get(sequence)
    if state is None or not 0 <= position < len(state.token_ids):
        return [[("no such token here", "dim")]]
    size = max(1, view.snapshot.stats.block_size)
    logical, slot = divmod(position, size)
    table = view.snapshot.tables.get(sequence, ())
    token = state.token_ids[position]
    text = clean_bytes(view.token_bytes.get(token, b""))
    name = view.letter(sequence)
    lines: list[Line] = [
        [
            ("token ", "dim"),
            (f"{position}", "strong"),
            (f" of {name}", view.role(sequence)),
            (f"  id {token} “{text}”", "text"),
        ],
        [(f"÷ {size} → logical block ", "dim"), (f"{logical}", "strong"), (", slot ", "dim"), (f"{slot}", "strong")],
    ]
    if logical >= len(table) or table[logical] == 0:
        return [*lines, [("no block holds it now", "dim")]]
    physical = table[logical]
    sharers = [view.letter(seq) for seq, _ in view.snapshot.owners(physical)]
    written = position < state.num_computed
    naming = f"{plural(len(sharers), 'table')} name{'s' if len(sharers) == 1 else ''} it"
    lines += [
        [(f"table of {name}[{logical}] → physical block ", "dim"), (f"{physical}", "strong")],
        [("slot number ", "dim"), (f"{physical} × {size} + {slot} = {physical * size + slot}", "strong")],
        [("its keys and values are ", "dim"), ("written" if written else "not written yet", "text")],
        [(fit(f"{'' if written else 'then '}read by {listing(sharers)} in every step ({naming})", width), "dim")],
    ]
    per_token = view.header.engine.get("kv_bytes_per_token")
    if isinstance(per_token, int):
        kept = view.header.engine.get("kv_cache_dtype")
        lines += [
            [(f"{per_token:,} bytes of keys and values{f' in {kept}' if kept else ''} over all layers", "dim")],
            [(f"its block takes {size} × that: {size * per_token:,} bytes", "dim")],
        ]
    return [[(to_ascii(text) if view.glyphs.ascii else text, role) for text, role in line] for line in lines]


class Journey(Pane):
    """One token's way from its position to its slot. left and right go along the text, up and down to another sequence."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "along(-1)", "token before", show=False, id="journey.left"),
        Binding("right,l", "along(1)", "next token", show=False, id="journey.right"),
        Binding("up,k", "sequence(-1)", "sequence before", show=False, id="journey.up"),
        Binding("down,j", "sequence(1)", "next sequence", show=False, id="journey.down"),
    ]

    def __init__(self, view: View, *, id: str | None = None) -> None:
        super().__init__(view, id=id)
        owners = view.snapshot.owners(view.block) if view.block > 0 else []
        alive = [state for state in view.snapshot.sequences.values() if state.alive] or list(
            view.snapshot.sequences.values()
        )
        self.sequence, index = owners[0] if owners else (alive[0].sequence if alive else -1, -1)
        size = max(1, view.snapshot.stats.block_size)
        state = view.snapshot.sequences.get(self.sequence)
        newest = len(state.token_ids) - 1 if state is not None else 0
        self.position = min(newest, (index + 1) * size - 1) if index >= 0 else newest

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """The words around the token, then its way."""
        return [
            *around_lines(view, self.sequence, self.position, width),
            [],
            *journey_lines(view, self.sequence, self.position, width),
        ]

    def action_along(self, by: int) -> None:
        """Another token."""
        state = self.view.snapshot.sequences.get(self.sequence)
        last = len(state.token_ids) - 1 if state is not None else 0
        self.position = max(0, min(last, self.position + by))
        self.show(self.view)

    def action_sequence(self, by: int) -> None:
        """Another sequence."""
        known = list(self.view.snapshot.sequences)
        if known:
            at = known.index(self.sequence) if self.sequence in known else 0
            self.sequence = known[(at + by) % len(known)]
            self.action_along(0)


def around_lines(view: View, sequence: int, position: int, width: int) -> list[Line]:
    """The token among its neighbours."""
    state = view.snapshot.sequences.get(sequence)
    if state is None or not view.token_bytes:
        return []

    def words(tokens: list[int]) -> str:
        return clean_bytes(b"".join(view.token_bytes.get(token, b"?") for token in tokens))

    token = words(state.token_ids[position : position + 1])
    room = max(4, (width - len(token)) // 2)
    before = tail(words(state.token_ids[max(0, position - 40) : position]), room)
    after = fit(words(state.token_ids[position + 1 : position + 40]), room)
    return [[(before, "dim"), (token or "∅", "mark"), (after, "dim")]]
