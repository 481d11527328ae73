"""The text pane: what each sequence says, the prompt dimmed, the newest words always in sight."""

from __future__ import annotations

from rich.cells import cell_len

from minipaged.text.safe import clean_bytes
from minipaged.trace.snapshot import SequenceState
from minipaged.trace.words import plural
from minipaged.tui.panes.pane import ListPane
from minipaged.tui.view import Line, View
from minipaged.tui.words.cells import fit, rows_of, tail

ENDS = {"finished": "✓", "aborted": "x", "refused": "!", "waiting": "…", "swapped": "▽"}


class TextPane(ListPane):
    """One sequence a line, or more where there is room."""

    def count(self, view: View) -> int:
        """Sequences there are."""
        return len(view.snapshot.sequences)

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """Living sequences, then the latest that ended."""
        states = ordered(view)
        states = states[min(self.first, max(0, len(states) - 1)) :]
        if not states:
            return [[("no text yet: a adds a prompt", "dim")]]
        states = states[: max(1, height)]
        each, more = divmod(max(1, height), len(states))
        lines: list[Line] = []
        for at, state in enumerate(states):  # the first ones, who live, get what is left over
            lines += text_lines(view, state, width, each + (at < more))
        return lines[:height]


def text_title(view: View) -> str:
    """`3 Text: 10 answers to 7 prompts`, where letters and prompts are not the same. Beams that were dropped answered nothing."""
    states = view.snapshot.sequences.values()
    prompts = len({state.request for state in states})
    what = "lines for" if any(state.finish_reason == "pruned" for state in states) else "answers to"
    return "3 Text" + (f": {len(states)} {what} {plural(prompts, 'prompt')}" if prompts < len(states) else "")


def ordered(view: View) -> list[SequenceState]:
    """By letter, so that lines do not jump; the dead go when the living need their lines."""
    states = list(view.snapshot.sequences.values())
    return sorted(states, key=lambda state: (not state.alive, state.sequence))


def text_lines(view: View, state: SequenceState, width: int, most: int) -> list[Line]:
    """The end of the text on up to `most` lines."""
    end = ENDS.get(state.status, " ")
    head = f"{view.letter(state.sequence)}{end}│"
    room = max(4, width - cell_len(head))
    end_of_prompt = state.prompt_bytes
    prompt, answer = clean_bytes(state.text[:end_of_prompt]), clean_bytes(state.text[end_of_prompt:])
    person = view.people.get(state.request)
    if person is None:
        rows = wrap_tail(prompt, answer, room, most)
    else:  # who asked stands before the text, or on a line of its own where there are several
        words = fit(person.words(state, view.snapshot.t_ns), room if most > 1 else 2 * room // 3) + " "
        asked: Line = [(words, "dim")]
        if most > 1:
            rows = [asked, *wrap_tail(prompt, answer, room, most - 1)]
        else:
            rows = [[*asked, *run] for run in wrap_tail(prompt, answer, max(4, room - cell_len(words)), 1)]
    if view.only not in (-1, state.sequence):
        rows = [[(text, "faint") for text, _ in row] for row in rows]
    lines: list[Line] = []
    for at, row in enumerate(rows or [[]]):
        start = (head[0], view.role(state.sequence)) if at == 0 else (" ", "text")
        lines.append([start, (end + "│" if at == 0 else " │", "faint"), *row])
    return lines


def wrap_tail(prompt: str, answer: str, width: int, most: int) -> list[Line]:
    """The last `most` rows of prompt and answer, broken between words; what is left out before shows as …."""
    if most == 1:
        return [_one_row(prompt, answer, width)]
    text, split = prompt + answer, len(prompt)
    need = width * most
    anchor = max(0, len(text) // need - 1) * need  # moves seldom, so that rows do not break anew with each word
    rows = rows_of(text, width, anchor)
    shown = rows[-most:]
    lines: list[Line] = []
    for start, end in shown:
        parts = ((text[start : min(end, split)], "dim"), (text[max(start, split) : end], "text"))
        lines.append([(part, role) for part, role in parts if part])
    if shown and shown[0][0] > 0:
        first, role = lines[0][0]
        lines[0][0] = ("…" + first[1:], role)
    return lines or [[]]


def _one_row(prompt: str, answer: str, width: int) -> Line:
    """The last `width` cells of both."""
    if cell_len(answer) >= width:
        return [(tail(answer, width), "text")]
    return [(tail(prompt, width - cell_len(answer)), "dim"), (answer, "text")]
