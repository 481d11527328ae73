"""What happened, in words: one sentence for a step, from its events and the state after it. And what sequences are called.

The terminal screen and the page in a browser say the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from minipaged.scheduling.runtime_settings import SettingChange
from minipaged.trace.events import FLAG_CACHED, FLAG_COPIED, FLAG_NULL, FLAG_PINNED, Event, Stats, StepDelta
from minipaged.trace.snapshot import Snapshot

Grouped = dict[str, list[Event]]
# The most telling first: what a newcomer should not miss.
ORDER = (
    "refuse",
    "preempt",
    "swap_out",
    "swap_in",
    "host_hit",
    "copy",
    "fork",
    "abort",
    "prune",
    "finish",
    "admit",
    "rejoin",
    "spill",
    "evict",
    "release",
    "knob",
    "alloc",
    "append",
)
TICKS = {
    "admit": "+",
    "copy": "c",
    "preempt": "p",
    "swap_out": "▽",
    "swap_in": "△",
    "finish": "✓",
    "fork": "f",
    "abort": "x",
    "refuse": "!",
    "evict": "e",
    "cache_hit": "h",
    "host_hit": "H",
    "spill": "s",
    "prune": "-",
    "release": "r",
    "knob": "k",
}
TICK_ORDER = (
    "refuse",
    "preempt",
    "swap_out",
    "swap_in",
    "copy",
    "fork",
    "abort",
    "prune",
    "finish",
    "host_hit",
    "cache_hit",
    "admit",
    "spill",
    "evict",
    "release",
    "knob",
)


# A block's past, an event at a time. copy: of the block that is left; copied: of the new one.
PAST = {
    "alloc": "taken by {who}",
    "free": "given back by {who}",
    "fork": "shared with {who}",
    "copy": "copied to {block} for {who}",
    "copied": "copied from {block} for {who}",
    "cache_hit": "found by {who} in the cache",
    "publish": "full: known to the cache",
    "evict": "forgotten by the cache",
    "swap_out": "swapped out ({who})",
    "swap_in": "swapped in ({who})",
    "release": "let go by {who}",
    "spill": "kept on in CPU memory",
    "host_hit": "back from CPU memory for {who}",
}

NUM_HUES = 7  # that a person can tell apart (tui/palette.py has them for a terminal)
NUM_LOOKS = 2 * NUM_HUES  # each hue plain, then each on a tint
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyzαβγδεζηθικλμνξοπρστυφχψω"


def letter(label: int) -> str:
    """The letter of a sequence's label; past the alphabet letters repeat."""
    return LETTERS[label % len(LETTERS)]


def other_looks(snapshot: Snapshot) -> dict[int, int]:
    """Sequence -> look, where the look of its label would not tell it from a living sibling.

    Up to seven living answers to one prompt have seven hues; up to fourteen have fourteen looks. Past that, looks repeat.
    """
    alive = [state for state in snapshot.sequences.values() if state.alive]
    if len({(state.request, state.label % NUM_HUES) for state in alive}) == len(alive):
        return {}  # as almost always
    taken: dict[int, set[int]] = {}
    others: dict[int, int] = {}
    for state in sorted(alive, key=lambda state: state.label):
        siblings = taken.setdefault(state.request, set())
        own = state.label % NUM_LOOKS
        hues = {look % NUM_HUES for look in siblings}
        around = [(own + step) % NUM_LOOKS for step in range(NUM_LOOKS)]
        look = next((look for look in around if look % NUM_HUES not in hues), None)
        if look is None:
            look = next((look for look in around if look not in siblings), own)
        if look != own:
            others[state.sequence] = look
        siblings.add(look)
    return others


def block_state(refs: int, flags: int) -> str:
    """What a block is, by its reference count and its flags."""
    if flags & FLAG_NULL:
        return "the null block: it pads tables, no token lives here"
    words = ["shared" if refs > 1 else "in use" if refs else "free"]
    if flags & FLAG_CACHED:
        words.append("known to the prefix cache" if refs else "still cached: a prefix may find it")
    if flags & FLAG_PINNED:
        words.append("pinned")
    if flags & FLAG_COPIED:
        words.append("copied in this step")
    return ", ".join(words)


class Moment(Protocol):
    """One moment of a trace, as whoever shows it has it."""

    @property
    def snapshot(self) -> Snapshot:
        """The state."""
        ...

    @property
    def delta(self) -> StepDelta | None:
        """What led there; None at the start."""
        ...

    @property
    def word(self) -> str:
        """LIVE while the engine runs."""
        ...

    def letter(self, sequence: int) -> str:
        """A sequence's letter; ? once it is forgotten."""
        ...


