"""The text pane: what each sequence says, the prompt dimmed, the newest words always in sight."""

from __future__ import annotations

from rich.cells import cell_len

from minipaged.trace.snapshot import SequenceState
from tui.pane import ListPane
from tui.safe import clean_bytes, tail
from tui.sentences import plural
from tui.view import Line, View

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
        each = max(1, height // len(states))
        lines: list[Line] = []
        for state in states[:height]:
            lines += text_lines(view, state, width, each)
        return lines[:height]


def text_title(view: View) -> str:
    """`3 Text: 10 answers to 7 prompts`, where letters and prompts are not the same."""
    states = view.snapshot.sequences.values()
    prompts = len({state.request for state in states})
    return "3 Text" + (f": {len(states)} answers to {plural(prompts, 'prompt')}" if prompts < len(states) else "")


def ordered(view: View) -> list[SequenceState]:
    """By letter, so that lines do not jump; the dead go when the living need their lines."""
    states = list(view.snapshot.sequences.values())
    return sorted(states, key=lambda state: (not state.alive, state.sequence))


def text_lines(view: View, state: SequenceState, width: int, most: int) -> list[Line]:
    """The end of the text on up to `most` lines."""
    end = ENDS.get(state.status, " ")
    head = f"{view.letter(state.sequence)}{end}│"
    room = max(4, width - cell_len(head))
    end_of_prompt = view.prompt_bytes(state)
    rows = wrap_tail(clean_bytes(state.text[:end_of_prompt]), clean_bytes(state.text[end_of_prompt:]), room, most)
    if view.only not in (-1, state.sequence):
        rows = [[(text, "faint") for text, _ in row] for row in rows]
    lines: list[Line] = []
    for at, row in enumerate(rows or [[]]):
        start = (head[0], view.role(state.sequence)) if at == 0 else (" ", "text")
        lines.append([start, (end + "│" if at == 0 else " │", "faint"), *row])
    return lines


def wrap_tail(prompt: str, answer: str, width: int, most: int) -> list[Line]:
    """The last `most` rows of prompt and answer, wrapped by cells; what is left out before shows as …."""
    if most == 1:
        return [_one_row(prompt, answer, width)]
    need = width * most
    answer_tail = answer[-need:]
    prompt_tail = prompt[-need:] if len(answer_tail) == len(answer) else ""
    rows: list[Line] = [[]]
    used = 0
    for text, role in ((prompt_tail, "dim"), (answer_tail, "text")):
        at = 0
        while at < len(text):
            end, cells = at, used
            while end < len(text) and (step := cell_len(text[end])) + cells <= width:
                cells += step
                end += 1
            if end > at:
                rows[-1].append((text[at:end], role))
            used, at = cells, end
            if at < len(text):
                rows.append([])
                used = 0
    hidden = len(rows) > most or len(prompt_tail) + len(answer_tail) < len(prompt) + len(answer)
    rows = rows[-most:]
    if hidden and rows[0]:
        text, role = rows[0][0]
        rows[0][0] = ("…" + text[1:], role)
    return rows


def _one_row(prompt: str, answer: str, width: int) -> Line:
    """The last `width` cells of both."""
    if cell_len(answer) >= width:
        return [(tail(answer, width), "text")]
    return [(tail(prompt, width - cell_len(answer)), "dim"), (answer, "text")]