def plural(count: int, noun: str) -> str:
    """1 block, 2 blocks."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listing(items: list[str], most: int = 4) -> str:
    """a, b, c and 5 more."""
    items = list(dict.fromkeys(items))
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def sentences(view: Moment) -> list[str]:
    """A sentence for each of the two most telling kinds of thing that happened in the step that led here, in their order."""
    if view.delta is None:
        return []
    grouped: Grouped = defaultdict(list)
    for event in view.delta.events:
        if event.kind == "fork" and event.other < 0:
            continue  # a copy that was given up: its source stands in the table again
        grouped[event.kind].append(event)
    found = [(kind, _TELL[kind](view, grouped)) for kind in ORDER if grouped.get(kind)]
    telling = [(kind, text) for kind, text in found if text]
    if len(telling) > 1:  # plain writing goes without saying where more happened
        telling = [(kind, text) for kind, text in telling if kind != "append"]
    return [text for _, text in sorted(telling[:2], key=lambda pair: grouped[pair[0]][0].id)]


def sentence(view: Moment) -> str:
    """The step in one line."""
    found = sentences(view)
    if not found:
        if view.delta is not None:
            return "nothing changed in this step"
        return (
            "the model reads the prompts: its first step is under way"
            if view.word == "LIVE"
            else "the start: every block is free"
        )
    return " · ".join(found)


def summary(view: Moment, final: Stats | None = None) -> str:
    """What a run has come to, once nothing is left to do. final: its last figures, where a moment before is shown."""
    stats = final or view.snapshot.stats
    if not stats.generated_tokens:
        return sentence(view)
    shown = [f"this is step {view.snapshot.step}, its fullest"] if final is not None else []
    return " · ".join([f"done: {plural(stats.generated_tokens, 'token')}", *counted(stats), *shown])


def counted(stats: Stats) -> list[str]:
    """What happened to the blocks of a run so far, as far as it did."""
    found = (
        (stats.copies, f"{plural(stats.copies, 'block')} copied on write"),
        (stats.hit_tokens, f"{plural(stats.hit_tokens, 'token')} found cached"),
        (stats.host_hit_tokens, f"{plural(stats.host_hit_tokens, 'token')} back from CPU memory"),
        (stats.preemptions, f"{stats.preemptions} preempted"),
    )
    return [words for count, words in found if count]


def _names(view: Moment, events: list[Event]) -> str:
    return listing([view.letter(event.sequence) for event in events])


def _copy(view: Moment, grouped: Grouped) -> str:
    event = grouped["copy"][0]
    table = view.snapshot.tables.get(event.sequence, ())
    shared = [
        str(block)
        for block in table
        if block != event.other and 0 <= block < len(view.snapshot.device) and view.snapshot.device.refs[block] > 1
    ]
    more = (
        f"; {'block' if len(shared) == 1 else 'blocks'} {listing(shared)} stay{'s' if len(shared) == 1 else ''} shared"
        if shared
        else ""
    )
    others = len(grouped["copy"]) - 1
    return f"{view.letter(event.sequence)} writes shared block {event.block} → copied to {event.other}{more}" + (
        f" (and {plural(others, 'more copy').replace('copys', 'copies')})" if others else ""
    )


def _fork(view: Moment, grouped: Grouped) -> str:
    events = grouped["fork"]
    children = list(dict.fromkeys(event.sequence for event in events))
    parent = next(
        (view.snapshot.sequences[c].parent for c in children if c in view.snapshot.sequences), events[0].other
    )
    table = view.snapshot.tables.get(children[0], ())
    verb = "fork" if len(children) > 1 else "forks"
    names = listing([view.letter(child) for child in children])
    return f"{names} {verb} from {view.letter(parent)}: the same {plural(len(table), 'block')}, no memory copied"


def _admit(view: Moment, grouped: Grouped) -> str:
    back = {event.sequence for event in grouped.get("swap_in", [])}
    admitted = [event for event in grouped["admit"] if event.sequence not in back]
    if not admitted:
        return ""
    sequence = admitted[0].sequence
    state = view.snapshot.sequences.get(sequence)
    table = view.snapshot.tables.get(sequence, ())
    hits = [event for event in grouped.get("cache_hit", []) if event.sequence == sequence]
    names = _names(view, admitted)
    if len(admitted) > 1:
        found = len(grouped.get("cache_hit", []))
        return f"{names} start" + (f"; {plural(found, 'block')} found in the prefix cache" if found else "")
    again = state is not None and len(state.token_ids) > state.num_prompt + 1
    length = state.num_computed if state is not None else 0
    text = f"{names} starts{' again' if again else ''}: {plural(len(table), 'block')} for {plural(length, 'token')}"
    return text + (f"; {plural(len(hits), 'block')} found in the prefix cache, not computed again" if hits else "")


def _rejoin(view: Moment, grouped: Grouped) -> str:
    forked = {event.sequence for event in grouped.get("fork", [])}  # those are told of as forks
    again = [event for event in grouped["rejoin"] if event.sequence not in forked]
    if not again:
        return ""
    hits = {event.block for event in grouped.get("cache_hit", []) if event.sequence in {e.sequence for e in again}}
    verb = "run" if len(again) > 1 else "runs"
    return f"{_names(view, again)} {verb} again; {plural(len(hits), 'block')} found in the prefix cache"


def _preempt(view: Moment, grouped: Grouped) -> str:
    if grouped.get("swap_out"):
        return ""
    verb = "give their" if len({event.sequence for event in grouped["preempt"]}) > 1 else "gives its"
    return f"the pool is full: {_names(view, grouped['preempt'])} {verb} blocks back and will recompute later"


def _swap(word: str) -> Callable[[Moment, Grouped], str]:
    kind, verb, way = (
        ("swap_out", "move", "to CPU memory") if word == "out" else ("swap_in", "come", "back from CPU memory")
    )

    def tell(view: Moment, grouped: Grouped) -> str:
        s = "" if len({event.sequence for event in grouped[kind]}) > 1 else "s"
        return f"{_names(view, grouped[kind])} {verb}{s} {way}: {plural(len(grouped[kind]), 'block')}"

    return tell


def _finish(view: Moment, grouped: Grouped) -> str:
    event = grouped["finish"][0]
    state = view.snapshot.sequences.get(event.sequence)
    freed = sum(1 for free in grouped.get("free", []) if free.sequence in {e.sequence for e in grouped["finish"]})
    reason = {"stop": "it said stop", "length": "length reached"}.get(state.finish_reason if state else "", "")
    names = _names(view, grouped["finish"])
    if len(grouped["finish"]) > 1:
        return f"{names} are done; {plural(freed, 'block')} given back"
    return (
        f"{names} is done"
        + (f" ({reason})" if reason else "")
        + (f"; {plural(freed, 'block')} given back" if freed else "")
    )


def _blocks(kind: str, text: str) -> Callable[[Moment, Grouped], str]:
    def tell(view: Moment, grouped: Grouped) -> str:
        blocks = listing([str(event.block) for event in grouped[kind] if event.block >= 0])
        noun = "block" if len({event.block for event in grouped[kind]}) == 1 else "blocks"
        return text.format(names=_names(view, grouped[kind]), noun=noun, blocks=blocks)

    return tell


def _prune(view: Moment, grouped: Grouped) -> str:
    names = _names(view, grouped["prune"])
    if len(grouped["prune"]) == 1:
        return f"beam {names} is dropped; what only it held is free again"
    return f"beams {names} are dropped; what only they held is free again"


def _alloc(view: Moment, grouped: Grouped) -> str:
    started = {event.sequence for event in grouped.get("admit", [])}
    events = [event for event in grouped["alloc"] if event.sequence not in started]
    if not events:
        return ""
    blocks = listing([str(event.block) for event in events])
    noun = "block" if len(events) == 1 else "blocks"
    verb = "takes" if len({event.sequence for event in events}) == 1 else "take"
    return f"{_names(view, events)} {verb} {noun} {blocks} for more tokens"


def _append(view: Moment, grouped: Grouped) -> str:
    tokens = sum(event.amount for event in grouped["append"])
    names = _names(view, grouped["append"])
    if len({event.sequence for event in grouped["append"]}) == 1:
        return f"{names} writes {plural(tokens, 'token')} into its last block"
    return f"{names} write {plural(tokens, 'token')} into their last blocks"


_TELL: dict[str, Callable[[Moment, Grouped], str]] = {
    "refuse": lambda view, grouped: f"{_names(view, grouped['refuse'])} refused: it can never fit",
    "preempt": _preempt,
    "swap_out": _swap("out"),
    "swap_in": _swap("in"),
    "host_hit": _blocks("host_hit", "{names} gets {noun} {blocks} back from the cache in CPU memory"),
    "spill": _blocks("spill", "cached {noun} {blocks} goes on in CPU memory: the room is needed"),
    "copy": _copy,
    "fork": _fork,
    "abort": lambda view, grouped: f"{_names(view, grouped['abort'])} aborted",
    "prune": _prune,
    "finish": _finish,
    "admit": _admit,
    "rejoin": _rejoin,
    "evict": _blocks("evict", "cached {noun} {blocks} forgotten: the room is needed"),
    "release": _blocks("release", "{names} lets go of {noun} {blocks}"),
    "knob": lambda view, grouped: (
        "from here on " + listing([SettingChange(e.other, e.amount).words for e in grouped["knob"]])
    ),
    "alloc": _alloc,
    "append": _append,
}
